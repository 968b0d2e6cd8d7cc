//! Looking after a pod between and during what is done for it.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use super::record::State;
use super::worker::Worker;

impl Worker {
    /// Puts what the probes say into the record.
    pub(super) fn tend_probes(&mut self, pod: &Pod) {
        let ip = self.pod_ips().first().copied();
        let ends = pod.metadata.deletion_timestamp.is_some() || self.record.end.is_some();
        let shared = self.orders.borrow().pod.clone();
        let shared = shared.unwrap_or_else(|| Arc::new(pod.clone()));
        self.probers.tend(&shared, &mut self.record, ip, ends);
        let waiting = &mut self.waiting;
        for (name, known) in &self.record.containers {
            let running = matches!(known.last.as_ref().map(|l| &l.state), Some(State::Running(_)));
            if running {
                waiting.remove(name);
            }
        }
    }

    /// Does something that may take long while the probes' verdicts and the containers' states go on being reported.
    pub(super) async fn meanwhile<T>(&mut self, pod: &Pod, work: impl Future<Output = T>) -> T {
        let mut orders = self.orders.clone();
        orders.mark_unchanged();
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                done = &mut work => return done,
                changed = orders.changed() => {
                    if changed.is_err() {
                        return work.await;
                    }
                    let told = match self.look(pod).await {
                        Ok(()) => self.publish(pod, false).await,
                        Err(error) => Err(error),
                    };
                    // The work decides what becomes of the pod; this was only news of it.
                    if let Err(error) = told {
                        tracing::debug!(uid = %self.uid, %error, "a pod's state cannot be told while it is worked on");
                    }
                }
            }
        }
    }
}
