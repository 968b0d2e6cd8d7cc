//! The provider: real sessions and real decisions, with lanes that write reports as `link/reports.rs` does.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_proto::SiteName;
use skerry_proto::link::{
    CloudBulk, FEATURE_DIGEST, Report, ReportResult, Welcome, cloud_bulk, edge_bulk, report, report_result,
};
use skerry_proto::object::{ObjectKey, Uid};
use skerry_provider::link::sessions::{Session, Sessions};
use skerry_provider::link::sync::{Proof, SiteSync};
use skerry_provider::pki::SitePeer;
use skerry_provider::refs::tokens::Minted;
use tokio::sync::mpsc;

use crate::cluster::Cluster;
use crate::world::{Down, Sabotage, Up, Wire};

/// One session.
pub(crate) struct Side {
    pub(crate) wire: usize,
    machine: usize,
    /// Sessions by age.
    number: u64,
    session: Session,
    sync: Option<SiteSync>,
    dirty: bool,
    lanes: BTreeMap<String, VecDeque<Report>>,
    mints: VecDeque<ObjectKey>,
}

/// A write on its way to the API server. Nothing takes it back.
#[derive(Clone)]
struct Write {
    session: u64,
    machine: usize,
    lane: String,
    report: Report,
}

pub(crate) struct Cloud {
    pub(crate) up: bool,
    /// It knows digests.
    pub(crate) digests: bool,
    sessions: Sessions,
    pub(crate) sides: Vec<Side>,
    writes: Vec<Write>,
    begun: u64,
    tokens: u64,
}

fn site() -> SiteName {
    "harbour".parse().unwrap()
}

impl Cloud {
    pub(crate) fn new() -> Self {
        Self {
            up: true,
            digests: true,
            sessions: Sessions::new(Timestamp::UNIX_EPOCH),
            sides: Vec::new(),
            writes: Vec::new(),
            begun: 0,
            tokens: 0,
        }
    }

    /// Everything in memory is lost. Writes under way land or do not.
    pub(crate) fn crash(
        &mut self,
        cluster: &mut Cluster,
        lands: bool,
        sabotage: Option<Sabotage>,
    ) -> Result<(), String> {
        self.up = false;
        self.sides.clear();
        for write in std::mem::take(&mut self.writes) {
            if lands {
                land(&write, cluster, sabotage)?;
            }
        }
        self.sessions = Sessions::new(Timestamp::UNIX_EPOCH);
        Ok(())
    }

    /// Takes the next message of a line. Answers whether a newcomer was refused.
    pub(crate) fn receive(
        &mut self,
        wire: &mut Wire,
        cluster: &mut Cluster,
        now: u64,
        sabotage: Option<Sabotage>,
    ) -> Result<Received, String> {
        match wire.up.pop_front() {
            Some(Up::Hello(hello)) => {
                let peer = SitePeer {
                    site: site(),
                    uid: Uid::from("site"),
                    serial: "1".to_owned(),
                    not_before: Timestamp::UNIX_EPOCH,
                    not_after: Timestamp::MAX,
                };
                let (orders, _) = mpsc::channel(1);
                let begun = self
                    .sessions
                    .begin(&peer, &hello, &cluster.site, orders, Timestamp::UNIX_EPOCH);
                let Ok(session) = begun else {
                    wire.down.push_back(Down::Goodbye);
                    return Ok(Received::Refused);
                };
                self.reap();
                let features = if self.digests {
                    vec![FEATURE_DIGEST.to_owned()]
                } else {
                    vec![]
                };
                wire.down.push_back(Down::Welcome(Welcome {
                    session: session.id.clone(),
                    features,
                    ..Welcome::default()
                }));
                cluster.site = json!({"storeID": hello.store_id, "incarnation": hello.incarnation, "bootID": hello.boot_id});
                self.begun += 1;
                self.sides.push(Side {
                    wire: wire.number,
                    machine: wire.machine,
                    number: self.begun,
                    session,
                    sync: None,
                    dirty: true,
                    lanes: BTreeMap::new(),
                    mints: VecDeque::new(),
                });
                Ok(Received::Begun)
            }
            Some(Up::Bulk(message)) => {
                let Some(place) = self.sides.iter().position(|side| side.wire == wire.number) else {
                    return Ok(Received::Nothing);
                };
                let side = &mut self.sides[place];
                let sessions = &self.sessions;
                let sync = side
                    .sync
                    .get_or_insert_with(|| SiteSync::new(sessions.recall(&side.session)));
                let answer = match message {
                    edge_bulk::Message::InventoryDigest(digest) => {
                        side.dirty = true;
                        sync.take_digest(&digest, &cluster.desired())
                            .map_err(|e| e.to_string())?
                    }
                    edge_bulk::Message::Inventory(inventory) => {
                        side.dirty = true;
                        sync.take_inventory(inventory).map_err(|e| e.to_string())?;
                        None
                    }
                    edge_bulk::Message::Applied(applied) => {
                        let was = sync.proof();
                        let answer = sync
                            .take_applied(&applied, Duration::from_secs(now))
                            .map_err(|e| e.to_string())?;
                        side.dirty |= answer.is_some();
                        if sync.proof() == Proof::Different && was != Proof::Different {
                            send(wire, answer);
                            return Ok(Received::Diverged);
                        }
                        answer
                    }
                    edge_bulk::Message::Report(report) => {
                        side.lanes.entry(lane(&report)).or_default().push_back(report);
                        None
                    }
                    edge_bulk::Message::Hello(_) => None,
                };
                let asked = answer.is_some();
                send(wire, answer);
                let _ = sabotage;
                Ok(if asked { Received::Asked } else { Received::Nothing })
            }
            None => Ok(Received::Nothing),
        }
    }

