//! What has to be done for a pod now: a pure function of its spec, its record and its sandboxes.
//!
//! The rules are a kubelet's (`computePodActions`): sandbox first, then init containers one by one with sidecars
//! staying up, then the others together; restarts by policy and back-off; a changed image restarts regardless.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, ContainerRestartRule, Pod};
use skerry_proto::object::ContentHash;

use super::backoff::{Backoff, Since};
use super::record::{Ended, Instance, PodRecord, State, View};
use super::{ephemeral, restart_all};
use crate::runtime::SandboxState;

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Make a sandbox; stop and leave what is there of older ones first.
    Sandbox {
        /// Its attempt number.
        attempt: u32,
        /// There was one before: say so in an event.
        changed: bool,
    },
    /// Stop a container; whether it starts again is planned when it has ended.
    Kill {
        /// Its name.
        name: String,
        /// The instance.
        id: String,
        /// Why, as the event says it.
        message: String,
        /// Grace instead of the pod's.
        grace: Option<Duration>,
    },
    /// Take the pod back to its beginning, in its sandbox. Always alone.
    RestartAll,
    /// Make and start a container.
    Start {
        /// Its name.
        name: String,
        /// Its restart count.
        restart_count: u32,
        /// An instance that must go first: made but never started, or lost track of.
        discard: Option<String>,
        /// How the instance before ended, to count the back-off.
        after: Option<Ended>,
    },
}

/// A container that waits for its back-off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Waits {
    /// Its name.
    pub(crate) name: String,
    /// The whole delay.
    pub(crate) delay: Duration,
    /// What is left of it.
    pub(crate) remaining: Duration,
}

/// What to do, and what waits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// In order. A sandbox step is always alone.
    pub(crate) steps: Vec<Step>,
    /// In crash back-off.
    pub(crate) waits: Vec<Waits>,
}

/// A verdict of a liveness or startup probe: this instance must be restarted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Condemned {
    /// The instance.
    pub(crate) id: String,
    /// `liveness` or `startup`.
    pub(crate) probe: &'static str,
    /// The probe's own grace.
    pub(crate) grace: Option<Duration>,
}

/// An init container that stays up beside the others.
pub(crate) fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// Init containers, in order.
pub(crate) fn inits(pod: &Pod) -> &[Container] {
    pod.spec
        .as_ref()
        .and_then(|s| s.init_containers.as_deref())
        .unwrap_or_default()
}

/// The pod's own containers.
pub(crate) fn regulars(pod: &Pod) -> &[Container] {
    pod.spec
        .as_ref()
        .map(|s| s.containers.as_slice())
        .unwrap_or_default()
}

/// A container of either kind.
pub(crate) fn find_container<'a>(pod: &'a Pod, name: &str) -> Option<&'a Container> {
    inits(pod).iter().chain(regulars(pod)).find(|c| c.name == name)
}

/// The pod's restart policy.
pub(crate) fn restart_policy(pod: &Pod) -> &str {
    pod.spec
        .as_ref()
        .and_then(|s| s.restart_policy.as_deref())
        .unwrap_or("Always")
}

/// Hash of what may change in a running container and then needs a restart: its name and image.
///
/// Every other field of a container is immutable in the API, and a hash of the whole would restart every container
/// when a new release learns a new field. A kubelet hashes the same two.
pub(crate) fn spec_hash(container: &Container) -> String {
    let text = serde_json::json!([container.name, container.image]).to_string();
    ContentHash::of_bytes(text.as_bytes())
        .0
        .iter()
        .take(8)
        .map(|b| format!("{b:02x}"))
        .collect()
}

/// The action of a rule that restarts the whole pod.
pub(crate) const RESTART_ALL: &str = "RestartAllContainers";

/// The first of a container's restart rules that an exit code meets.
pub(crate) fn matching_rule(container: &Container, code: i32) -> Option<&ContainerRestartRule> {
    container.restart_policy_rules.iter().flatten().find(|rule| {
        rule.exit_codes.as_ref().is_some_and(|codes| {
            let listed = codes.values.iter().flatten().any(|v| *v == code);
            match codes.operator.as_str() {
                "In" => listed,
                "NotIn" => !listed,
                _ => false,
            }
        })
    })
}

