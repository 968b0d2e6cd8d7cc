//! The rule `RestartAllContainers`: one container's end takes the whole pod back to its beginning, in its sandbox.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;

use super::events::Level;
use super::hooks::Stop;
use super::plan::{RESTART_ALL, find_container, inits, matching_rule, regulars};
use super::record::{Ended, PodRecord, State};
use super::status::Waiting;
use super::worker::{SyncError, Worker};
use crate::runtime::{Container, ContainerState};

/// Reason of containers that go because of the rule.
pub(super) const REASON: &str = "RestartingAllContainers";
const MESSAGE: &str = "The container is removed because RestartAllContainers in place";
/// What each container that still runs gets.
const GRACE: Duration = Duration::from_secs(2);

/// The pod has a container with such a rule.
pub(super) fn may_happen(pod: &Pod) -> bool {
    let rules = |c: &k8s_openapi::api::core::v1::Container| {
        c.restart_policy_rules
            .iter()
            .flatten()
            .any(|r| r.action == RESTART_ALL)
    };
    inits(pod).iter().chain(regulars(pod)).any(rules)
}

/// A container has ended in a way for which the whole pod starts again, or that is under way.
pub(super) fn is_due(pod: &Pod, record: &PodRecord) -> bool {
    record.restarting_all
        || inits(pod).iter().chain(regulars(pod)).any(|c| {
            matches!(record.last(&c.name).map(|l| &l.state), Some(State::Exited(ended)) if triggers(c, ended.code))
        })
}

fn triggers(container: &k8s_openapi::api::core::v1::Container, code: i32) -> bool {
    matching_rule(container, code).is_some_and(|r| r.action == RESTART_ALL)
}

impl Worker {
    /// Removes every container, so that the next plan begins with the first init container. The sandbox, its address
    /// and the volumes stay. Done again from the start when the daemon ends in the middle.
    pub(super) async fn restart_all(&mut self, pod: &Pod) -> Result<(), SyncError> {
        if !self.record.restarting_all {
            self.record.restarting_all = true;
            self.save()?;
        }
        self.publish(pod, false).await?;
        // What triggered it goes last: as long as it is there, an interrupted removal is known for what it is.
        let mut all: Vec<Container> = self.view.containers.clone();
        all.retain(|c| find_container(pod, &c.name).is_some());
        all.sort_by_key(|c| {
            let init = inits(pod).iter().any(|i| i.name == c.name);
            let source = matches!(c.state, ContainerState::Exited { code, .. }
                if find_container(pod, &c.name).is_some_and(|spec| triggers(spec, code)));
            (source, init)
        });
        let ip = self.pod_ips().first().copied();
        for container in &all {
            if !matches!(
                container.state,
                ContainerState::Exited { .. } | ContainerState::Created
            ) {
                let message = format!("Container {} is restarted with its pod", container.name);
                self.shared
                    .events
                    .emit(pod, Some(&container.name), Level::Normal, "Killing", message)
                    .await;
                let stop = Stop {
                    pod: Some(pod),
                    container,
                    ip,
                    grace: GRACE,
                    least: GRACE,
                };
                stop.signal(&self.shared, GRACE).await?;
            }
            self.shared.runtime.remove_container(&container.id).await?;
        }
        self.look(pod).await?;
        let now = self.shared.clock.now();
        for container in inits(pod).iter().chain(regulars(pod)) {
            let Some(known) = self.record.containers.get_mut(&container.name) else {
                continue;
            };
            let Some(last) = &mut known.last else { continue };
            known.previous = Some(Ended {
                id: last.id.clone(),
                started: None,
                finished: now,
                code: 137,
                reason: REASON.to_owned(),
                message: MESSAGE.to_owned(),
                vanished: false,
            });
            last.state = State::Unknown;
            last.lost = true;
            let (reason, message) = (REASON.to_owned(), MESSAGE.to_owned());
            self.waiting
                .insert(container.name.clone(), Waiting { reason, message });
        }
        self.record.restarting_all = false;
        self.save()
    }
}
