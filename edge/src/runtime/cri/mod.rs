//! CRI v1 over a unix socket: containerd, CRI-O and whatever else speaks `runtime.v1`.
//!
//! * [`client`]: the connection, its calls and their time limits;
//! * [`failure`]: what a gRPC status means as a [`RuntimeError`];
//! * [`config`]: what a pod wants, in CRI's words;
//! * [`inventory`]: what the runtime has, in ours, asking only about what has changed;
//! * [`changes`]: notices that something has changed;
//! * [`usage`]: where the use of containers is read;
//! * [`operations`]: counts and times the calls;
//! * [`exits`]: containerd's own notice that a task has ended, the quickest of them;
//! * [`gate`]: how many costly calls are under way at the same time, and which come first;
//! * [`reserved`]: gets a name back that a crash in the middle of a creation has left taken;
//! * [`fuzzing`]: hostile bytes as an engine's answers;
//! * [`stay`]: which images must stay, and where images are kept.
//!
//! The runtime keeps all state: a new [`CriRuntime`] on the same socket sees what an earlier one made. The engine may
//! start later than the daemon and be restarted at any time; until it answers, every call fails with
//! [`RuntimeError::Unavailable`].

mod changes;
mod client;
mod config;
mod exits;
mod failure;
mod fuzzing;
mod gate;
mod inventory;
mod operations;
mod reserved;
mod stay;
mod usage;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use skerry_proto::object::Uid;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    ContainerConfig, ContainerId, ExecOutput, ExecRequest, Features, Image, ImageFs, Inventory, RegistryAuth,
    Resources, Runtime, RuntimeError, RuntimeStatus, RuntimeUse, RuntimeVersion, SandboxConfig, SandboxId,
    StreamEndpoint,
};
use crate::cgroup::Driver;
use client::Client;
pub(crate) use fuzzing::{answer_seeds, any_answer};
use gate::{Gate, Turn};
pub use operations::Operations;

/// Messages and services of CRI v1, generated from `proto/cri/runtime.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
mod api {
    tonic::include_proto!("runtime.v1");
}

/// containerd's own events, generated from `proto/containerd/events.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
mod containerd {
    tonic::include_proto!("containerd.services.events.v1");
}

/// A CRI runtime behind a unix socket. See the [module](self).
///
/// Dropping it ends the connection and the background task; what runs goes on running.
pub struct CriRuntime {
    client: Client,
    inventory: inventory::Cache,
    gate: Gate,
    changes: changes::Counter,
    usage: usage::Cache,
    /// Of an engine that cannot be asked.
    old_engine_driver: Driver,
    features: std::sync::Mutex<Option<Features>>,
    _background: DropGuard,
}

impl CriRuntime {
    /// Makes a runtime for the engine that listens, now or later, on `socket`.
    ///
    /// `owner` becomes the value of the label [`MANAGED_BY`](super::labels::MANAGED_BY) on everything that is made
    /// here, whatever the given labels say, and only what has that value is listed. Two daemons that share an engine
    /// need two owners; a daemon must keep its own across restarts.
    ///
    /// Must be called within a tokio runtime, which then also runs a task that watches for changes.
    pub fn connect(socket: PathBuf, owner: &str) -> CriRuntime {
        let client = Client::new(socket, owner);
        let changes = changes::Counter::default();
        let background = CancellationToken::new();
        let watcher = changes::watch_for_changes(client.clone(), changes.clone());
        let stopped = background.clone();
        tokio::spawn(async move { stopped.run_until_cancelled(watcher).await });
        CriRuntime {
            client,
            inventory: inventory::Cache::default(),
            gate: Gate::new(std::thread::available_parallelism().map_or(2, usize::from) + 1),
            changes,
            usage: usage::Cache::default(),
            old_engine_driver: Driver::default(),
            features: std::sync::Mutex::default(),
            _background: background.drop_guard(),
        }
    }

    /// Who makes cgroups in an engine that does not answer that question (containerd before 2.0).
    #[must_use]
    pub fn with_cgroup_driver(mut self, driver: Driver) -> CriRuntime {
        self.old_engine_driver = driver;
        self
    }

    /// Counters of the calls to the engine.
    pub fn operations(&self) -> Operations {
        self.client.operations().clone()
    }

    /// Tells watchers that a call of ours may have changed something, whether it answered well or not.
    fn after_change<T>(&self, outcome: Result<T, RuntimeError>) -> Result<T, RuntimeError> {
        self.changes.bump();
        outcome
    }
}

/// Takes "it is not there" as done.
fn gone_is_success(outcome: Result<(), RuntimeError>) -> Result<(), RuntimeError> {
    match outcome {
        Err(RuntimeError::NotFound(_)) => Ok(()),
        other => other,
    }
}

