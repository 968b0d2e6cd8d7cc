//! The pod lifecycle: what a kubelet does, over any [`Runtime`].
//!
//! **In:** Pods and the objects that they refer to, from the store; the runtime's inventory. **Out:** sandboxes and
//! containers in the runtime; status reports and events in the store's outbox.
//!
//! One task ([`worker`]) owns each pod. It looks at the runtime, merges that into the pod's record ([`record`]), asks
//! the pure functions [`plan`] and [`status`] what to do and what to say, and does it. The supervisor here only starts
//! workers and wakes them: orders to a worker are a `watch`, so they never queue up and never block.
//!
//! What must always hold:
//! * A pod is identified by its UID; the same name with another UID is another pod.
//! * A running container whose pod is in the store is never touched because the daemon started or stopped.
//! * A pod is stopped for three reasons only: its object carries a deletionTimestamp, its object was removed from the
//!   store by an explicit order, or it ended by its own rules.
//! * A terminal phase is reported only when nothing of the pod can be running, and is final.
//! * A container with our label whose pod is not in the store is stopped: the store is the truth.

mod admission;
mod affinity;
mod allocation;
mod alone;
mod attend;
mod backoff;
mod class;
mod conditions;
mod config;
mod create;
mod dead;
mod ending;
mod env;
mod env_files;
mod ephemeral;
mod events;
#[cfg(test)]
pub(crate) mod fixtures;
mod fuzzing;
mod groups;
mod hooks;
mod httpget;
mod images;
mod intake;
mod ledger;
mod message;
mod mounts;
mod needs;
mod network;
mod objects;
mod plan;
mod probes;
pub(crate) mod quantity;
mod record;
mod resize;
mod resources;
mod restart_all;
mod resting;
mod returned;
mod security;
mod starts;
mod statics;
mod status;
mod teardown;
mod tell;
mod terminations;
mod trace;
mod uninterrupted;
mod volumes;
mod worker;
#[cfg(test)]
mod worker_tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use skerry_proto::link::Kind;
use skerry_proto::object::{ObjectKey, Uid};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::runtime::{Inventory, Runtime, RuntimeError};
use crate::store::{ObjectChanged, Store, StoreError};
pub(crate) use class::class_of;
use events::Events;
pub(crate) use fuzzing::{any_pod, any_pull_secret, pod_seeds, pull_secret_seeds};
use images::Images;
use ledger::{Ledger, Nudge};
pub use probes::ProbeMetrics;
use record::{PodRecord, View};
pub(crate) use resting::any_record;
pub use starts::Starts;
pub use terminations::Terminations;
use worker::{Orders, Shared, Worker};

pub use dead::DeadPolicy;
pub use ending::Ending;
pub use events::{Level, NodeEvents};
pub(crate) use images::default_policy as default_pull_policy;
pub(crate) use resources::{is_critical, limits, requests, to_list as to_quantities};
pub use statics::StaticPods;
pub use volumes::VolumeUse;

/// The status of a pod that was last reported; `None` when none was.
pub fn last_status(store: &Store, uid: &Uid) -> Option<PodStatus> {
    store.state_get::<PodRecord>(ROOM, uid.as_str()).ok()??.status
}

/// A quantity's text in thousandths; `None` when it is none.
pub(crate) fn quantity_milli(text: &str) -> Option<i128> {
    quantity::milli(&k8s_openapi::apimachinery::pkg::api::resource::Quantity(
        text.to_owned(),
    ))
}

/// The room's name for its records in the store.
const ROOM: &str = "pods";

/// How often everything is looked at even without a notice.
const RESYNC: Duration = Duration::from_secs(60);

