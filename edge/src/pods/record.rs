//! What is remembered of a pod, on disk: the memory that a kubelet loses with its process.
//!
//! The record is the runtime's view merged with what the runtime has forgotten ([`PodRecord::observe`]). Planning and
//! status read the record only, so that a container that vanished (a reboot, a wiped runtime) is a fact like any other.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{self, Pod, PodStatus, ResourceRequirements};
use serde::{Deserialize, Serialize};

use super::allocation::{Actuated, Allocation, Resizing};
use super::backoff::Backoff;
use crate::runtime::{Container, ContainerState, ContainerUser, Sandbox, SandboxState};

/// Everything of one pod that must survive the daemon and the machine's restart.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct PodRecord {
    /// Namespace, to find the logs of a pod whose object is gone.
    pub(crate) namespace: String,
    /// Name, likewise.
    pub(crate) name: String,
    /// When this node first saw the pod.
    pub(crate) start_time: Option<Timestamp>,
    /// The highest attempt number given to a sandbox, plus one.
    pub(crate) sandboxes_made: u32,
    /// The newest sandbox.
    pub(crate) sandbox: Option<String>,
    /// By container name; init containers too.
    pub(crate) containers: BTreeMap<String, ContainerRecord>,
    /// A rule `RestartAllContainers` is being carried out.
    #[serde(default)]
    pub(crate) restarting_all: bool,
    /// What the pod was given; `None` until the node has taken it.
    pub(crate) allocated: Option<Allocation>,
    /// What the pod as a whole is set up with; `None` where it has no cgroup of its own.
    pub(crate) pod_actuated: Option<ResourceRequirements>,
    /// Where a resize stands.
    #[serde(default)]
    pub(crate) resize: Resizing,
    /// A decision that the pod has ended. Final.
    pub(crate) end: Option<End>,
    /// The node ended it, and how.
    #[serde(default)]
    pub(crate) forced: Option<super::ending::Forced>,
    /// Nothing of it runs any more, its volumes and cgroups are gone.
    pub(crate) released: bool,
    /// The report with `finished` has been queued.
    pub(crate) finished: bool,
    /// The status that was reported last.
    pub(crate) status: Option<PodStatus>,
}

/// How a pod ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct End {
    /// It did what it should.
    pub(crate) succeeded: bool,
    /// `status.reason`, often empty.
    pub(crate) reason: String,
    /// `status.message`, often empty.
    pub(crate) message: String,
    /// The node ended it for the sake of others: message of the condition `DisruptionTarget`.
    pub(crate) disruption: Option<String>,
}

/// What is remembered of one container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ContainerRecord {
    /// The newest instance.
    pub(crate) last: Option<Instance>,
    /// How the instance before it ended.
    pub(crate) previous: Option<Ended>,
    /// What the newest instance was last given.
    pub(crate) actuated: Option<Actuated>,
    /// Crash back-off.
    pub(crate) backoff: Option<Backoff>,
    /// The startup probe and postStart have passed for the newest instance.
    pub(crate) started: bool,
    /// The readiness probe has passed for the newest instance.
    pub(crate) ready: bool,
}

/// One instance of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Instance {
    /// Id without prefix.
    pub(crate) id: String,
    /// The sandbox that it is or was in.
    pub(crate) sandbox: String,
    /// Its restart count.
    pub(crate) restart_count: u32,
    /// Hash of the spec that it was made from.
    pub(crate) spec_hash: String,
    /// Image as the spec named it.
    pub(crate) image: String,
    /// Image as the runtime names it.
    pub(crate) image_ref: String,
    /// As whom it was started, where the runtime tells.
    #[serde(default)]
    pub(crate) user: Option<ContainerUser>,
    /// Its state.
    pub(crate) state: State,
    /// The runtime does not know it any more.
    pub(crate) lost: bool,
}

/// State of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum State {
    /// Made, not started.
    Created,
    /// Runs since then.
    Running(Timestamp),
    /// Ended.
    Exited(Ended),
    /// The runtime does not know.
    Unknown,
}

/// How an instance ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    /// Container id without prefix.
    pub(crate) id: String,
    /// Absent when it never ran.
    pub(crate) started: Option<Timestamp>,
    /// When it ended.
    pub(crate) finished: Timestamp,
    /// Exit code.
    pub(crate) code: i32,
    /// `Completed`, `Error`, …
    pub(crate) reason: String,
    /// The termination message.
    pub(crate) message: String,
    /// It vanished while it was running; the code is made up.
    pub(crate) vanished: bool,
}

/// One pod as the runtime shows it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct View {
    /// Its sandboxes, newest first.
    pub(crate) sandboxes: Vec<Sandbox>,
    /// Its containers, newest first.
    pub(crate) containers: Vec<Container>,
}

impl View {
    /// Puts the newest first.
    pub(crate) fn new(mut sandboxes: Vec<Sandbox>, mut containers: Vec<Container>) -> Self {
        sandboxes.sort_by_key(|s| std::cmp::Reverse((s.attempt, s.created_at)));
        containers.sort_by_key(|c| std::cmp::Reverse((c.restart_count, c.created_at)));
        Self {
            sandboxes,
            containers,
        }
    }

