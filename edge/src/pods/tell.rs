//! What a pod's worker tells the cloud: its status, and what keeps it waiting.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod};
use skerry_proto::link::{PodStatusReport, report};

use super::events::Level;
use super::plan::{Plan, inits, regulars};
use super::status::{self, Waiting};
use super::worker::{SyncError, Worker};
use crate::store::{Lane, NewReport};

impl Worker {
    /// What this node does not do yet is said, never silent.
    pub(super) async fn say_unsupported(&mut self, pod: &Pod) {
        if std::mem::replace(&mut self.said_unsupported, true) {
            return;
        }
        self.say_wrong_class(pod).await;
        self.say_wrong_autonomy(pod).await;
        let mut said = Vec::new();
        let asks = |c: &Container| c.lifecycle.as_ref().is_some_and(|l| l.stop_signal.is_some());
        let asked = inits(pod).iter().chain(regulars(pod)).any(asks);
        let no_signals = asked && !self.knows_stop_signals().await;
        for container in inits(pod).iter().chain(regulars(pod)) {
            let unsupported = [(
                no_signals && asks(container),
                "lifecycle.stopSignal (it needs containerd 2.3 or newer)",
            )];
            for (_, what) in unsupported.iter().filter(|(used, _)| *used) {
                said.push((Some(container.name.clone()), (*what).to_owned()));
            }
        }
        for (container, what) in said {
            let message = format!("{what} is not supported by this node yet and has no effect");
            self.shared
                .events
                .emit(pod, container.as_deref(), Level::Warning, "Unsupported", message)
                .await;
        }
    }

    /// Whether the runtime sends the stop signal that a pod asks for instead of the image's.
    async fn knows_stop_signals(&self) -> bool {
        match self.shared.runtime.version().await {
            Ok(found) if found.name == "containerd" => {
                let mut numbers = found.version.trim_start_matches('v').split('.');
                let mut next = || numbers.next().and_then(|n| n.parse::<u32>().ok()).unwrap_or(0);
                (next(), next()) >= (2, 3)
            }
            Ok(_) => true,
            // It is said only of a runtime that is known.
            Err(_) => true,
        }
    }

    pub(super) async fn note_waits(&mut self, pod: &Pod, plan: &Plan) {
        for waits in &plan.waits {
            self.again = self.again.min(waits.remaining);
            let full = format!(
                "{}_{}({})",
                pod.metadata.name.as_deref().unwrap_or_default(),
                pod.metadata.namespace.as_deref().unwrap_or_default(),
                self.uid
            );
            let message = format!(
                "back-off {} restarting failed container={} pod={full}",
                short(waits.delay),
                waits.name
            );
            let reason = "CrashLoopBackOff".to_owned();
            let new = Waiting { reason, message };
            if self.waiting.insert(waits.name.clone(), new.clone()) != Some(new) {
                let message = format!(
                    "Back-off restarting failed container {} in pod {full}",
                    waits.name
                );
                self.shared
                    .events
                    .emit(pod, Some(&waits.name), Level::Warning, "BackOff", message)
                    .await;
            }
        }
    }

    /// Reports the status when it has changed; `finished` always.
    pub(super) async fn publish(&mut self, pod: &Pod, finished: bool) -> Result<(), SyncError> {
        let ips = self.pod_ips();
        let context = status::Context {
            scheme: self.shared.runtime.scheme(),
            host_ip: self.shared.config.node_ip,
            pod_ips: &ips,
            sandbox_ready: self.view.ready_sandbox().is_some(),
            waiting: &self.waiting,
            now: self.shared.clock.now(),
        };
        // Through JSON, so that it compares equal to what was stored.
        let json = serde_json::to_vec(&status::build(pod, &self.record, &context)).unwrap_or_default();
        let status: k8s_openapi::api::core::v1::PodStatus = serde_json::from_slice(&json).unwrap_or_default();
        self.note_phase(pod, status.phase.clone().unwrap_or_default());
        self.shared
            .terminations
            .note(self.record.status.as_ref(), &status);
        self.trace_start(status.phase.as_deref());
        let round = *self.shared.report_round.borrow();
        let api_uid = self.api_uid();
        let asked =
            api_uid.is_some() && (round != self.reported_in || self.unsure || self.reported_as != api_uid);
        if !asked && self.record.status.as_ref() == Some(&status) && (!finished || self.record.finished) {
            return Ok(());
        }
        let Some(api_uid) = api_uid else {
            // A static pod without a mirror: nobody to tell yet.
            self.record.status = Some(status);
            return self.save();
        };
        let body = report::Report::PodStatus(PodStatusReport {
            uid: api_uid.to_string(),
            namespace: self.record.namespace.clone(),
            name: self.record.name.clone(),
            status_json: json.into(),
            finished: finished || self.record.finished,
            class: skerry_proto::link::Class::from(self.class(pod)).into(),
        });
        let coalesce = Some(format!("pod/{api_uid}"));
        self.reported_in = round;
        self.reported_as = Some(api_uid);
        self.record.status = Some(status);
        self.record.finished |= finished;
        // The record first: whoever sees the report finds the status here.
        self.save()?;
        let report = NewReport {
            coalesce,
            observed: self.shared.clock.now(),
            body,
        };
        let lane = match self.class(pod) {
            skerry_proto::Class::Critical => Lane::CriticalStatus,
            _ => Lane::Status,
        };
        let report = self.shared.store.queue_report_in(lane, report);
        self.await_later(report);
        Ok(())
    }

    /// Tells how the pod's first start went, once it runs.
    fn trace_start(&mut self, phase: Option<&str>) {
        let ran_before = self.record.status.as_ref().and_then(|s| s.phase.as_deref());
        match (ran_before, phase) {
            (None | Some("Pending"), Some("Running")) => {
                let (namespace, name) = (&self.record.namespace, &self.record.name);
                self.trace.running(self.shared.starts.steps(), namespace, name);
            }
            (None | Some("Pending"), _) => {}
            (Some(_), _) => self.trace.skip(),
        }
    }

    fn note_phase(&self, pod: &Pod, phase: String) {
        let mut phases = self.shared.phases.lock().unwrap_or_else(PoisonError::into_inner);
        let old = phases.insert(self.uid.clone(), phase.clone());
        drop(phases);
        self.shared
            .starts
            .phase(pod, self.record.status.is_none(), &phase, self.shared.clock.now());
        if old.as_deref() != Some(phase.as_str()) {
            self.count_phases();
        }
    }

    pub(super) fn count_phases(&self) {
        let mut counts = BTreeMap::new();
        for phase in self
            .shared
            .phases
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
        {
            *counts.entry(phase.clone()).or_insert(0) += 1;
        }
        self.shared.resting.count(&mut counts);
        self.shared.summary.send_modify(|s| s.by_phase = counts);
    }
}

/// A delay as a kubelet prints it: `40s`, `2m40s`.
fn short(delay: Duration) -> String {
    let seconds = delay.as_secs();
    if seconds < 60 {
        format!("{seconds}s")
    } else {
        format!("{}m{}s", seconds / 60, seconds % 60)
    }
}