/// Least time between two looks at the whole runtime: in a burst, changes are taken together. Workers see what they did
/// themselves without it.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// Settings of the pod lifecycle.
#[derive(Clone, Debug)]
pub struct PodsConfig {
    /// The node's name: the site's.
    pub node_name: String,
    /// The node's address: `status.hostIP`.
    pub node_ip: Option<IpAddr>,
    /// Directory of the pods' volumes and files; one subdirectory per UID.
    pub root_dir: PathBuf,
    /// Directory of container logs, `/var/log/pods` on a real node.
    pub pod_log_dir: PathBuf,
    /// Name servers of the cluster; empty when it has none for this site.
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster, `cluster.local`.
    pub cluster_domain: String,
    /// The node's own resolver file.
    pub resolv_conf: PathBuf,
    /// Image pulls at one time.
    pub parallel_pulls: usize,
    /// Containers without a seccomp profile get the runtime's default.
    pub seccomp_default: bool,
    /// What of the machine is for pods.
    pub shares: crate::node::Shares,
    /// Pods have cgroups of their own.
    pub cgroups: bool,
    /// Most processes and threads in a pod.
    pub pod_pids_limit: Option<u64>,
    /// On the file system that counts as the node's.
    pub data_dir: PathBuf,
    /// Directory of the seccomp profiles that pods name as `Localhost`.
    pub seccomp_dir: PathBuf,
    /// Dead containers to keep.
    pub dead: DeadPolicy,
}

impl Default for PodsConfig {
    fn default() -> Self {
        Self {
            node_name: String::new(),
            node_ip: None,
            root_dir: PathBuf::from("/var/lib/skerry/pods"),
            pod_log_dir: PathBuf::from("/var/log/pods"),
            cluster_dns: Vec::new(),
            cluster_domain: "cluster.local".to_owned(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            parallel_pulls: 3,
            seccomp_default: false,
            shares: crate::node::Shares::default(),
            cgroups: false,
            pod_pids_limit: None,
            data_dir: PathBuf::from("/var/lib/skerry"),
            seccomp_dir: PathBuf::from("/var/lib/kubelet/seccomp"),
            dead: DeadPolicy::default(),
        }
    }
}

/// The site's pods in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// The first look at store and runtime is done: pods are adopted.
    pub synced: bool,
    /// Pods by phase as last reported (`Pending`, `Running`, `Succeeded`, `Failed`).
    pub by_phase: BTreeMap<String, usize>,
    /// Restarts of containers since the daemon started.
    pub restarts: u64,
    /// The last error of the runtime's list, empty when it answers.
    pub runtime_error: String,
}

/// The pod lifecycle. Clones share one set of pods.
#[derive(Clone)]
pub struct Pods {
    shared: Arc<Shared>,
}