    /// The newest sandbox, if it can take containers.
    pub(crate) fn ready_sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first().filter(|s| s.state == SandboxState::Ready)
    }

    /// Any container may be running.
    pub(crate) fn anything_alive(&self) -> bool {
        self.containers
            .iter()
            .any(|c| !matches!(c.state, ContainerState::Exited { .. } | ContainerState::Created))
            || self.sandboxes.iter().any(|s| s.state == SandboxState::Ready)
    }
}

impl PodRecord {
    /// Merges what the runtime shows. `message` reads a container's termination message, once for each that ended.
    pub(crate) fn observe(
        &mut self,
        view: &View,
        now: Timestamp,
        mut message: impl FnMut(&Container) -> String,
    ) {
        if let Some(sandbox) = view.sandboxes.first() {
            self.sandbox = Some(sandbox.id.0.clone());
            self.sandboxes_made = self.sandboxes_made.max(sandbox.attempt + 1);
        }
        let mut seen = std::collections::BTreeSet::new();
        for container in &view.containers {
            if seen.insert(container.name.clone()) {
                let known = self.containers.entry(container.name.clone()).or_default();
                let last = known.last.as_ref().map(|l| l.id.clone());
                // Between two looks one may have ended and the next begun: the end of the first is not lost.
                let before = view.containers.iter().find(|c| Some(&c.id.0) == last.as_ref());
                if let Some(before) = before.filter(|b| b.id != container.id) {
                    known.see(before, &mut message);
                }
                known.see(container, &mut message);
            }
        }
        for record in self.containers.values_mut() {
            let Some(last) = &mut record.last else { continue };
            if view.containers.iter().any(|c| c.id.0 == last.id) || last.lost {
                continue;
            }
            last.lost = true;
            record.started = false;
            record.ready = false;
            match last.state {
                State::Running(started) => {
                    last.state = State::Exited(Ended {
                        id: last.id.clone(),
                        started: Some(started),
                        finished: now,
                        code: 137,
                        reason: "ContainerStatusUnknown".to_owned(),
                        message: "The container could not be located when the pod was deleted.  The container used \
                                  to be Running"
                            .to_owned(),
                        vanished: true,
                    });
                }
                State::Created => last.state = State::Unknown,
                State::Exited(_) | State::Unknown => {}
            }
        }
    }

    /// Takes a pod that runs already for one that was given, and has, what its spec asks for.
    pub(crate) fn adopt(&mut self, pod: &Pod) {
        self.allocated = Some(Allocation::of(pod));
        self.pod_actuated = Some(super::resources::effective(pod));
        for (name, container) in &mut self.containers {
            container.actuated = super::plan::find_container(pod, name).map(|c| Actuated::of(pod, c));
        }
    }

    /// The newest instance of a container.
    pub(crate) fn last(&self, container: &str) -> Option<&Instance> {
        self.containers.get(container)?.last.as_ref()
    }

    /// The restart count that the next instance of a container gets.
    pub(crate) fn next_restart_count(&self, container: &str) -> u32 {
        match self.last(container) {
            None => 0,
            // It never ran: its number is taken over.
            Some(last) if last.state == State::Created => last.restart_count,
            Some(last) => last.restart_count + 1,
        }
    }

    /// The container's newest instance is in the newest sandbox.
    pub(crate) fn is_current(&self, instance: &Instance) -> bool {
        !instance.lost && self.sandbox.as_deref() == Some(instance.sandbox.as_str())
    }
}

impl ContainerRecord {
    fn see(&mut self, container: &Container, message: &mut impl FnMut(&Container) -> String) {
        match &mut self.last {
            Some(last) if last.id == container.id.0 => {
                if matches!(last.state, State::Exited(_)) {
                    // Its end is known; the termination message is not read twice.
                    last.lost = false;
                    return;
                }
                last.lost = false;
                last.state = state_of(container, message);
                last.image_ref.clone_from(&container.image_ref);
                last.user.clone_from(&container.user);
            }
            // The runtime shows an older one only: the newest has vanished, which `observe` notes.
            Some(last) if last.restart_count > container.restart_count => return,
            _ => {
                if let Some(Instance {
                    state: State::Exited(ended),
                    ..
                }) = self.last.take()
                {
                    self.previous = Some(ended);
                }
                self.started = false;
                self.ready = false;
                self.last = Some(Instance {
                    id: container.id.0.clone(),
                    sandbox: container.sandbox.0.clone(),
                    restart_count: container.restart_count,
                    spec_hash: container.spec_hash.clone(),
                    image: container.image.clone(),
                    image_ref: container.image_ref.clone(),
                    user: container.user.clone(),
                    state: state_of(container, message),
                    lost: false,
                });
            }
        }
        if self
            .last
            .as_ref()
            .is_some_and(|l| !matches!(l.state, State::Running(_)))
        {
            self.started = false;
            self.ready = false;
        }
    }
}

