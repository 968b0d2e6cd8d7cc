//! Who asks: a client certificate of the API server's, or a bearer token.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::cache::Cache;
use super::reviews::{ReviewError, Reviews};

/// How long a token's user is remembered; a kubelet's default.
const TOKEN_TTL: Duration = Duration::from_secs(120);

/// How long a refusal is remembered: a token may become valid at any time.
const REFUSED_TTL: Duration = Duration::from_secs(10);

const TOKENS: usize = 4096;

/// A longer token is not worth a question.
const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// An authenticated user as Kubernetes sees one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct User {
    /// User name.
    pub name: String,
    /// UID, may be empty.
    pub uid: String,
    /// Groups.
    pub groups: Vec<String>,
    /// Further attributes.
    pub extra: BTreeMap<String, Vec<String>>,
}

/// The user of a client certificate that TLS has verified: CN is the name, every O a group.
pub(super) fn certificate_user(der: &[u8]) -> Option<User> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let groups = subject
        .iter_organization()
        .filter_map(|group| group.as_str().ok().map(str::to_owned));
    let mut groups: Vec<String> = groups.collect();
    groups.push("system:authenticated".to_owned());
    (!name.is_empty()).then_some(User {
        name,
        groups,
        ..User::default()
    })
}

/// Authenticates bearer tokens.
pub(super) struct Authenticator {
    reviews: Arc<dyn Reviews>,
    /// By the token's hash: the tokens themselves are not kept.
    tokens: Cache<[u8; 32], Option<User>>,
}

impl Authenticator {
    pub(super) fn new(reviews: Arc<dyn Reviews>) -> Self {
        Self {
            reviews,
            tokens: Cache::new(TOKENS),
        }
    }

    /// The user of a request; `None` for nobody.
    pub(super) async fn user(
        &self,
        certificate: Option<&User>,
        headers: &HeaderMap,
    ) -> Result<Option<User>, ReviewError> {
        if let Some(user) = certificate {
            return Ok(Some(user.clone()));
        }
        let Some(token) = bearer(headers) else {
            return Ok(None);
        };
        let key: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some(known) = self.tokens.get(&key) {
            return Ok(known);
        }
        let user = self.reviews.token(token).await?;
        let ttl = if user.is_some() { TOKEN_TTL } else { REFUSED_TTL };
        self.tokens.put(key, user.clone(), ttl);
        Ok(user)
    }
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    let usable = scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= MAX_TOKEN_BYTES;
    usable.then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubelet::server::testing::FakeReviews;

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(AUTHORIZATION, value.parse().unwrap())])
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_reviewed_once_in_two_minutes() {
        let reviews = Arc::new(FakeReviews::default());
        let authenticator = Authenticator::new(reviews.clone());
        for _ in 0..3 {
            let user = authenticator.user(None, &headers("Bearer good")).await.unwrap();
            assert_eq!(user.unwrap().name, "good");
        }
        assert_eq!(reviews.token_reviews(), 1);
        tokio::time::advance(TOKEN_TTL).await;
        authenticator.user(None, &headers("bearer good")).await.unwrap();
        assert_eq!(reviews.token_reviews(), 2);
    }

    #[tokio::test]
    async fn without_a_usable_token_there_is_no_user_and_no_review() {
        let reviews = Arc::new(FakeReviews::default());
        let authenticator = Authenticator::new(reviews.clone());
        for value in [
            "Basic abc",
            "Bearer ",
            "Bearer",
            &format!("Bearer {}", "x".repeat(MAX_TOKEN_BYTES + 1)),
        ] {
            assert_eq!(
                authenticator.user(None, &headers(value)).await.unwrap(),
                None,
                "{value:.20}"
            );
        }
        assert_eq!(authenticator.user(None, &HeaderMap::new()).await.unwrap(), None);
        assert_eq!(reviews.token_reviews(), 0);
    }

    #[test]
    fn a_certificate_names_user_and_groups() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "kube-apiserver");
        params
            .distinguished_name
            .push(rcgen::DnType::OrganizationName, "system:masters");
        let certificate = params.self_signed(&key).unwrap();
        let user = certificate_user(certificate.der()).unwrap();
        assert_eq!(user.name, "kube-apiserver");
        assert_eq!(user.groups, ["system:masters", "system:authenticated"]);
        assert_eq!(certificate_user(b"nonsense"), None);
    }
}
