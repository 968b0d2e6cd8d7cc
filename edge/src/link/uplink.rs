//! What goes first when the uplink cannot carry everything, and what waits.
//!
//! Statuses of critical pods travel on the control stream (`critical`), all else on Bulk, whose socket keeps only so much under way as the
//! line takes (`skerry_transport::pace`). Of what waits for it, classes get turns by their weight. When there is more to send
//! than the line takes for [`PATIENCE`], the uplink is *saturated*: from then on reports of best-effort pods, and the bytes of
//! their logs and sessions, wait until the rest is through. Nothing is lost by that: statuses stay in the outbox, where a newer one
//! replaces an older one, and streams are held back at their source. A Site may also say that its link rests (`thrift`): then all that can wait waits in the same way.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use skerry_proto::Class;
use skerry_proto::link::{Report, report};
use skerry_transport::Lines;
use tokio::sync::watch;
use tokio::time::Instant;

use super::thrift::{Deferring, Thrift};

/// More to send than the line takes for this long: the uplink is saturated.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nothing was held back for this long: it is no more.
const CALM: Duration = Duration::from_secs(3);
/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// What is held back now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gate {
    /// There is more to send than the line takes: best-effort waits.
    pub saturated: bool,
    /// The Site's link profile: what can wait does.
    pub deferring: Deferring,
}

/// The state of the uplink, for whoever sends on it. Clones share it.
#[derive(Clone)]
pub(crate) struct Uplink {
    gate: Arc<watch::Sender<Gate>>,
    shed: Arc<AtomicU64>,
}

impl Default for Uplink {
    fn default() -> Self {
        Self {
            gate: Arc::new(watch::Sender::new(Gate::default())),
            shed: Arc::default(),
        }
    }
}

impl Uplink {
    /// What is held back now.
    pub(crate) fn gate(&self) -> Gate {
        *self.gate.borrow()
    }

    /// The same, to be watched.
    pub(crate) fn watch(&self) -> watch::Receiver<Gate> {
        self.gate.subscribe()
    }

    /// Reports of best-effort pods that were held back for a full line since the daemon started.
    pub(crate) fn shed(&self) -> u64 {
        self.shed.load(Ordering::Relaxed)
    }

    /// Waits while bytes of this class are held back.
    pub(crate) async fn pass(&self, class: Class) {
        if class == Class::BestEffort {
            // The sender lives in `self`.
            let _ = self.gate.subscribe().wait_for(|gate| !gate.saturated).await;
        }
    }

    /// Whether a stream of this class may begin; else why not.
    pub(crate) fn admits(&self, class: Class) -> Result<(), &'static str> {
        match self.gate().deferring {
            deferring if deferring != Deferring::Not && class != Class::Critical => Err(deferring.reason()),
            _ => Ok(()),
        }
    }

    /// Keeps the state true to the session's connections, for as long as it is polled.
    pub(super) async fn follow(&self, lines: &Lines, thrift: &Thrift) {
        let mut free_since = Instant::now();
        thrift.begin();
        loop {
            tokio::time::sleep(LOOK).await;
            let held_back = lines.held_back();
            let now = Instant::now();
            if !held_back.is_zero() {
                free_since = now;
            }
            let saturated = if self.gate().saturated {
                now.duration_since(free_since) < CALM
            } else {
                held_back >= PATIENCE
            };
            let (read, written) = lines.bytes();
            let deferring = thrift.look(read + written);
            self.set(Gate { saturated, deferring });
        }
    }

    /// A new session knows nothing of its line yet.
    pub(super) fn reset(&self) {
        self.set(Gate::default());
    }

    fn set(&self, gate: Gate) {
        self.gate
            .send_if_modified(|now| std::mem::replace(now, gate) != gate);
    }

    fn count_shed(&self) {
        self.shed.fetch_add(1, Ordering::Relaxed);
    }
}

/// The class of what a report is about. What is not about a pod is standard.
pub(super) fn class_of(report: &Report) -> Class {
    match &report.report {
        Some(report::Report::PodStatus(status)) => status.class().into(),
        _ => Class::Standard,
    }
}

/// Puts waiting reports into the order of their turns: by class, each with its weight; the oldest of a class first.
pub(super) fn in_turns(waiting: Vec<Report>) -> Vec<Report> {
    let mut queues: [(Class, VecDeque<Report>); 3] = Class::ALL.map(|class| (class, VecDeque::new()));
    let mut turns = Vec::with_capacity(waiting.len());
    for report in waiting {
        let class = class_of(&report);
        if let Some((_, queue)) = queues.iter_mut().find(|(c, _)| *c == class) {
            queue.push_back(report);
        }
    }
    while queues.iter().any(|(_, queue)| !queue.is_empty()) {
        for (class, queue) in &mut queues {
            let count = class.weight().min(queue.len());
            turns.extend(queue.drain(..count));
        }
    }
    turns
}

/// Whether a report may wait for hours: the Node's own status, without which there is no Node, may not.
fn can_wait(report: &Report) -> bool {
    !matches!(report.report, Some(report::Report::NodeStatus(_))) && class_of(report) != Class::Critical
}

