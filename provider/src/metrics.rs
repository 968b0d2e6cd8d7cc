//! The provider's metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use skerry_proto::link::{Heartbeat, heartbeat};
use skerry_proto::{Class, SiteName};

/// Upper bounds in seconds; 0.2 is the target of the API's P99.
const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Labels of a per-site metric.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct SiteLabels {
    node: String,
}

/// Labels of what a site has dropped.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct DropLabels {
    node: String,
    lane: String,
    reason: String,
}

/// Labels of a request to the Kubernetes API.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RequestLabels {
    method: String,
    code: String,
}

/// Labels of what a site is.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct InfoLabels {
    node: String,
    class: &'static str,
}

/// Labels of what is counted by class.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct ClassLabels {
    class: &'static str,
}

/// Labels of a certificate.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct CertificateLabels {
    certificate: String,
}

impl InfoLabels {
    fn of(site: &SiteName, class: Class) -> Self {
        Self {
            node: site.to_string(),
            class: class.as_str(),
        }
    }
}

/// Everything that the provider counts.
pub struct Metrics {
    /// What `/metrics` shows.
    pub registry: Arc<Mutex<Registry>>,
    node_status: Family<SiteLabels, Gauge>,
    info: Family<InfoLabels, Gauge>,
    heartbeats: Family<ClassLabels, Histogram, fn() -> Histogram>,
    saturated: Family<SiteLabels, Gauge>,
    shed: Family<SiteLabels, Gauge>,
    used_today: Family<SiteLabels, Gauge>,
    deferring: Family<SiteLabels, Gauge>,
    tunnels: Family<SiteLabels, Gauge>,
    drops: Family<DropLabels, Gauge>,
    serving_by_cluster: Gauge,
    serving_expiry: Gauge,
    requests: Family<RequestLabels, Histogram, fn() -> Histogram>,
    certificates: Family<CertificateLabels, Gauge<f64, std::sync::atomic::AtomicU64>>,
    /// Sites among `certificates`.
    site_certificates: Mutex<BTreeSet<String>>,
    synced: Family<SiteLabels, Gauge>,
    divergences: Family<SiteLabels, Counter>,
    /// Sessions begun since the start.
    pub sessions: Counter,
    /// Sites that were told to come back later, because too many came at once.
    pub link_shed: Counter,
    /// Connections whose TLS handshake failed.
    pub link_refused: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Registers every metric.
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let node_status = Family::<SiteLabels, Gauge>::default();
        registry.register(
            "kubeedge_edge_node_status",
            "1 while the site's link is up, 0 while it is not",
            node_status.clone(),
        );
        let info = Family::<InfoLabels, Gauge>::default();
        registry.register(
            "skerry_site_info",
            "1 for the class that the site has",
            info.clone(),
        );
        let heartbeats: Family<ClassLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(BUCKETS));
        registry.register(
            "skerry_heartbeat_round_trip_seconds",
            "Round trips of heartbeats as the sites measured them, by class",
            heartbeats.clone(),
        );
        let by_site = Family::<SiteLabels, Gauge>::default;
        let (saturated, shed, used_today, deferring) = (by_site(), by_site(), by_site(), by_site());
        registry.register(
            "skerry_site_link_bytes_today",
            "TCP payload that the site's link has carried since midnight UTC, both ways",
            used_today.clone(),
        );
        registry.register(
            "skerry_site_link_deferring",
            "1 while the site's link profile (budget, quiet hours) lets all wait that can",
            deferring.clone(),
        );
        registry.register(
            "skerry_site_uplink_saturated",
            "1 while the site has more to send than its uplink takes: best-effort waits",
            saturated.clone(),
        );
        registry.register(
            "skerry_site_reports_shed",
            "Reports of best-effort pods that the site has held back for it since its daemon started",
            shed.clone(),
        );
        let (serving_by_cluster, serving_expiry) = (Gauge::default(), Gauge::default());
        registry.register(
            "skerry_kubelet_certificate_by_cluster",
            "1 while the kubelet API shows a certificate of the cluster's signer, 0 while one of Skerry's own CA",
            serving_by_cluster.clone(),
        );
        registry.register(
            "skerry_kubelet_certificate_by_cluster_expiry_timestamp_seconds",
            "When that certificate expires, seconds since 1970; 0 when there is none",
            serving_expiry.clone(),
        );
        let tunnels = Family::<SiteLabels, Gauge>::default();
        registry.register(
            "skerry_tunnels",
            "Streams that are open to the site; sites without any are not shown",
            tunnels.clone(),
        );
        let drops = Family::<DropLabels, Gauge>::default();
        registry.register(
            "skerry_site_reports_dropped",
            "Reports that the site has dropped since its store was made, by lane and reason",
            drops.clone(),
        );
        let requests: Family<RequestLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(BUCKETS));
        registry.register(
            "kubeedge_api_request_duration_seconds",
            "Time from sending a request to the Kubernetes API until the head of its answer",
            requests.clone(),
        );
        let certificates = Family::<CertificateLabels, Gauge<f64, std::sync::atomic::AtomicU64>>::default();
        registry.register(
            "kubeedge_certificate_expiry_days",
            "Days until the certificate expires, negative when it has",
            certificates.clone(),
        );
        let synced = Family::<SiteLabels, Gauge>::default();
        registry.register(
            "skerry_link_synced_timestamp_seconds",
            "When the site's store was last shown to hold what it should, seconds since 1970",
            synced.clone(),
        );
        let divergences = Family::<SiteLabels, Counter>::default();
        registry.register(
            "skerry_link_divergences",
            "How often the site's store was found to hold something else than it should",
            divergences.clone(),
        );
        let sessions = Counter::default();
        registry.register(
            "skerry_sessions",
            "Sessions that sites have begun",
            sessions.clone(),
        );
        let (link_shed, link_refused) = (Counter::default(), Counter::default());
        registry.register(
            "skerry_link_shed",
            "Sites that were told to come back later, because too many came at once",
            link_shed.clone(),
        );
        registry.register(
            "skerry_link_handshakes_refused",
            "Connections whose TLS handshake failed or took too long",
            link_refused.clone(),
        );
        Self {
            registry: Arc::new(Mutex::new(registry)),
            node_status,
            info,
            heartbeats,
            saturated,
            shed,
            used_today,
            deferring,
            tunnels,
            drops,
            serving_by_cluster,
            serving_expiry,
            requests,
            certificates,
            site_certificates: Mutex::default(),
            synced,
            divergences,
            sessions,
            link_shed,
            link_refused,
        }
    }

    /// Notes whether a site's link is up.
    pub fn set_site(&self, site: &SiteName, online: bool) {
        self.node_status
            .get_or_create(&SiteLabels {
                node: site.to_string(),
            })
            .set(i64::from(online));
    }

    /// Notes whether the kubelet API shows a certificate of the cluster's signer, and until when it is good.
    pub fn set_serving_by_cluster(&self, not_after: Option<jiff::Timestamp>) {
        self.serving_by_cluster.set(i64::from(not_after.is_some()));
        self.serving_expiry
            .set(not_after.map_or(0, jiff::Timestamp::as_second));
    }

    /// Notes what a site has dropped, by lane and reason.
    pub fn set_drops(&self, site: &SiteName, drops: &BTreeMap<(String, String), u64>) {
        for ((lane, reason), count) in drops {
            let labels = DropLabels {
                node: site.to_string(),
                lane: lane.clone(),
                reason: reason.clone(),
            };
            self.drops
                .get_or_create(&labels)
                .set(i64::try_from(*count).unwrap_or(i64::MAX));
        }
    }

    /// Drops what was said of what a site has dropped.
    pub fn forget_drops(&self, site: &SiteName, drops: &BTreeMap<(String, String), u64>) {
        for (lane, reason) in drops.keys() {
            self.drops.remove(&DropLabels {
                node: site.to_string(),
                lane: lane.clone(),
                reason: reason.clone(),
            });
        }
    }

    /// Notes how many streams are open, by site.
    pub fn set_tunnels(&self, open: impl IntoIterator<Item = (SiteName, usize)>) {
        self.tunnels.clear();
        for (site, count) in open {
            let labels = SiteLabels {
                node: site.to_string(),
            };
            self.tunnels
                .get_or_create(&labels)
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Notes what class a site has.
    pub fn set_class(&self, site: &SiteName, class: Class) {
        for other in Class::ALL.into_iter().filter(|other| *other != class) {
            self.info.remove(&InfoLabels::of(site, other));
        }
        self.info.get_or_create(&InfoLabels::of(site, class)).set(1);
    }

    /// Notes the round trip of a heartbeat.
    pub fn observe_heartbeat(&self, class: Class, took: Duration) {
        let labels = ClassLabels {
            class: class.as_str(),
        };
        self.heartbeats.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Notes what a heartbeat says of the uplink.
    pub fn set_uplink(&self, site: &SiteName, beat: &Heartbeat) {
        let int = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let labels = SiteLabels {
            node: site.to_string(),
        };
        let deferring = beat.deferring() != heartbeat::Deferring::Not;
        self.saturated
            .get_or_create(&labels)
            .set(i64::from(beat.saturated));
        self.shed.get_or_create(&labels).set(int(beat.shed));
        self.used_today.get_or_create(&labels).set(int(beat.used_today));
        self.deferring.get_or_create(&labels).set(i64::from(deferring));
    }

    /// Notes that the site's store was shown to hold what it should.
    pub fn set_synced(&self, site: &SiteName, at: jiff::Timestamp) {
        self.synced.get_or_create(&labels(site)).set(at.as_second());
    }

    /// Counts that the site's store holds something else than it should.
    pub fn count_divergence(&self, site: &SiteName) {
        self.divergences.get_or_create(&labels(site)).inc();
    }

    /// Drops what was said of a site that was deleted.
    pub fn forget_site(&self, site: &SiteName) {
        let labels = labels(site);
        for gauge in [&self.saturated, &self.shed, &self.used_today, &self.deferring] {
            gauge.remove(&labels);
        }
        for class in Class::ALL {
            self.info.remove(&InfoLabels::of(site, class));
        }
        self.node_status.remove(&labels);
        self.synced.remove(&labels);
        self.divergences.remove(&labels);
    }

    /// Notes an answer of the Kubernetes API; `code` is 0 when none came.
    pub fn observe_request(&self, method: &http::Method, code: u16, took: Duration) {
        let labels = RequestLabels {
            method: method.to_string(),
            code: code.to_string(),
        };
        self.requests.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Notes how many seconds the certificates of all sites are still good; negative when they have expired.
    pub fn set_site_certificates<'a>(&self, all: impl IntoIterator<Item = (&'a SiteName, i64)>) {
        let mut known = self
            .site_certificates
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut gone = std::mem::take(&mut *known);
        for (site, left) in all {
            let name = format!("site/{site}");
            self.set_certificate(&name, left);
            gone.remove(&name);
            known.insert(name);
        }
        for certificate in gone {
            self.certificates.remove(&CertificateLabels { certificate });
        }
    }

    /// Notes when a certificate expires.
    pub fn set_certificate(&self, name: &str, seconds_left: i64) {
        #[allow(clippy::cast_precision_loss)]
        let days = seconds_left as f64 / 86_400.0;
        self.certificates
            .get_or_create(&CertificateLabels {
                certificate: name.to_owned(),
            })
            .set(days);
    }
}

fn labels(site: &SiteName) -> SiteLabels {
    SiteLabels {
        node: site.to_string(),
    }
}
