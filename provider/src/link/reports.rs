//! Reports of a site on their way to the API server.
//!
//! Each session has a few lanes; all statuses of one object take the same lane, so that they arrive in order, and so do
//! its events, in a lane for events, so that no status waits behind one. The Node has a lane of its own. A lane tries a report again until the API server
//! has it or will never take it, and only then answers the edge, whose outbox keeps the report until that answer. A
//! status that a newer one of the same object follows in its lane is answered without being written: only the newest
//! matters.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use skerry_proto::SiteName;
use skerry_proto::limits::REPORT_WINDOW;
use skerry_proto::link::report_result::Outcome as Wire;
use skerry_proto::link::{CloudBulk, Report, ReportResult, cloud_bulk, report};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tonic::Status;

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
    sink: Box<dyn ReportSink>,
}

impl Reports {
    /// Reports go to `sink`.
    pub fn new(sink: impl ReportSink) -> Self {
        Self { sink: Box::new(sink) }
    }
}

/// The lanes of one session. They end with it. A lane without reports costs nothing: its task ends with its last report.
pub(super) struct Lanes {
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
}

struct Shared {
    reports: Arc<Reports>,
    session: Session,
    results: mpsc::Sender<Result<CloudBulk, Status>>,
    lanes: Mutex<[Lane; LANES + EVENT_LANES + NODE_LANES]>,
}

#[derive(Default)]
struct Lane {
    waiting: VecDeque<Waiting>,
    /// A task works on it.
    busy: bool,
}

struct Waiting {
    report: Report,
    _place: Option<OwnedSemaphorePermit>,
}

impl Lanes {
    pub(super) fn start(
        reports: &Arc<Reports>,
        session: &Session,
        results: &mpsc::Sender<Result<CloudBulk, Status>>,
    ) -> Self {
        let shared = Shared {
            reports: Arc::clone(reports),
            session: session.clone(),
            results: results.clone(),
            lanes: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
            room: Arc::new(Semaphore::new(ROOM)),
        }
    }

    /// Queues a report; waits while there is no room, which holds back the edge.
    pub(super) async fn take(&self, report: Report) {
        let mut hasher = DefaultHasher::new();
        subject(&report).hash(&mut hasher);
        #[allow(clippy::cast_possible_truncation)]
        let hash = hasher.finish() as usize;
        let lane = match &report.report {
            Some(report::Report::Event(_)) => LANES + hash % EVENT_LANES,
            // A mirror pod waits for its Node: the Node must not wait behind it.
            Some(report::Report::NodeStatus(_)) => LANES + EVENT_LANES,
            _ => hash % LANES,
        };
        let place = tokio::select! {
            () = self.shared.session.over.cancelled() => return,
            // Never closed.
            place = Arc::clone(&self.room).acquire_owned() => place.ok(),
        };
        let idle = {
            let mut lanes = self.shared.lanes();
            let lane = &mut lanes[lane];
            lane.waiting.push_back(Waiting {
                report,
                _place: place,
            });
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
        loop {
            let (next, needless) = {
                let mut lanes = self.lanes();
                let Some(next) = lanes[lane].next() else { return };
                next
            };
            let (outcome, message) = if needless {
                (Wire::Accepted, String::new())
            } else {
                self.settle(&next.report).await
            };
            let result = ReportResult {
                seq: next.report.seq,
                outcome: outcome.into(),
                message,
            };
            let message = CloudBulk {
                message: Some(cloud_bulk::Message::ReportResult(result)),
            };
            if self.results.send(Ok(message)).await.is_err() {
                return;
            }
        }
    }

    async fn settle(&self, report: &Report) -> (Wire, String) {
        let mut pause = FIRST_RETRY;
        loop {
            match self.reports.sink.take(&self.session.peer.site, report).await {
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
    /// The oldest report, and whether a newer one behind it says the same and more. With none left the lane is idle.
    fn next(&mut self) -> Option<(Waiting, bool)> {
        let Some(next) = self.waiting.pop_front() else {
            *self = Self::default();
            return None;
        };
        let needless = self
            .waiting
            .iter()
            .any(|newer| supersedes(&newer.report, &next.report));
        Some((next, needless))
    }
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
                _place: None,
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
        let session = Session {
            id: "s".to_owned(),
            peer: crate::pki::SitePeer {
                site: "harbour".parse().unwrap(),
                uid: skerry_proto::object::Uid::from("u"),
                not_after: jiff::Timestamp::MAX,
            },
            over: tokio_util::sync::CancellationToken::new(),
            begun: tokio_util::sync::CancellationToken::new(),
        };
        let lanes = Lanes::start(&Arc::new(Reports::new(Slow(taken))), &session, &results);
        for seq in 1..=100 {
            let event = EventReport {
                uid: format!("pod-{}", seq % 5),
                ..Default::default()
            };
            lanes
                .take(Report {
                    seq,
                    report: Some(report::Report::Event(event)),
                    ..Default::default()
                })
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
}