    /// Sessions that were fenced end.
    fn reap(&mut self) {
        let sessions = &self.sessions;
        self.sides.retain(|side| {
            let over = side.session.over.is_cancelled();
            if over {
                end(sessions, side);
            }
            !over
        });
    }

    /// A line is noticed to be cut.
    pub(crate) fn cut(&mut self, wire: usize) {
        let sessions = &self.sessions;
        self.sides.retain(|side| {
            if side.wire == wire {
                end(sessions, side);
            }
            side.wire != wire
        });
    }

    /// The cluster has changed.
    pub(crate) fn dirty(&mut self) {
        for side in &mut self.sides {
            side.dirty = true;
        }
    }

    /// Compares and sends, at most so many messages.
    pub(crate) fn step(&mut self, wire: &mut Wire, cluster: &Cluster, now: u64, most: usize) {
        let Some(side) = self.sides.iter_mut().find(|side| side.wire == wire.number) else {
            return;
        };
        let Some(sync) = &mut side.sync else { return };
        if side.dirty && sync.is_sending() {
            side.dirty = false;
            sync.compare(&cluster.desired(), unix(now));
        }
        while let Some((key, _)) = sync.next_mint() {
            side.mints.push_back(key);
        }
        for _ in 0..most {
            let Some(message) = sync.next_message() else {
                return;
            };
            send(wire, Some(message));
        }
    }

    /// The check that comes every few seconds.
    pub(crate) fn check(&mut self, wire: &mut Wire, now: u64) {
        let Some(side) = self.sides.iter_mut().find(|side| side.wire == wire.number) else {
            return;
        };
        side.dirty = true;
        if let Some(sync) = &mut side.sync {
            sync.forgive();
            let request = sync.repair(Duration::from_secs(now));
            send(wire, request);
        }
    }

    /// The API server answers a request for a token.
    pub(crate) fn mint(&mut self, wire: usize, now: u64, refuses: bool) {
        let Some(side) = self.sides.iter_mut().find(|side| side.wire == wire) else {
            return;
        };
        let (Some(sync), Some(key)) = (&mut side.sync, side.mints.pop_front()) else {
            return;
        };
        self.tokens += 1;
        let minted = Minted {
            object: json!({"token": self.tokens}),
            expires_unix: unix(now) + 3600,
        };
        sync.take_minted(&key, (!refuses).then_some(&minted)).unwrap();
    }

