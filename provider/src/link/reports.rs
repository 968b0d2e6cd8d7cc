//! Reports of a site on their way to the API server.
//!
//! Each session has a few lanes; all statuses of one object take the same lane, so that they arrive in order, and so do
//! its events, in a lane for events, so that no status waits behind one. The Node has a lane of its own. A lane tries a report again until the API server
//! has it or will never take it, and only then answers the edge, whose outbox keeps the report until that answer. A
//! status that a newer one of the same object follows in its lane is answered without being written: only the newest
//! matters.
//!
//! Reports that came on the control stream, the statuses of critical pods, go before all others of their lane. That does
//! not turn the order of one object around: a status older than the one last written is answered without being written.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message as _;
use skerry_proto::SiteName;
use skerry_proto::limits::{CONTROL_REPORT_WINDOW, MAX_REPORT_BYTES_UNDER_WAY, REPORT_WINDOW};
use skerry_proto::link::report_result::Outcome as Wire;
use skerry_proto::link::{CloudBulk, CloudControl, Report, ReportResult, cloud_bulk, cloud_control, report};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::Status;

use super::gate::{Gate, Gates};
use super::sessions::Session;

/// Lanes for statuses.
const LANES: usize = 6;
/// Lanes for events.
const EVENT_LANES: usize = 2;
/// The Node's own lane.
const NODE_LANES: usize = 1;
/// Reports of one session that wait in its lanes: the edge's own window, twice.
const ROOM: usize = 2 * REPORT_WINDOW;
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(15);

/// What became of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The API server has it.
    Accepted,
    /// It will never be taken: the object is gone or refuses it. The reason is for the log.
    Dropped(String),
    /// Not now; try again later.
    Retry(String),
}

/// Classifies an error of the Kubernetes API: what the object itself refuses is final, all else is tried again.
pub fn outcome_of(error: &kube::Error) -> Outcome {
    match error {
        kube::Error::Api(status) if matches!(status.code, 400 | 404 | 409 | 410 | 413 | 422) => {
            Outcome::Dropped(status.message.clone())
        }
        other => Outcome::Retry(other.to_string()),
    }
}

/// Takes a report to where it belongs.
#[tonic::async_trait]
pub trait ReportSink: Send + Sync + 'static {
    /// Tries once.
    async fn take(&self, site: &SiteName, report: &Report) -> Outcome;
}

/// The sink behind all sessions.
pub struct Reports {
    sink: Arc<dyn ReportSink>,
    gates: Gates,
}

impl Reports {
    /// Reports go to `sink`.
    pub fn new(sink: impl ReportSink) -> Self {
        Self {
            sink: Arc::new(sink),
            gates: Gates::default(),
        }
    }
}

/// The stream on which a report came, and its result goes back.
#[derive(Clone)]
pub(super) enum Reply {
    /// Bulk.
    Bulk(mpsc::Sender<Result<CloudBulk, Status>>),
    /// Control.
    Control(mpsc::Sender<Result<CloudControl, Status>>),
}

impl Reply {
    /// Fails when the session is over.
    async fn send(&self, result: ReportResult) -> Result<(), ()> {
        match self {
            Self::Bulk(stream) => {
                let message = Some(cloud_bulk::Message::ReportResult(result));
                stream.send(Ok(CloudBulk { message })).await.map_err(drop)
            }
            Self::Control(stream) => {
                let message = Some(cloud_control::Message::ReportResult(result));
                stream.send(Ok(CloudControl { message })).await.map_err(drop)
            }
        }
    }
}

/// The lanes of one session. They end with it. A lane without reports costs nothing: its task ends with its last report.
pub(super) struct Lanes {
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    urgent_room: Arc<Semaphore>,
}

struct Shared {
    reports: Arc<Reports>,
    session: Session,
    gate: Gate,
    lanes: Mutex<[Lane; LANES + EVENT_LANES + NODE_LANES]>,
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Waiting>,
    /// A task works on it.
    busy: bool,
    /// Number of the newest status that was written, by hash of the pod's UID: a pod's statuses may come on two streams.
    written: HashMap<u64, u64>,
}

struct Waiting {
    report: Report,
    reply: Reply,
    /// It came on Control, and goes before those that did not.
    urgent: bool,
    _place: Option<OwnedSemaphorePermit>,
    _bytes: Option<OwnedSemaphorePermit>,
}

/// Reports are weighed in KiB.
fn weight(report: &Report) -> u32 {
    u32::try_from(report.encoded_len() / 1024 + 1).unwrap_or(u32::MAX)
}

