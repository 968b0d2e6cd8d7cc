//! What is told of certificates: events on the Site.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use skerry_proto::SiteName;

use super::SitePeer;

/// The same matter of the same site is told once in this time: a refused site comes back again and again.
const AGAIN: Duration = Duration::from_secs(600);

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Matter {
    /// A certificate was renewed in time.
    Renewed,
    /// A certificate was renewed after it had expired.
    RenewedLate,
    /// A certificate came after the grace.
    TooLate,
    /// A certificate came whose successor was used already.
    OldCopy,
    /// A certificate came that was revoked.
    Revoked,
    /// A certificate was not renewed though it is time.
    Overdue,
}

impl Matter {
    fn reason(self) -> &'static str {
        match self {
            Self::Renewed => "CertificateRenewed",
            Self::RenewedLate => "CertificateRenewedLate",
            Self::TooLate => "CertificateExpired",
            Self::OldCopy => "CertificateReused",
            Self::Revoked => "CertificateRevoked",
            Self::Overdue => "CertificateExpiring",
        }
    }

    fn is_warning(self) -> bool {
        !matches!(self, Self::Renewed | Self::RenewedLate)
    }
}

/// Where it is told. Never fails: an event that cannot be written is logged.
#[async_trait::async_trait]
pub trait Audit: Send + Sync + 'static {
    /// Tells of a site's certificate.
    async fn note(&self, peer: &SitePeer, matter: Matter, message: &str);
}

/// Events on the Site object.
pub struct SiteEvents {
    recorder: Recorder,
    told: Mutex<HashMap<(SiteName, Matter), Instant>>,
}

impl SiteEvents {
    /// Writes with that client.
    pub fn new(client: Client) -> Self {
        let reporter = Reporter {
            controller: "skerry-provider".to_owned(),
            instance: None,
        };
        Self {
            recorder: Recorder::new(client, reporter),
            told: Mutex::default(),
        }
    }

    fn repeats(&self, site: &SiteName, matter: Matter) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.retain(|_, at| at.elapsed() < AGAIN);
        let key = (site.clone(), matter);
        if told.contains_key(&key) {
            return true;
        }
        told.insert(key, Instant::now());
        false
    }
}

#[async_trait::async_trait]
impl Audit for SiteEvents {
    async fn note(&self, peer: &SitePeer, matter: Matter, message: &str) {
        let site = &peer.site;
        if matter.is_warning() {
            tracing::warn!(%site, reason = matter.reason(), message, "a site's certificate needs attention");
            if self.repeats(site, matter) {
                return;
            }
        }
        let event = Event {
            type_: if matter.is_warning() {
                EventType::Warning
            } else {
                EventType::Normal
            },
            reason: matter.reason().to_owned(),
            // At most 1 kB, as the API wants it.
            note: Some(message.chars().take(1_000).collect()),
            action: "Certificate".to_owned(),
            secondary: None,
        };
        let reference = ObjectReference {
            api_version: Some("edge.skerry.dev/v1alpha1".to_owned()),
            kind: Some("Site".to_owned()),
            name: Some(site.to_string()),
            uid: Some(peer.uid.to_string()),
            ..Default::default()
        };
        if let Err(error) = self.recorder.publish(&event, &reference).await {
            tracing::warn!(%site, reason = matter.reason(), %error, "an event could not be written");
        }
    }
}
