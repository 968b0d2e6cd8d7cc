//! One pod's task: look, plan, do, report; until the pod is gone.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use skerry_proto::object::Uid;
use tokio::sync::watch;
use tokio::time::Instant;

use super::admission::Admitted;
use super::events::{Events, Level};
use super::hooks::Stop;
use super::images::Images;
use super::plan::{self, Plan, Step, find_container};
use super::probes::{ProbeMetrics, Probers};
use super::record::{End, PodRecord, View};
use super::security::UserRanges;
use super::status::{self, Phase, Waiting};
use super::teardown::stop_all;
use super::trace::{Stage, Trace};
use super::uninterrupted::Uninterrupted;
use super::{Clock, PodsConfig, ROOM, Summary, ephemeral, volumes};
use crate::runtime::{ContainerId, Features, Runtime, RuntimeError, SandboxConfig};
use crate::store::{Store, Written};

/// Try again after an error.
pub(super) const RETRY: Duration = Duration::from_secs(10);
/// Look again although nothing happened: everything that a pod depends on brings a notice, this is the net below.
const IDLE: Duration = Duration::from_secs(300);
/// Rounds of look and do before the task looks up.
const MAX_ROUNDS: usize = 32;

/// What every worker uses.
pub(super) struct Shared {
    pub(super) groups: super::groups::Groups,
    pub(super) ledger: super::ledger::Ledger,
    /// What the ledger has to tell; the supervisor listens.
    pub(super) nudges: tokio::sync::Mutex<tokio::sync::mpsc::UnboundedReceiver<super::ledger::Nudge>>,
    pub(super) config: PodsConfig,
    pub(super) store: Store,
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) events: Events,
    pub(super) images: Images,
    /// Whether the machine enforces AppArmor profiles.
    pub(super) apparmor: bool,
    /// Ids of the pods with user namespaces.
    pub(super) user_ranges: UserRanges,
    pub(super) probes: Arc<ProbeMetrics>,
    /// From which priority on a pod is critical.
    pub(super) critical_priority: std::sync::atomic::AtomicI32,
    /// How long the site has been without its cloud.
    pub(super) solitude: super::alone::Solitude,
    /// How long pods take to start.
    pub(super) starts: super::Starts,
    /// How many containers have ended.
    pub(super) terminations: super::Terminations,
    /// Phase by UID.
    pub(super) phases: Mutex<HashMap<Uid, String>>,
    /// Pods that have ended and have no worker any more.
    pub(super) resting: super::resting::Resting,
    pub(super) summary: watch::Sender<Summary>,
    /// Moves when every status must be reported again, changed or not.
    pub(super) report_round: watch::Sender<u64>,
    /// Pods from files.
    pub(super) statics: watch::Sender<super::StaticPods>,
    /// Orders by UID, for those who tell workers from outside.
    pub(super) workers: Mutex<HashMap<Uid, watch::Sender<Orders>>>,
    /// The machine is going down.
    pub(super) shutdown: watch::Sender<super::ending::Shutdown>,
}

/// What a worker is told; only the newest counts.
#[derive(Clone, Debug, Default)]
pub(super) struct Orders {
    /// The pod as the store has it.
    pub(super) pod: Option<Arc<Pod>>,
    /// The object was removed: stop, clean up, end.
    pub(super) removed: bool,
    /// A critical pod needs the room: stop, end.
    pub(super) preempted: bool,
    /// Moves when something that the pod depends on may have changed.
    pub(super) wakes: u64,
    /// Moves when the runtime shows something else of this pod than before. Often it is what the worker did itself.
    pub(super) runtime_moves: u64,
    /// The node ends the pod.
    pub(super) ending: Option<Arc<super::Ending>>,
}

impl Orders {
    /// Nothing has changed since `last` but what the runtime shows.
    pub(super) fn only_runtime_moved(&self, last: &Self) -> bool {
        // Each field by name, so that a new one is not forgotten here.
        let Self {
            pod,
            removed,
            preempted,
            wakes,
            runtime_moves: _,
            ending,
        } = self;
        *removed == last.removed
            && *preempted == last.preempted
            && *wakes == last.wakes
            && is_same(pod.as_ref(), last.pod.as_ref())
            && is_same(ending.as_ref(), last.ending.as_ref())
    }