impl Pods {
    /// Prepares the lifecycle; nothing runs before [`Pods::run`].
    pub fn new(config: PodsConfig, store: Store, runtime: Arc<dyn Runtime>, clock: Arc<dyn Clock>) -> Self {
        let events = Events::new(store.clone(), clock.clone());
        let starts = Starts::default();
        let images = Images::new(
            runtime.clone(),
            events.clone(),
            clock.clone(),
            store.clone(),
            config.parallel_pulls,
            starts.clone(),
        );
        let user_ranges = security::UserRanges::load(store.clone());
        let (ledger, nudges) = Ledger::new();
        let shared = Shared {
            groups: groups::Groups::new(&config),
            ledger,
            nudges: tokio::sync::Mutex::new(nudges),
            config,
            store,
            runtime,
            clock,
            events,
            images,
            apparmor: security::apparmor_enabled(),
            user_ranges,
            probes: Arc::default(),
            solitude: alone::Solitude::default(),
            critical_priority: skerry_proto::CRITICAL_PRIORITY.into(),
            phases: Mutex::default(),
            resting: resting::Resting::default(),
            starts,
            terminations: Terminations::default(),
            summary: watch::Sender::new(Summary::default()),
            report_round: watch::Sender::new(0),
            statics: watch::Sender::default(),
            workers: Mutex::default(),
            shutdown: watch::Sender::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// How long pods take to start.
    pub fn starts(&self) -> &Starts {
        &self.shared.starts
    }

    /// How many containers have ended.
    pub fn terminations(&self) -> &Terminations {
        &self.shared.terminations
    }

    /// The site's pods in numbers, from now on.
    pub fn summary(&self) -> watch::Receiver<Summary> {
        self.shared.summary.subscribe()
    }

    /// Runs of the pods' probes, for `/metrics/probes`.
    pub fn probes(&self) -> Arc<ProbeMetrics> {
        Arc::clone(&self.shared.probes)
    }

    /// Reports every pod's status again, changed or not: the API may have lost or altered it meanwhile.
    pub fn report_all(&self) {
        self.shared.report_round.send_modify(|round| *round += 1);
    }

    /// Emits events about the Node.
    pub fn node_events(&self) -> NodeEvents {
        NodeEvents(self.shared.events.clone())
    }

    /// What the pod's emptyDir volumes take now. Reads their trees: call it where blocking is allowed.
    pub fn empty_dirs(&self, pod: &Pod) -> Vec<VolumeUse> {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        volumes::measure_empty_dirs(pod, &self.shared.config.root_dir.join(uid))
    }

    /// Pods that have a worker: all but those that have ended for good.
    pub fn pod_count(&self) -> usize {
        self.shared
            .phases
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Runs the pods until `stop`. Containers go on running afterwards, and are adopted by the next run.
    ///
    /// Fails when the store cannot be read at the start.
    pub async fn run(&self, stop: CancellationToken) -> Result<(), StoreError> {
        let mut supervisor = Supervisor {
            shared: self.shared.clone(),
            workers: BTreeMap::new(),
            tasks: JoinSet::new(),
            seen: BTreeMap::new(),
            looks: JoinSet::new(),
            rest_looks: JoinSet::new(),
            report_rested: false,
            next_look: tokio::time::Instant::now(),
            intake: intake::Intake::new(),
            stop: stop.clone(),
        };
        let mut objects = self.shared.store.changes();
        let mut runtime = self.shared.runtime.changes();
        let mut rounds = self.shared.report_round.subscribe();
        let mut nudges = self.shared.nudges.lock().await;
        let recorded = supervisor.find_recorded()?;
        supervisor.restore_ledger(&recorded.holders)?;
        let mut statics = self.shared.statics.subscribe();
        supervisor.look_at_all(recorded.all)?;
        supervisor.look_at_statics();
        let mut tick = tokio::time::interval(RESYNC);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                notice = objects.recv() => supervisor.object_changed(notice),
                moved = next_move(&mut runtime, supervisor.next_look), if supervisor.looks.is_empty() => {
                    supervisor.look(moved);
                }
                Some(look) = supervisor.looks.join_next() => supervisor.looked(look),
                Some(look) = supervisor.rest_looks.join_next() => supervisor.resting_looked_at(look),
                // Wakes those for which it finds something; a worker looks up by itself now and then.
                _ = tick.tick() => supervisor.look(Ok(())),
                // The sender lives in `self`.
                _ = rounds.changed() => {
                    supervisor.wake(|_| true);
                    supervisor.report_resting();
                }
                (uid, place) = supervisor.intake.next() => supervisor.take_in(&uid, place),
                Some(nudge) = nudges.recv() => supervisor.nudged(nudge),
                // The sender lives in `self`.
                _ = statics.changed() => supervisor.look_at_statics(),
                Some(ended) = supervisor.tasks.join_next() => supervisor.worker_ended(ended),
            }
        }
        while supervisor.tasks.join_next().await.is_some() {}
        Ok(())
    }
}

/// Waits until something may have changed in the runtime, but not before `earliest`. Cancellation safe.
async fn next_move(
    changes: &mut watch::Receiver<u64>,
    earliest: tokio::time::Instant,
) -> Result<(), watch::error::RecvError> {
    tokio::time::sleep_until(earliest).await;
    changes.changed().await
}

/// Starts workers and wakes them.
struct Supervisor {
    shared: Arc<Shared>,
    workers: BTreeMap<Uid, watch::Sender<Orders>>,
    tasks: JoinSet<Uid>,
    /// The runtime's pods at the last look, to wake only those that changed.
    seen: BTreeMap<Uid, Inventory>,
    /// The look under way.
    looks: JoinSet<Result<Inventory, RuntimeError>>,
    /// Looks at the objects of pods at rest that are under way, and whether these are to be reported after it.
    rest_looks: JoinSet<Result<Vec<Uid>, StoreError>>,
    report_rested: bool,
    /// Not before that comes the next one.
    next_look: tokio::time::Instant,
    intake: intake::Intake,
    stop: CancellationToken,
}

impl Supervisor {
    /// Every pod of the store has a worker or rests, and every worker whose pod is gone is told.
    fn look_at_everything(&mut self) -> Result<(), StoreError> {
        let recorded = self.find_recorded()?;
        self.look_at_all(recorded.all)
    }

