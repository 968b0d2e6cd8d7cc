//! Replacing the CA without losing a site.
//!
//! `rotate` makes a new CA beside the old one; `keys` says what each of them signs from then on. Providers take the new keys
//! from the Secret within seconds, and ask the sites that are connected to renew; the others do so when they come back. A Site
//! *needs the old CA* while the certificate on its record is not of the new one, or was not used yet. When none does,
//! `retire` withdraws the old CA. All state is in the Secret and in the Sites: a provider may stop at any point.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, DynamicObject, ListParams, PostParams};
use serde_json::Value;
use skerry_proto::link::Kind;
use skerry_proto::{SiteName, TrustDomain};
use tokio_util::sync::CancellationToken;

use super::audit::{Audit, Matter};
use super::authority::{Authority, AuthorityError, CA_SECRET, SitePeer};
use super::keys::Keys;
use super::ledger::CertificateRecord;
use crate::clock::{Clock, SystemClock};
use crate::cluster::{Mirror, Object};
use crate::link::sessions::Sessions;
use crate::metrics::Metrics;
use crate::sites;

/// How often a provider looks for other keys, and for sites that should renew.
const LOOK: Duration = Duration::from_secs(5);
/// Sites that are asked to renew at one look: each renewal is two requests to the API server.
const AT_ONCE: usize = 50;
/// A site that was asked is asked again after this.
const AGAIN: Duration = Duration::from_secs(120);
const DAY: Duration = Duration::from_secs(86_400);

/// Why the CA could not be replaced.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// One after the other.
    #[error(
        "the CA is being replaced already; see skerry-provider ca status, and end it with skerry-provider ca retire"
    )]
    UnderWay,
    /// There is no old one.
    #[error("there is no old CA to withdraw; make a new one with skerry-provider ca rotate")]
    Nothing,
    /// Sites would be cut off.
    #[error(
        "{} sites still need the old CA: {}; they renew when they come back. With --force they are cut off, and must join again",
        .0.len(), names(.0)
    )]
    Needed(Vec<String>),
    /// The Secret changed meanwhile.
    #[error(
        "Secret {CA_SECRET} was changed by somebody else at the same time; look at skerry-provider ca status and try again"
    )]
    Conflict,
    /// The keys cannot be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The Kubernetes API refused.
    #[error("the Kubernetes API refused: {0}")]
    Api(#[from] kube::Error),
}

fn names(all: &[String]) -> String {
    let mut text = all.iter().take(10).cloned().collect::<Vec<_>>().join(", ");
    if all.len() > 10 {
        text.push_str(", …");
    }
    text
}

/// Whether a Site's record says that it depends on another CA than `current`.
fn needs_other(status: &Value, current: &str) -> bool {
    let record = CertificateRecord::of(status);
    !record.serial.is_empty() && (record.issuer != current || record.previous.is_some())
}

/// Where an operator works.
pub struct Desk {
    /// The Kubernetes API.
    pub client: Client,
    /// Namespace of the Secret.
    pub namespace: String,
    /// The trust domain.
    pub domain: TrustDomain,
}

impl Desk {
    /// Makes a new CA; answers its id.
    pub async fn rotate(&self, now: Timestamp) -> Result<String, RotationError> {
        let (secret, keys) = self.read().await?;
        if keys.old.is_some() {
            return Err(RotationError::UnderWay);
        }
        let keys = keys.rotate(now)?;
        self.write(secret, &keys).await?;
        Ok(keys.current.id().to_owned())
    }