/// Reports that were passed over.
pub(super) struct HeldBack {
    uplink: Uplink,
    gate: watch::Receiver<Gate>,
    seqs: BTreeSet<u64>,
    /// Number of the newest report that was counted as shed.
    counted: u64,
}

impl HeldBack {
    pub(super) fn new(uplink: &Uplink) -> Self {
        Self {
            uplink: uplink.clone(),
            gate: uplink.watch(),
            seqs: BTreeSet::new(),
            counted: 0,
        }
    }

    /// Whether this one must wait; then its number is kept.
    pub(super) fn holds(&mut self, report: &Report) -> bool {
        let gate = self.uplink.gate();
        let shed = gate.saturated && class_of(report) == Class::BestEffort;
        let deferred = gate.deferring != Deferring::Not && can_wait(report);
        if shed && report.seq > self.counted {
            self.counted = report.seq;
            self.uplink.count_shed();
        }
        if shed || deferred {
            self.seqs.insert(report.seq);
        }
        shed || deferred
    }

    /// The numbers to be judged anew: all, when the gate has changed.
    pub(super) fn released(&mut self) -> BTreeSet<u64> {
        match self.gate.has_changed() {
            Ok(true) => {
                self.gate.mark_unchanged();
                std::mem::take(&mut self.seqs)
            }
            _ => BTreeSet::new(),
        }
    }

    /// Waits until [`HeldBack::released`] has some; for ever when none wait. Cancellation safe.
    pub(super) async fn release(&mut self) {
        if self.seqs.is_empty() {
            std::future::pending::<()>().await;
        }
        // The sender lives in `self`. Seen by `released`, not here.
        let _ = self.gate.changed().await;
        self.gate.mark_changed();
    }
}

#[cfg(test)]
mod tests {
    use skerry_proto::link::PodStatusReport;

    use super::*;

    fn status(seq: u64, class: Class) -> Report {
        let status = PodStatusReport {
            class: skerry_proto::link::Class::from(class).into(),
            ..Default::default()
        };
        Report {
            seq,
            report: Some(report::Report::PodStatus(status)),
            ..Default::default()
        }
    }

    fn seqs(reports: &[Report]) -> Vec<u64> {
        reports.iter().map(|report| report.seq).collect()
    }

    #[test]
    fn classes_take_turns_by_weight_and_keep_their_own_order() {
        let mut waiting: Vec<Report> = (1..=3).map(|n| status(n, Class::BestEffort)).collect();
        waiting.extend((4..=9).map(|n| status(n, Class::Standard)));
        waiting.extend((10..=11).map(|n| status(n, Class::Critical)));
        assert_eq!(seqs(&in_turns(waiting)), [10, 11, 4, 5, 6, 7, 1, 8, 9, 2, 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn best_effort_waits_while_the_uplink_is_saturated_and_is_counted_once() {
        let uplink = Uplink::default();
        let mut held = HeldBack::new(&uplink);
        let (low, high) = (status(1, Class::BestEffort), status(2, Class::Standard));
        assert!(!held.holds(&low));
        let full = Gate {
            saturated: true,
            ..Gate::default()
        };
        uplink.set(full);
        assert!(held.released().is_empty());
        assert!(held.holds(&low) && held.holds(&low));
        assert!(!held.holds(&high));
        assert_eq!(uplink.shed(), 1);
        assert!(held.released().is_empty());
        assert!(
            tokio::time::timeout(Duration::from_secs(9), held.release())
                .await
                .is_err()
        );
        uplink.set(Gate::default());
        held.release().await;
        assert_eq!(held.released(), BTreeSet::from([1]));
        assert!(held.released().is_empty());
    }

    #[test]
    fn a_link_that_rests_carries_what_is_critical_and_the_node() {
        let uplink = Uplink::default();
        let mut held = HeldBack::new(&uplink);
        uplink.set(Gate {
            deferring: Deferring::QuietHours,
            ..Gate::default()
        });
        let node = Report {
            report: Some(report::Report::NodeStatus(Default::default())),
            ..Default::default()
        };
        assert!(!held.holds(&node) && !held.holds(&status(1, Class::Critical)));
        assert!(held.holds(&status(2, Class::Standard)) && held.holds(&status(3, Class::BestEffort)));
        assert_eq!(uplink.shed(), 0);
        assert!(uplink.admits(Class::Critical).is_ok());
        assert!(
            uplink
                .admits(Class::Standard)
                .unwrap_err()
                .contains("quiet hours")
        );
        uplink.set(Gate::default());
        assert_eq!(held.released(), BTreeSet::from([2, 3]));
        assert!(uplink.admits(Class::BestEffort).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_without_connections_is_never_saturated() {
        let dir = tempfile::tempdir().unwrap();
        let store = crate::store::Store::open(dir.path()).unwrap();
        let thrift = Thrift::new("harbour".parse().unwrap(), store);
        let uplink = Uplink::default();
        uplink.set(Gate {
            saturated: true,
            ..Gate::default()
        });
        let lines = Lines::default();
        let followed = tokio::time::timeout(Duration::from_secs(10), uplink.follow(&lines, &thrift)).await;
        assert!(followed.is_err());
        assert_eq!(uplink.gate(), Gate::default());
    }
}
