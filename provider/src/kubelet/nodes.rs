//! Paths about a whole node: what the provider knows itself, and what it asks the site.
//!
//! Measurements are asked for once in a few seconds at most and shared: any number of scrapers cost a site's link no
//! more than one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderValue, Method, Response, StatusCode, Uri, header};
use serde_json::{Value, json};
use skerry_proto::SiteName;
use skerry_proto::limits::MAX_QUERY_ANSWER_BYTES;
use skerry_proto::link::query_target::What;
use skerry_proto::link::{QueryTarget, open_tunnel::Target};
use skerry_proto::object::decompress;
use skerry_proto::stats::{ContainerStats, NodeStats, PodStats, Snapshot, Summary};
use skerry_telemetry::exposition;
use tokio::time::Instant;

use super::routes::{NodePath, PodPath, Refusal};
use super::server::{Body, full};
use super::{cadvisor, resource};
use crate::link::tunnels::Tunnels;

/// How long a measurement is shared.
const SHARED: Duration = Duration::from_secs(5);

/// Knows the pods of a node.
pub trait NodeDirectory: Send + Sync + 'static {
    /// Every pod that is bound to the site, as the API server has it.
    fn pods(&self, site: &SiteName) -> Vec<Value>;
}

type Measured = Arc<tokio::sync::Mutex<Option<(Instant, Arc<Snapshot>)>>>;

/// Answers for nodes.
pub(super) struct Nodes {
    tunnels: Tunnels,
    directory: Arc<dyn NodeDirectory>,
    measured: Mutex<HashMap<SiteName, Measured>>,
}

impl Nodes {
    pub(super) fn new(tunnels: Tunnels, directory: Arc<dyn NodeDirectory>) -> Self {
        Self {
            tunnels,
            directory,
            measured: Mutex::default(),
        }
    }

    /// Answers a path about the node `site`.
    pub(super) async fn serve(
        &self,
        site: &SiteName,
        path: NodePath,
        method: &Method,
        uri: &Uri,
    ) -> Result<Response<Body>, Refusal> {
        let get_only = |path: NodePath| !matches!(path, NodePath::StatsSummary | NodePath::Logs);
        if *method != Method::GET && (get_only(path) || *method != Method::POST) {
            let text = "405: Method Not Allowed\n";
            return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, text));
        }
        match path {
            NodePath::Pods => Ok(json_answer(&list(self.directory.pods(site)))),
            NodePath::RunningPods => {
                let text = self.ask(site, What::RunningPods).await?;
                let pods: Vec<Value> = serde_json::from_slice(&text).map_err(|_| garbled(site))?;
                Ok(json_answer(&list(pods)))
            }
            NodePath::StatsSummary => {
                let snapshot = self.snapshot(site).await?;
                let brief = uri.query().is_some_and(|query| {
                    form_urlencoded::parse(query.as_bytes()).any(|(key, value)| {
                        key == "only_cpu_and_memory" && value.parse::<bool>().unwrap_or(value == "1")
                    })
                });
                let summary = match brief {
                    true => serde_json::to_value(only_cpu_and_memory(&snapshot.summary)),
                    false => serde_json::to_value(&snapshot.summary),
                };
                // Numbers and text only: it can always be written.
                Ok(json_answer(&summary.unwrap_or_default()))
            }
            NodePath::Metrics => Ok(metrics(self.ask(site, What::NodeMetrics).await?)),
            NodePath::MetricsProbes => Ok(metrics(self.ask(site, What::ProbeMetrics).await?)),
            NodePath::MetricsSlis => Ok(metrics(self.slis(site).await)),
            // A node that cannot be measured answers that, and no error: the scrape itself has worked.
            NodePath::MetricsResource => Ok(metrics(match self.snapshot(site).await {
                Ok(snapshot) => resource::render(&snapshot),
                Err(refusal) if refusal.status == StatusCode::SERVICE_UNAVAILABLE => return Err(refusal),
                Err(refusal) => {
                    tracing::warn!(%site, error = refusal.text, "a node could not be measured");
                    resource::render_failure()
                }
            })),
            NodePath::MetricsCadvisor => Ok(metrics(cadvisor::render(&*self.snapshot(site).await?))),
            NodePath::Configz => {
                let text = self.ask(site, What::Config).await?;
                let config: Value = serde_json::from_slice(&text).map_err(|_| garbled(site))?;
                Ok(json_answer(&json!({"kubeletconfig": config})))
            }
            NodePath::Logs => Err(Refusal::new(
                StatusCode::NOT_IMPLEMENTED,
                format!(
                    "node {site} does not serve /logs/: system logs of a site are not read through the cluster; use \
                     kubectl logs for containers, and the site's own journal for its system\n"
                ),
            )),
        }
    }

    /// `/healthz` of a node: the site's own word.
    pub(super) async fn health(&self, site: &SiteName) -> Result<(), Refusal> {
        self.ask(site, What::Health).await.map(drop)
    }

    /// `/run/...`: a command to its end.
    pub(super) async fn run(
        &self,
        site: &SiteName,
        path: &PodPath,
        uri: &Uri,
    ) -> Result<Response<Body>, Refusal> {
        let query = uri.query().unwrap_or_default();
        let command = form_urlencoded::parse(query.as_bytes())
            .find(|(key, _)| key == "cmd")
            .map(|(_, value)| value.split(' ').map(str::to_owned).collect::<Vec<_>>())
            .filter(|words| words.iter().any(|word| !word.is_empty()))
            .ok_or_else(|| Refusal::new(StatusCode::BAD_REQUEST, "you must specify a command: ?cmd=\n"))?;
        let target = QueryTarget {
            what: What::Run.into(),
            namespace: path.namespace.clone(),
            pod: path.pod.clone(),
            uid: path.uid.clone(),
            container: path.container.clone(),
            command,
        };
        let output = self.read(site, target).await?;
        let mut response = Response::new(full(output));
        set_type(&mut response, "text/plain; charset=utf-8");
        Ok(response)
    }

    async fn slis(&self, site: &SiteName) -> String {
        let healthy = self.ask(site, What::Health).await.is_ok();
        let mut out = exposition::Exposition::default();
        let help = "[STABLE] This metric records the result of a single healthcheck.";
        let value = Some(f64::from(u8::from(healthy)));
        out.family("kubernetes_healthcheck", "gauge", help).sample(
            &[("name", "syncloop"), ("type", "healthz")],
            value,
            None,
        );
        out.finish()
    }

    async fn snapshot(&self, site: &SiteName) -> Result<Arc<Snapshot>, Refusal> {
        let slot = {
            let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
            // What nobody holds and is old is of no use any more.
            if measured.len() > 64 && !measured.contains_key(site) {
                measured.retain(|_, slot| {
                    Arc::strong_count(slot) > 1
                        || slot
                            .try_lock()
                            .is_ok_and(|s| s.as_ref().is_some_and(|(at, _)| at.elapsed() < SHARED))
                });
            }
            Arc::clone(measured.entry(site.clone()).or_default())
        };
        let mut slot = slot.lock().await;
        if let Some((at, snapshot)) = &*slot
            && at.elapsed() < SHARED
        {
            return Ok(Arc::clone(snapshot));
        }
        let text = self.ask(site, What::Stats).await?;
        let snapshot: Snapshot = serde_json::from_slice(&text).map_err(|_| garbled(site))?;
        let snapshot = Arc::new(snapshot);
        *slot = Some((Instant::now(), Arc::clone(&snapshot)));
        Ok(snapshot)
    }

    /// Asks the site; its answer, unpacked.
    async fn ask(&self, site: &SiteName, what: What) -> Result<Vec<u8>, Refusal> {
        let target = QueryTarget {
            what: what.into(),
            ..QueryTarget::default()
        };
        let packed = self.read(site, target).await?;
        decompress(&packed, MAX_QUERY_ANSWER_BYTES).map_err(|_| garbled(site))
    }

    async fn read(&self, site: &SiteName, target: QueryTarget) -> Result<Bytes, Refusal> {
        let opened = self.tunnels.open(site, Target::Query(target)).await;
        let mut tunnel = opened.map_err(|error| Refusal::new(error.http_status(), format!("{error}\n")))?;
        let mut answer = BytesMut::new();
        while let Some(part) = tunnel.incoming.recv().await {
            let part = part.map_err(|error| Refusal::new(StatusCode::BAD_GATEWAY, format!("{error}\n")))?;
            if answer.len() + part.len() > MAX_QUERY_ANSWER_BYTES {
                return Err(garbled(site));
            }
            answer.extend_from_slice(&part);
        }
        Ok(answer.freeze())
    }
}

