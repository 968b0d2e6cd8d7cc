//! A runtime and pods in memory for the tests of this room.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use skerry_proto::link::open_tunnel::Target;
use skerry_proto::link::{LogsTarget, TunnelFrame};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::{PodLookup, Streams};
use crate::runtime::*;

/// One container `c` of pod `ns/p`; whatever a stream does not need is unsupported.
pub(super) struct FakeRuntime {
    container: Mutex<Container>,
    changes: watch::Sender<u64>,
    /// What exec and attach answer, once.
    pub(super) endpoint: Mutex<Option<StreamEndpoint>>,
}

impl FakeRuntime {
    pub(super) fn with_container(log_path: &Path, running: bool) -> Arc<Self> {
        let started_at = Timestamp::UNIX_EPOCH;
        let container = Container {
            id: ContainerId("id".into()),
            sandbox: SandboxId("s".into()),
            pod_uid: "u".into(),
            name: "c".into(),
            restart_count: 0,
            spec_hash: String::new(),
            state: ContainerState::Running { started_at },
            created_at: started_at,
            image: String::new(),
            image_ref: String::new(),
            log_path: log_path.to_owned(),
            annotations: Default::default(),
            user: None,
        };
        let runtime = Arc::new(Self {
            container: Mutex::new(container),
            changes: watch::Sender::new(0),
            endpoint: Mutex::default(),
        });
        if !running {
            runtime.exit();
        }
        runtime
    }

    pub(super) fn exit(&self) {
        self.container.lock().unwrap().state = ContainerState::Exited {
            started_at: None,
            finished_at: Timestamp::UNIX_EPOCH,
            code: 0,
            reason: "Completed".into(),
            message: String::new(),
        };
        self.changes.send_modify(|count| *count += 1);
    }

    fn take_endpoint(&self) -> Result<StreamEndpoint, RuntimeError> {
        self.endpoint.lock().unwrap().take().ok_or_else(unsupported)
    }
}

fn unsupported() -> RuntimeError {
    RuntimeError::Unsupported {
        runtime: "fake",
        what: "this".into(),
    }
}

struct OnePod;

impl PodLookup for OnePod {
    fn pod(&self, namespace: &str, name: &str) -> Option<Pod> {
        let pod = json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {"containers": [{"name": "c"}]}
        });
        (namespace == "ns" && name == "p").then(|| serde_json::from_value(pod).unwrap())
    }
}

pub(super) fn pods() -> Arc<dyn PodLookup> {
    Arc::new(OnePod)
}

pub(super) fn logs_target() -> LogsTarget {
    LogsTarget {
        namespace: "ns".into(),
        pod: "p".into(),
        container: "c".into(),
        ..LogsTarget::default()
    }
}

/// Serves one tunnel in a task.
pub(super) fn run(
    runtime: Arc<FakeRuntime>,
    pods: Arc<dyn PodLookup>,
    target: Target,
) -> (mpsc::Sender<Bytes>, mpsc::Receiver<TunnelFrame>, JoinHandle<()>) {
    let (to_edge, incoming) = mpsc::channel(8);
    let (out, frames) = mpsc::channel(8);
    let streams = Streams::new(runtime, pods, "/nonexistent".into());
    let task = tokio::spawn(async move { streams.run(target, incoming, out).await });
    (to_edge, frames, task)
}

#[async_trait]
impl Runtime for FakeRuntime {
    fn scheme(&self) -> &'static str {
        "fake"
    }

    fn isolated(&self) -> bool {
        true
    }

    async fn version(&self) -> Result<RuntimeVersion, RuntimeError> {
        Err(unsupported())
    }

    async fn status(&self) -> Result<RuntimeStatus, RuntimeError> {
        Err(unsupported())
    }

    async fn list(&self) -> Result<Inventory, RuntimeError> {
        Ok(Inventory {
            sandboxes: vec![],
            containers: vec![self.container.lock().unwrap().clone()],
        })
    }

    async fn stats(&self, _: &Inventory) -> Result<crate::runtime::RuntimeUse, RuntimeError> {
        Err(unsupported())
    }
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn run_sandbox(&self, _: &SandboxConfig) -> Result<SandboxId, RuntimeError> {
        Err(unsupported())
    }

    async fn stop_sandbox(&self, _: &SandboxId) -> Result<(), RuntimeError> {
        Err(unsupported())
    }

    async fn remove_sandbox(&self, _: &SandboxId) -> Result<(), RuntimeError> {
        Err(unsupported())
    }

    async fn create_container(
        &self,
        _: &SandboxId,
        _: &ContainerConfig,
        _: &SandboxConfig,
    ) -> Result<ContainerId, RuntimeError> {
        Err(unsupported())
    }

    async fn start_container(&self, _: &ContainerId) -> Result<(), RuntimeError> {
        Err(unsupported())
    }

    async fn stop_container(&self, _: &ContainerId, _: Duration) -> Result<(), RuntimeError> {
        Err(unsupported())
    }

    async fn remove_container(&self, _: &ContainerId) -> Result<(), RuntimeError> {
        Err(unsupported())
    }

    async fn image_status(&self, _: &str) -> Result<Option<Image>, RuntimeError> {
        Err(unsupported())
    }

    async fn pull_image(&self, _: &str, _: Option<&RegistryAuth>) -> Result<String, RuntimeError> {
        Err(unsupported())
    }

    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError> {
        Err(unsupported())
    }

    async fn exec_sync(
        &self,
        _: &ContainerId,
        _: &[String],
        _: Duration,
    ) -> Result<ExecOutput, RuntimeError> {
        Err(unsupported())
    }

    async fn exec(&self, _: &ContainerId, _: &ExecRequest) -> Result<StreamEndpoint, RuntimeError> {
        self.take_endpoint()
    }

    async fn attach(&self, _: &ContainerId, _: &ExecRequest) -> Result<StreamEndpoint, RuntimeError> {
        self.take_endpoint()
    }

    async fn port_forward(&self, _: &SandboxId, _: &[u16]) -> Result<StreamEndpoint, RuntimeError> {
        Err(unsupported())
    }
}
