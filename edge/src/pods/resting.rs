//! Pods that have ended and of which nothing is left but the memory: thousands of them must cost next to nothing.
//!
//! A pod rests once it has ended for good, holds nothing on the machine, and its last status is in the outbox. Its worker
//! ends; what remains in memory is its UID and how it ended. It wakes when its object is to be deleted or is gone.
//!
//! Whether the API shows the same end is seen in the object: the provider sends a pod again when its phase in the API
//! becomes terminal, and when it is no longer so (an older backup was restored). After each reconnection the status is
//! reported again of those alone whose object does not show the end yet.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::PodStatus;
use serde::Deserialize;
use serde::de::IgnoredAny;
use skerry_proto::link::{Kind, PodStatusReport, report};
use skerry_proto::object::{ObjectKey, Uid};
use tokio::task::JoinError;

use super::record::PodRecord;
use super::worker::{Orders, Shared, Worker};
use super::{ROOM, Supervisor};
use crate::manifests::read::is_static_uid;
use crate::store::{Lane, NewReport, StoreError};

/// Statuses that are reported again at one time.
const AT_ONCE: usize = 64;

/// How a pod has ended, and whether the API shows it, once that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rest {
    succeeded: bool,
    shown: Option<bool>,
}

/// The pods at rest.
#[derive(Debug, Default)]
pub(super) struct Resting(Mutex<HashMap<Uid, Rest>>);

impl Resting {
    fn lock(&self) -> MutexGuard<'_, HashMap<Uid, Rest>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn has(&self, uid: &Uid) -> bool {
        self.lock().contains_key(uid)
    }

    fn put(&self, uid: &Uid, succeeded: bool) {
        let shown = None;
        self.lock().insert(uid.clone(), Rest { succeeded, shown });
    }

    /// The pod rests no more.
    pub(super) fn wake(&self, uid: &Uid) {
        self.lock().remove(uid);
    }

    /// Adds the pods at rest to counts by phase.
    pub(super) fn count(&self, counts: &mut BTreeMap<String, usize>) {
        let resting = self.lock();
        let succeeded = resting.values().filter(|rest| rest.succeeded).count();
        for (phase, count) in [("Succeeded", succeeded), ("Failed", resting.len() - succeeded)] {
            if count > 0 {
                *counts.entry(phase.to_owned()).or_insert(0) += count;
            }
        }
    }

    fn note_shown(&self, uid: &Uid, shown: bool) {
        if let Some(rest) = self.lock().get_mut(uid) {
            rest.shown = Some(shown);
        }
    }

    /// For one who looked at older objects: what has become known since stays.
    fn note_shown_before(&self, uid: &Uid, shown: bool) {
        if let Some(rest) = self.lock().get_mut(uid) {
            rest.shown.get_or_insert(shown);
        }
    }

    /// Nothing is known any more about what the API shows.
    fn doubt_shown(&self) {
        self.lock().values_mut().for_each(|rest| rest.shown = None);
    }

    fn not_shown(&self) -> Vec<Uid> {
        let resting = self.lock();
        let not_shown = resting.iter().filter(|(_, rest)| rest.shown != Some(true));
        not_shown.map(|(uid, _)| uid.clone()).collect()
    }

    fn all(&self) -> Vec<Uid> {
        self.lock().keys().cloned().collect()
    }
}

/// As much of a stored record as tells whether its pod rests.
#[derive(Deserialize)]
pub(super) struct RecordInShort {
    end: Option<EndInShort>,
    released: bool,
    status: Option<StatusInShort>,
    allocated: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct EndInShort {
    succeeded: bool,
}

impl RecordInShort {
    /// The pod holds what it was given.
    pub(super) fn holds_room(&self) -> bool {
        self.allocated.is_some() && !self.released
    }