#[async_trait]
impl Runtime for CriRuntime {
    fn scheme(&self) -> &'static str {
        self.client.scheme()
    }

    fn isolated(&self) -> bool {
        true
    }

    async fn version(&self) -> Result<RuntimeVersion, RuntimeError> {
        self.client.version().await
    }

    async fn status(&self) -> Result<RuntimeStatus, RuntimeError> {
        let answer = self.client.status().await?;
        // Engines are updated while the daemon runs: the newest answer counts.
        *self
            .features
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = Some(inventory::features(&answer));
        Ok(inventory::runtime_status(
            &answer.status.unwrap_or_default().conditions,
        ))
    }

    async fn features(&self) -> Features {
        let known = || {
            self.features
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .clone()
        };
        if let Some(features) = known() {
            return features;
        }
        match self.status().await {
            Ok(_) => known().unwrap_or_default(),
            Err(error) => {
                tracing::warn!(%error, "the runtime does not say what it can do; the minimum is taken");
                Features::default()
            }
        }
    }

    async fn list(&self) -> Result<Inventory, RuntimeError> {
        self.inventory.list(&self.client).await
    }

    async fn stats(&self, inventory: &Inventory) -> Result<RuntimeUse, RuntimeError> {
        self.usage.read(&self.client, inventory).await
    }

    async fn list_pod(&self, pod: &Uid) -> Result<Inventory, RuntimeError> {
        self.inventory.list_pod(&self.client, pod).await
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn run_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId, RuntimeError> {
        let request = api::RunPodSandboxRequest {
            config: Some(config::sandbox(config, self.client.owner())),
            runtime_handler: config.runtime_handler.clone(),
        };
        let call = self.client.run_pod_sandbox(request.clone());
        let mut outcome = self.gate.pass(Turn::Sandbox, call).await;
        if reserved::is_name_taken(&outcome) && reserved::free_sandbox_name(&self.client, config).await? {
            outcome = self.client.run_pod_sandbox(request).await;
        }
        self.after_change(outcome.map(SandboxId).map_err(failure::CreateError::into_error))
    }

    async fn stop_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.after_change(gone_is_success(
            self.gate
                .pass(Turn::Stop, self.client.stop_pod_sandbox(&id.0))
                .await,
        ))
    }

    async fn remove_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.after_change(gone_is_success(
            self.gate
                .pass(Turn::Tidy, self.client.remove_pod_sandbox(&id.0))
                .await,
        ))
    }

    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: &ContainerConfig,
        sandbox_config: &SandboxConfig,
    ) -> Result<ContainerId, RuntimeError> {
        let request = api::CreateContainerRequest {
            pod_sandbox_id: sandbox.0.clone(),
            config: Some(config::container(config, sandbox_config, self.client.owner())?),
            sandbox_config: Some(config::sandbox(sandbox_config, self.client.owner())),
        };
        let call = self.client.create_container(request.clone());
        let mut outcome = self.gate.pass(Turn::Container, call).await;
        if reserved::is_name_taken(&outcome)
            && reserved::free_container_name(&self.client, sandbox, &config.name, config.attempt).await?
        {
            outcome = self.client.create_container(request).await;
        }
        self.after_change(outcome.map(ContainerId).map_err(failure::CreateError::into_error))
    }

    async fn start_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let call = self.client.start_container(&id.0);
        self.after_change(self.gate.pass(Turn::Container, call).await)
    }

    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<(), RuntimeError> {
        let call = self.client.stop_container(&id.0, grace);
        self.after_change(gone_is_success(self.gate.pass(Turn::Signal, call).await))
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let call = self.client.remove_container(&id.0);
        self.after_change(gone_is_success(self.gate.pass(Turn::Container, call).await))
    }

    async fn update_container(&self, id: &ContainerId, resources: &Resources) -> Result<(), RuntimeError> {
        let outcome = self
            .client
            .update_container(&id.0, config::resources(resources))
            .await;
        self.after_change(outcome)
    }

    async fn update_sandbox(&self, id: &SandboxId, resources: &Resources) -> Result<(), RuntimeError> {
        self.client
            .update_sandbox(&id.0, config::resources(resources))
            .await
    }

    async fn cgroup_driver(&self) -> Result<Driver, RuntimeError> {
        Ok(match self.client.cgroup_driver().await? {
            Some(api::CgroupDriver::Systemd) => Driver::Systemd,
            Some(api::CgroupDriver::Cgroupfs) => Driver::Cgroupfs,
            None => self.old_engine_driver,
        })
    }

    async fn image_status(&self, image: &str) -> Result<Option<Image>, RuntimeError> {
        let found = self.client.image_status(image).await?;
        Ok(found.map(inventory::image))
    }

    async fn pull_image(&self, image: &str, auth: Option<&RegistryAuth>) -> Result<String, RuntimeError> {
        self.client.pull_image(image, auth).await
    }

    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError> {
        let found = self.client.list_images().await?;
        Ok(found.into_iter().map(inventory::image).collect())
    }

    async fn remove_image(&self, id: &str) -> Result<(), RuntimeError> {
        gone_is_success(self.client.remove_image(id).await)
    }

    async fn images_in_use(&self) -> Result<BTreeSet<String>, RuntimeError> {
        stay::images_in_use(&self.client).await
    }

    async fn image_fs_info(&self) -> Result<Vec<ImageFs>, RuntimeError> {
        let found = self.client.image_fs_info().await?;
        Ok(found
            .image_filesystems
            .into_iter()
            .filter_map(stay::image_fs)
            .collect())
    }

    async fn reopen_log(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.client.reopen_container_log(&id.0).await
    }

    async fn exec_sync(
        &self,
        id: &ContainerId,
        command: &[String],
        timeout: Duration,
    ) -> Result<ExecOutput, RuntimeError> {
        let output = self.client.exec_sync(&id.0, command, timeout).await?;
        Ok(ExecOutput {
            stdout: output.stdout,
            stderr: output.stderr,
            code: output.exit_code,
        })
    }

    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<StreamEndpoint, RuntimeError> {
        self.client.exec(&id.0, request).await.map(StreamEndpoint::Url)
    }

    async fn attach(&self, id: &ContainerId, request: &ExecRequest) -> Result<StreamEndpoint, RuntimeError> {
        self.client.attach(&id.0, request).await.map(StreamEndpoint::Url)
    }

    async fn port_forward(&self, id: &SandboxId, ports: &[u16]) -> Result<StreamEndpoint, RuntimeError> {
        self.client
            .port_forward(&id.0, ports)
            .await
            .map(StreamEndpoint::Url)
    }
}
