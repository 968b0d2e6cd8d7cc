//! ServiceAccount tokens for the pods of a site, bound to the pod's UID.

use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::Client;
use kube::api::{Api, PostParams};
use serde_json::{Value, json};
use skerry_proto::object::Uid;

use super::TokenNeed;

/// Share of a token's life after which it is replaced, as a kubelet does.
const REFRESH_AT: f64 = 0.8;
/// A token is replaced after this long in any case.
const REFRESH_AFTER_SECONDS: i64 = 24 * 3600;

/// A token that the API server issued.
#[derive(Clone, PartialEq, Eq)]
pub struct Minted {
    /// What travels to the edge: `{"token": …, "expirationTimestamp": …}`.
    pub object: Value,
    /// Seconds since the Unix epoch.
    pub expires_unix: i64,
}

/// The pod that a token is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenOwner {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// Its UID.
    pub uid: Uid,
    /// Its ServiceAccount.
    pub service_account: String,
}

/// The UID under which a token travels.
pub fn token_uid(pod: &Uid, need: &TokenNeed) -> Uid {
    Uid::from(format!("{pod}/{}/{}", need.volume, need.path))
}

/// Whether a token that expires then should be replaced now.
///
/// The edge tells only the expiry of what it holds, so the time of issue is taken to be expiry minus what was asked.
/// A token that the API server extended (to a year, by default) is replaced daily, as a kubelet does.
pub fn due(expires_unix: i64, need: &TokenNeed, now_unix: i64) -> bool {
    let life = need.expiration_seconds.max(1);
    let left = expires_unix - now_unix;
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
    let keep = ((1.0 - REFRESH_AT) * life as f64) as i64;
    left <= keep.max(life - REFRESH_AFTER_SECONDS)
}

/// Asks the API server for a token. Errors are the API's own; retry later.
pub async fn mint(client: &Client, owner: &TokenOwner, need: &TokenNeed) -> Result<Minted, kube::Error> {
    let audiences = (!need.audience.is_empty()).then(|| vec![need.audience.clone()]);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences,
            expiration_seconds: Some(need.expiration_seconds),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: Some(owner.pod.clone()),
                uid: Some(owner.uid.to_string()),
            }),
        }),
        ..Default::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), &owner.namespace);
    let answer = accounts
        .create_token_request(&owner.service_account, &PostParams::default(), &request)
        .await?;
    let status = answer.status.unwrap_or_default();
    Ok(Minted {
        // An answer without expiry would be a token for ever; treating it as expired only refreshes it early.
        expires_unix: status
            .expiration_timestamp
            .as_ref()
            .map_or(0, |t| t.0.as_second()),
        object: json!({
            "token": status.token,
            "expirationTimestamp": status.expiration_timestamp,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(seconds: i64) -> TokenNeed {
        TokenNeed {
            volume: "v".to_owned(),
            path: "p".to_owned(),
            audience: String::new(),
            expiration_seconds: seconds,
        }
    }

    #[test]
    fn a_token_is_due_at_four_fifths_of_its_life() {
        assert!(!due(3600, &need(3600), 2800));
        assert!(due(3600, &need(3600), 2881));
        assert!(due(3600, &need(3600), 4000));
    }

    #[test]
    fn a_long_lived_token_is_due_after_a_day() {
        let week = 7 * 24 * 3600;
        assert!(!due(week, &need(week), 24 * 3600 - 1));
        assert!(due(week, &need(week), 24 * 3600));
    }
}