    /// The pod must stop.
    pub(super) fn stops(&self) -> bool {
        self.removed
            || self
                .pod
                .as_ref()
                .is_some_and(|p| p.metadata.deletion_timestamp.is_some())
    }
}

/// Why a round failed; the task tries again.
#[derive(Debug, thiserror::Error)]
pub(super) enum SyncError {
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: std::io::Error },
}

/// One pod's task.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) uid: Uid,
    pub(super) orders: watch::Receiver<Orders>,
    pub(super) waker: watch::Sender<Orders>,
    pub(super) record: PodRecord,
    pub(super) view: View,
    pub(super) waiting: BTreeMap<String, Waiting>,
    pub(super) probers: Probers,
    /// Host paths of the volumes.
    pub(super) volumes: BTreeMap<String, PathBuf>,
    /// The plan's earliest wish to look again.
    pub(super) again: Duration,
    /// What this daemon made the sandbox from; its containers are made with the same.
    pub(super) sandbox_made: Option<SandboxConfig>,
    pub(super) uninterrupted: Uninterrupted,
    pub(super) said_unsupported: bool,
    /// It was said that the pod is stopped because the site is alone.
    pub(super) said_alone: bool,
    /// What the runtime can do.
    pub(super) features: Features,
    /// The report round in which the status was last reported.
    pub(super) reported_in: u64,
    /// Writes of this round that may not be on disk yet.
    writes: Mutex<Vec<Written>>,
    /// A write has failed: the status must be reported again, changed or not.
    pub(super) unsure: bool,
    /// The UID under which it was last reported.
    pub(super) reported_as: Option<Uid>,
    /// Held until it is decided what becomes of the pod.
    place: Option<super::intake::Place>,
    pub(super) trace: Trace,
}

impl Worker {
    pub(super) fn new(
        shared: Arc<Shared>,
        uid: Uid,
        waker: watch::Sender<Orders>,
        place: Option<super::intake::Place>,
    ) -> Self {
        let record = shared.store.state_get::<PodRecord>(ROOM, uid.as_str()).unwrap_or_else(|error| {
            tracing::error!(%uid, %error, "a pod's record cannot be read; it starts anew from the runtime");
            None
        });
        shared
            .phases
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(uid.clone(), "Pending".to_owned());
        let mut orders = waker.subscribe();
        orders.mark_changed();
        let reported_in = *shared.report_round.borrow();
        let wake = waker.clone();
        let probers = Probers::new(Arc::clone(&shared), move || wake.send_modify(|o| o.wakes += 1));
        let reported_as = super::statics::first_report(&uid);
        Self {
            probers,
            shared,
            uid,
            orders,
            waker,
            record: record.unwrap_or_default(),
            view: View::default(),
            waiting: BTreeMap::new(),
            volumes: BTreeMap::new(),
            again: IDLE,
            sandbox_made: None,
            uninterrupted: Uninterrupted::new(),
            said_unsupported: false,
            said_alone: false,
            features: Features::default(),
            reported_in,
            writes: Mutex::default(),
            unsure: false,
            reported_as,
            place,
            trace: Trace::new(),
        }
    }

    /// Runs until the pod is gone. Cancellation safe: what was done shows in the runtime.
    pub(super) async fn run(mut self) {
        loop {
            let orders = self.orders.borrow_and_update().clone();
            self.again = IDLE;
            let result = if orders.removed {
                self.vanish(orders.pod.as_deref()).await
            } else if let Some(pod) = &orders.pod {
                self.live(pod, orders.stops()).await
            } else {
                Ok(())
            };
            // Whatever came of the round: what it wrote must be on disk before the next.
            match result.and(self.on_disk().await) {
                Ok(()) if orders.removed => break,
                Ok(()) if self.may_rest(&orders) => return self.rest(),
                Ok(()) => {}
                Err(error) => {
                    tracing::warn!(uid = %self.uid, %error, "a pod's round failed; trying again");
                    self.again = self.again.min(RETRY);
                }
            }
            self.place = None;
            if self.wait(&orders).await.is_err() {
                return;
            }
        }
        self.forget();
    }

