//! Enrolment that waits for a person.
//!
//! A Site whose `spec.enrolment.approval` is `Manual` gives a certificate only to the machine whose key stands in
//! `spec.enrolment.approvedKey`. A machine with a good token shows its key (SHA-256 of the public key) on its screen; the
//! provider writes it to `status.enrolment`, and somebody who sees both approves it.

use jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use skerry_proto::SiteName;

use crate::sites;

/// Fewest digits of a key that name it when it is approved.
const LEAST_DIGITS: usize = 8;

/// Why nothing could be approved.
#[derive(Debug, thiserror::Error)]
pub enum ApproveError {
    /// The site is not declared.
    #[error("there is no Site {0}")]
    NoSite(SiteName),
    /// Nobody asks.
    #[error("no machine waits to become Site {0}; run skerry-edge join on it first")]
    Nobody(SiteName),
    /// Another machine asks.
    #[error(
        "the machine that waits to become Site {site} has the key {waiting}, not {given}; compare with what skerry-edge join shows there (at least {LEAST_DIGITS} digits)"
    )]
    OtherKey {
        /// The Site.
        site: SiteName,
        /// Whose key it is.
        waiting: String,
        /// What was given.
        given: String,
    },
    /// The Kubernetes API refused.
    #[error("the Kubernetes API refused: {0}")]
    Api(#[from] kube::Error),
}

/// Whether a machine with that key must wait.
pub(super) fn waits(spec: &Value, key: &str) -> bool {
    let enrolment = &spec["enrolment"];
    enrolment["approval"] == "Manual" && enrolment["approvedKey"].as_str() != Some(key)
}

/// What a Site's status shows of a machine that waits; absent when it shows that already.
pub(super) fn request(status: &Value, key: &str, now: Timestamp) -> Option<Value> {
    let known = status["enrolment"]["waitingKey"].as_str() == Some(key);
    (!known).then(
        || json!({"enrolment": {"waitingKey": key, "since": now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()}}),
    )
}

fn matches(waiting: &str, given: &str) -> bool {
    given.len() >= LEAST_DIGITS && waiting.starts_with(&given.to_ascii_lowercase())
}

/// Approves the machine that waits, if its key begins with `given`. Answers the whole key.
pub async fn approve(client: &Client, site: &SiteName, given: &str) -> Result<String, ApproveError> {
    let sites: Api<DynamicObject> = Api::all_with(client.clone(), &sites::resource());
    let found = sites.get_opt(site.as_str()).await?;
    let found = found.ok_or_else(|| ApproveError::NoSite(site.clone()))?;
    let Some(waiting) = found.data["status"]["enrolment"]["waitingKey"].as_str() else {
        return Err(ApproveError::Nobody(site.clone()));
    };
    if !matches(waiting, given) {
        return Err(ApproveError::OtherKey {
            site: site.clone(),
            waiting: waiting.to_owned(),
            given: given.chars().take(64).collect(),
        });
    }
    // The key that was looked at, and no other that came meanwhile.
    let patch = json!({"spec": {"enrolment": {"approvedKey": waiting}}});
    sites
        .patch(site.as_str(), &PatchParams::default(), &Patch::Merge(&patch))
        .await?;
    Ok(waiting.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_approved_key_passes_where_approval_is_manual() {
        let manual = json!({"enrolment": {"approval": "Manual", "approvedKey": "aa"}});
        assert!(!waits(&manual, "aa"));
        assert!(waits(&manual, "ab"));
        assert!(waits(&json!({"enrolment": {"approval": "Manual"}}), ""));
        assert!(!waits(&json!({"enrolment": {"approval": "Automatic"}}), "ab"));
        assert!(!waits(&json!({}), "ab"));
    }

    #[test]
    fn a_key_is_approved_by_its_first_digits_but_not_by_too_few() {
        let key = "0123456789abcdef";
        assert!(matches(key, "01234567") && matches(key, key) && matches(key, "0123456789ABCDEF"));
        assert!(!matches(key, "0123456") && !matches(key, "12345678") && !matches(key, ""));
    }

    #[test]
    fn a_machine_that_asks_again_changes_nothing() {
        let status = request(&json!({}), "aa", Timestamp::UNIX_EPOCH).unwrap();
        assert!(request(&status, "aa", Timestamp::now()).is_none());
        assert!(request(&status, "ab", Timestamp::now()).is_some());
    }
}
