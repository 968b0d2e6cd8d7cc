//! Reports of a site on their way to the API server.
//!
//! Each session has a few lanes; all reports about one object take the same lane, so that they arrive in order. A
//! lane tries a report again until the API server has it or will never take it, and only then answers the edge, whose
//! outbox keeps the report until that answer.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use skerry_proto::SiteName;
use skerry_proto::link::report_result::Outcome as Wire;
use skerry_proto::link::{CloudBulk, Report, ReportResult, cloud_bulk, report};
use tokio::sync::mpsc;
use tonic::Status;

use super::sessions::Session;

const LANES: usize = 4;
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
        let lanes = (0..LANES)
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
        let lane = hasher.finish() as usize % self.lanes.len();
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
            while let Some(report) = queue.recv().await {
                let (outcome, message) = self.settle(&report).await;
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

/// What a report is about: reports of one subject keep their order.
fn subject(report: &Report) -> &str {
    match &report.report {
        Some(report::Report::PodStatus(status)) => &status.uid,
        Some(report::Report::DeviceStatus(status)) => &status.uid,
        Some(report::Report::Event(event)) => &event.uid,
        Some(report::Report::NodeStatus(_)) | None => "",
    }
}
