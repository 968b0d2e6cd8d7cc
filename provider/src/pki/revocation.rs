//! Certificates that count no more, though their time is not over: kept in the Site's spec.

use std::time::Duration;

use jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};
use skerry_proto::SiteName;
use skerry_proto::limits::CERTIFICATE_BACKDATE;

use super::SitePeer;
use crate::sites;

/// Most single certificates that a Site lists, as its schema has it; the oldest are long expired.
const MOST: usize = 64;

/// `spec.certificates` of a Site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Revoked {
    /// Every certificate that was made until then.
    pub before: Option<Timestamp>,
    /// Single ones, by serial number.
    pub serials: Vec<String>,
}

/// Why nothing could be revoked.
#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    /// The site is not declared, so none of its certificates is good for anything.
    #[error("there is no Site {0}: none of its certificates is accepted anyway")]
    NoSite(SiteName),
    /// Too many single ones.
    #[error(
        "Site {0} lists {MOST} revoked certificates already; revoke all that were made until now, without --serial"
    )]
    Full(SiteName),
    /// The Kubernetes API refused.
    #[error("the Kubernetes API refused: {0}")]
    Api(#[from] kube::Error),
}

impl Revoked {
    /// What a Site's spec says.
    pub fn of(spec: &Value) -> Self {
        let field = &spec["certificates"];
        let serials = field["revokedSerials"].as_array().into_iter().flatten();
        Self {
            before: field["revokedBefore"].as_str().and_then(|t| t.parse().ok()),
            serials: serials
                .filter_map(Value::as_str)
                .map(str::to_ascii_lowercase)
                .collect(),
        }
    }

    /// Whether a certificate is among them.
    pub fn covers(&self, peer: &SitePeer) -> bool {
        let made = jiff::SignedDuration::try_from(CERTIFICATE_BACKDATE)
            .ok()
            .and_then(|backdate| peer.not_before.checked_add(backdate).ok())
            .unwrap_or(peer.not_before);
        // Whole seconds: one that was made within the second of the revocation goes, too.
        self.before.is_some_and(|before| made <= before) || self.serials.contains(&peer.serial)
    }

    /// Why a site with a revoked certificate is sent away.
    pub fn refusal(peer: &SitePeer) -> String {
        format!(
            "the certificate of site {0} with serial {1} was revoked; if this machine is the right one: skerry-edge join --force, with a new token from: skerry-provider token create {0}",
            peer.site, peer.serial
        )
    }
}

/// Revokes one certificate of a site, or all that were made until `now`; returns when the next one would be good.
pub async fn revoke(
    client: &Client,
    site: &SiteName,
    serial: Option<&str>,
    now: Timestamp,
) -> Result<(), RevokeError> {
    let sites: Api<DynamicObject> = Api::all_with(client.clone(), &sites::resource());
    let found = sites.get_opt(site.as_str()).await?;
    let found = found.ok_or_else(|| RevokeError::NoSite(site.clone()))?;
    let certificates = match serial {
        None => json!({"revokedBefore": now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()}),
        Some(serial) => {
            let mut serials = Revoked::of(&found.data["spec"]).serials;
            let serial = serial.to_ascii_lowercase();
            if !serials.contains(&serial) {
                serials.push(serial);
            }
            if serials.len() > MOST {
                return Err(RevokeError::Full(site.clone()));
            }
            json!({"revokedSerials": serials})
        }
    };
    let patch = json!({
        "metadata": {"resourceVersion": found.metadata.resource_version},
        "spec": {"certificates": certificates},
    });
    sites
        .patch(site.as_str(), &PatchParams::default(), &Patch::Merge(&patch))
        .await?;
    if serial.is_none() {
        // Certificates know whole seconds only: one of a site that joins again within this one would be revoked, too.
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use skerry_proto::object::Uid;

    use super::*;

    fn peer(serial: &str, made: &str) -> SitePeer {
        let made: Timestamp = made.parse().unwrap();
        SitePeer {
            site: "harbour".parse().unwrap(),
            uid: Uid::from("u".to_owned()),
            serial: serial.to_owned(),
            not_before: made - jiff::SignedDuration::from_secs(300),
            not_after: made + jiff::SignedDuration::from_hours(24 * 90),
        }
    }

    #[test]
    fn a_certificate_is_revoked_by_its_number_or_by_its_time() {
        let revoked = Revoked::of(&json!({"certificates": {
            "revokedBefore": "2026-02-01T00:00:00Z", "revokedSerials": ["ABCD"],
        }}));
        assert!(revoked.covers(&peer("abcd", "2026-03-01T00:00:00Z")));
        assert!(revoked.covers(&peer("01", "2026-01-31T00:00:00Z")));
        assert!(revoked.covers(&peer("01", "2026-02-01T00:00:00Z")));
        assert!(!revoked.covers(&peer("01", "2026-02-01T00:00:01Z")));
        assert!(!Revoked::of(&json!({})).covers(&peer("01", "2026-01-01T00:00:00Z")));
    }
}
