//! A machine of the site: its disk, its daemon, and a kubelet that does what the store says.

use std::collections::{BTreeMap, BTreeSet};

use crate::block_on;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use skerry_edge::link::holding::{Holding, Work};
use skerry_edge::store::{Memory, NewReport, Store};
use skerry_proto::link::{EventReport, Hello, Kind, PodStatusReport, change, cloud_bulk, edge_bulk, report};
use skerry_proto::object::{ObjectKey, Uid};

use crate::cluster::event_name;
use crate::world::{Down, Sabotage, Up, Wire};

const ROOM: &str = "pods";

/// What the kubelet remembers of a pod, on disk.
#[derive(Clone, Default, Serialize, Deserialize)]
struct Record {
    ended: bool,
    finished: bool,
}

pub(crate) struct Session {
    pub(crate) wire: usize,
    holding: Option<Holding>,
    after: u64,
}

pub(crate) struct Machine {
    number: usize,
    pub(crate) memory: Memory,
    pub(crate) store: Option<Store>,
    life: u64,
    boot: String,
    instance: u64,
    pub(crate) session: Option<Session>,
    /// Switched off for good.
    pub(crate) off: bool,
    running: BTreeSet<String>,
    /// Pods that were begun here, and those whose removal was committed.
    begun: BTreeSet<String>,
    removed: BTreeSet<String>,
    /// Events by name, as often as they happened.
    pub(crate) emitted: BTreeMap<String, u32>,
    statuses: u64,
}

impl Machine {
    pub(crate) fn new(number: usize) -> Self {
        Self {
            number,
            memory: Memory::default(),
            store: None,
            life: 0,
            boot: String::new(),
            instance: 0,
            session: None,
            off: false,
            running: BTreeSet::new(),
            begun: BTreeSet::new(),
            removed: BTreeSet::new(),
            emitted: BTreeMap::new(),
            statuses: 0,
        }
    }

    /// A machine with a copy of this one's disk.
    pub(crate) fn clone_disk(&self, number: usize) -> Self {
        Self {
            memory: self.memory.copy(),
            begun: self.begun.clone(),
            removed: self.removed.clone(),
            // What waits in the outbox goes out from both; the event is the same one.
            emitted: self.emitted.clone(),
            ..Self::new(number)
        }
    }

    /// The daemon starts; on a machine that has just booted, nothing runs.
    pub(crate) fn start(&mut self, boot: bool) {
        let store = Store::open_in(&self.memory).unwrap();
        self.life = store.begin_life().unwrap();
        self.store = Some(store);
        self.instance += 1;
        if boot || self.boot.is_empty() {
            self.running.clear();
            self.boot = format!("boot-{}-{}", self.number, self.instance);
        }
    }

    pub(crate) fn crash(&mut self) {
        self.store = None;
        self.session = None;
    }

    pub(crate) fn connect(&mut self, wire: usize) -> Up {
        self.session = Some(Session {
            wire,
            holding: None,
            after: 0,
        });
        Up::Hello(Hello {
            site: "harbour".to_owned(),
            boot_id: self.boot.clone(),
            store_id: self.store.as_ref().unwrap().id().to_owned(),
            incarnation: self.life,
            instance: format!("{}-{}", self.number, self.instance),
            ..Hello::default()
        })
    }

    /// Takes the next messages from its line.
    pub(crate) fn receive(
        &mut self,
        wire: &mut Wire,
        most: usize,
        sabotage: Option<Sabotage>,
    ) -> Result<(), String> {
        let Some(store) = self.store.clone() else {
            return Ok(());
        };
        let Some(session) = &mut self.session else {
            return Ok(());
        };
        if session.holding.is_none() {
            match wire.down.pop_front() {
                Some(Down::Welcome(welcome)) => {
                    let holding = Holding::new(&welcome);
                    wire.up
                        .extend(holding.opening(&store).unwrap().into_iter().map(Up::Bulk));
                    session.holding = Some(holding);
                }
                Some(Down::Goodbye) => self.session = None,
                _ => {}
            }
            return Ok(());
        }
        let mut messages = Vec::new();
        while messages.len() < most {
            match wire.down.pop_front() {
                Some(Down::Bulk(message)) => messages.push(message),
                Some(Down::Goodbye) => {
                    self.session = None;
                    return Ok(());
                }
                Some(Down::Welcome(_)) | None => break,
            }
        }
        let holding = session.holding.as_mut().unwrap();
        let work = holding.plan(messages).map_err(|e| e.to_string())?;
        let holding = holding.clone();
        for work in work {
            let answer = match work {
                Work::Commit { changes, seq } => {
                    if sabotage != Some(Sabotage::AcknowledgeWithoutCommit) {
                        self.commit(&store, changes, sabotage)?;
                    }
                    vec![holding.acknowledgement(&store, seq).unwrap()]
                }
                Work::Synced { seq } => holding.proof(&store, seq).unwrap().into_iter().collect(),
                Work::Answer(request) => holding.answer(&store, &request).unwrap(),
                Work::Settle(results) => {
                    let seqs = results.iter().map(|result| result.seq).collect();
                    block_on(store.settle_reports(seqs)).unwrap();
                    Vec::new()
                }
            };
            wire.up.extend(answer.into_iter().map(Up::Bulk));
        }
        Ok(())
    }

