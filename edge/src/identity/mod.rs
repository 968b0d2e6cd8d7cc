//! Who this site is: its key, its certificate, and whom it trusts.
//!
//! In: a join token, once; renewals over the link, which also prove the time to a machine whose clock is wrong. Out: TLS settings for the link. The key is made here and never
//! leaves: `<data-dir>/identity/` (mode 0700) holds `identity.pem` (key and certificate), `roots.pem` and
//! `identity.json`.
//!
//! What must always hold:
//! * The provider is recognised by its SPIFFE ID under the roots, never by its address.
//! * A session is begun only with a provider whose certificate is in its time, by a clock that is not in doubt (`time`).
//! * Key and certificate change together: both stand in one file, `identity.pem`, which is replaced atomically.

mod dial;
mod files;
mod join;
mod proxy;
mod reach;
mod renew;
#[cfg(test)]
pub(crate) mod testing;
mod time;
mod tls;

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use skerry_proto::{SiteName, SpiffeId, TrustDomain};

pub use dial::Dialer;
pub(crate) use files::any_files;
pub(crate) use join::check as check_answer;
pub use join::{JoinError, JoinOptions, join};
pub(crate) use proxy::any_answer as any_proxy_answer;
pub use proxy::{Proxy, ProxyRules};
pub use renew::Renewer;
pub use time::{Doubt, TrustedTime};

/// Why the identity cannot be used. Exit code 2 before joining, 4 when the files are damaged.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The site has not joined yet.
    #[error(
        "this machine has not joined a provider yet (no {0}); run: skerry-edge join --provider HOST:PORT --token TOKEN"
    )]
    NotJoined(PathBuf),
    /// A file is damaged.
    #[error(
        "{file} cannot be used: {reason}; join again with a new token: skerry-edge join --provider HOST:PORT --token TOKEN"
    )]
    Damaged {
        /// Which.
        file: PathBuf,
        /// Why.
        reason: String,
    },
    /// Others can read the private key.
    #[error(
        "{file} holds the private key and is open to other users (mode {mode:03o}); if nobody can have copied it: chmod 600 {file}, else join again with a new token and --force"
    )]
    Exposed {
        /// Which.
        file: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file system refuses.
    #[error("{file}: {source}")]
    Io {
        /// Which.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The site's identity, loaded and checked.
#[derive(Debug)]
pub struct Identity {
    /// The site.
    pub site: SiteName,
    /// The trust domain that the provider must be of.
    pub trust_domain: TrustDomain,
    /// Where the provider was reached when joining, `host:port`.
    pub provider: String,
    /// The certificate chain, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key.
    pub key: PrivateKeyDer<'static>,
    /// Whom to trust.
    pub roots: Vec<CertificateDer<'static>>,
    /// Validity of the leaf.
    pub not_before: Timestamp,
    /// End of validity of the leaf.
    pub not_after: Timestamp,
}

impl Identity {
    /// Reads the identity of a data directory and checks that its parts fit together.
    pub fn load(data_dir: &Path) -> Result<Self, IdentityError> {
        files::load(data_dir)
    }

    /// The site's SPIFFE ID.
    pub fn spiffe_id(&self) -> SpiffeId {
        SpiffeId::Site(self.trust_domain.clone(), self.site.clone())
    }
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self {
            site: self.site.clone(),
            trust_domain: self.trust_domain.clone(),
            provider: self.provider.clone(),
            chain: self.chain.clone(),
            key: self.key.clone_key(),
            roots: self.roots.clone(),
            not_before: self.not_before,
            not_after: self.not_after,
        }
    }
}
