//! Reports of a site on their way to the API server.
//!
//! Each session has a few lanes; all statuses of one object take the same lane, so that they arrive in order, and so do
//! its events, in a lane for events, so that no status waits behind one. The Node has a lane of its own. A lane tries a report again until the API server
//! has it or will never take it, and only then answers the edge, whose outbox keeps the report until that answer. A
//! status that a newer one of the same object follows in its lane is answered without being written: only the newest
//! matters.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use skerry_proto::SiteName;
use skerry_proto::link::report_result::Outcome as Wire;
use skerry_proto::link::{CloudBulk, Report, ReportResult, cloud_bulk, report};
use tokio::sync::mpsc;
use tonic::Status;

use super::sessions::Session;

/// Lanes for statuses.
const LANES: usize = 6;
/// Lanes for events.
const EVENT_LANES: usize = 2;
/// The Node's own lane.
const NODE_LANES: usize = 1;
const LANE_QUEUE: usize = 64;
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

/// The lanes of one session. They end with it.
pub(super) struct Lanes {
    lanes: Vec<mpsc::Sender<Report>>,
}

impl Lanes {
    pub(super) fn start(
        reports: &Arc<Reports>,
        session: &Session,
        results: &mpsc::Sender<Result<CloudBulk, Status>>,
    ) -> Self {
        let lanes = (0..LANES + EVENT_LANES + NODE_LANES)
            .map(|_| {
                let (sender, queue) = mpsc::channel(LANE_QUEUE);
                let lane = Lane {
                    reports: Arc::clone(reports),
                    session: session.clone(),
                    results: results.clone(),
                };
                tokio::spawn(lane.run(queue));
                sender
            })
            .collect();
        Self { lanes }
    }

    /// Queues a report; waits while its lane is full, which holds back the edge.
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
        // A closed lane belongs to a session that is over.
        let _ = self.lanes[lane].send(report).await;
    }
}

struct Lane {
    reports: Arc<Reports>,
    session: Session,
    results: mpsc::Sender<Result<CloudBulk, Status>>,
}

impl Lane {
    async fn run(self, mut queue: mpsc::Receiver<Report>) {
        let over = self.session.over.clone();
        let work = async {
            let mut taken = VecDeque::new();
            while let Some(report) = next(&mut taken, &mut queue).await {
                let (outcome, message) = if taken.iter().any(|newer| supersedes(newer, &report)) {
                    (Wire::Accepted, String::new())
                } else {
                    self.settle(&report).await
                };
                let result = ReportResult {
                    seq: report.seq,
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
        };
        tokio::select! {
            () = over.cancelled() => {}
            () = work => {}
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

/// The oldest report of a lane; `taken` are those behind it.
async fn next(taken: &mut VecDeque<Report>, queue: &mut mpsc::Receiver<Report>) -> Option<Report> {
    if taken.is_empty() {
        taken.push_back(queue.recv().await?);
    }
    while taken.len() < LANE_QUEUE
        && let Ok(report) = queue.try_recv()
    {
        taken.push_back(report);
    }
    taken.pop_front()
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

    #[tokio::test]
    async fn a_lane_gives_the_oldest_and_shows_what_is_behind_it() {
        let (sender, mut queue) = mpsc::channel(LANE_QUEUE);
        for seq in 1..=3 {
            sender.send(status(seq, "a")).await.unwrap();
        }
        drop(sender);
        let mut taken = VecDeque::new();
        assert_eq!(
            next(&mut taken, &mut queue).await.map(|r| (r.seq, taken.len())),
            Some((1, 2))
        );
        assert_eq!(
            next(&mut taken, &mut queue).await.map(|r| (r.seq, taken.len())),
            Some((2, 1))
        );
        assert_eq!(
            next(&mut taken, &mut queue).await.map(|r| (r.seq, taken.len())),
            Some((3, 0))
        );
        assert_eq!(next(&mut taken, &mut queue).await, None);
    }
}