    /// The CAs and the sites that still need the old one, for people.
    pub async fn status(&self) -> Result<String, RotationError> {
        let (_, keys) = self.read().await?;
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:<10} {:<18} EXPIRES", "CA", "ID");
        let _ = writeln!(
            text,
            "{:<10} {:<18} {}",
            "current",
            keys.current.id(),
            keys.current.not_after()
        );
        let Some(old) = &keys.old else {
            return Ok(text);
        };
        let _ = writeln!(text, "{:<10} {:<18} {}", "old", old.ca.id(), old.ca.not_after());
        let waiting = self.waiting(&keys).await?;
        if waiting.is_empty() {
            text.push_str("No site needs the old CA: skerry-provider ca retire\n");
        } else {
            let _ = writeln!(text, "Sites that need the old CA still ({}):", waiting.len());
            for site in waiting {
                let _ = writeln!(text, "  {site}");
            }
        }
        Ok(text)
    }

    /// Withdraws the old CA. Answers the sites that are cut off by that, none without `force`.
    pub async fn retire(&self, force: bool) -> Result<Vec<String>, RotationError> {
        let (secret, keys) = self.read().await?;
        if keys.old.is_none() {
            return Err(RotationError::Nothing);
        }
        let waiting = self.waiting(&keys).await?;
        if !waiting.is_empty() && !force {
            return Err(RotationError::Needed(waiting));
        }
        self.write(secret, &keys.retire()).await?;
        Ok(waiting)
    }

    async fn waiting(&self, keys: &Keys) -> Result<Vec<String>, RotationError> {
        let sites: Api<DynamicObject> = Api::all_with(self.client.clone(), &sites::resource());
        let all = sites.list(&ListParams::default()).await?;
        let needing = all
            .items
            .into_iter()
            .filter(|site| needs_other(&site.data["status"], keys.current.id()));
        Ok(needing.filter_map(|site| site.metadata.name).collect())
    }

    async fn read(&self) -> Result<(Secret, Keys), RotationError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let secret = secrets.get(CA_SECRET).await?;
        let keys = Keys::from_secret(&secret, &self.namespace, &self.domain)?;
        Ok((secret, keys))
    }

    async fn write(&self, secret: Secret, keys: &Keys) -> Result<(), RotationError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let secret = Secret {
            data: Some(keys.to_data()),
            ..secret
        };
        match secrets.replace(CA_SECRET, &PostParams::default(), &secret).await {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.code == 409 => Err(RotationError::Conflict),
            Err(error) => Err(error.into()),
        }
    }
}

/// What a provider works with while the CA is replaced.
pub struct Tending {
    /// The Kubernetes API.
    pub client: Client,
    /// Namespace of the Secret.
    pub namespace: String,
    /// Takes the new keys.
    pub authority: Authority,
    /// The Sites.
    pub mirror: Arc<Mirror>,
    /// Who is connected.
    pub sessions: Sessions,
    /// Tells people.
    pub audit: Arc<dyn Audit>,
    /// Shows how long certificates are still good.
    pub metrics: Arc<Metrics>,
}

/// Keeps a provider's keys equal to those in the Secret, and moves the sites that are connected to a new CA, until `stop`.
pub async fn tend(tending: Tending, stop: CancellationToken) {
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut version = None;
    let (mut asked, mut warned) = (BTreeMap::new(), BTreeMap::new());
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        if let Err(error) = tending.reload(&mut version).await {
            tracing::error!(%error, "the CA's Secret cannot be read; the keys that are known stay in use");
        }
        tending.move_sites(&mut asked);
        tending.watch_expiry(&mut warned, SystemClock.now()).await;
    }
}

impl Tending {
    async fn reload(&self, version: &mut Option<String>) -> Result<(), RotationError> {
        let secrets: Api<Secret> = Api::namespaced(self.client.clone(), &self.namespace);
        let secret = secrets.get(CA_SECRET).await?;
        let found = secret.metadata.resource_version.clone();
        if found == *version {
            return Ok(());
        }
        let keys = Keys::from_secret(&secret, &self.namespace, self.authority.trust_domain())?;
        let known = self.authority.keys();
        let id = |keys: &Keys| {
            let old = keys.old.as_ref().map(|old| old.ca.pin.clone());
            (keys.current.pin.clone(), old)
        };
        if id(&keys) != id(&known) {
            let old = keys.old.as_ref().map(|old| old.ca.id().to_owned());
            tracing::info!(
                ca = keys.current.id(),
                ?old,
                "other keys of the CA are in use from now on"
            );
            self.authority.reload(keys);
        }
        *version = found;
        Ok(())
    }