/// Hostile bytes as a site's answers to questions about its node.
pub(crate) fn any_answer(bytes: &[u8]) {
    let text = decompress(bytes, MAX_QUERY_ANSWER_BYTES);
    let text = text.as_deref().unwrap_or(bytes);
    let _ = serde_json::from_slice::<Vec<Value>>(text).map(list);
    if let Ok(snapshot) = serde_json::from_slice::<Snapshot>(text) {
        let _ = serde_json::to_value(only_cpu_and_memory(&snapshot.summary));
        let _ = (resource::render(&snapshot), cadvisor::render(&snapshot));
    }
}

fn garbled(site: &SiteName) -> Refusal {
    let text =
        format!("site {site} gave an answer that cannot be read; do provider and edge fit together?\n");
    Refusal::new(StatusCode::BAD_GATEWAY, text)
}

fn list(items: Vec<Value>) -> Value {
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
}

/// The summary as `only_cpu_and_memory` wants it: names, start times, processors, memory.
fn only_cpu_and_memory(summary: &Summary) -> Summary {
    let brief = |one: &ContainerStats| ContainerStats {
        name: one.name.clone(),
        start_time: one.start_time,
        cpu: one.cpu.clone(),
        memory: one.memory.clone(),
        ..ContainerStats::default()
    };
    let node = &summary.node;
    Summary {
        node: NodeStats {
            node_name: node.node_name.clone(),
            system_containers: node.system_containers.iter().map(brief).collect(),
            start_time: node.start_time,
            cpu: node.cpu.clone(),
            memory: node.memory.clone(),
            ..NodeStats::default()
        },
        pods: summary
            .pods
            .iter()
            .map(|pod| PodStats {
                pod_ref: pod.pod_ref.clone(),
                start_time: pod.start_time,
                containers: pod.containers.iter().map(brief).collect(),
                cpu: pod.cpu.clone(),
                memory: pod.memory.clone(),
                ..PodStats::default()
            })
            .collect(),
    }
}

fn json_answer(value: &Value) -> Response<Body> {
    let mut response = Response::new(full(value.to_string()));
    set_type(&mut response, "application/json");
    response
}

fn metrics(text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(text));
    set_type(&mut response, exposition::CONTENT_TYPE);
    response
}

fn set_type(response: &mut Response<Body>, kind: &'static str) {
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
}
