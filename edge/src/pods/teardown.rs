//! Stopping a pod: in order, within its grace, and leaving nothing behind.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;

use super::events::Level;
use super::hooks::Stop;
use super::plan::{inits, is_sidecar};
use super::record::{End, View};
use super::worker::{Orders, Shared, SyncError, Worker, deletion_time, grace};
use super::{ROOM, status, volumes};
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
        let (shared, view) = (Arc::clone(&self.shared), self.view.clone());
        let work = async {
            tokio::select! {
                biased;
                stopped = stop_all(&shared, &view, Some(pod), grace) => Some(stopped),
                // A later deletion may only shorten the grace: start again with what is left.
                _ = orders.wait_for(|o| ends_sooner(o, pod)) => None,
            }
        };
        match self.meanwhile(pod, work).await {
            Some(stopped) => stopped?,
            None => {
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
                ..End::default()
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
        let left = Duration::try_from(end.duration_since(self.shared.clock.cloud())).unwrap_or_default();
        left.min(whole).max(LEAST.min(whole))
    }

    /// A pod whose object is gone: stop, forget, remove every trace.
    pub(super) async fn vanish(&mut self, pod: Option<&Pod>) -> Result<(), SyncError> {
        self.probers.stop();
        let inventory = self.shared.runtime.list_pod(&self.uid).await?;
        self.view = View::new(inventory.sandboxes, inventory.containers);
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
        self.await_later(self.shared.store.queue_state_end(ROOM, self.uid.as_str()));
        Ok(())
    }

    /// Stops all containers, then the sandboxes. With a pod, sidecars go last, and it is said in events.
    pub(super) async fn stop_everything(
        &mut self,
        pod: Option<&Pod>,
        grace: Duration,
    ) -> Result<(), SyncError> {
        Ok(stop_all(&self.shared, &self.view, pod, grace).await?)
    }

    /// Gives back what the pod held on the host: volumes and its directory, its cgroup.
    pub(super) async fn release(&mut self) -> Result<(), SyncError> {
        let dir = self.pod_dir();
        volumes::remove(&dir).map_err(|error| SyncError::Io { path: dir, error })?;
        self.volumes.clear();
        self.remove_cgroup(&self.uid).await;
        self.shared.user_ranges.release(&self.uid);
        self.leave_ledger().await;
        Ok(())
    }
}

/// Stops what runs in a pod, then its sandboxes.
///
/// All containers are told at once and run their preStop hooks side by side. A sidecar gets its stop signal only when
/// the regular containers and the sidecars after it have ended; waiting for that uses up its grace.
pub(super) async fn stop_all(
    shared: &Shared,
    view: &View,
    pod: Option<&Pod>,
    grace: Duration,
) -> Result<(), RuntimeError> {
    let began = tokio::time::Instant::now();
    let sidecars: Vec<&str> = pod
        .map(inits)
        .unwrap_or_default()
        .iter()
        .filter(|i| is_sidecar(i))
        .map(|i| i.name.as_str())
        .collect();
    // 0 = at once; later sidecars go before earlier ones.
    let turn = |c: &Container| {
        let at = sidecars.iter().position(|s| *s == c.name);
        at.map_or(0, |at| sidecars.len() - at)
    };
    let alive: Vec<&Container> = view
        .containers
        .iter()
        .filter(|c| !matches!(c.state, ContainerState::Exited { .. }))
        .collect();
    let mut before = vec![0_usize; sidecars.len() + 1];
    for container in &alive {
        before[turn(container)] += 1;
    }
    let before = watch::Sender::new(before);
    let ip = view.ready_sandbox().and_then(|s| s.ips.first().copied());
    let stops = alive.iter().map(|container| {
        let before = &before;
        async move {
            if let Some(pod) = pod
                && !matches!(container.state, ContainerState::Created)
            {
                let message = format!("Stopping container {}", container.name);
                shared
                    .events
                    .emit(pod, Some(&container.name), Level::Normal, "Killing", message)
                    .await;
            }
            let stop = Stop {
                pod,
                container,
                ip,
                grace,
                least: LEAST,
            };
            stop.pre_stop(shared).await;
            let mut earlier = before.subscribe();
            let turn = turn(container);
            let my_turn = earlier.wait_for(|left| left[..turn].iter().all(|n| *n == 0));
            // When the time is up, its turn has come all the same.
            let _ = tokio::time::timeout(grace.saturating_sub(began.elapsed()), my_turn).await;
            let result = stop.signal(shared, grace.saturating_sub(began.elapsed())).await;
            before.send_modify(|left| left[turn] -= 1);
            ignore_missing(result)
        }
    });
    for result in join_all(stops).await {
        result?;
    }
    for sandbox in view.sandboxes.iter().filter(|s| s.state == SandboxState::Ready) {
        ignore_missing(shared.runtime.stop_sandbox(&sandbox.id).await)?;
    }
    Ok(())
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
