//! The edge daemon's metrics.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use skerry_proto::{Class, SiteName};

use crate::store::{DropReason, Lane, LaneUse};

/// Upper bounds in seconds; 0.2 is the target of the link's P99.
const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Labels of a request over the link.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct RequestLabels {
    request: String,
}

/// Labels of dropped reports.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct DropLabels {
    lane: String,
    reason: String,
}

/// Labels of what there is in each lane of the outbox.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct LaneLabels {
    lane: String,
}

/// Labels of what exists once a site.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct SiteLabels {
    node: String,
}

/// Labels of what the site is.
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

/// A tunnel that is open.
struct OpenTunnel(Gauge);

impl Drop for OpenTunnel {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Everything that the daemon counts.
pub struct Metrics {
    /// What `/metrics` shows.
    pub registry: Arc<Mutex<Registry>>,
    site: SiteLabels,
    node_status: Family<SiteLabels, Gauge>,
    requests: Family<RequestLabels, Histogram, fn() -> Histogram>,
    info: Family<InfoLabels, Gauge>,
    heartbeats: Family<ClassLabels, Histogram, fn() -> Histogram>,
    saturated: Gauge,
    shed: Gauge,
    certificate: Gauge<f64, std::sync::atomic::AtomicU64>,
    skew: Gauge<f64, std::sync::atomic::AtomicU64>,
    dropped: Family<DropLabels, Counter>,
    outbox_bytes: Family<LaneLabels, Gauge>,
    store_written: Counter,
    store_syncs: Counter,
    tunnels: Gauge,
    outbox: Gauge,
    pods: Gauge,
    store_bytes: Gauge,
    static_pods: Gauge,
    static_pod_errors: Gauge,
}

impl Metrics {
    /// Registers every metric of this site.
    pub fn new(site: &SiteName) -> Self {
        let mut registry = Registry::default();
        let node_status = Family::<SiteLabels, Gauge>::default();
        registry.register(
            "kubeedge_edge_node_status",
            "1 while the link to the provider is up, 0 while it is not",
            node_status.clone(),
        );
        let requests: Family<RequestLabels, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(|| Histogram::new(BUCKETS));
        registry.register(
            "kubeedge_api_request_duration_seconds",
            "Round trips over the link, from the edge's point of view",
            requests.clone(),
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
            "Round trips of heartbeats, by the class that the site had",
            heartbeats.clone(),
        );
        let (saturated, shed) = (Gauge::default(), Gauge::default());
        registry.register(
            "skerry_uplink_saturated",
            "1 while there is more to send than the uplink takes: best-effort waits",
            saturated.clone(),
        );
        registry.register(
            "skerry_reports_shed",
            "Reports of best-effort pods that were held back for it since the start",
            shed.clone(),
        );
        let certificate = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
        registry.register(
            "kubeedge_certificate_expiry_days",
            "Days until the site's certificate expires, negative when it has",
            certificate.clone(),
        );
        let skew = Gauge::<f64, std::sync::atomic::AtomicU64>::default();
        registry.register(
            "skerry_clock_skew_seconds",
            "How far this machine's clock is ahead of the provider's, negative when behind; 0 before the first contact",
            skew.clone(),
        );
        let dropped = Family::<DropLabels, Counter>::default();
        registry.register(
            "skerry_reports_dropped",
            "Reports to the cloud that were dropped since the store was made, by lane and reason",
            dropped.clone(),
        );
        let outbox_bytes = Family::<LaneLabels, Gauge>::default();
        registry.register(
            "skerry_outbox_bytes",
            "Bytes of the reports that wait for the provider",
            outbox_bytes.clone(),
        );
        let (store_written, store_syncs) = (Counter::default(), Counter::default());
        registry.register(
            "skerry_store_written_bytes",
            "Bytes that the store has written to its file since the daemon started",
            store_written.clone(),
        );
        registry.register(
            "skerry_store_syncs",
            "Syncs of the store's file since the daemon started",
            store_syncs.clone(),
        );
        let tunnels = Gauge::default();
        registry.register(
            "skerry_tunnels",
            "Streams that are served to the cloud",
            tunnels.clone(),
        );
        let (outbox, pods, store_bytes) = (Gauge::default(), Gauge::default(), Gauge::default());
        registry.register(
            "skerry_outbox_reports",
            "Reports that wait for the provider",
            outbox.clone(),
        );
        registry.register("skerry_pods", "Pods in the store", pods.clone());
        registry.register(
            "skerry_store_bytes",
            "Size of the store's file",
            store_bytes.clone(),
        );
        let (static_pods, static_pod_errors) = (Gauge::default(), Gauge::default());
        registry.register(
            "skerry_static_pods",
            "Pods that come from files of this site",
            static_pods.clone(),
        );
        registry.register(
            "skerry_static_pod_errors",
            "Files of static pods that cannot be used",
            static_pod_errors.clone(),
        );
        let site = SiteLabels {
            node: site.to_string(),
        };
        node_status.get_or_create(&site).set(0);
        Self {
            registry: Arc::new(Mutex::new(registry)),
            site,
            node_status,
            requests,
            info,
            heartbeats,
            saturated,
            shed,
            certificate,
            skew,
            dropped,
            outbox_bytes,
            store_written,
            store_syncs,
            tunnels,
            outbox,
            pods,
            store_bytes,
            static_pods,
            static_pod_errors,
        }
    }

