//! Enrolment: a single-use token for a certificate.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair};
use sha2::{Digest, Sha256};
use skerry_proto::link::enrolment_client::EnrolmentClient;
use skerry_proto::link::{JoinRequest, JoinResponse};
use skerry_proto::token::{InvalidToken, JoinToken, hex};
use skerry_proto::{SiteName, SpiffeId};

use super::{Identity, IdentityError, dial, files, tls};

const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Pause before a machine that waits for its approval asks again.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// What `skerry-edge join` was told.
#[derive(Clone, Debug)]
pub struct JoinOptions {
    /// `host:port` of the provider's link.
    pub provider: String,
    /// Through which proxy.
    pub proxies: super::ProxyRules,
    /// The printed token.
    pub token: String,
    /// Where the identity is kept.
    pub data_dir: PathBuf,
    /// Replace an identity that exists.
    pub force: bool,
    /// Told once, with the Site and this machine's key, when a person must approve it first.
    pub waits: fn(&SiteName, &str),
}

/// Why a site could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The token is no token. Exit code 2.
    #[error(transparent)]
    Token(#[from] InvalidToken),
    /// The address is no address. Exit code 2.
    #[error("{0}")]
    Address(String),
    /// The machine has an identity already. Exit code 2.
    #[error("this machine is already site {site} (identity in {dir}); use --force to replace its identity")]
    Joined {
        /// As whom.
        site: SiteName,
        /// Where.
        dir: PathBuf,
    },
    /// The provider is not there. Exit code 1.
    #[error("{0}")]
    Unreachable(String),
    /// The provider refuses. Exit code 3.
    #[error("the provider refuses: {0}")]
    Refused(String),
    /// The provider's answer makes no sense. Exit code 1.
    #[error("the provider's answer cannot be used: {0}")]
    Answer(String),
    /// The identity could not be written. Exit code 4.
    #[error(transparent)]
    Files(#[from] IdentityError),
}

/// Makes a key, asks the provider for a certificate, and writes the identity. Answers as whom.
pub async fn join(options: &JoinOptions) -> Result<SiteName, JoinError> {
    let token: JoinToken = options.token.parse()?;
    let provider = dial::address(&options.provider).map_err(JoinError::Address)?;
    if !options.force {
        vacant(&options.data_dir)?;
    }
    files::prepare(&options.data_dir)?;
    let (key, csr_der) = new_key().map_err(JoinError::Answer)?;
    let config = tls::joining(&token.pin).map_err(|e| JoinError::Answer(e.to_string()))?;
    let request = JoinRequest {
        site: token.site.to_string(),
        token: options.token.trim().to_owned(),
        csr_der,
    };
    let config = Arc::new(config);
    let own = public_key(&key);
    let mut told = false;
    let answer = loop {
        let answer = ask(&provider, &options.proxies, Arc::clone(&config), request.clone()).await?;
        if answer.waiting_key.is_empty() {
            break answer;
        }
        if answer.waiting_key != own {
            return Err(JoinError::Answer("it is about another machine's key".to_owned()));
        }
        if !told {
            (options.waits)(&token.site, &own);
            told = true;
        }
        tokio::time::sleep(ASK_AGAIN).await;
    };
    check(&answer, &token.site).map_err(JoinError::Answer)?;
    save(&options.data_dir, &token.site, &provider, &key, &answer)?;
    Ok(token.site)
}

/// One request for a certificate.
async fn ask(
    provider: &str,
    proxies: &super::ProxyRules,
    config: Arc<rustls::ClientConfig>,
    request: JoinRequest,
) -> Result<JoinResponse, JoinError> {
    let (channel, _) = dial::connect(provider, proxies, config)
        .await
        .map_err(JoinError::Unreachable)?;
    let answer = tokio::time::timeout(ANSWER_LIMIT, EnrolmentClient::new(channel).join(request))
        .await
        .map_err(|_| {
            JoinError::Unreachable(format!(
                "the provider at {provider} did not answer within {ANSWER_LIMIT:?}"
            ))
        })?;
    let answer = answer.map_err(|status| match status.code() {
        tonic::Code::Unavailable | tonic::Code::Unknown | tonic::Code::Internal => {
            JoinError::Unreachable(status.message().to_owned())
        }
        _ => JoinError::Refused(status.message().to_owned()),
    })?;
    Ok(answer.into_inner())
}

/// SHA-256 of a public key, hexadecimal.
fn public_key(key: &KeyPair) -> String {
    hex(&Sha256::digest(rcgen::PublicKeyData::subject_public_key_info(
        key,
    )))
}

/// Only an identity that is absent or damaged beyond use is replaced without being asked.
fn vacant(data_dir: &Path) -> Result<(), JoinError> {
    match Identity::load(data_dir) {
        Ok(existing) => Err(JoinError::Joined {
            site: existing.site,
            dir: files::dir(data_dir),
        }),
        Err(IdentityError::NotJoined(_) | IdentityError::Damaged { .. }) => Ok(()),
        Err(IdentityError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(unusable) => Err(unusable.into()),
    }
}

/// A fresh key and a certificate request for it.
pub(super) fn new_key() -> Result<(KeyPair, bytes::Bytes), String> {
    let make = || {
        let key = KeyPair::generate()?;
        let request = CertificateParams::default().serialize_request(&key)?;
        let der = bytes::Bytes::copy_from_slice(request.der());
        Ok((key, der))
    };
    make().map_err(|e: rcgen::Error| format!("a key cannot be made: {e}"))
}

/// The certificate must be for this site: what else it was signed for is the provider's business.
pub(crate) fn check(answer: &JoinResponse, site: &SiteName) -> Result<(), String> {
    let leaf = answer.certificates_der.first().ok_or("it holds no certificate")?;
    if answer.roots_der.is_empty() {
        return Err("it holds no root certificate".to_owned());
    }
    match SpiffeId::from_certificate_der(leaf) {
        Ok(SpiffeId::Site(domain, name)) if name == *site && domain.as_str() == answer.trust_domain => Ok(()),
        Ok(other) => Err(format!("its certificate is for {other}")),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn save(
    data_dir: &Path,
    site: &SiteName,
    provider: &str,
    key: &KeyPair,
    answer: &JoinResponse,
) -> Result<(), IdentityError> {
    let list = |all: &[bytes::Bytes]| all.iter().map(|der| der.to_vec()).collect::<Vec<_>>();
    let material = files::Material {
        site,
        trust_domain: &answer.trust_domain,
        provider,
        key_pem: &key.serialize_pem(),
        chain: &list(&answer.certificates_der),
        roots: &list(&answer.roots_der),
    };
    files::save(data_dir, &material)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_identity_is_replaced_unasked_only_when_it_is_absent_or_damaged() {
        let data = tempfile::tempdir().unwrap();
        assert!(vacant(data.path()).is_ok());
        files::tests::joined(data.path());
        assert!(matches!(vacant(data.path()), Err(JoinError::Joined { .. })));
        let key = files::dir(data.path()).join("identity.pem");
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            vacant(data.path()),
            Err(JoinError::Files(IdentityError::Exposed { .. }))
        ));
        std::fs::remove_file(&key).unwrap();
        assert!(vacant(data.path()).is_ok());
    }

    #[tokio::test]
    async fn a_directory_that_cannot_be_written_is_told_before_the_provider_is_asked() {
        let data = tempfile::tempdir().unwrap();
        let file = data.path().join("file");
        std::fs::write(&file, "").unwrap();
        let token = JoinToken {
            site: "harbour".parse().unwrap(),
            id: "a".repeat(12),
            secret: "b".repeat(32),
            pin: "c".repeat(64),
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let options = JoinOptions {
            provider: listener.local_addr().unwrap().to_string(),
            proxies: Default::default(),
            token: token.to_string(),
            data_dir: file,
            force: true,
            waits: |_, _| {},
        };
        assert!(matches!(join(&options).await, Err(JoinError::Files(_))));
        // Nobody has dialled.
        let dialled = futures::FutureExt::now_or_never(listener.accept());
        assert!(dialled.is_none());
    }
}