    /// The same, with the UIDs of all records.
    fn look_at_all(&mut self, recorded: Vec<Uid>) -> Result<(), StoreError> {
        let stored = self.shared.store.uids(Kind::Pod)?;
        for uid in &stored {
            if !self.shared.resting.has(uid) {
                let uid = uid.clone();
                self.pod_changed(&ObjectKey { kind: Kind::Pod, uid });
            }
        }
        let present: BTreeSet<Uid> = stored.into_iter().collect();
        // Records without an object: pods whose removal was not finished when the daemon stopped.
        for uid in recorded {
            if !present.contains(&uid) && !self.is_spared(&uid) && !self.shared.resting.has(&uid) {
                self.begin(&uid);
            }
        }
        for (uid, orders) in &self.workers {
            if !present.contains(uid) && !self.is_spared(uid) {
                orders.send_modify(|o| o.removed = true);
            }
        }
        self.look_at_resting();
        Ok(())
    }

    /// Enters every pod that was admitted before into the book, so that no new one takes its room.
    fn restore_ledger(&self, holders: &[Uid]) -> Result<(), StoreError> {
        for uid in holders.iter().cloned() {
            let record = self.shared.store.state_get::<PodRecord>(ROOM, uid.as_str())?;
            let Some(given) = record.and_then(|record| record.allocated) else {
                continue;
            };
            let key = ObjectKey { kind: Kind::Pod, uid };
            // A pod whose object is gone is about to stop.
            if let Some(object) = self.shared.store.get(&key)?
                && let Ok(pod) = object.decode::<Pod>()
            {
                self.shared.ledger.restore(&key.uid, &given.apply(&pod));
            }
        }
        Ok(())
    }

    fn nudged(&mut self, nudge: Nudge) {
        match nudge {
            Nudge::Look(uid) => self.wake(|other| *other == uid),
            Nudge::Preempt(uid) => {
                if let Some(orders) = self.workers.get(&uid) {
                    orders.send_modify(|o| o.preempted = true);
                }
            }
        }
    }

    fn object_changed(&mut self, notice: Result<ObjectChanged, broadcast::error::RecvError>) {
        let notice = match notice {
            Ok(notice) => notice,
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                tracing::info!(missed, "object notices were missed, looking at everything");
                if let Err(error) = self.look_at_everything() {
                    tracing::error!(%error, "the stored pods cannot be read");
                }
                self.wake(|_| true);
                return;
            }
            // The store lives as long as this room: nothing more will come.
            Err(broadcast::error::RecvError::Closed) => return,
        };
        match notice.key.kind {
            Kind::Pod if notice.removed => {
                self.shared.resting.wake(&notice.key.uid);
                match self.workers.get(&notice.key.uid) {
                    Some(orders) => orders.send_modify(|o| o.removed = true),
                    None => self.begin(&notice.key.uid),
                }
            }
            Kind::Pod => self.pod_changed(&notice.key),
            Kind::ServiceAccountToken => {
                let pod = notice.key.uid.as_str().split('/').next().map(Uid::from);
                self.wake(|uid| Some(uid) == pod.as_ref());
            }
            Kind::ConfigMap
            | Kind::Secret
            | Kind::RuntimeClass
            | Kind::PersistentVolumeClaim
            | Kind::PersistentVolume => self.wake_in(&notice.namespace),
            _ => {}
        }
    }

