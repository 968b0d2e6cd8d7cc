//! The site CA: who may speak on the link, and as whom.
//!
//! In: join tokens, certificate requests. Out: certificates with SPIFFE IDs, TLS settings of both listeners.
//!
//! What must always hold:
//! * The CA's key lives in the Secret [`CA_SECRET`] and in this process, nowhere else; a site's key never leaves the
//!   site.
//! * A certificate names exactly one site, the one whose token or certificate was presented, and that Site's UID: a Site
//!   that is deleted and made anew under the same name accepts neither the old certificate nor an old token.
//! * A token works once: it is deleted before the certificate leaves the provider.

mod authority;
mod enrolment;
pub mod tokens;

pub use authority::{Authority, AuthorityError, CA_SECRET, InvalidPeer, Issued, Names, SitePeer};
pub(crate) use authority::{read_request, sample_request};
pub use enrolment::{EnrolmentService, renew};
