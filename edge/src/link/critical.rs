//! Statuses of critical pods, on the control stream: they never wait behind bulk.
//!
//! In: the outbox. Out: reports on Control, at most [`CONTROL_REPORT_WINDOW`] ahead of their results. The rest of the outbox is Bulk's;
//! which of the two takes a report follows from the report alone.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use skerry_proto::Class;
use skerry_proto::limits::{CONTROL_REPORT_WINDOW, REPORT_WINDOW};
use skerry_proto::link::{EdgeControl, Report, ReportResult, Welcome, edge_control};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use super::uplink::class_of;
use super::{Link, SessionError};

/// The feature by which a provider says that it takes such reports.
const FEATURE: &str = "critical-status";

/// The critical statuses of one session. Clones share them.
#[derive(Clone)]
pub(super) struct Critical {
    /// The provider takes them.
    on: bool,
    window: Arc<Semaphore>,
    sent: Arc<Mutex<HashMap<u64, Instant>>>,
}

impl Critical {
    pub(super) fn new(welcome: &Welcome) -> Self {
        Self {
            on: welcome.features.iter().any(|feature| feature == FEATURE),
            window: Arc::new(Semaphore::new(CONTROL_REPORT_WINDOW)),
            sent: Arc::default(),
        }
    }

    /// Whether the control stream takes this report, so that Bulk must not.
    pub(super) fn takes(&self, report: &Report) -> bool {
        self.on && class_of(report) == Class::Critical
    }

    /// Sends what waits in the outbox, oldest first.
    pub(super) async fn run(self, link: Arc<Link>, to_control: mpsc::Sender<EdgeControl>) -> SessionError {
        if !self.on {
            return std::future::pending().await;
        }
        let mut moved = link.store.outbox_moved();
        let mut after = 0;
        loop {
            moved.mark_unchanged();
            let waiting = match link.store.waiting_reports(after, REPORT_WINDOW) {
                Ok(waiting) => waiting,
                Err(error) => return error.into(),
            };
            if waiting.is_empty() && moved.changed().await.is_err() {
                return SessionError::Protocol("the store was closed");
            }
            for report in waiting {
                after = report.seq;
                if !self.takes(&report) {
                    continue;
                }
                let Ok(permit) = self.window.acquire().await else {
                    return SessionError::Protocol("the session ended");
                };
                // Comes back with the report's result.
                permit.forget();
                self.book().insert(report.seq, Instant::now());
                let message = Some(edge_control::Message::Report(report));
                if to_control.send(EdgeControl { message }).await.is_err() {
                    return SessionError::Protocol("the control stream ended");
                }
            }
        }
    }

    /// Forgets reports as their results come.
    pub(super) async fn settle(
        self,
        link: Arc<Link>,
        mut results: mpsc::Receiver<ReportResult>,
    ) -> SessionError {
        while let Some(result) = results.recv().await {
            if let Some(sent) = self.book().remove(&result.seq) {
                let took = sent.elapsed();
                tracing::debug!(
                    seq = result.seq,
                    micros = took.as_micros(),
                    "a critical status was settled"
                );
                link.metrics.observe_request("critical-status", took);
            }
            super::session::settle(&link, &[result], &self.window).await;
        }
        SessionError::Protocol("the control stream ended")
    }

    fn book(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Instant>> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