    /// Lanes that could begin a write: those whose last one is done, in sessions whose predecessors write no more.
    pub(crate) fn ready_lanes(&self, sabotage: Option<Sabotage>) -> Vec<(usize, String)> {
        let mut ready = Vec::new();
        for side in &self.sides {
            let gate = self.writes.iter().all(|write| write.session >= side.number);
            if !gate && sabotage != Some(Sabotage::NoGate) {
                continue;
            }
            for (lane, queue) in &side.lanes {
                let busy = |write: &Write| write.session == side.number && write.lane == *lane;
                if !queue.is_empty() && !self.writes.iter().any(busy) {
                    ready.push((side.wire, lane.clone()));
                }
            }
        }
        ready
    }

    /// A lane begins to write its oldest report; one that a newer one follows is answered at once.
    pub(crate) fn begin_write(&mut self, wire: &mut Wire, lane: &str) {
        let Some(side) = self.sides.iter_mut().find(|side| side.wire == wire.number) else {
            return;
        };
        let Some(queue) = side.lanes.get_mut(lane) else {
            return;
        };
        let superseded = lane.starts_with("pod/") && queue.len() > 1;
        if superseded && let Some(older) = queue.pop_front() {
            answer(wire, older.seq);
            return;
        }
        if let Some(report) = queue.front() {
            self.writes.push(Write {
                session: side.number,
                machine: side.machine,
                lane: lane.to_owned(),
                report: report.clone(),
            });
        }
    }

    pub(crate) fn writing(&self) -> usize {
        self.writes.len()
    }

    /// A write lands, whatever became of its session. Answers on which line, and what.
    pub(crate) fn land(
        &mut self,
        place: usize,
        cluster: &mut Cluster,
        sabotage: Option<Sabotage>,
    ) -> Result<Option<(usize, u64)>, String> {
        let write = self.writes.remove(place);
        land(&write, cluster, sabotage)?;
        let Some(side) = self.sides.iter_mut().find(|side| side.number == write.session) else {
            return Ok(None);
        };
        if let Some(queue) = side.lanes.get_mut(&write.lane) {
            queue.pop_front();
        }
        Ok(Some((side.wire, write.report.seq)))
    }

    /// How the session of a line stands, and whether nothing is left to do in it.
    pub(crate) fn stands(&self, wire: usize) -> Option<(Proof, bool)> {
        let side = self.sides.iter().find(|side| side.wire == wire)?;
        let idle = side.lanes.values().all(VecDeque::is_empty) && side.mints.is_empty() && !side.dirty;
        Some((side.sync.as_ref()?.proof(), idle && self.writes.is_empty()))
    }
}

/// What came of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Received {
    Nothing,
    Begun,
    Refused,
    Asked,
    Diverged,
}

fn end(sessions: &Sessions, side: &Side) {
    if let Some(sync) = &side.sync {
        sessions.remember(&side.session, sync.tokens());
    }
    sessions.end(&side.session, Timestamp::UNIX_EPOCH);
}

fn land(write: &Write, cluster: &mut Cluster, sabotage: Option<Sabotage>) -> Result<(), String> {
    let twice = sabotage == Some(Sabotage::CountTwice);
    cluster.write(&write.report, write.machine, write.session, twice)
}

fn send(wire: &mut Wire, message: Option<cloud_bulk::Message>) {
    wire.down.extend(message.map(|message| {
        Down::Bulk(CloudBulk {
            message: Some(message),
        })
    }));
}

pub(crate) fn answer(wire: &mut Wire, seq: u64) {
    let result = ReportResult {
        seq,
        outcome: report_result::Outcome::Accepted.into(),
        ..ReportResult::default()
    };
    send(wire, Some(cloud_bulk::Message::ReportResult(result)));
}

/// Statuses of one pod have one lane, its events another.
fn lane(report: &Report) -> String {
    match report.report.as_ref().unwrap() {
        report::Report::PodStatus(status) => format!("pod/{}", status.uid),
        report::Report::Event(event) => format!("event/{}", event.uid),
        other => panic!("{other:?}"),
    }
}

fn unix(now: u64) -> i64 {
    1_000_000 + i64::try_from(now).unwrap()
}

/// A Site that nobody has been on.
pub(crate) fn fresh_site() -> Value {
    json!({})
}
