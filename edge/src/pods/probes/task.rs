//! The task of one probe of one instance of a container.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Pod, Probe};
use tokio::time::{Instant, MissedTickBehavior};

use super::super::events::Level;
use super::super::plan::find_container;
use super::super::worker::Shared;
use super::act::{self, Outcome};
use super::metrics;
use super::rules::{Kind, Rules, Tally};
use super::set::Verdicts;
use crate::runtime::ContainerId;

/// Times after which a container that has just started is asked without its failing being held against it: one that
/// is up at once need not wait for the first regular run.
const EARLY: [Duration; 3] = [Duration::ZERO, Duration::from_millis(250), Duration::from_secs(1)];
/// The same for commands, which cost more than a connection.
const EARLY_COMMAND: [Duration; 1] = [Duration::from_millis(250)];
/// A failed run's words in an event; more would fill the outbox of a site that is cut off.
const MAX_WORDS: usize = 1024;

/// When the asking begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begin {
    /// The container has just started, or has this long to go until its initial delay is over.
    After(Duration),
    /// The startup probe has just passed.
    AtOnce,
    /// The container was there before the daemon, so that all are asked at different times.
    Somewhen,
}

/// Everything that a task needs.
pub(super) struct Task {
    pub(super) shared: Arc<Shared>,
    pub(super) verdicts: Arc<Verdicts>,
    pub(super) pod: Arc<Pod>,
    pub(super) container: String,
    pub(super) kind: Kind,
    pub(super) id: ContainerId,
    /// The pod's address.
    pub(super) host: String,
    pub(super) begin: Begin,
}

impl Task {
    /// Asks until a verdict that ends the asking, or until it is aborted.
    pub(super) async fn run(self) {
        let Some((rules, command)) = self
            .probe()
            .map(|(_, probe)| (Rules::of(probe), probe.exec.is_some()))
        else {
            return;
        };
        let (wait, first) = match self.begin {
            Begin::After(left) => (left, rules.first(self.kind)),
            Begin::AtOnce => (Duration::ZERO, Duration::ZERO),
            Begin::Somewhen => (rules.period.mul_f64(rand::random::<f64>()), Duration::ZERO),
        };
        let eligible = Instant::now() + wait;
        let subject = self.subject();
        let mut tally = Tally::default();
        if self.kind != Kind::Liveness {
            let early: &[Duration] = if command { &EARLY_COMMAND } else { &EARLY };
            for after in early.iter().filter(|e| **e < first) {
                tokio::time::sleep_until(eligible + *after).await;
                let began = Instant::now();
                if let Ok(Outcome::Success) = Box::pin(self.ask(&rules)).await {
                    self.shared.probes.count(&subject, true, began.elapsed());
                    if let Some(verdict) = tally.count(true, &rules) {
                        if self.publish(verdict) {
                            return;
                        }
                        break;
                    }
                }
            }
        }
        let mut tick = tokio::time::interval_at(eligible + first, rules.period);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            tick.tick().await;
            let began = Instant::now();
            // Boxed, so that a task that waits is small.
            let outcome = Box::pin(self.ask(&rules)).await;
            let Some(passed) = self.say(outcome).await else {
                continue;
            };
            self.shared.probes.count(&subject, passed, began.elapsed());
            if let Some(verdict) = tally.count(passed, &rules)
                && self.publish(verdict)
            {
                return;
            }
        }
    }

    fn probe(&self) -> Option<(&Container, &Probe)> {
        let container = find_container(&self.pod, &self.container)?;
        Some((container, self.kind.of(container)?))
    }

    async fn ask(&self, rules: &Rules) -> Result<Outcome, String> {
        let Some((container, probe)) = self.probe() else {
            return Err("the probe is not in the pod any more".to_owned());
        };
        let subject = act::Subject {
            container,
            id: &self.id,
            host: &self.host,
            timeout: rules.timeout,
        };
        act::run(self.shared.runtime.as_ref(), probe, &subject).await
    }

    /// Tells what is worth telling; `None` when the run counts for nothing.
    async fn say(&self, outcome: Result<Outcome, String>) -> Option<bool> {
        let kind = self.kind.text();
        let (reason, message, passed) = match outcome {
            Ok(Outcome::Success) => return Some(true),
            Ok(Outcome::Warning(words)) => (
                "ProbeWarning",
                format!("{kind} probe warning: {words}"),
                Some(true),
            ),
            Ok(Outcome::Failure(words)) => {
                ("Unhealthy", format!("{kind} probe failed: {words}"), Some(false))
            }
            Err(words) => (
                "Unhealthy",
                format!("{kind} probe errored and resulted in unknown state: {words}"),
                None,
            ),
        };
        let message = message.chars().take(MAX_WORDS).collect();
        self.shared
            .events
            .emit(&self.pod, Some(&self.container), Level::Warning, reason, message)
            .await;
        passed
    }

    /// Publishes a verdict; answers whether it was the last one.
    fn publish(&self, passed: bool) -> bool {
        self.verdicts.set(&self.id.0, self.kind, passed);
        match self.kind {
            Kind::Startup => true,
            Kind::Liveness => !passed,
            Kind::Readiness => false,
        }
    }

    fn subject(&self) -> metrics::Subject {
        let meta = &self.pod.metadata;
        metrics::Subject {
            kind: self.kind,
            container: self.container.clone(),
            pod: meta.name.clone().unwrap_or_default(),
            namespace: meta.namespace.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
        }
    }
}