impl From<&ContainerUser> for v1::ContainerUser {
    fn from(is: &ContainerUser) -> Self {
        Self {
            linux: Some(v1::LinuxContainerUser {
                uid: is.uid,
                gid: is.gid,
                supplemental_groups: (!is.groups.is_empty()).then(|| is.groups.clone()),
            }),
        }
    }
}

fn state_of(container: &Container, message: &mut impl FnMut(&Container) -> String) -> State {
    match &container.state {
        ContainerState::Created => State::Created,
        ContainerState::Running { started_at } => State::Running(*started_at),
        ContainerState::Unknown => State::Unknown,
        ContainerState::Exited {
            started_at,
            finished_at,
            code,
            reason,
            message: words,
        } => {
            let text = message(container);
            State::Exited(Ended {
                id: container.id.0.clone(),
                started: *started_at,
                finished: *finished_at,
                code: *code,
                reason: if reason.is_empty() {
                    if *code == 0 { "Completed" } else { "Error" }.to_owned()
                } else {
                    reason.clone()
                },
                message: if text.is_empty() { words.clone() } else { text },
                vanished: false,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{at, container, exited, running, sandbox};
    use super::*;

    fn observed(record: &mut PodRecord, containers: Vec<Container>) {
        record.observe(&View::new(vec![sandbox("s", 0)], containers), at(100), |_| {
            String::new()
        });
    }

    #[test]
    fn a_running_container_that_vanishes_counts_as_killed_and_is_said_to_have_vanished() {
        let mut record = PodRecord::default();
        observed(&mut record, vec![container("c", "id0", 0, running(10))]);
        observed(&mut record, vec![]);
        let last = record.last("c").unwrap();
        assert!(last.lost);
        let State::Exited(ended) = &last.state else {
            panic!("{last:?}")
        };
        assert_eq!(
            (ended.code, ended.reason.as_str(), ended.vanished),
            (137, "ContainerStatusUnknown", true)
        );
        assert_eq!(record.next_restart_count("c"), 1);
    }

    #[test]
    fn a_new_instance_pushes_the_end_of_the_old_into_previous() {
        let mut record = PodRecord::default();
        observed(&mut record, vec![container("c", "id0", 0, exited(20, 3))]);
        observed(
            &mut record,
            vec![
                container("c", "id1", 1, running(30)),
                container("c", "id0", 0, exited(20, 3)),
            ],
        );
        assert_eq!(record.containers["c"].previous.as_ref().unwrap().code, 3);
        assert_eq!(record.last("c").unwrap().restart_count, 1);
    }

    #[test]
    fn an_end_and_the_next_start_between_two_looks_are_both_seen() {
        let mut record = PodRecord::default();
        observed(&mut record, vec![container("c", "id0", 0, running(10))]);
        let both = vec![
            container("c", "id1", 1, running(21)),
            container("c", "id0", 0, exited(20, 137)),
        ];
        observed(&mut record, both);
        let c = &record.containers["c"];
        assert_eq!(c.last.as_ref().unwrap().id, "id1");
        assert_eq!(c.previous.as_ref().unwrap().code, 137);
    }

    #[test]
    fn the_restart_count_of_an_adopted_container_comes_from_the_runtime() {
        let mut record = PodRecord::default();
        observed(&mut record, vec![container("c", "id7", 7, running(30))]);
        assert_eq!(record.last("c").unwrap().restart_count, 7);
        assert_eq!(record.next_restart_count("c"), 8);
    }

    #[test]
    fn an_end_that_is_known_stays_when_the_container_is_gone() {
        let mut record = PodRecord::default();
        observed(&mut record, vec![container("c", "id0", 0, exited(20, 0))]);
        observed(&mut record, vec![]);
        let State::Exited(ended) = &record.last("c").unwrap().state else {
            panic!()
        };
        assert_eq!((ended.code, ended.vanished), (0, false));
    }

    #[test]
    fn the_termination_message_is_read_once() {
        let mut record = PodRecord::default();
        let mut reads = 0;
        for _ in 0..3 {
            let view = View::new(vec![], vec![container("c", "id0", 0, exited(20, 1))]);
            record.observe(&view, at(0), |_| {
                reads += 1;
                "why".to_owned()
            });
        }
        assert_eq!(reads, 1);
    }

    #[test]
    fn an_adopted_pod_has_what_its_spec_asks_for_so_that_a_resize_finds_what_differs() {
        let of = |cpu: &str| {
            super::super::fixtures::pod(serde_json::json!({"containers": [
                {"name": "c", "resources": {"limits": {"cpu": cpu}, "requests": {"cpu": cpu}}}]}))
        };
        let mut record = PodRecord::default();
        observed(&mut record, vec![container("c", "id0", 0, running(10))]);
        record.adopt(&of("1"));
        let has = record.containers["c"].actuated.clone().unwrap();
        assert_eq!(
            (has.sizes.cpu_limit, record.allocated),
            (1000, Some(Allocation::of(&of("1"))))
        );
    }

    #[test]
    fn the_record_survives_json() {
        let mut record = PodRecord::default();
        observed(&mut record, vec![container("c", "id0", 0, exited(20, 1))]);
        let text = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<PodRecord>(&text).unwrap(), record);
    }
}
