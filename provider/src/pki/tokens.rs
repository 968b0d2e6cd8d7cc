//! Join tokens: made by an operator, used once by a site.
//!
//! A token is a Secret `skerry-token-<id>` that holds the SHA-256 of its secret part, its site with the UID, and its expiry. Using it
//! means deleting that Secret with its UID and version as preconditions, so that of two concurrent uses one fails.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::stream::{self, Stream, StreamExt};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams, PostParams, Preconditions};
use sha2::{Digest, Sha256};
use skerry_proto::SiteName;
use skerry_proto::object::Uid;
use skerry_proto::token::{JoinToken, hex};

use super::Authority;
use crate::sites;

const LABEL: &str = "edge.skerry.dev/join-token";
const TYPE: &str = "edge.skerry.dev/join-token";

/// Why a token could not be made or is refused.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The site is not declared.
    #[error(
        "there is no Site {0}: declare it first, for example with\n  kubectl apply -f - <<< '{{\"apiVersion\": \"edge.skerry.dev/v1alpha1\", \"kind\": \"Site\", \"metadata\": {{\"name\": \"{0}\"}}}}'"
    )]
    NoSite(SiteName),
    /// Not a token that exists.
    #[error(
        "the join token is unknown or was used already; make a new one with: skerry-provider token create {0}"
    )]
    Unknown(SiteName),
    /// Too late.
    #[error("the join token has expired at {at}; make a new one with: skerry-provider token create {site}")]
    Expired {
        /// Its site.
        site: SiteName,
        /// When.
        at: Timestamp,
    },
    /// Made for another site.
    #[error("the join token is for another site than {0}; make one with: skerry-provider token create {0}")]
    OtherSite(SiteName),
    /// Made for a Site of that name that was deleted since.
    #[error(
        "the join token was made for an earlier Site {0}, which was deleted; make a new one with: skerry-provider token create {0}"
    )]
    EarlierSite(SiteName),
    /// The Kubernetes API refused.
    #[error("the Kubernetes API refused: {0}")]
    Api(#[from] kube::Error),
}

/// A token as listed: everything but its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenInfo {
    /// Its id.
    pub id: String,
    /// The site that may use it.
    pub site: String,
    /// When it expires.
    pub expires: Option<Timestamp>,
}

/// Tokens under way at one time, of many.
const AT_ONCE: usize = 16;

/// Makes tokens.
pub struct Maker {
    /// The Kubernetes API.
    pub client: Client,
    /// Where tokens are kept.
    pub namespace: String,
    /// Whose public key the sites shall expect.
    pub authority: Authority,
    /// How long a token may be used.
    pub life: Duration,
}

impl Maker {
    /// Makes a token for a declared site.
    pub async fn make(&self, site: &SiteName, now: Timestamp) -> Result<JoinToken, TokenError> {
        let Some(uid) = sites::uid(&self.client, site).await? else {
            return Err(TokenError::NoSite(site.clone()));
        };
        let token = JoinToken {
            site: site.clone(),
            id: hex(&rand::random::<[u8; 6]>()),
            secret: hex(&rand::random::<[u8; 16]>()),
            pin: self.authority.pin(),
        };
        let life = SignedDuration::try_from(self.life).unwrap_or(SignedDuration::MAX);
        let expires = now.saturating_add(life).unwrap_or(Timestamp::MAX);
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        secrets
            .create(
                &PostParams::default(),
                &record(&self.namespace, &token, &uid, expires),
            )
            .await?;
        Ok(token)
    }

    /// Makes a token for each site, several at a time; they come in the order of the sites.
    pub fn make_all(
        &self,
        sites: Vec<SiteName>,
    ) -> impl Stream<Item = (SiteName, Result<JoinToken, TokenError>)> {
        stream::iter(sites)
            .map(move |site| async move {
                let token = self.make(&site, Timestamp::now()).await;
                (site, token)
            })
            .buffered(AT_ONCE)
    }
}

fn record(namespace: &str, token: &JoinToken, uid: &Uid, expires: Timestamp) -> Secret {
    let data = [
        ("site", token.site.to_string()),
        ("site-uid", uid.to_string()),
        ("secret-sha256", hex(&Sha256::digest(token.secret.as_bytes()))),
        ("expires", expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
    ];
    Secret {
        metadata: kube::api::ObjectMeta {
            name: Some(secret_name(&token.id)),
            namespace: Some(namespace.to_owned()),
            labels: Some(BTreeMap::from([(LABEL.to_owned(), token.site.to_string())])),
            ..Default::default()
        },
        type_: Some(TYPE.to_owned()),
        string_data: Some(data.map(|(key, value)| (key.to_owned(), value)).into()),
        ..Default::default()
    }
}

/// A token that was shown with the right secret, for the right site, in time; not used up yet.
pub struct Presented {
    site: SiteName,
    record: Secret,
}

/// Looks a token up and checks it.
pub async fn present(
    client: &Client,
    namespace: &str,
    token: &JoinToken,
    now: Timestamp,
) -> Result<Presented, TokenError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let name = secret_name(&token.id);
    let Some(secret) = secrets.get_opt(&name).await? else {
        return Err(TokenError::Unknown(token.site.clone()));
    };
    check(&secret, token, now)?;
    Ok(Presented {
        site: token.site.clone(),
        record: secret,
    })
}