    /// How the pod has ended, if nothing but its memory is left.
    fn rests(&self) -> Option<bool> {
        let end = self.end.as_ref()?;
        // An older status would never be followed by the end's.
        let told = self.status.as_ref().is_some_and(StatusInShort::is_end);
        (self.released && told).then_some(end.succeeded)
    }
}

/// Reads any bytes as a stored record, in short and whole.
pub(crate) fn any_record(bytes: &[u8]) {
    let short = serde_json::from_slice::<RecordInShort>(bytes);
    if let Ok(record) = serde_json::from_slice::<PodRecord>(bytes) {
        assert!(
            short.is_ok(),
            "what can be read whole can be read in short: {record:?}"
        );
    }
}

/// As much of a stored pod as matters to one at rest.
#[derive(Deserialize)]
struct PodInShort {
    metadata: MetadataInShort,
    #[serde(default)]
    status: StatusInShort,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct MetadataInShort {
    deletion_timestamp: Option<IgnoredAny>,
}

#[derive(Default, Deserialize)]
struct StatusInShort {
    #[serde(default)]
    phase: Option<String>,
}

impl StatusInShort {
    fn is_end(&self) -> bool {
        matches!(self.phase.as_deref(), Some("Succeeded" | "Failed"))
    }
}

impl Worker {
    /// Nothing is left to be done for the pod until its object changes.
    pub(super) fn may_rest(&self, orders: &Orders) -> bool {
        let record = &self.record;
        !orders.stops()
            && orders.pod.is_some()
            && record.end.is_some()
            && record.released
            && record.status.is_some()
            && self.reported_in == *self.shared.report_round.borrow()
            && !is_static_uid(self.uid.as_str())
            && self.orders.has_changed().is_ok_and(|changed| !changed)
    }

    /// Leaves the pod to the memory.
    pub(super) fn rest(self) {
        let succeeded = self.record.end.as_ref().is_some_and(|end| end.succeeded);
        self.shared.resting.put(&self.uid, succeeded);
        self.shared.events.forget(self.uid.as_str());
        self.shared.images.forget(self.uid.as_str());
        self.forget();
    }
}

/// What the stored records tell before any pod is looked at.
pub(super) struct Recorded {
    /// Pods that have a record.
    pub(super) all: Vec<Uid>,
    /// Those of them that hold what they were given.
    pub(super) holders: Vec<Uid>,
}

impl Supervisor {
    /// Reads all records and finds the pods that rest already. One pass over the store, since there may be thousands.
    pub(super) fn find_recorded(&self) -> Result<Recorded, StoreError> {
        let (mut all, mut holders) = (Vec::new(), Vec::new());
        self.shared
            .store
            .state_each::<RecordInShort>(ROOM, |uid, record| {
                let uid = Uid::from(uid);
                if let Some(succeeded) = record.rests()
                    && !self.workers.contains_key(&uid)
                    && !self.shared.resting.has(&uid)
                    && !is_static_uid(uid.as_str())
                {
                    self.shared.resting.put(&uid, succeeded);
                }
                if record.holds_room() {
                    holders.push(uid.clone());
                }
                all.push(uid);
            })?;
        Ok(Recorded { all, holders })
    }

    /// Begins to look at the objects of all pods at rest. There may be thousands, and those that run must not wait for them.
    pub(super) fn look_at_resting(&mut self) {
        self.shared.resting.doubt_shown();
        let shared = Arc::clone(&self.shared);
        self.rest_looks.spawn_blocking(move || stirring(&shared));
    }

    /// Wakes those that shall not go on resting.
    pub(super) fn resting_looked_at(&mut self, look: Result<Result<Vec<Uid>, StoreError>, JoinError>) {
        match look {
            Ok(Ok(stirring)) => {
                for uid in stirring {
                    let kind = Kind::Pod;
                    let key = ObjectKey { kind, uid };
                    // Its object may be another one by now.
                    if self.shared.resting.has(&key.uid) && !self.still_rests(&key) {
                        self.begin(&key.uid);
                    }
                }
            }
            Ok(Err(error)) => tracing::error!(%error, "the objects of pods that have ended cannot be read"),
            Err(error) => tracing::error!(%error, "the look at pods that have ended failed"),
        }
        if self.rest_looks.is_empty() && std::mem::take(&mut self.report_rested) {
            self.report_resting();
        }
    }

