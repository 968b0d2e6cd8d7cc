//! Pods that have been without the cloud for longer than they may (`crate::autonomy`).

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::autonomy::{Alone, Annotations, Autonomy, Then};
use skerry_proto::object::Uid;

use super::events::Level;
use super::worker::{SyncError, Worker, grace};
use super::{Ending, Pods};

/// `status.reason`, and the event's.
const REASON: &str = "AloneTooLong";

/// How long the site has been alone, and its policy.
#[derive(Debug, Default)]
pub(super) struct Solitude {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    alone: Duration,
    policy: Autonomy,
    /// Pods that were over their limit at the last look.
    over: HashSet<Uid>,
}

impl Solitude {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has become of the pod by now, and its policy.
    fn of(&self, pod: &Pod) -> (Then, Alone) {
        let state = self.state();
        let alone = policy(&state.policy, pod).0;
        (alone.after(state.alone), alone)
    }
}

/// What a pod may do alone. A pod from a file needs no cloud: only what it says itself holds.
fn policy(site: &Autonomy, pod: &Pod) -> (Alone, Vec<String>) {
    let none = Annotations::new();
    let annotations = pod.metadata.annotations.as_ref().unwrap_or(&none);
    let from_file = annotations
        .get(skerry_proto::static_pod::SOURCE)
        .is_some_and(|source| source != "api");
    if from_file {
        return Autonomy::default().alone_of(annotations);
    }
    site.alone_of(annotations)
}

impl Pods {
    /// Tells how long the site has been alone and what its policy is; wakes the pods for which that changes something.
    pub fn set_alone(&self, alone: Duration, policy: Autonomy) {
        let workers = self.shared.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.shared.solitude.state();
        state.alone = alone;
        state.policy = policy;
        let over: HashSet<Uid> = workers
            .iter()
            .filter(|(_, orders)| {
                let pod = orders.borrow().pod.clone();
                pod.is_some_and(|pod| self::policy(&policy, &pod).0.after(alone) != Then::Keep)
            })
            .map(|(uid, _)| uid.clone())
            .collect();
        let before = std::mem::replace(&mut state.over, over);
        let changed: Vec<Uid> = before.symmetric_difference(&state.over).cloned().collect();
        drop(state);
        for uid in changed {
            if let Some(orders) = workers.get(&uid) {
                orders.send_modify(|o| o.wakes += 1);
            }
        }
    }
}

impl Worker {
    /// Stops a pod that has been alone for too long. `None`: it may go on.
    pub(super) async fn heed_solitude(&mut self, pod: &Pod) -> Option<Result<(), SyncError>> {
        let (then, alone) = self.shared.solitude.of(pod);
        let most = alone.most.unwrap_or_default();
        let message = |what: &str| format!("The site has been without its cloud for {most:?}: {what}");
        match then {
            Then::Keep => {
                self.said_alone = false;
                None
            }
            Then::Stop => {
                if !std::mem::replace(&mut self.said_alone, true) {
                    let message = message("the pod is stopped until it is back.");
                    self.shared
                        .events
                        .emit(pod, None, Level::Warning, REASON, message)
                        .await;
                }
                Some(self.hold(pod).await)
            }
            Then::StopForGood => {
                let ending = Ending {
                    reason: REASON.to_owned(),
                    message: message("the pod is stopped for good."),
                    grace: grace(pod),
                    disruption: None,
                    event: true,
                };
                Some(self.end_as_told(pod, &ending).await)
            }
        }
    }

    /// Keeps the pod stopped, without a decision about it.
    async fn hold(&mut self, pod: &Pod) -> Result<(), SyncError> {
        self.look(pod).await?;
        if self.view.anything_alive() {
            self.stop_everything(Some(pod), grace(pod)).await?;
            self.look(pod).await?;
            self.publish(pod, false).await?;
        }
        Ok(())
    }

    /// Annotations that make no sense are said.
    pub(super) async fn say_wrong_autonomy(&self, pod: &Pod) {
        let (_, wrong) = policy(&Autonomy::default(), pod);
        for what in wrong {
            let message = format!("{what}; the Site's policy holds");
            self.shared
                .events
                .emit(pod, None, Level::Warning, "InvalidAutonomy", message)
                .await;
        }
    }
}
