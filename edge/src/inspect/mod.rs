//! Answers the kubelet API's questions about the node: measurements, metrics, settings, what runs, health.
//!
//! In comes a kind of question ([`What`]), out goes its answer as bytes, compressed for the link. The provider words
//! measurements as the kubelet's endpoints do; what only the edge can count (calls of the runtime, starts of pods) is
//! worded here.
//!
//! What must always hold: nothing is measured or counted up unless asked, beyond counters that are incremented where
//! things happen.

mod config;
mod metrics;

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use http::StatusCode;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use skerry_proto::link::query_target::What;
use skerry_proto::object::compress;
use tokio::sync::watch;

pub use config::{ConfigFacts, kubelet_configuration};

use crate::pods::{ProbeMetrics, Summary};
use crate::runtime::{ContainerState, Inventory, Runtime, SandboxState};
use crate::stats::{SCRAPE_AGE, Stats};
use crate::streams::{Queries, StreamError};

/// What the answers are made from.
pub struct Inspect {
    /// The Node's name.
    pub node_name: String,
    /// Measures.
    pub stats: Stats,
    /// Knows what runs.
    pub runtime: Arc<dyn Runtime>,
    /// The pods in numbers.
    pub pods: watch::Receiver<Summary>,
    /// Counters under the kubelet's names.
    pub registry: Arc<Mutex<Registry>>,
    /// Counters of probes.
    pub probes: Arc<ProbeMetrics>,
    /// A `KubeletConfiguration`.
    pub config: Value,
}

fn failed(error: &dyn std::fmt::Display) -> StreamError {
    StreamError {
        status: StatusCode::INTERNAL_SERVER_ERROR,
        message: error.to_string(),
    }
}

#[async_trait]
impl Queries for Inspect {
    async fn answer(&self, what: What) -> Result<Vec<u8>, StreamError> {
        let text = match what {
            What::Stats => {
                let snapshot = self.stats.snapshot(SCRAPE_AGE).await?;
                serde_json::to_string(&*snapshot).map_err(|error| failed(&error))?
            }
            What::NodeMetrics => self.metrics().await?,
            What::ProbeMetrics => self.probe_metrics(),
            What::Config => self.config.to_string(),
            What::RunningPods => Value::from(running_pods(&self.runtime.list().await?)).to_string(),
            What::Health => self.health()?.to_owned(),
            What::Run | What::Unspecified => {
                return Err(StreamError {
                    status: StatusCode::NOT_IMPLEMENTED,
                    message: "this edge daemon does not know the question; update it".to_owned(),
                });
            }
        };
        compress(text.as_bytes()).map_err(|error| failed(&error))
    }
}

impl Inspect {
    /// The site does its work: it has read its runtime, and the runtime answers.
    fn health(&self) -> Result<&'static str, StreamError> {
        let summary = self.pods.borrow();
        if !summary.runtime_error.is_empty() {
            return Err(failed(&summary.runtime_error));
        }
        if !summary.synced {
            return Err(failed(&"the runtime's containers have not been read yet"));
        }
        Ok("ok")
    }

    async fn metrics(&self) -> Result<String, StreamError> {
        let inventory = self.runtime.list().await?;
        Ok(metrics::render(self, &inventory))
    }

    fn probe_metrics(&self) -> String {
        let mut text = self.probes.text();
        text.push_str(&metrics::process_start());
        text
    }
}

/// Pods with a ready sandbox or a running container, with as much of a Pod as the runtime knows.
fn running_pods(inventory: &Inventory) -> Vec<Value> {
    let running = |state: &ContainerState| matches!(state, ContainerState::Running { .. });
    let ready = inventory
        .sandboxes
        .iter()
        .filter(|sandbox| sandbox.state == SandboxState::Ready);
    ready
        .map(|sandbox| {
            let mine = inventory
                .containers
                .iter()
                .filter(|one| one.sandbox == sandbox.id && running(&one.state));
            let containers: Vec<Value> = mine
                .map(|one| json!({"name": one.name, "image": one.image_ref, "resources": {}}))
                .collect();
            json!({
                "metadata": {
                    "name": sandbox.pod_name, "namespace": sandbox.pod_namespace, "uid": sandbox.pod_uid.as_str(),
                    "creationTimestamp": sandbox.created_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
                },
                "spec": {"containers": containers},
                "status": {},
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pods::fixtures;

    #[test]
    fn running_pods_are_those_of_the_runtime() {
        let running = fixtures::container("c", "1", 0, fixtures::running(0));
        let ended = fixtures::container("d", "2", 0, fixtures::exited(0, 0));
        let inventory = Inventory {
            sandboxes: vec![fixtures::sandbox("s", 0)],
            containers: vec![running, ended],
        };
        let pods = running_pods(&inventory);
        assert_eq!(pods.len(), 1);
        assert_eq!(pods[0]["metadata"]["uid"], fixtures::UID);
        let containers = pods[0]["spec"]["containers"].as_array().unwrap();
        assert_eq!(containers.len(), 1);
        assert_eq!(containers[0]["name"], "c");
    }
}