impl Lanes {
    pub(super) fn start(reports: &Arc<Reports>, session: &Session) -> Self {
        let shared = Shared {
            reports: Arc::clone(reports),
            session: session.clone(),
            gate: reports.gates.of(&session.peer.site, &session.over),
            lanes: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
            room: Arc::new(Semaphore::new(ROOM)),
            bytes: Arc::new(Semaphore::new(MAX_REPORT_BYTES_UNDER_WAY / 1024)),
            urgent_room: Arc::new(Semaphore::new(CONTROL_REPORT_WINDOW)),
        }
    }

    /// Queues a report; waits while there is no room, which holds back the edge.
    pub(super) async fn take(&self, report: Report, reply: Reply) {
        let weight = weight(&report);
        let room = async {
            let place = Arc::clone(&self.room).acquire_owned().await;
            let bytes = Arc::clone(&self.bytes).acquire_many_owned(weight).await;
            // Never closed.
            (place.ok(), bytes.ok())
        };
        let (place, bytes) = tokio::select! {
            () = self.shared.session.over.cancelled() => return,
            both = room => both,
        };
        self.queue(Waiting {
            report,
            reply,
            urgent: false,
            _place: place,
            _bytes: bytes,
        });
    }

    /// Queues the status of a critical pod. Never waits; fails when the edge does not keep to its window.
    pub(super) fn take_urgent(&self, report: Report, reply: Reply) -> Result<(), String> {
        let Ok(place) = Arc::clone(&self.urgent_room).try_acquire_owned() else {
            return Err(format!(
                "the edge sent more than {CONTROL_REPORT_WINDOW} critical statuses ahead of their results"
            ));
        };
        self.queue(Waiting {
            report,
            reply,
            urgent: true,
            _place: Some(place),
            _bytes: None,
        });
        Ok(())
    }

    fn queue(&self, waiting: Waiting) {
        #[allow(clippy::cast_possible_truncation)]
        let hash = hash(subject(&waiting.report)) as usize;
        let lane = match &waiting.report.report {
            Some(report::Report::Event(_)) => LANES + hash % EVENT_LANES,
            // A mirror pod waits for its Node: the Node must not wait behind it.
            Some(report::Report::NodeStatus(_)) => LANES + EVENT_LANES,
            _ => hash % LANES,
        };
        let idle = {
            let mut lanes = self.shared.lanes();
            let lane = &mut lanes[lane];
            lane.waiting.push_back(waiting);
            !std::mem::replace(&mut lane.busy, true)
        };
        if idle {
            tokio::spawn(Arc::clone(&self.shared).work(lane));
        }
    }
}

impl Shared {
    fn lanes(&self) -> MutexGuard<'_, [Lane; LANES + EVENT_LANES + NODE_LANES]> {
        // No code panics while it holds the lock.
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn work(self: Arc<Self>, lane: usize) {
        let over = self.session.over.clone();
        tokio::select! {
            () = over.cancelled() => {}
            () = self.empty(lane) => {}
        }
    }

    /// Settles what waits in a lane, in order, until there is nothing left.
    async fn empty(&self, lane: usize) {
        self.gate.wait().await;
        loop {
            let (next, needless) = {
                let mut lanes = self.lanes();
                let Some(next) = lanes[lane].next() else { return };
                next
            };
            let (outcome, message) = if needless {
                (Wire::Accepted, String::new())
            } else {
                let settled = self.settle(&next.report).await;
                self.lanes()[lane].note(&next.report, settled.0);
                settled
            };
            let result = ReportResult {
                seq: next.report.seq,
                outcome: outcome.into(),
                message,
            };
            // Before the answer: the edge may send the next one with it.
            drop((next._place, next._bytes));
            if next.reply.send(result).await.is_err() {
                return;
            }
        }
    }

    /// Tries once. Once begun it is carried to its end, even when the session is over meanwhile.
    async fn write(&self, report: &Report) -> Outcome {
        let Some(writing) = self.gate.begin().await else {
            return Outcome::Retry("the session is over".to_owned());
        };
        let (sink, site) = (Arc::clone(&self.reports.sink), self.session.peer.site.clone());
        let report = report.clone();
        let written = tokio::spawn(async move {
            let outcome = sink.take(&site, &report).await;
            drop(writing);
            outcome
        });
        // It fails only when it panics, which it has said.
        written
            .await
            .unwrap_or_else(|error| Outcome::Retry(error.to_string()))
    }

