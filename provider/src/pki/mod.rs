//! The site CA: who may speak on the link, and as whom.
//!
//! In: join tokens, certificate requests. Out: certificates with SPIFFE IDs, TLS settings of both listeners.
//!
//! What must always hold:
//! * The CA's key lives in the Secret [`CA_SECRET`] and in this process, nowhere else; a site's key never leaves the
//!   site.
//! * A certificate names exactly one site, the one whose token or certificate was presented.
//! * A token works once: it is deleted before the certificate leaves the provider.

mod authority;
mod enrolment;
pub mod tokens;

pub use authority::{Authority, AuthorityError, CA_SECRET, Issued, Names};
pub use enrolment::{EnrolmentService, renew};