    /// Leaves nothing behind in the books of those that have a worker.
    pub(super) fn forget(&self) {
        self.shared
            .phases
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.uid);
        self.shared.probes.forget(self.uid.as_str());
        self.shared.starts.forget(self.uid.as_str());
        self.count_phases();
    }

    /// Waits for a reason to look again. Fails when the supervisor has dropped the orders: only when it stops.
    async fn wait(&mut self, last: &Orders) -> Result<(), watch::error::RecvError> {
        let again = Instant::now() + self.again;
        loop {
            tokio::select! {
                changed = self.orders.changed() => changed?,
                () = tokio::time::sleep_until(again) => return Ok(()),
            }
            let new = self.orders.borrow_and_update().clone();
            if !new.only_runtime_moved(last) || self.runtime_differs().await {
                return Ok(());
            }
        }
    }

    /// The runtime shows this pod otherwise than the last look did.
    async fn runtime_differs(&self) -> bool {
        match self.shared.runtime.list_pod(&self.uid).await {
            Ok(now) => View::new(now.sandboxes, now.containers) != self.view,
            // The round says why.
            Err(_) => true,
        }
    }

    /// A pod whose object exists.
    async fn live(&mut self, pod: &Pod, stops: bool) -> Result<(), SyncError> {
        if stops {
            return self.delete(pod).await;
        }
        if let Some(result) = self.obey(pod).await {
            return result;
        }
        let ended = self.record.end.is_some();
        let mut orders = self.orders.clone();
        let uninterrupted = self.uninterrupted.clone();
        tokio::select! {
            biased;
            result = self.sync(pod) => result,
            // Deletion, and an end that the node wants, interrupt whatever is going on, but for a start half made.
            () = async {
                let _ = orders.wait_for(|o| o.stops() || (o.ending.is_some() && !ended)).await;
                uninterrupted.idle().await;
            } => {
                self.again = Duration::ZERO;
                Ok(())
            }
        }
    }

    /// One complete look at a pod that should run.
    async fn sync(&mut self, wished: &Pod) -> Result<(), SyncError> {
        self.begin(wished);
        self.features = self.shared.runtime.features().await;
        self.look(wished).await?;
        if self.record.end.is_some() {
            return self.finish_end(wished).await;
        }
        // From here on the pod has what it was given, whatever its spec asks for.
        let begun = Instant::now();
        let admitted = self.admit(wished).await?;
        self.trace.note(Stage::Admission, begun);
        self.place = None;
        let pod = match admitted {
            Admitted::Yes(pod) => *pod,
            Admitted::NotYet => return self.publish(wished, false).await,
            Admitted::No(end) => return self.end(wished, end).await,
        };
        let pod = &pod;
        if let Some(end) = self.ending(pod) {
            return self.end(pod, end).await;
        }
        self.say_unsupported(pod).await;
        for _ in 0..MAX_ROUNDS {
            let begun = Instant::now();
            let mounted = self.mount(pod).await;
            self.trace.note(Stage::Volumes, begun);
            if !mounted {
                break;
            }
            self.resize(pod).await?;
            let plan = plan::plan(
                pod,
                &self.record,
                &self.view,
                self.shared.runtime.isolated(),
                &self.probers.condemned(pod, &self.record),
                &|then| self.shared.clock.elapsed(then),
            );
            self.note_waits(pod, &plan).await;
            if plan.steps.is_empty() {
                break;
            }
            let progress = self.execute(pod, plan).await?;
            self.look(pod).await?;
            self.publish(pod, false).await?;
            if !progress {
                break;
            }
            if let Some(end) = self.ending(pod) {
                return self.end(pod, end).await;
            }
        }
        self.collect_dead().await;
        self.publish(pod, false).await
    }

    /// Notes a new pod; what comes of its admission is saved with that.
    pub(super) fn begin(&mut self, pod: &Pod) {
        if self.record.start_time.is_none() {
            self.record.start_time = Some(self.shared.clock.now());
            self.record.namespace = pod.metadata.namespace.clone().unwrap_or_default();
            self.record.name = pod.metadata.name.clone().unwrap_or_default();
        }
    }

    /// Looks at the runtime and merges it into the record.
    pub(super) async fn look(&mut self, pod: &Pod) -> Result<(), SyncError> {
        let begun = Instant::now();
        let inventory = self.shared.runtime.list_pod(&self.uid).await?;
        self.trace.note(Stage::Look, begun);
        self.view = View::new(inventory.sandboxes, inventory.containers);
        let before = self.record.clone();
        let dir = self.pod_dir();
        self.record
            .observe(&self.view, self.shared.clock.now(), |container| {
                super::message::termination_message(&dir, container)
            });
        self.tend_probes(pod);
        if self.record != before {
            self.save()?;
        }
        Ok(())
    }

    /// Queues the record for the disk. What is on disk is always the record after some step; what the last steps before
    /// a crash wrote may be missing, and shows in the runtime again.
    pub(super) fn save(&self) -> Result<(), SyncError> {
        let written = self
            .shared
            .store
            .queue_state(ROOM, self.uid.as_str(), &self.record)?;
        self.await_later(written);
        Ok(())
    }

    /// Leaves a write to be waited for at the end of the round.
    pub(super) fn await_later(&self, write: Written) {
        self.writes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(write);
    }

    /// Waits until all that this round wrote is on disk.
    async fn on_disk(&mut self) -> Result<(), SyncError> {
        let writes = std::mem::take(&mut *self.writes.lock().unwrap_or_else(PoisonError::into_inner));
        if writes.is_empty() {
            return Ok(());
        }
        self.unsure = true;
        let begun = Instant::now();
        for write in writes {
            write.on_disk().await?;
        }
        self.trace.note(Stage::Disk, begun);
        self.unsure = false;
        Ok(())
    }

    pub(super) fn pod_dir(&self) -> PathBuf {
        self.shared.config.root_dir.join(self.uid.as_str())
    }

    pub(super) fn pod_ips(&self) -> Vec<IpAddr> {
        self.view
            .ready_sandbox()
            .map(|s| s.ips.clone())
            .unwrap_or_default()
    }

    /// The pod has ended by its own rules.
    fn ending(&mut self, pod: &Pod) -> Option<End> {
        if self.orders.borrow().preempted {
            return Some(End {
                reason: "Preempting".to_owned(),
                message: "Preempted in order to admit critical pod".to_owned(),
                disruption: Some("Pod was preempted by Kubelet to accommodate a critical pod.".to_owned()),
                ..End::default()
            });
        }
        let limit = pod.spec.as_ref().and_then(|s| s.active_deadline_seconds);
        if let (Some(limit), Some(start)) =
            (limit.and_then(|l| u64::try_from(l).ok()), self.record.start_time)
        {
            let active = self.shared.clock.elapsed(start);
            match Duration::from_secs(limit)
                .checked_sub(active)
                .filter(|left| !left.is_zero())
            {
                Some(left) => self.again = self.again.min(left),
                None => {
                    return Some(End {
                        reason: "DeadlineExceeded".to_owned(),
                        message: "Pod was active on the node longer than the specified deadline".to_owned(),
                        ..End::default()
                    });
                }
            }
        }
        let succeeded = match status::phase(pod, &self.record) {
            Phase::Succeeded => true,
            Phase::Failed => false,
            Phase::Pending | Phase::Running => return None,
        };
        Some(End {
            succeeded,
            ..End::default()
        })
    }

    pub(super) async fn end(&mut self, pod: &Pod, end: End) -> Result<(), SyncError> {
        // Those that were turned away have had their event.
        let level = match end.reason.as_str() {
            "DeadlineExceeded" => Some(Level::Normal),
            "Preempting" => Some(Level::Warning),
            _ => None,
        };
        if let Some(level) = level {
            self.shared
                .events
                .emit(pod, None, level, &end.reason, end.message.clone())
                .await;
        }
        self.record.end = Some(end);
        self.save()?;
        self.finish_end(pod).await
    }

    /// Stops what an ended pod still has, then reports the terminal phase.
    async fn finish_end(&mut self, pod: &Pod) -> Result<(), SyncError> {
        if !self.record.released {
            let (shared, view) = (Arc::clone(&self.shared), self.view.clone());
            let grace = self.end_grace(pod);
            let work = stop_all(&shared, &view, Some(pod), grace);
            self.meanwhile(pod, work).await?;
            self.look(pod).await?;
            self.release().await?;
            self.record.released = true;
            self.save()?;
        }
        self.publish(pod, false).await
    }

    /// Makes or refreshes the volumes; answers whether containers may start.
    async fn mount(&mut self, pod: &Pod) -> bool {
        if let Some(message) = volumes::resource_claims(pod) {
            self.shared
                .events
                .emit(
                    pod,
                    None,
                    Level::Warning,
                    "FailedPrepareDynamicResources",
                    message,
                )
                .await;
            return false;
        }
        let ips = self.pod_ips();
        let facts = super::env::Facts {
            pod,
            host_ip: self.shared.config.node_ip,
            pod_ips: &ips,
            objects: &self.shared.store,
        };
        let (paths, errors) = volumes::set_up(&facts, &self.pod_dir());
        self.volumes.extend(paths);
        for error in &errors {
            // Once it is mounted, an object that went away changes nothing.
            if !self.volumes.contains_key(&error.volume) {
                self.shared
                    .events
                    .emit(pod, None, Level::Warning, error.event(), error.to_string())
                    .await;
            }
        }
        if !errors.is_empty() {
            self.again = self.again.min(RETRY);
        }
        let uses = volumes::Uses::of(pod);
        volumes::used(pod, &uses).all(|v| self.volumes.contains_key(&v.name))
    }

    /// Does what was planned; answers whether another round makes sense.
    async fn execute(&mut self, pod: &Pod, plan: Plan) -> Result<bool, SyncError> {
        let mut progress = false;
        for step in plan.steps {
            match step {
                Step::Sandbox { attempt, changed } => {
                    if changed {
                        let message = "Pod sandbox changed, it will be killed and re-created.".to_owned();
                        self.shared
                            .events
                            .emit(pod, None, Level::Normal, "SandboxChanged", message)
                            .await;
                    }
                    self.stop_everything(None, grace(pod)).await?;
                    progress |= self.run_sandbox(pod, attempt).await?;
                }
                Step::RestartAll => {
                    self.restart_all(pod).await?;
                    progress = true;
                }
                Step::Kill {
                    name,
                    id,
                    message,
                    grace: own,
                } => {
                    self.shared
                        .events
                        .emit(pod, Some(&name), Level::Normal, "Killing", message)
                        .await;
                    let grace = own.unwrap_or_else(|| grace(pod)).max(Duration::from_secs(2));
                    let Some(instance) = self.view.containers.iter().find(|c| c.id.0 == id).cloned() else {
                        continue;
                    };
                    let shared = Arc::clone(&self.shared);
                    let stop = Stop {
                        pod: Some(pod),
                        container: &instance,
                        ip: self.pod_ips().first().copied(),
                        grace,
                        least: Duration::from_secs(2),
                    };
                    self.meanwhile(pod, stop.run(&shared)).await?;
                    progress = true;
                }
                Step::Start {
                    name,
                    restart_count,
                    discard,
                    after,
                } => {
                    let found = find_container(pod, &name).cloned();
                    let Some(container) = &found.or_else(|| ephemeral::find(pod, &name)) else {
                        continue;
                    };
                    if let Some(id) = discard {
                        self.shared
                            .runtime
                            .stop_container(&ContainerId(id.clone()), Duration::ZERO)
                            .await?;
                        self.shared.runtime.remove_container(&ContainerId(id)).await?;
                    }
                    if !self
                        .start_container(pod, container, restart_count, after.as_ref())
                        .await?
                    {
                        continue;
                    }
                    progress = true;
                    if restart_count > 0 {
                        self.shared.summary.send_modify(|s| s.restarts += 1);
                    }
                }
            }
        }
        Ok(progress)
    }
}

fn is_same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        (None, None) => true,
        _ => false,
    }
}

/// The grace that a pod's containers get.
pub(super) fn grace(pod: &Pod) -> Duration {
    let seconds = pod
        .metadata
        .deletion_grace_period_seconds
        .or_else(|| pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds))
        .unwrap_or(30);
    Duration::from_secs(u64::try_from(seconds).unwrap_or(0).max(1))
}

/// When a deletion began, by the object.
pub(super) fn deletion_time(pod: &Pod) -> Option<jiff::Timestamp> {
    pod.metadata.deletion_timestamp.as_ref().map(|Time(t)| *t)
}