    /// Shows how long each site's certificate is still good, and warns daily when its renewal is overdue.
    async fn watch_expiry(&self, warned: &mut BTreeMap<SiteName, Instant>, now: Timestamp) {
        warned.retain(|_, at| at.elapsed() < DAY);
        let objects = self.mirror.all(Kind::Site);
        let peers: Vec<SitePeer> = objects.iter().filter_map(|object| peer_of(object)).collect();
        let left = |peer: &SitePeer| peer.not_after.as_second() - now.as_second();
        self.metrics
            .set_site_certificates(peers.iter().map(|peer| (&peer.site, left(peer))));
        for peer in peers.iter().filter(|peer| overdue(peer, now)) {
            if warned.contains_key(&peer.site) {
                continue;
            }
            warned.insert(peer.site.clone(), Instant::now());
            let message = format!(
                "the site's certificate should have been renewed by now: it expires at {} ({} days). Is the site connected? After its end the site can renew it itself for a while, then it must join again",
                peer.not_after,
                left(peer) / 86_400
            );
            self.audit.note(peer, Matter::Overdue, &message).await;
        }
    }

    /// Asks sites to renew while both CAs are trusted; ends their sessions when theirs is not any more.
    fn move_sites(&self, asked: &mut BTreeMap<SiteName, Instant>) {
        let keys = self.authority.keys();
        asked.retain(|_, at| at.elapsed() < AGAIN);
        let mut places = AT_ONCE;
        for object in self.mirror.all(Kind::Site) {
            let Ok(site) = object.name.parse::<SiteName>() else {
                continue;
            };
            let status = &object.value["status"];
            if !needs_other(status, keys.current.id()) || !self.sessions.is_online(&site) {
                continue;
            }
            let record = CertificateRecord::of(status);
            if keys.old.is_none() {
                // An older provider wrote no issuer: then there never was another CA.
                if !record.issuer.is_empty() && record.issuer != keys.current.id() {
                    let reason = "the CA that has signed the site's certificate was withdrawn; join again with a new token";
                    self.sessions.dismiss(&site, reason, 60_000);
                }
                continue;
            }
            // One that has the new certificate in hand shows it with its next session.
            if record.issuer == keys.current.id() || asked.contains_key(&site) || places == 0 {
                continue;
            }
            places -= 1;
            self.sessions.ask_to_renew(&site);
            asked.insert(site, Instant::now());
        }
    }
}

/// What a Site's record says of its newest certificate; `None` when it has none.
fn peer_of(object: &Object) -> Option<SitePeer> {
    let record = CertificateRecord::of(&object.value["status"]);
    Some(SitePeer {
        site: object.name.parse().ok()?,
        uid: object.key.uid.clone(),
        serial: record.serial,
        not_before: record.issued?,
        not_after: record.not_after?,
    })
}

/// Less than a sixth of its life is left: a site that is connected renews before the last quarter.
fn overdue(peer: &SitePeer, now: Timestamp) -> bool {
    let life = peer.not_after.as_second() - peer.not_before.as_second();
    peer.not_after.as_second() - now.as_second() < life / 6
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_renewal_is_overdue_in_the_last_sixth_of_a_certificates_life() {
        let object = Object::new(
            Kind::Site,
            json!({"metadata": {"name": "harbour", "uid": "u"}, "status": {"certificate": {
                "serial": "1", "issuedAt": "2026-01-01T00:00:00Z", "notAfter": "2026-04-01T00:00:00Z",
            }}}),
        )
        .unwrap();
        let peer = peer_of(&object).unwrap();
        assert!(!overdue(&peer, "2026-03-16T00:00:00Z".parse().unwrap()));
        assert!(overdue(&peer, "2026-03-18T00:00:00Z".parse().unwrap()));
        assert!(overdue(&peer, "2026-05-01T00:00:00Z".parse().unwrap()));
    }

    #[test]
    fn a_site_needs_the_old_ca_until_it_has_used_a_certificate_of_the_new_one() {
        let status = |issuer: &str, previous: Option<&str>| json!({"certificate": {"serial": "1", "issuer": issuer, "previousSerial": previous}});
        assert!(needs_other(&status("old", None), "new"));
        assert!(needs_other(&status("new", Some("0")), "new"));
        assert!(!needs_other(&status("new", None), "new"));
        assert!(needs_other(&json!({"certificate": {"serial": "1"}}), "new"));
        // It was never enrolled.
        assert!(!needs_other(&json!({}), "new"));
    }
}
