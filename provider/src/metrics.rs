//! The provider's metrics.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use skerry_proto::SiteName;

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

/// Labels of a certificate.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct CertificateLabels {
    certificate: String,
}

/// Everything that the provider counts.
pub struct Metrics {
    /// What `/metrics` shows.
    pub registry: Arc<Mutex<Registry>>,
    node_status: Family<SiteLabels, Gauge>,
    tunnels: Family<SiteLabels, Gauge>,
    drops: Family<DropLabels, Gauge>,
    serving_by_cluster: Gauge,
    serving_expiry: Gauge,
    requests: Family<RequestLabels, Histogram, fn() -> Histogram>,
    certificates: Family<CertificateLabels, Gauge<f64, std::sync::atomic::AtomicU64>>,
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
            tunnels,
            drops,
            serving_by_cluster,
            serving_expiry,
            requests,
            certificates,
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

    /// Drops what was said of a site that was deleted.
    pub fn forget_site(&self, site: &SiteName) {
        self.node_status.remove(&SiteLabels {
            node: site.to_string(),
        });
    }

    /// Notes an answer of the Kubernetes API; `code` is 0 when none came.
    pub fn observe_request(&self, method: &http::Method, code: u16, took: Duration) {
        let labels = RequestLabels {
            method: method.to_string(),
            code: code.to_string(),
        };
        self.requests.get_or_create(&labels).observe(took.as_secs_f64());
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
