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
//! * A certificate that has expired reaches its own renewal only, and only within the grace.
//! * A revoked certificate is good for nothing, and a session that began with it ends at once.
//! * A certificate whose successor was used renews nothing any more.

mod approval;
mod audit;
mod authority;
mod clients;
mod enrolment;
mod keys;
mod ledger;
mod renewal;
mod revocation;
pub mod rotation;
mod standing;
pub mod tokens;

pub use approval::{ApproveError, approve};
pub use audit::{Audit, Matter, SiteEvents};
pub use authority::{Authority, AuthorityError, CA_SECRET, InvalidPeer, Issued, LEAF_LIFE, Names, SitePeer};
pub(crate) use authority::{read_request, sample_request};
pub use enrolment::EnrolmentService;
pub use ledger::{CertificateRecord, Ledger, Page, SiteLedger};
pub use renewal::Renewals;
pub use revocation::{RevokeError, Revoked, revoke};
pub use standing::{GRACE, OutOfTime, Standing, current, renewable, standing};