    /// Hands the newest object to the pod's worker.
    fn pod_changed(&mut self, key: &ObjectKey) {
        if self.still_rests(key) {
            return;
        }
        if !self.workers.contains_key(&key.uid) {
            return self.begin(&key.uid);
        }
        let pod = match self.shared.store.get(key) {
            Ok(Some(object)) => object.decode::<Pod>().map_err(|e| e.to_string()),
            Ok(None) => return,
            Err(error) => Err(error.to_string()),
        };
        match (pod, self.workers.get(&key.uid)) {
            // What it shows runs from a file, under another UID.
            (Ok(pod), _) if crate::manifests::mirror::mirrored(&pod).is_some() => self.mirror_changed(),
            (Ok(pod), Some(orders)) => orders.send_modify(|o| o.pod = Some(Arc::new(pod))),
            (Ok(_), None) => {}
            (Err(error), _) => {
                tracing::error!(uid = %key.uid, error, "a stored pod cannot be read; it is left as it is")
            }
        }
    }

    /// Gives the pod a worker as soon as there is a place for it.
    fn begin(&mut self, uid: &Uid) {
        if !self.workers.contains_key(uid)
            && let Some(place) = self.intake.enter(uid)
        {
            self.take_in(uid, place);
        }
    }

    /// The pod's turn has come: what the store says of it now decides.
    fn take_in(&mut self, uid: &Uid, place: intake::Place) {
        let key = ObjectKey {
            kind: Kind::Pod,
            uid: uid.clone(),
        };
        let first = match self.shared.store.get(&key) {
            Ok(Some(object)) => match object.decode::<Pod>() {
                Ok(pod) if crate::manifests::mirror::mirrored(&pod).is_some() => {
                    return self.mirror_changed();
                }
                Ok(_) if !returned::may_start(&self.shared.store, uid) => return,
                Ok(pod) => Orders {
                    pod: Some(Arc::new(pod)),
                    ..Orders::default()
                },
                Err(error) => {
                    tracing::error!(%uid, %error, "a stored pod cannot be read; it is left as it is");
                    return;
                }
            },
            Ok(None) => Orders {
                removed: true,
                ..Orders::default()
            },
            // Nothing is known, so nothing is done; the next look at everything tries again.
            Err(error) => {
                tracing::error!(%uid, %error, "the store cannot be read");
                return;
            }
        };
        self.start_with(uid, first, Some(place));
    }

    fn start(&mut self, uid: &Uid) {
        self.start_with(uid, Orders::default(), None);
    }