/// Whether a container that ended like this starts again.
pub(crate) fn restarts(pod: &Pod, container: &Container, code: i32) -> bool {
    if pod.metadata.deletion_timestamp.is_some() || ephemeral::is_one(pod, &container.name) {
        return false;
    }
    if matching_rule(container, code).is_some_and(|r| r.action == "Restart" || r.action == RESTART_ALL) {
        return true;
    }
    let is_init = inits(pod).iter().any(|c| c.name == container.name);
    match container
        .restart_policy
        .as_deref()
        .unwrap_or_else(|| restart_policy(pod))
    {
        "Never" => false,
        "OnFailure" => code != 0,
        // A regular init container that has done its work is done.
        _ => !is_init || is_sidecar(container) || code != 0,
    }
}

/// Whether the newest sandbox serves the pod as it is.
pub(crate) fn sandbox_fits(pod: &Pod, view: &View, isolated: bool) -> bool {
    let host_network = pod.spec.as_ref().and_then(|s| s.host_network).unwrap_or(false);
    let ready = view
        .sandboxes
        .iter()
        .filter(|s| s.state == SandboxState::Ready)
        .count();
    match view.ready_sandbox() {
        Some(s) if ready == 1 => {
            !isolated || (s.host_network == host_network && (host_network || !s.ips.is_empty()))
        }
        _ => false,
    }
}

/// A regular container of the pod has been started in the newest sandbox.
pub(crate) fn any_regular_started(pod: &Pod, record: &PodRecord) -> bool {
    regulars(pod)
        .iter()
        .filter_map(|c| record.last(&c.name))
        .any(|i| record.is_current(i) && i.state != State::Created)
}

/// Plans for a pod that is neither ended nor under deletion. `since` tells what has passed since a container ended.
pub(crate) fn plan(
    pod: &Pod,
    record: &PodRecord,
    view: &View,
    isolated: bool,
    condemned: &[Condemned],
    since: Since<'_>,
) -> Plan {
    if !sandbox_fits(pod, view, isolated) {
        return plan_sandbox(pod, record);
    }
    if restart_all::is_due(pod, record) {
        return Plan {
            steps: vec![Step::RestartAll],
            waits: Vec::new(),
        };
    }
    let mut planner = Planner {
        pod,
        record,
        condemned,
        since,
        plan: Plan::default(),
    };
    for container in ephemeral::wanted(pod, record) {
        planner.start(&container, record.last(&container.name));
    }
    let initialized = any_regular_started(pod, record);
    if planner.inits(initialized) {
        for container in regulars(pod) {
            planner.regular(container);
        }
    }
    planner.plan
}

/// A sandbox is needed; unless everything that the pod had to do is done, or must not be tried again.
fn plan_sandbox(pod: &Pod, record: &PodRecord) -> Plan {
    let wants = regulars(pod)
        .iter()
        .any(|c| match record.last(&c.name).map(|l| &l.state) {
            Some(State::Exited(ended)) => restarts(pod, c, ended.code),
            _ => true,
        });
    let init_failed = !any_ran(pod, record)
        && inits(pod).iter().filter(|c| !is_sidecar(c)).any(|c| {
            matches!(record.last(&c.name).map(|l| &l.state), Some(State::Exited(e)) if e.code != 0 && !restarts(pod, c, e.code))
        });
    if !wants || init_failed {
        return Plan::default();
    }
    let attempt = record.sandboxes_made;
    Plan {
        steps: vec![Step::Sandbox {
            attempt,
            changed: attempt > 0,
        }],
        waits: Vec::new(),
    }
}

/// A regular container has ever run.
fn any_ran(pod: &Pod, record: &PodRecord) -> bool {
    regulars(pod)
        .iter()
        .filter_map(|c| record.last(&c.name))
        .any(|i| matches!(i.state, State::Running(_) | State::Exited(_)))
}

struct Planner<'a> {
    pod: &'a Pod,
    record: &'a PodRecord,
    condemned: &'a [Condemned],
    since: Since<'a>,
    plan: Plan,
}