    /// Commits changes, and checks that nothing goes without an order.
    fn commit(
        &mut self,
        store: &Store,
        mut changes: Vec<change::Change>,
        sabotage: Option<Sabotage>,
    ) -> Result<(), String> {
        let held = |store: &Store| -> BTreeSet<(i32, String)> {
            let entries = store.inventory().unwrap().into_iter();
            entries.map(|entry| (entry.kind, entry.uid)).collect()
        };
        let before = held(store);
        let ordered: BTreeSet<(i32, String)> = changes
            .iter()
            .filter_map(|change| match change {
                change::Change::Remove(remove) => Some((remove.kind, remove.uid.clone())),
                change::Change::Upsert(_) => None,
            })
            .collect();
        if sabotage == Some(Sabotage::RemoveAnother)
            && let Some((kind, uid)) = before.first().cloned()
        {
            changes.push(change::Change::Remove(skerry_proto::link::Remove { kind, uid }));
        }
        block_on(store.apply(changes)).unwrap();
        let after = held(store);
        if let Some(lost) = before.difference(&after).find(|key| !ordered.contains(key)) {
            return Err(format!("{lost:?} was removed without an order"));
        }
        let pod = i32::from(Kind::Pod);
        let pods = ordered
            .into_iter()
            .filter(|key| key.0 == pod && before.contains(key));
        self.removed.extend(pods.map(|(_, uid)| uid));
        Ok(())
    }

    /// Sends reports that wait.
    pub(crate) fn report(&mut self, wire: &mut Wire, most: usize) {
        let (Some(store), Some(session)) = (&self.store, &mut self.session) else {
            return;
        };
        if session.holding.is_none() {
            return;
        }
        for report in store.waiting_reports(session.after, most).unwrap() {
            session.after = report.seq;
            wire.up.push_back(Up::Bulk(edge_bulk::Message::Report(report)));
        }
    }

    /// Pods that the kubelet should look at.
    pub(crate) fn pods(&self) -> Vec<String> {
        let Some(store) = &self.store else {
            return Vec::new();
        };
        let stored = store
            .list(Kind::Pod)
            .unwrap()
            .into_iter()
            .map(|o| o.key.uid.to_string());
        let known = store
            .state_list::<Record>(ROOM)
            .unwrap()
            .into_iter()
            .map(|(uid, _)| uid);
        let all: BTreeSet<String> = stored.chain(known).chain(self.running.iter().cloned()).collect();
        all.into_iter().collect()
    }

    /// One look at one pod.
    pub(crate) fn look(&mut self, uid: &str, sabotage: Option<Sabotage>) -> Result<(), String> {
        let Some(store) = self.store.clone() else {
            return Ok(());
        };
        let key = ObjectKey {
            kind: Kind::Pod,
            uid: Uid::from(uid),
        };
        let record = store.state_get::<Record>(ROOM, uid).unwrap();
        let Some(object) = store.get(&key).unwrap() else {
            self.running.remove(uid);
            if record.is_some() {
                store.state_delete(ROOM, uid).unwrap();
            }
            return Ok(());
        };
        let pod: Value = object.decode().unwrap();
        let deleting = pod["metadata"]["deletionTimestamp"].is_string();
        let Some(mut record) = record else {
            let ended = store.has_ended(&key.uid).unwrap() && sabotage != Some(Sabotage::NoTombstones);
            let record = Record {
                ended,
                ..Record::default()
            };
            store.state_put(ROOM, uid, &record).unwrap();
            if ended {
                self.tell(&store, uid, "Failed", false);
                return Ok(());
            }
            if self.removed.contains(uid) {
                return Err(format!("{uid} was removed here and has been started again"));
            }
            if !self.begun.insert(uid.to_owned()) {
                return Err(format!("{uid} was started twice"));
            }
            self.running.insert(uid.to_owned());
            self.event(&store, uid, "Started");
            self.tell(&store, uid, "Running", false);
            return Ok(());
        };
        if deleting && !record.finished {
            self.running.remove(uid);
            record = Record {
                ended: true,
                finished: true,
            };
            store.state_put(ROOM, uid, &record).unwrap();
            self.event(&store, uid, "Killing");
            self.tell(&store, uid, "Succeeded", true);
        } else if !record.ended && self.running.insert(uid.to_owned()) {
            // After a boot: another container of the same pod.
            self.event(&store, uid, "Started");
            self.tell(&store, uid, "Running", false);
        }
        Ok(())
    }