    fn start_with(&mut self, uid: &Uid, first: Orders, place: Option<intake::Place>) {
        if self.workers.contains_key(uid) {
            return;
        }
        let orders = watch::Sender::new(first);
        let worker = Worker::new(self.shared.clone(), uid.clone(), orders.clone(), place);
        let (stop, uid_of_task) = (self.stop.clone(), uid.clone());
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = worker.run() => {}
            }
            uid_of_task
        });
        self.shared
            .workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(uid.clone(), orders.clone());
        self.workers.insert(uid.clone(), orders);
    }

    fn wake(&self, which: impl Fn(&Uid) -> bool) {
        for (uid, orders) in &self.workers {
            if which(uid) {
                orders.send_modify(|o| o.wakes += 1);
            }
        }
    }

    /// Wakes the pods that may use an object of a namespace; all of them when it is of none.
    fn wake_in(&self, namespace: &str) {
        for orders in self.workers.values() {
            orders.send_if_modified(|o| {
                let own = o.pod.as_ref().and_then(|pod| pod.metadata.namespace.as_deref());
                let wake = namespace.is_empty() || own.is_none_or(|own| own == namespace);
                o.wakes += u64::from(wake);
                wake
            });
        }
    }

    /// Looks at the whole runtime, beside everything else, one look at a time.
    fn look(&mut self, moved: Result<(), watch::error::RecvError>) {
        // Without the runtime's watcher, the tick goes on looking.
        let pause = if moved.is_ok() { BETWEEN_LOOKS } else { RESYNC };
        self.next_look = tokio::time::Instant::now() + pause;
        if self.looks.is_empty() {
            let runtime = self.shared.runtime.clone();
            self.looks.spawn(async move { runtime.list().await });
        }
    }

    /// Wakes the pods that a look concerns, and stops what has no pod.
    fn looked(&mut self, look: Result<Result<Inventory, RuntimeError>, tokio::task::JoinError>) {
        let inventory = match look {
            Ok(Ok(inventory)) => inventory,
            Ok(Err(error)) => {
                tracing::warn!(%error, "the runtime cannot be listed");
                self.shared
                    .summary
                    .send_modify(|s| s.runtime_error = error.to_string());
                return;
            }
            Err(error) => {
                tracing::error!(%error, "a look at the runtime failed; the next change brings another");
                return;
            }
        };
        self.shared.summary.send_modify(|s| {
            s.runtime_error.clear();
            s.synced = true;
        });
        let mut by_pod = BTreeMap::<Uid, Inventory>::new();
        for sandbox in inventory.sandboxes {
            by_pod
                .entry(sandbox.pod_uid.clone())
                .or_default()
                .sandboxes
                .push(sandbox);
        }
        for container in inventory.containers {
            by_pod
                .entry(container.pod_uid.clone())
                .or_default()
                .containers
                .push(container);
        }
        let before = std::mem::replace(&mut self.seen, by_pod);
        let in_runtime: Vec<Uid> = self.seen.keys().cloned().collect();
        for uid in in_runtime {
            if self.workers.contains_key(&uid) || self.intake.waits(&uid) {
                continue;
            }
            if self.shared.resting.has(&uid) {
                // Its dead containers are kept for their logs.
                if !self.seen.get(&uid).is_some_and(is_alive) {
                    continue;
                }
                self.shared.resting.wake(&uid);
            }
            let key = ObjectKey {
                kind: Kind::Pod,
                uid: uid.clone(),
            };
            match self.shared.store.get(&key) {
                Ok(Some(_)) => self.pod_changed(&key),
                Ok(None) if self.is_spared(&uid) => {}
                Ok(None) => {
                    tracing::info!(%uid, "a pod runs here that the store does not know; it is stopped");
                    self.begin(&uid);
                }
                // Nothing is known, so nothing is stopped.
                Err(error) => tracing::error!(%uid, %error, "the store cannot be read"),
            }
        }
        for (uid, orders) in &self.workers {
            if self.seen.get(uid) != before.get(uid) {
                orders.send_modify(|o| o.runtime_moves += 1);
            }
        }
    }

    fn worker_ended(&mut self, ended: Result<Uid, tokio::task::JoinError>) {
        match ended {
            Ok(uid) => {
                self.workers.remove(&uid);
                // What came between its last look and its end; or it has come back while it was being removed.
                let key = ObjectKey { kind: Kind::Pod, uid };
                if self.shared.resting.has(&key.uid) || matches!(self.shared.store.get(&key), Ok(Some(_))) {
                    self.pod_changed(&key);
                }
            }
            Err(error) => {
                tracing::error!(%error, "a pod's worker failed; it starts again with the next look")
            }
        }
        self.workers.retain(|_, orders| orders.receiver_count() > 0);
        let alive = &self.workers;
        self.shared
            .workers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|uid, _| alive.contains_key(uid));
        // A static pod may have waited for this one's name.
        self.look_at_statics();
    }
}

/// Anything of the pod may be running.
fn is_alive(pod: &Inventory) -> bool {
    View::new(pod.sandboxes.clone(), pod.containers.clone()).anything_alive()
}