impl Planner<'_> {
    /// Plans the init containers; answers whether the regular ones may start.
    fn inits(&mut self, initialized: bool) -> bool {
        let list = inits(self.pod);
        for (index, container) in list.iter().enumerate() {
            let current = self.current(container).cloned();
            if is_sidecar(container) {
                let later = initialized || list[index + 1..].iter().any(|c| self.current(c).is_some());
                match current.as_ref().map(|i| &i.state) {
                    Some(State::Running(_)) => {
                        if let Some(i) = &current {
                            self.check_running(container, i);
                        }
                        let started = self
                            .record
                            .containers
                            .get(&container.name)
                            .is_some_and(|c| c.started);
                        if !started && !later {
                            return false;
                        }
                    }
                    _ => {
                        self.start(container, current.as_ref());
                        if !later {
                            return false;
                        }
                    }
                }
                continue;
            }
            if initialized {
                continue;
            }
            match current.as_ref().map(|i| &i.state) {
                Some(State::Exited(ended)) if ended.code == 0 => {}
                Some(State::Exited(ended)) => {
                    if restarts(self.pod, container, ended.code) {
                        self.start(container, current.as_ref());
                    }
                    return false;
                }
                Some(State::Running(_)) => {
                    if let Some(i) = &current {
                        self.check_running(container, i);
                    }
                    return false;
                }
                Some(State::Created | State::Unknown) | None => {
                    self.start(container, current.as_ref());
                    return false;
                }
            }
        }
        true
    }

    fn regular(&mut self, container: &Container) {
        let Some(last) = self.record.last(&container.name).cloned() else {
            self.start(container, None);
            return;
        };
        let current = self.record.is_current(&last);
        match &last.state {
            State::Running(_) if current => self.check_running(container, &last),
            State::Exited(ended) => {
                if restarts(self.pod, container, ended.code) {
                    self.start(container, current.then_some(&last));
                }
            }
            _ => self.start(container, current.then_some(&last)),
        }
    }

    /// The newest instance of a container, if it is in the newest sandbox.
    fn current(&self, container: &Container) -> Option<&Instance> {
        self.record
            .last(&container.name)
            .filter(|i| self.record.is_current(i))
    }

    /// Stops a running instance and starts the next one at once, whatever the restart policy says.
    fn replace(&mut self, container: &Container, instance: &Instance, message: String) {
        self.plan.steps.push(Step::Kill {
            name: container.name.clone(),
            id: instance.id.clone(),
            message,
            grace: None,
        });
        self.plan.steps.push(Step::Start {
            name: container.name.clone(),
            restart_count: instance.restart_count + 1,
            discard: None,
            after: None,
        });
    }

    fn check_running(&mut self, container: &Container, instance: &Instance) {
        let name = container.name.clone();
        if instance.spec_hash != spec_hash(container) {
            let message = format!("Container {name} definition changed, will be restarted");
            self.replace(container, instance, message);
        } else if super::resize::needs_restart(self.pod, container, self.record) {
            let message = format!("Container {name} resize requires restart");
            self.replace(container, instance, message);
        } else if let Some(verdict) = self.condemned.iter().find(|c| c.id == instance.id) {
            let again = restarts(self.pod, container, 137);
            let then = if again { ", will be restarted" } else { "" };
            self.plan.steps.push(Step::Kill {
                message: format!("Container {name} failed {} probe{then}", verdict.probe),
                name: name.clone(),
                id: instance.id.clone(),
                grace: verdict.grace,
            });
            if !again {
                return;
            }
            // As with a kubelet, what counts for the back-off of a restart by a probe is how the instance before ended.
            let known = self.record.containers.get(&name);
            let previous = known.and_then(|k| k.previous.clone());
            let waits = previous.as_ref().is_some_and(|ended| {
                let backoff = known.and_then(|k| k.backoff.as_ref());
                Backoff::remaining(backoff, &backoff_key(container), ended.finished, self.since).is_some()
            });
            if !waits {
                self.plan.steps.push(Step::Start {
                    restart_count: instance.restart_count + 1,
                    name,
                    discard: None,
                    after: previous,
                });
            }
        }
    }

    /// Starts a container, unless its back-off says to wait. `current` is its instance in this sandbox.
    fn start(&mut self, container: &Container, current: Option<&Instance>) {
        let name = container.name.clone();
        let ended = current.and_then(|i| match &i.state {
            State::Exited(ended) => Some(ended.clone()),
            _ => None,
        });
        if let Some(ended) = &ended {
            let backoff = self.record.containers.get(&name).and_then(|c| c.backoff.as_ref());
            let remaining = Backoff::remaining(backoff, &backoff_key(container), ended.finished, self.since);
            if let (Some(remaining), Some(backoff)) = (remaining, backoff) {
                self.plan.waits.push(Waits {
                    name,
                    delay: backoff.delay(),
                    remaining,
                });
                return;
            }
        }
        let discard = current
            .filter(|i| matches!(i.state, State::Created | State::Unknown) && !i.lost)
            .map(|i| i.id.clone());
        let restart_count = self.record.next_restart_count(&name);
        self.plan.steps.push(Step::Start {
            name,
            restart_count,
            discard,
            after: ended,
        });
    }
}

/// What a crash back-off is about: another image is another story.
pub(crate) fn backoff_key(container: &Container) -> String {
    container.image.clone().unwrap_or_default()
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
