//! Pods that the node itself ends: under pressure, or when the machine shuts down.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};
use skerry_proto::object::Uid;

use super::Pods;
use super::events::Level;
use super::record::End;
use super::worker::{SyncError, Worker};
use crate::runtime::ContainerState;

/// How and why a pod is ended. Its phase becomes Failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending {
    /// `status.reason`, for example `Evicted`.
    pub reason: String,
    /// `status.message`.
    pub message: String,
    /// Grace of its containers, in place of its own.
    pub grace: Duration,
    /// Message of the condition DisruptionTarget; `None` leaves the condition out.
    pub disruption: Option<String>,
    /// Say it in an event as well.
    pub event: bool,
}

/// Whether the machine is going down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Shutdown {
    /// It is not.
    #[default]
    Up,
    /// It is; pods that it ends have failed.
    Failing,
    /// It is; pods are only stopped, and start again with the next boot.
    Keeping,
}

/// What of an [`Ending`] must outlive the daemon, beside reason and message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Forced {
    /// Grace in seconds.
    pub(crate) grace_seconds: u64,
}

impl Pods {
    /// Every pod that has not ended and is not being deleted.
    pub fn active(&self) -> Vec<(Uid, Arc<Pod>)> {
        let workers = self.shared.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let phases = self.shared.phases.lock().unwrap_or_else(PoisonError::into_inner);
        let ended = |uid: &Uid| phases.get(uid).is_some_and(|phase| is_terminal(phase));
        workers
            .iter()
            .filter_map(|(uid, orders)| {
                let orders = orders.borrow();
                let goes = orders.stops() || orders.ending.is_some() || ended(uid);
                Some((uid.clone(), orders.pod.clone().filter(|_| !goes)?))
            })
            .collect()
    }

    /// Tells a pod's worker to end it. Does nothing for a pod that is not there, or has ended.
    pub fn end(&self, uid: &Uid, ending: Ending) {
        let workers = self.shared.workers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(orders) = workers.get(uid) {
            orders.send_modify(|o| o.ending = Some(Arc::new(ending)));
        }
    }

    /// From now on no new pod starts. With `keep`, pods that are ended are only stopped.
    pub fn shut_down(&self, keep: bool) {
        let state = if keep {
            Shutdown::Keeping
        } else {
            Shutdown::Failing
        };
        self.shared.shutdown.send_replace(state);
    }

    /// How many of these pods have a running container. All of them when the runtime does not answer.
    pub async fn running<'a>(&self, uids: impl Iterator<Item = &'a Uid>) -> usize {
        let uids: Vec<&Uid> = uids.collect();
        let Ok(inventory) = self.shared.runtime.list().await else {
            return uids.len();
        };
        let runs = |uid: &&&Uid| {
            let mut own = inventory.containers.iter().filter(|c| c.pod_uid == ***uid);
            own.any(|c| matches!(c.state, ContainerState::Running { .. }))
        };
        uids.iter().filter(runs).count()
    }

    /// Whether a pod has reached a terminal phase, or is not there.
    pub fn has_ended(&self, uid: &Uid) -> bool {
        let phases = self.shared.phases.lock().unwrap_or_else(PoisonError::into_inner);
        phases.get(uid).is_none_or(|phase| is_terminal(phase))
    }

    /// Removes the containers of pods that have ended, for the room that they take. Their logs stay.
    pub async fn remove_dead(&self) {
        let Ok(inventory) = self.shared.runtime.list().await else {
            return;
        };
        for container in inventory.containers {
            let dead = matches!(container.state, ContainerState::Exited { .. });
            if !dead || !self.has_ended(&container.pod_uid) {
                continue;
            }
            if let Err(error) = self.shared.runtime.remove_container(&container.id).await {
                tracing::debug!(id = container.id.0, %error, "a dead container could not be removed");
            }
        }
    }
}

fn is_terminal(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}

impl Worker {
    /// Does what the node wants of this pod, if it wants something.
    pub(super) async fn obey(&mut self, pod: &Pod) -> Option<Result<(), SyncError>> {
        if self.record.end.is_some() {
            return None;
        }
        let ending = self.orders.borrow().ending.clone();
        let shutdown = *self.shared.shutdown.borrow();
        match (ending, shutdown) {
            (Some(ending), Shutdown::Keeping) => Some(self.stop_for_now(pod, &ending).await),
            (Some(ending), _) => Some(self.end_as_told(pod, &ending).await),
            (None, Shutdown::Up) => self.heed_solitude(pod).await,
            // It runs, and its turn comes.
            (None, _) if self.record.sandboxes_made > 0 => None,
            (None, Shutdown::Keeping) => Some(Ok(())),
            (None, Shutdown::Failing) => {
                let refusal = Ending {
                    reason: "NodeShutdown".to_owned(),
                    message: "Pod was rejected as the node is shutting down.".to_owned(),
                    grace: Duration::ZERO,
                    disruption: None,
                    event: true,
                };
                Some(self.end_as_told(pod, &refusal).await)
            }
        }
    }

    /// Stops the pod without a decision about it: the next daemon starts it again.
    async fn stop_for_now(&mut self, pod: &Pod, ending: &Ending) -> Result<(), SyncError> {
        self.look(pod).await?;
        if self.view.anything_alive() {
            self.stop_everything(Some(pod), ending.grace).await?;
            self.look(pod).await?;
        }
        Ok(())
    }

    /// Ends the pod as it was told. The decision is on disk before anything is stopped.
    pub(super) async fn end_as_told(&mut self, pod: &Pod, ending: &Ending) -> Result<(), SyncError> {
        self.begin(pod);
        self.look(pod).await?;
        if ending.event {
            self.shared
                .events
                .emit(pod, None, Level::Warning, &ending.reason, ending.message.clone())
                .await;
        }
        self.record.forced = Some(Forced {
            grace_seconds: ending.grace.as_secs(),
        });
        let end = End {
            succeeded: false,
            reason: ending.reason.clone(),
            message: ending.message.clone(),
            disruption: ending.disruption.clone(),
        };
        self.end(pod, end).await
    }

    /// The grace of the pod's end: as told, else its own.
    pub(super) fn end_grace(&self, pod: &Pod) -> Duration {
        match &self.record.forced {
            Some(forced) => Duration::from_secs(forced.grace_seconds),
            None => super::worker::grace(pod),
        }
    }
}