    async fn settle(&self, report: &Report) -> (Wire, String) {
        let mut pause = FIRST_RETRY;
        loop {
            match self.write(report).await {
                Outcome::Accepted => return (Wire::Accepted, String::new()),
                Outcome::Dropped(reason) => {
                    tracing::info!(site = %self.session.peer.site, seq = report.seq, subject = %subject(report), %reason, "a report was dropped");
                    return (Wire::Dropped, reason);
                }
                Outcome::Retry(reason) => {
                    tracing::warn!(site = %self.session.peer.site, seq = report.seq, subject = %subject(report), %reason, "a report is tried again");
                }
            }
            tokio::time::sleep(pause.mul_f64(rand::random_range(0.75..1.25))).await;
            pause = (pause * 2).min(LAST_RETRY);
        }
    }
}

impl Lane {
    /// The oldest urgent report, else the oldest, and whether a newer one says the same and more. With none left the
    /// lane is idle.
    fn next(&mut self) -> Option<(Waiting, bool)> {
        let first = self
            .waiting
            .iter()
            .position(|waiting| waiting.urgent)
            .unwrap_or(0);
        let Some(next) = self.waiting.remove(first) else {
            self.waiting = VecDeque::new();
            self.busy = false;
            return None;
        };
        let needless = self.wrote_newer(&next.report)
            || self
                .waiting
                .iter()
                .any(|other| other.report.seq > next.report.seq && supersedes(&other.report, &next.report));
        Some((next, needless))
    }

    fn wrote_newer(&self, report: &Report) -> bool {
        match &report.report {
            Some(report::Report::PodStatus(status)) => {
                let newest = self.written.get(&hash(&status.uid));
                newest.is_some_and(|newest| *newest > report.seq)
            }
            _ => false,
        }
    }

    fn note(&mut self, report: &Report, outcome: Wire) {
        if let Some(report::Report::PodStatus(status)) = &report.report {
            match outcome {
                Wire::Accepted => self.written.insert(hash(&status.uid), report.seq),
                // The pod is gone.
                _ => self.written.remove(&hash(&status.uid)),
            };
        }
    }
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// A newer status of the same object says all that an older one did.
fn supersedes(newer: &Report, older: &Report) -> bool {
    use report::Report::{DeviceStatus, NodeStatus, PodStatus};
    match (&newer.report, &older.report) {
        (Some(PodStatus(newer)), Some(PodStatus(older))) => newer.uid == older.uid,
        (Some(DeviceStatus(newer)), Some(DeviceStatus(older))) => newer.uid == older.uid,
        (Some(NodeStatus(_)), Some(NodeStatus(_))) => true,
        _ => false,
    }
}

/// What a report is about: reports of one subject keep their order.
fn subject(report: &Report) -> &str {
    match &report.report {
        Some(report::Report::PodStatus(status)) => &status.uid,
        Some(report::Report::DeviceStatus(status)) => &status.uid,
        Some(report::Report::Event(event)) => &event.uid,
        Some(report::Report::MirrorPod(mirror)) => &mirror.name,
        Some(report::Report::NodeStatus(_)) | None => "",
    }
}

#[cfg(test)]
mod tests {
    use skerry_proto::link::{EventReport, PodStatusReport};

    use super::*;

    fn status(seq: u64, uid: &str) -> Report {
        let status = PodStatusReport {
            uid: uid.to_owned(),
            ..Default::default()
        };
        Report {
            seq,
            report: Some(report::Report::PodStatus(status)),
            ..Default::default()
        }
    }

    #[test]
    fn only_a_status_of_the_same_pod_makes_an_older_one_needless() {
        let event = Report {
            report: Some(report::Report::Event(EventReport {
                uid: "a".to_owned(),
                ..Default::default()
            })),
            ..Default::default()
        };
        assert!(supersedes(&status(2, "a"), &status(1, "a")));
        assert!(!supersedes(&status(2, "b"), &status(1, "a")));
        assert!(!supersedes(&event, &status(1, "a")));
        assert!(!supersedes(&event, &event));
    }

    #[test]
    fn a_lane_gives_the_oldest_and_knows_what_a_newer_one_makes_needless() {
        let mut lane = Lane {
            busy: true,
            ..Lane::default()
        };
        for (seq, uid) in [(1, "a"), (2, "b"), (3, "a")] {
            lane.waiting.push_back(Waiting {
                report: status(seq, uid),
                reply: Reply::Bulk(mpsc::channel(1).0),
                urgent: false,
                _place: None,
                _bytes: None,
            });
        }
        let mut next = || {
            lane.next()
                .map(|(waiting, needless)| (waiting.report.seq, needless))
        };
        assert_eq!(next(), Some((1, true)));
        assert_eq!(next(), Some((2, false)));
        assert_eq!(next(), Some((3, false)));
        assert_eq!(next(), None);
        assert!(!lane.busy);
    }

