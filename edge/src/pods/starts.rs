//! How long pods take to start, under the kubelet's metric names.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::trace::Steps;

/// Upper bounds in seconds, the kubelet's.
const BUCKETS: [f64; 25] = [
    0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0, 360.0,
    480.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0,
];

/// A pod on its way.
#[derive(Clone, Copy, Debug, Default)]
struct Starting {
    /// When it was `Pending` first.
    seen: Option<Timestamp>,
    pulling: Duration,
}

/// Measures the starts of pods that came while this daemon ran. Clones count together.
#[derive(Clone, Debug)]
pub struct Starts {
    starting: Arc<Mutex<HashMap<String, Starting>>>,
    seen: Histogram,
    total: Histogram,
    sli: Histogram,
    steps: Steps,
}

impl Default for Starts {
    fn default() -> Self {
        Self {
            starting: Arc::default(),
            seen: Histogram::new(BUCKETS),
            total: Histogram::new(BUCKETS),
            sli: Histogram::new(BUCKETS),
            steps: Steps::default(),
        }
    }
}

impl Starts {
    /// Shows the histograms in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "kubelet_pod_start_duration_seconds",
            "Duration in seconds from the node seeing a pod for the first time to the pod starting to run",
            self.seen.clone(),
        );
        registry.register(
            "kubelet_pod_start_total_duration_seconds",
            "Duration in seconds to start a pod since creation, including time to pull images and run init containers",
            self.total.clone(),
        );
        registry.register(
            "kubelet_pod_start_sli_duration_seconds",
            "Duration in seconds to start a pod without init containers since creation, excluding time to pull images",
            self.sli.clone(),
        );
        self.steps.register(registry);
    }

    /// Durations by step.
    pub(super) fn steps(&self) -> &Steps {
        &self.steps
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Starting>> {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pod's phase; `first`: no status of it was ever told.
    pub(super) fn phase(&self, pod: &Pod, first: bool, new: &str, now: Timestamp) {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let mut all = self.lock();
        if first {
            all.entry(uid.to_owned()).or_default().seen.get_or_insert(now);
        }
        if new == "Pending" {
            return;
        }
        // Only one that was told of while it started has been seen.
        let Some(starting) = all.remove(uid).filter(|starting| starting.seen.is_some()) else {
            return;
        };
        drop(all);
        let Some(created) = pod.metadata.creation_timestamp.as_ref() else {
            return;
        };
        if new != "Running" {
            return;
        }
        let since = |from: Timestamp| Duration::try_from(now.duration_since(from)).unwrap_or_default();
        self.seen
            .observe(since(starting.seen.unwrap_or(now)).as_secs_f64());
        let total = since(created.0);
        self.total.observe(total.as_secs_f64());
        let has_init = pod
            .spec
            .as_ref()
            .is_some_and(|spec| spec.init_containers.as_ref().is_some_and(|all| !all.is_empty()));
        if !has_init {
            self.sli
                .observe(total.saturating_sub(starting.pulling).as_secs_f64());
        }
    }

    /// An image of the pod was pulled.
    pub(super) fn pulled(&self, uid: &str, took: Duration) {
        self.lock().entry(uid.to_owned()).or_default().pulling += took;
    }

    /// A pod is gone, started or not.
    pub(super) fn forget(&self, uid: &str) {
        self.lock().remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::fixtures::{at, pod};
    use serde_json::json;

    fn shown(starts: &Starts) -> String {
        let mut registry = Registry::default();
        starts.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }

    fn created() -> Pod {
        let mut pod = pod(json!({"containers": [{"name": "c"}]}));
        pod.metadata.creation_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(0)));
        pod
    }

    #[test]
    fn a_start_is_measured_from_creation_and_the_pull_is_taken_off() {
        let starts = Starts::default();
        let pod = created();
        starts.phase(&pod, true, "Pending", at(1));
        starts.pulled(pod.metadata.uid.as_deref().unwrap(), Duration::from_secs(3));
        starts.phase(&pod, false, "Running", at(5));
        starts.phase(&pod, false, "Running", at(50));
        let text = shown(&starts);
        for line in [
            "kubelet_pod_start_duration_seconds_sum 4.0",
            "kubelet_pod_start_total_duration_seconds_sum 5.0",
            "kubelet_pod_start_sli_duration_seconds_sum 2.0",
            "kubelet_pod_start_sli_duration_seconds_count 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_pod_that_was_running_before_the_daemon_started_is_no_start() {
        let starts = Starts::default();
        starts.phase(&created(), false, "Running", at(5));
        assert!(shown(&starts).contains("kubelet_pod_start_duration_seconds_count 0"));
    }
}