    /// The object of a pod at rest may have changed. Answers whether the pod goes on resting.
    pub(super) fn still_rests(&self, key: &ObjectKey) -> bool {
        if !self.shared.resting.has(&key.uid) {
            return false;
        }
        let pod = match self.shared.store.get(key) {
            Ok(Some(object)) => object.decode::<PodInShort>().ok(),
            Ok(None) => None,
            // Nothing is known, so nothing is done.
            Err(_) => return true,
        };
        match pod {
            Some(pod) if pod.metadata.deletion_timestamp.is_none() => {
                let shown = pod.status.is_end();
                self.shared.resting.note_shown(&key.uid, shown);
                if !shown {
                    report_again(&self.shared, vec![key.uid.clone()]);
                }
                true
            }
            _ => {
                self.shared.resting.wake(&key.uid);
                false
            }
        }
    }

    /// Reports the end of those whose objects do not show it, once that is known.
    pub(super) fn report_resting(&mut self) {
        if self.rest_looks.is_empty() {
            report_again(&self.shared, self.shared.resting.not_shown());
        } else {
            self.report_rested = true;
        }
    }
}

/// The pods at rest whose object is to be deleted or gone; of the others it is noted what the API shows. One pass over the
/// store. Blocking.
fn stirring(shared: &Shared) -> Result<Vec<Uid>, StoreError> {
    let resting = &shared.resting;
    let mut gone: BTreeSet<Uid> = resting.all().into_iter().collect();
    let mut leaving = Vec::new();
    shared.store.each(Kind::Pod, |object| {
        let uid = object.key.uid.clone();
        if !gone.remove(&uid) {
            return;
        }
        match object.decode::<PodInShort>() {
            Ok(pod) if pod.metadata.deletion_timestamp.is_some() => leaving.push(uid),
            Ok(pod) => resting.note_shown_before(&uid, pod.status.is_end()),
            // It is told where it is needed.
            Err(_) => {}
        }
    })?;
    leaving.extend(gone);
    Ok(leaving)
}

/// Reports again how pods have ended, a few at a time, beside everything else.
fn report_again(shared: &Arc<Shared>, uids: Vec<Uid>) {
    if uids.is_empty() {
        return;
    }
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        for some in uids.chunks(AT_ONCE) {
            let mut written = Vec::with_capacity(some.len());
            for uid in some {
                match last_report(&shared, uid) {
                    Ok(Some(report)) => written.push(shared.store.queue_report_in(Lane::Status, report)),
                    Ok(None) => {}
                    Err(error) => tracing::warn!(%uid, %error, "the end of a pod cannot be reported again"),
                }
            }
            for write in written {
                if let Err(error) = write.on_disk().await {
                    tracing::warn!(%error, "the end of a pod cannot be reported again");
                }
            }
        }
    });
}

fn last_report(shared: &Shared, uid: &Uid) -> Result<Option<NewReport>, StoreError> {
    // It may have been woken meanwhile.
    if !shared.resting.has(uid) {
        return Ok(None);
    }
    let Some(record) = shared.store.state_get::<PodRecord>(ROOM, uid.as_str())? else {
        return Ok(None);
    };
    let Some(status) = record.status else {
        return Ok(None);
    };
    Ok(Some(NewReport {
        coalesce: Some(format!("pod/{uid}")),
        observed: shared.clock.now(),
        body: report::Report::PodStatus(PodStatusReport {
            uid: uid.to_string(),
            namespace: record.namespace,
            name: record.name,
            status_json: json(&status).into(),
            finished: record.finished,
            ..PodStatusReport::default()
        }),
    }))
}

fn json(status: &PodStatus) -> Vec<u8> {
    // A status has no maps with keys that JSON does not know.
    serde_json::to_vec(status).unwrap_or_default()
}