    /// Says once more what there is to say, as after each synchronisation.
    pub(crate) fn tell_all(&mut self) {
        let Some(store) = self.store.clone() else { return };
        for (uid, record) in store.state_list::<Record>(ROOM).unwrap() {
            let phase = if record.ended { "Succeeded" } else { "Running" };
            self.tell(&store, &uid, phase, record.finished);
        }
    }

    fn tell(&mut self, store: &Store, uid: &str, phase: &str, finished: bool) {
        self.statuses += 1;
        let status = json!({"phase": phase, "number": self.statuses}).to_string();
        let body = report::Report::PodStatus(PodStatusReport {
            uid: uid.to_owned(),
            namespace: "ns".to_owned(),
            name: uid.to_owned(),
            status_json: status.into_bytes().into(),
            finished,
            ..PodStatusReport::default()
        });
        self.queue(store, Some(format!("pod/{uid}")), body);
    }

    fn event(&mut self, store: &Store, uid: &str, reason: &str) {
        let mut event = EventReport {
            uid: uid.to_owned(),
            reason: reason.to_owned(),
            // A series begins anew with each daemon.
            first_unix_nanos: i64::try_from(self.number as u64 * 1_000 + self.instance).unwrap(),
            ..EventReport::default()
        };
        let count = self.emitted.entry(event_name(&event)).or_default();
        *count += 1;
        event.count = *count;
        self.queue(store, None, report::Report::Event(event));
    }

    fn queue(&self, store: &Store, coalesce: Option<String>, body: report::Report) {
        let report = NewReport {
            coalesce,
            observed: jiff::Timestamp::UNIX_EPOCH,
            body,
        };
        block_on(store.report(report)).unwrap();
    }

    /// An object turns out to be unreadable.
    pub(crate) fn distrust(&self, number: usize) -> bool {
        let Some(store) = &self.store else { return false };
        let entries = store.inventory().unwrap();
        if entries.is_empty() {
            return false;
        }
        let entry = &entries[number % entries.len()];
        let key = ObjectKey {
            kind: entry.kind(),
            uid: Uid::from(entry.uid.as_str()),
        };
        block_on(store.distrust(&key).on_disk()).unwrap();
        true
    }

    /// What still differs from what should be, when all is quiet; `None` when nothing does.
    pub(crate) fn unsettled(
        &self,
        wanted: &BTreeMap<(i32, String), Vec<u8>>,
        tokens: &BTreeSet<String>,
    ) -> Option<String> {
        let Some(store) = &self.store else {
            return Some("the daemon does not run".to_owned());
        };
        let token = i32::from(Kind::ServiceAccountToken);
        let (held_tokens, held): (Vec<_>, Vec<_>) = store
            .inventory()
            .unwrap()
            .into_iter()
            .partition(|entry| entry.kind == token);
        let held: BTreeMap<_, _> = held
            .into_iter()
            .map(|e| ((e.kind, e.uid), e.hash.to_vec()))
            .collect();
        let held_tokens: BTreeSet<_> = held_tokens.into_iter().map(|entry| entry.uid).collect();
        if held != *wanted {
            return Some(format!(
                "the store holds {:?}, wanted {:?}",
                held.keys(),
                wanted.keys()
            ));
        }
        if held_tokens != *tokens {
            return Some(format!(
                "the store holds tokens {held_tokens:?}, wanted {tokens:?}"
            ));
        }
        if store.outbox_len().unwrap() > 0 {
            return Some("reports wait in the outbox".to_owned());
        }
        let pod = i32::from(Kind::Pod);
        let refused = |uid: &String| self.removed.contains(uid);
        let should: BTreeSet<String> = wanted
            .keys()
            .filter(|(kind, uid)| *kind == pod && !refused(uid))
            .map(|(_, uid)| uid.clone())
            .collect();
        let ended = |uid: &String| {
            let record = store.state_get::<Record>(ROOM, uid).unwrap();
            record.is_some_and(|record| record.ended)
        };
        let alive: BTreeSet<String> = should.into_iter().filter(|uid| !ended(uid)).collect();
        (alive != self.running).then(|| format!("{:?} run, wanted {alive:?}", self.running))
    }
}

/// The wire's message, for the history.
pub(crate) fn name(message: &Down) -> &'static str {
    match message {
        Down::Welcome(_) => "Welcome",
        Down::Goodbye => "Goodbye",
        Down::Bulk(bulk) => match &bulk.message {
            Some(cloud_bulk::Message::Change(_)) => "Change",
            Some(cloud_bulk::Message::Synced(_)) => "Synced",
            Some(cloud_bulk::Message::ReportResult(_)) => "ReportResult",
            Some(cloud_bulk::Message::InventoryRequest(_)) => "InventoryRequest",
            None => "nothing",
        },
    }
}