impl Presented {
    /// UID of the Site that the token was made for.
    pub fn site_uid(&self) -> Uid {
        Uid::from(text(&self.record, "site-uid"))
    }

    /// Uses the token up. After this returned `Ok`, the same token is unknown.
    pub async fn consume(self, client: &Client, namespace: &str) -> Result<(), TokenError> {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let metadata = self.record.metadata;
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: metadata.uid,
                resource_version: metadata.resource_version,
            }),
            ..Default::default()
        };
        match secrets.delete(&metadata.name.unwrap_or_default(), &params).await {
            Ok(_) => Ok(()),
            // Another use was faster.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
                Err(TokenError::Unknown(self.site))
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn check(secret: &Secret, token: &JoinToken, now: Timestamp) -> Result<(), TokenError> {
    let presented = hex(&Sha256::digest(token.secret.as_bytes()));
    // Hashes are compared, so the time taken tells nothing about the secret.
    if text(secret, "secret-sha256") != presented {
        return Err(TokenError::Unknown(token.site.clone()));
    }
    if text(secret, "site") != token.site.as_str() {
        return Err(TokenError::OtherSite(token.site.clone()));
    }
    match text(secret, "expires").parse::<Timestamp>() {
        Ok(at) if at > now => Ok(()),
        Ok(at) => Err(TokenError::Expired {
            site: token.site.clone(),
            at,
        }),
        Err(_) => Err(TokenError::Unknown(token.site.clone())),
    }
}

/// All tokens that were not used, also expired ones.
pub async fn list(client: &Client, namespace: &str) -> Result<Vec<TokenInfo>, TokenError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let found = secrets.list(&ListParams::default().labels(LABEL)).await?;
    let info = |secret: &Secret| TokenInfo {
        id: secret
            .metadata
            .name
            .as_deref()
            .and_then(|n| n.strip_prefix("skerry-token-"))
            .unwrap_or_default()
            .to_owned(),
        site: text(secret, "site"),
        expires: text(secret, "expires").parse().ok(),
    };
    Ok(found.items.iter().map(info).collect())
}

/// Deletes a token; answers whether it existed.
pub async fn delete(client: &Client, namespace: &str, id: &str) -> Result<bool, TokenError> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    match secrets.delete(&secret_name(id), &DeleteParams::default()).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn secret_name(id: &str) -> String {
    format!("skerry-token-{id}")
}

fn text(secret: &Secret, key: &str) -> String {
    let stored = secret.data.as_ref().and_then(|data| data.get(key));
    match stored {
        Some(bytes) => String::from_utf8_lossy(&bytes.0).into_owned(),
        None => secret
            .string_data
            .as_ref()
            .and_then(|data| data.get(key))
            .cloned()
            .unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(site: &str, secret: char) -> JoinToken {
        JoinToken {
            site: site.parse().unwrap(),
            id: "0".repeat(12),
            secret: secret.to_string().repeat(32),
            pin: "0".repeat(64),
        }
    }

    #[test]
    fn only_the_right_secret_for_the_right_site_in_time_passes() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let later: Timestamp = "2026-01-02T00:00:00Z".parse().unwrap();
        let secret = record("ns", &token("harbour", 'a'), &Uid::from("u".to_owned()), later);
        assert!(check(&secret, &token("harbour", 'a'), now).is_ok());
        assert!(matches!(
            check(&secret, &token("harbour", 'b'), now),
            Err(TokenError::Unknown(_))
        ));
        assert!(matches!(
            check(&secret, &token("mast", 'a'), now),
            Err(TokenError::OtherSite(_))
        ));
        assert!(matches!(
            check(&secret, &token("harbour", 'a'), later),
            Err(TokenError::Expired { .. })
        ));
    }

    #[test]
    fn the_stored_record_does_not_hold_the_secret() {
        let secret = record(
            "ns",
            &token("harbour", 'a'),
            &Uid::from("u".to_owned()),
            Timestamp::UNIX_EPOCH,
        );
        assert!(!serde_json::to_string(&secret).unwrap().contains(&"a".repeat(32)));
    }
}