    struct Slow(mpsc::UnboundedSender<u64>);

    #[tonic::async_trait]
    impl ReportSink for Slow {
        async fn take(&self, _: &SiteName, report: &Report) -> Outcome {
            tokio::time::sleep(Duration::from_millis(report.seq % 7)).await;
            let _ = self.0.send(report.seq);
            Outcome::Accepted
        }
    }

    #[tokio::test(start_paused = true)]
    async fn reports_of_one_object_arrive_in_order_and_each_gets_its_result() {
        let (taken, mut order) = mpsc::unbounded_channel();
        let (results, mut answers) = mpsc::channel(8);
        let session = crate::link::sessions::tests::session();
        let lanes = Lanes::start(&Arc::new(Reports::new(Slow(taken))), &session);
        for seq in 1..=100 {
            let event = EventReport {
                uid: format!("pod-{}", seq % 5),
                ..Default::default()
            };
            lanes
                .take(
                    Report {
                        seq,
                        report: Some(report::Report::Event(event)),
                        ..Default::default()
                    },
                    Reply::Bulk(results.clone()),
                )
                .await;
            // Lanes run dry in between, and start again.
            if seq % 10 == 0 {
                for _ in 0..10 {
                    answers.recv().await.unwrap().unwrap();
                }
            }
        }
        let mut newest = [0; 5];
        for _ in 0..100 {
            let seq = order.recv().await.unwrap();
            let place = usize::try_from(seq % 5).unwrap();
            assert!(newest[place] < seq);
            newest[place] = seq;
        }
    }

    #[tokio::test]
    async fn critical_statuses_go_first_and_no_status_goes_backwards() {
        struct Book(Mutex<Vec<u64>>, Semaphore);
        #[tonic::async_trait]
        impl ReportSink for Arc<Book> {
            async fn take(&self, _: &SiteName, report: &Report) -> Outcome {
                // The first waits until everything is queued.
                if report.seq == 1 {
                    self.1.acquire().await.unwrap().forget();
                }
                self.0.lock().unwrap().push(report.seq);
                Outcome::Accepted
            }
        }
        let book = Arc::new(Book(Mutex::default(), Semaphore::new(0)));
        let reports = Arc::new(Reports::new(Arc::clone(&book)));
        let session = crate::link::sessions::tests::session();
        let lanes = Lanes::start(&reports, &session);
        let (bulk, mut bulk_results) = mpsc::channel(16);
        let (control, mut control_results) = mpsc::channel(16);
        // All are of one pod, which became critical with the last.
        lanes.take(status(1, "a"), Reply::Bulk(bulk.clone())).await;
        tokio::task::yield_now().await;
        lanes.take(status(4, "a"), Reply::Bulk(bulk.clone())).await;
        let urgent = lanes.take_urgent(status(5, "a"), Reply::Control(control.clone()));
        assert_eq!(urgent, Ok(()));
        book.1.add_permits(1);
        for expected in [1, 4] {
            let message = bulk_results.recv().await.unwrap().unwrap().message;
            let Some(cloud_bulk::Message::ReportResult(result)) = message else {
                panic!("{message:?}");
            };
            assert_eq!((result.seq, result.outcome()), (expected, Wire::Accepted));
        }
        assert!(control_results.recv().await.is_some());
        assert_eq!(*book.0.lock().unwrap(), [1, 5]);
        session.over.cancel();
    }

    #[tokio::test]
    async fn an_edge_that_floods_the_control_stream_is_found_out() {
        struct Stuck;
        #[tonic::async_trait]
        impl ReportSink for Stuck {
            async fn take(&self, _: &SiteName, _: &Report) -> Outcome {
                std::future::pending().await
            }
        }
        let session = crate::link::sessions::tests::session();
        let lanes = Lanes::start(&Arc::new(Reports::new(Stuck)), &session);
        let (control, _results) = mpsc::channel(16);
        let sent = (0..100).map(|seq| lanes.take_urgent(status(seq, "a"), Reply::Control(control.clone())));
        assert!(sent.collect::<Result<(), _>>().is_err());
        session.over.cancel();
    }
}