    /// Notes whether the link is up.
    pub fn set_link(&self, up: bool) {
        self.node_status.get_or_create(&self.site).set(i64::from(up));
    }

    /// Notes a round trip.
    pub fn observe_request(&self, request: &str, took: Duration) {
        self.requests
            .get_or_create(&RequestLabels {
                request: request.to_owned(),
            })
            .observe(took.as_secs_f64());
    }

    /// Notes the class that the provider named.
    pub fn set_class(&self, class: Class) {
        self.info.clear();
        let labels = InfoLabels {
            node: self.site.node.clone(),
            class: class.as_str(),
        };
        self.info.get_or_create(&labels).set(1);
    }

    /// Notes the round trip of a heartbeat.
    pub fn observe_heartbeat(&self, class: Class, took: Duration) {
        self.observe_request("heartbeat", took);
        let labels = ClassLabels {
            class: class.as_str(),
        };
        self.heartbeats.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Notes whether the uplink is saturated.
    pub fn set_saturated(&self, saturated: bool) {
        self.saturated.set(i64::from(saturated));
    }

    /// Notes how many reports of best-effort pods were held back.
    pub fn set_shed(&self, shed: u64) {
        self.shed.set(i64::try_from(shed).unwrap_or(i64::MAX));
    }

    /// Notes when the certificate expires.
    pub fn set_certificate(&self, seconds_left: i64) {
        #[allow(clippy::cast_precision_loss)]
        self.certificate.set(seconds_left as f64 / 86_400.0);
    }

    /// Notes how far the local clock is ahead.
    pub fn set_skew(&self, ahead: Option<jiff::SignedDuration>) {
        self.skew.set(ahead.unwrap_or_default().as_secs_f64());
    }

    /// Counts a tunnel until the answer is dropped.
    pub fn tunnel(&self) -> impl Drop + Send + use<> {
        self.tunnels.inc();
        OpenTunnel(self.tunnels.clone())
    }

    /// Notes how full the outbox is and what was dropped.
    pub fn set_outbox(&self, used: &[LaneUse; 4], drops: &[(Lane, DropReason, u64)]) {
        for (lane, used) in Lane::ALL.iter().zip(used) {
            let lane = lane.name().to_owned();
            self.outbox_bytes
                .get_or_create(&LaneLabels { lane })
                .set(i64::try_from(used.bytes).unwrap_or(i64::MAX));
        }
        for (lane, reason, count) in drops {
            let labels = DropLabels {
                lane: lane.name().to_owned(),
                reason: reason.name().to_owned(),
            };
            // The store counts; this only shows it.
            let shown = self.dropped.get_or_create(&labels);
            shown.inc_by(count.saturating_sub(shown.get()));
        }
    }

    /// Notes what went to the disk since the start.
    pub fn set_store_traffic(&self, bytes: u64, syncs: u64) {
        self.store_written
            .inc_by(bytes.saturating_sub(self.store_written.get()));
        self.store_syncs
            .inc_by(syncs.saturating_sub(self.store_syncs.get()));
    }

    /// Notes how many static pods there are, and how many of their files cannot be used.
    pub fn set_static_pods(&self, pods: usize, errors: usize) {
        self.static_pods.set(i64::try_from(pods).unwrap_or(i64::MAX));
        self.static_pod_errors
            .set(i64::try_from(errors).unwrap_or(i64::MAX));
    }

    /// Notes what the store holds.
    pub fn set_store(&self, outbox: u64, pods: usize, bytes: u64) {
        self.outbox.set(i64::try_from(outbox).unwrap_or(i64::MAX));
        self.pods.set(i64::try_from(pods).unwrap_or(i64::MAX));
        self.store_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}
