//! All probes of one pod.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::task::AbortHandle;

use super::super::hooks::reached_at;
use super::super::plan::{Condemned, inits, is_sidecar, regulars};
use super::super::record::{PodRecord, State};
use super::super::worker::Shared;
use super::rules::{Kind, Rules};
use super::task::{Begin, Task};
use crate::runtime::ContainerId;

/// Verdicts by instance and kind; a new one wakes the worker.
pub(super) struct Verdicts {
    table: Mutex<HashMap<(String, Kind), bool>>,
    wake: Box<dyn Fn() + Send + Sync>,
}

impl Verdicts {
    pub(super) fn set(&self, id: &str, kind: Kind, passed: bool) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let before = table.insert((id.to_owned(), kind), passed);
        drop(table);
        if before != Some(passed) {
            (self.wake)();
        }
    }

    fn get(&self, id: &str, kind: Kind) -> Option<bool> {
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.get(&(id.to_owned(), kind)).copied()
    }

    fn keep(&self, known: impl Fn(&str) -> bool) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.retain(|(id, _), _| known(id));
    }
}

/// The tasks and verdicts of one pod. Dropping it ends the tasks.
pub(in crate::pods) struct Probers {
    shared: Arc<Shared>,
    verdicts: Arc<Verdicts>,
    tasks: BTreeMap<(String, Kind), Asked>,
    /// Since when this daemon looks after the pod.
    born: Timestamp,
}

struct Asked {
    id: String,
    task: AbortHandle,
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Probers {
    /// Nothing is asked before the first [`Probers::tend`]. `wake` is called when a verdict has changed.
    pub(in crate::pods) fn new(shared: Arc<Shared>, wake: impl Fn() + Send + Sync + 'static) -> Self {
        let born = shared.clock.now();
        Self {
            shared,
            verdicts: Arc::new(Verdicts {
                table: Mutex::default(),
                wake: Box::new(wake),
            }),
            tasks: BTreeMap::new(),
            born,
        }
    }

    /// Puts the verdicts into the record (`started`, `ready`) and makes the tasks fit the containers that run.
    ///
    /// With `ends` the pod stops: only readiness goes on being asked, for as long as containers run.
    pub(in crate::pods) fn tend(
        &mut self,
        pod: &Arc<Pod>,
        record: &mut PodRecord,
        ip: Option<IpAddr>,
        ends: bool,
    ) {
        let mut alive = Vec::new();
        for container in inits(pod).iter().chain(regulars(pod)) {
            let Some(known) = record.containers.get_mut(&container.name) else {
                continue;
            };
            let instance = known.last.as_ref().filter(|l| !l.lost);
            let running = instance.and_then(|i| match i.state {
                State::Running(since) => Some((i.id.clone(), since)),
                _ => None,
            });
            let Some((id, since)) = running else {
                known.started = false;
                known.ready = false;
                continue;
            };
            // A regular init container has no probes.
            let probed = !inits(pod).iter().any(|c| c.name == container.name) || is_sidecar(container);
            if !probed {
                known.started = true;
                known.ready = true;
                continue;
            }
            alive.push(id.clone());
            let was_started = known.started;
            known.started |=
                Kind::Startup.of(container).is_none() || self.verdicts.get(&id, Kind::Startup) == Some(true);
            known.ready = known.started
                && (Kind::Readiness.of(container).is_none()
                    || self.verdicts.get(&id, Kind::Readiness).unwrap_or(known.ready));
            let passed_now = known.started && !was_started && Kind::Startup.of(container).is_some();
            for kind in Kind::ALL {
                let wanted = match kind {
                    Kind::Startup => !known.started && !ends && self.verdicts.get(&id, kind).is_none(),
                    Kind::Liveness => known.started && !ends && self.verdicts.get(&id, kind) != Some(false),
                    Kind::Readiness => known.started,
                };
                let key = (container.name.clone(), kind);
                let Some(probe) = kind.of(container).filter(|_| wanted) else {
                    self.tasks.remove(&key);
                    continue;
                };
                if self.tasks.get(&key).is_some_and(|asked| asked.id == id) {
                    continue;
                }
                let up = self.shared.clock.elapsed(since);
                let left = Rules::of(probe).initial_delay.saturating_sub(up);
                let begin = if !left.is_zero() {
                    Begin::After(left)
                } else if since < self.born {
                    Begin::Somewhen
                } else if passed_now && kind == Kind::Readiness {
                    Begin::AtOnce
                } else {
                    Begin::After(Duration::ZERO)
                };
                let asked = self.ask(pod, container, kind, &id, ip, begin);
                self.tasks.insert(key, asked);
            }
        }
        let current = |id: &str| alive.iter().any(|a| a == id);
        self.tasks.retain(|_, asked| current(&asked.id));
        self.verdicts.keep(current);
    }

    fn ask(
        &self,
        pod: &Arc<Pod>,
        container: &Container,
        kind: Kind,
        id: &str,
        ip: Option<IpAddr>,
        begin: Begin,
    ) -> Asked {
        let task = Task {
            shared: Arc::clone(&self.shared),
            verdicts: Arc::clone(&self.verdicts),
            pod: Arc::clone(pod),
            container: container.name.clone(),
            kind,
            id: ContainerId(id.to_owned()),
            host: reached_at(&self.shared, pod, ip).to_string(),
            begin,
        };
        Asked {
            id: id.to_owned(),
            task: tokio::spawn(task.run()).abort_handle(),
        }
    }

    /// Instances that must be restarted, with the grace that their probe gives them.
    pub(in crate::pods) fn condemned(&self, pod: &Pod, record: &PodRecord) -> Vec<Condemned> {
        let mut all = Vec::new();
        for container in inits(pod).iter().chain(regulars(pod)) {
            let Some(instance) = record.last(&container.name) else {
                continue;
            };
            for (kind, probe) in [(Kind::Liveness, "liveness"), (Kind::Startup, "startup")] {
                if self.verdicts.get(&instance.id, kind) != Some(false) {
                    continue;
                }
                let grace = kind
                    .of(container)
                    .and_then(|p| p.termination_grace_period_seconds)
                    .and_then(|s| u64::try_from(s).ok())
                    .map(Duration::from_secs);
                all.push(Condemned {
                    id: instance.id.clone(),
                    probe,
                    grace,
                });
                break;
            }
        }
        all
    }

    /// Ends all asking.
    pub(in crate::pods) fn stop(&mut self) {
        self.tasks.clear();
    }
}
