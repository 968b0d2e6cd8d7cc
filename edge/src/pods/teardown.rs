//! Stopping a pod: in order, within its grace, and leaving nothing behind.

use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;

use super::events::Level;
use super::plan::{inits, is_sidecar};
use super::record::{End, View};
use super::worker::{Orders, SyncError, Worker, deletion_time, grace};
use super::{ROOM, hooks, status, volumes};
use crate::runtime::{Container, ContainerState, RuntimeError, SandboxState};

/// The least time that a container gets between the stop signal and the kill, while its pod exists.
const LEAST: Duration = Duration::from_secs(2);

impl Worker {
    /// A pod with a deletionTimestamp: stop, release, report it finished. The provider deletes the object then.
    pub(super) async fn delete(&mut self, pod: &Pod) -> Result<(), SyncError> {
        if self.record.finished {
            // Says so once more after a reconnection: the final delete must not hang on one lost report.
            return self.publish(pod, true).await;
        }
        self.look(pod).await?;
        if self.record.name.is_empty() {
            self.record.name = pod.metadata.name.clone().unwrap_or_default();
            self.record.namespace = pod.metadata.namespace.clone().unwrap_or_default();
        }
        self.publish(pod, false).await?;
        let grace = self.remaining_grace(pod);
        let mut orders = self.orders.clone();
        orders.mark_unchanged();
        let shorter = orders.wait_for(|o| ends_sooner(o, pod));
        tokio::select! {
            biased;
            stopped = self.stop_everything(Some(pod), grace) => stopped?,
            // A later deletion may only shorten the grace: start again with what is left.
            _ = shorter => {
                self.again = Duration::ZERO;
                return Ok(());
            }
        }
        self.look(pod).await?;
        if self.view.anything_alive() {
            self.again = Duration::from_secs(1);
            return Ok(());
        }
        if self.record.end.is_none() {
            let succeeded = status::final_succeeded(pod, &self.record);
            self.record.end = Some(End {
                succeeded,
                reason: String::new(),
                message: String::new(),
            });
        }
        self.release().await?;
        self.record.released = true;
        self.save()?;
        self.publish(pod, true).await
    }

    /// What is left of the grace of a deletion that may have begun while the daemon was away.
    fn remaining_grace(&self, pod: &Pod) -> Duration {
        let whole = grace(pod);
        let Some(end) = deletion_time(pod) else {
            return whole;
        };
        // deletionTimestamp is when the grace is over. A clock that is off must not lengthen it, nor take it away
        // from a pod that has just been told: the stop signal always gets the least time.
        let left = Duration::try_from(end.duration_since(self.shared.clock.now())).unwrap_or_default();
        left.min(whole).max(LEAST.min(whole))
    }

    /// A pod whose object is gone: stop, forget, remove every trace.
    pub(super) async fn vanish(&mut self, pod: Option<&Pod>) -> Result<(), SyncError> {
        let inventory = self.shared.runtime.list().await?;
        self.view = View::new(
            inventory
                .sandboxes
                .into_iter()
                .filter(|s| s.pod_uid == self.uid)
                .collect(),
            inventory
                .containers
                .into_iter()
                .filter(|c| c.pod_uid == self.uid)
                .collect(),
        );
        if self.record.name.is_empty()
            && let Some(sandbox) = self.view.sandboxes.first()
        {
            self.record.name.clone_from(&sandbox.pod_name);
            self.record.namespace.clone_from(&sandbox.pod_namespace);
        }
        let grace = pod.map_or(Duration::from_secs(1), grace);
        self.stop_everything(pod, grace).await?;
        for container in &self.view.containers {
            self.shared.runtime.remove_container(&container.id).await?;
        }
        for sandbox in &self.view.sandboxes {
            self.shared.runtime.remove_sandbox(&sandbox.id).await?;
        }
        self.release().await?;
        if !self.record.name.is_empty() {
            remove_dir(&self.log_dir())?;
        }
        self.shared.events.forget(self.uid.as_str());
        self.shared.images.forget(self.uid.as_str());
        Ok(self.shared.store.state_delete(ROOM, self.uid.as_str())?)
    }

    /// Stops all containers, then the sandboxes. With a pod, sidecars go last, and it is said in events.
    pub(super) async fn stop_everything(
        &mut self,
        pod: Option<&Pod>,
        grace: Duration,
    ) -> Result<(), SyncError> {
        let began = tokio::time::Instant::now();
        let alive: Vec<Container> = self
            .view
            .containers
            .iter()
            .filter(|c| !matches!(c.state, ContainerState::Exited { .. }))
            .cloned()
            .collect();
        let order = |c: &Container| {
            let sidecars: Vec<_> = pod
                .map(inits)
                .unwrap_or_default()
                .iter()
                .filter(|i| is_sidecar(i))
                .collect();
            // 0 = at once; later sidecars go before earlier ones.
            sidecars
                .iter()
                .position(|s| s.name == c.name)
                .map_or(0, |at| sidecars.len() - at)
        };
        let last = alive.iter().map(order).max().unwrap_or(0);
        for turn in 0..=last {
            let left = grace.saturating_sub(began.elapsed()).max(LEAST.min(grace));
            let mut stops = Vec::new();
            for container in alive.iter().filter(|c| order(c) == turn) {
                if let Some(pod) = pod
                    && !matches!(container.state, ContainerState::Created)
                {
                    let message = format!("Stopping container {}", container.name);
                    self.shared
                        .events
                        .emit(pod, Some(&container.name), Level::Normal, "Killing", message)
                        .await;
                }
                let (runtime, events) = (self.shared.runtime.as_ref(), &self.shared.events);
                stops.push(hooks::stop(runtime, events, pod, container, left, LEAST));
            }
            for result in join_all(stops).await {
                ignore_missing(result)?;
            }
        }
        for sandbox in self
            .view
            .sandboxes
            .iter()
            .filter(|s| s.state == SandboxState::Ready)
        {
            ignore_missing(self.shared.runtime.stop_sandbox(&sandbox.id).await)?;
        }
        Ok(())
    }

    /// Gives back what the pod held on the host: volumes and its directory, its cgroup.
    pub(super) async fn release(&mut self) -> Result<(), SyncError> {
        let dir = self.pod_dir();
        volumes::remove(&dir).map_err(|error| SyncError::Io { path: dir, error })?;
        self.volumes.clear();
        self.remove_cgroup(&self.uid).await;
        self.shared.user_ranges.release(&self.uid);
        Ok(())
    }
}

fn ignore_missing(result: Result<(), RuntimeError>) -> Result<(), RuntimeError> {
    match result {
        Err(RuntimeError::NotFound(_)) => Ok(()),
        other => other,
    }
}

fn ends_sooner(orders: &Orders, pod: &Pod) -> bool {
    orders.removed || orders.pod.as_deref().is_some_and(|new| grace(new) < grace(pod))
}

fn remove_dir(path: &std::path::Path) -> Result<(), SyncError> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(SyncError::Io {
            path: path.to_owned(),
            error,
        }),
        _ => Ok(()),
    }
}
