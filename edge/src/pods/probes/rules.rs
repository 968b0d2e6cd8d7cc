//! When a probe runs, and what its results add up to.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, Probe};

/// What a probe is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Passes once, and lets the others begin.
    Startup,
    /// Fails, and the container is restarted.
    Liveness,
    /// Says whether the container takes traffic.
    Readiness,
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 3] = [Self::Startup, Self::Liveness, Self::Readiness];

    /// As events and metrics say it.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Startup => "Startup",
            Self::Liveness => "Liveness",
            Self::Readiness => "Readiness",
        }
    }

    /// The container's probe of this kind.
    pub(super) fn of(self, container: &Container) -> Option<&Probe> {
        match self {
            Self::Startup => container.startup_probe.as_ref(),
            Self::Liveness => container.liveness_probe.as_ref(),
            Self::Readiness => container.readiness_probe.as_ref(),
        }
    }
}

/// Numbers of a probe, defaults filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rules {
    /// From one run to the next.
    pub(super) period: Duration,
    /// For one run.
    pub(super) timeout: Duration,
    /// After the container's start.
    pub(super) initial_delay: Duration,
    /// Runs in a row that must pass.
    pub(super) successes: u32,
    /// Runs in a row that must fail.
    pub(super) failures: u32,
}

impl Rules {
    pub(super) fn of(probe: &Probe) -> Self {
        let number = |value: Option<i32>, least: u32, default: u32| {
            value
                .filter(|v| *v != 0 || least == 0)
                .and_then(|v| u32::try_from(v).ok())
                .map_or(default, |v| v.max(least))
        };
        let time = |value, least, default| Duration::from_secs(number(value, least, default).into());
        Self {
            period: time(probe.period_seconds, 1, 10),
            timeout: time(probe.timeout_seconds, 1, 1),
            initial_delay: time(probe.initial_delay_seconds, 0, 0),
            successes: number(probe.success_threshold, 1, 1),
            failures: number(probe.failure_threshold, 1, 3),
        }
    }

    /// How long after the container has become eligible the first run that counts takes place.
    ///
    /// A kubelet's clock of a probe begins with the pod, a moment before its containers start: what has no initial
    /// delay is first asked one period later, and a slow starter relies on it. Readiness is first asked when the
    /// kubelet has seen the container run, which it looks for every second.
    pub(super) fn first(&self, kind: Kind) -> Duration {
        match kind {
            _ if !self.initial_delay.is_zero() => Duration::ZERO,
            Kind::Readiness => Duration::from_secs(1),
            Kind::Startup | Kind::Liveness => self.period,
        }
    }
}

/// Counts results in a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    last: Option<bool>,
    run: u32,
}

impl Tally {
    /// Counts one result; `Some` when as many as it takes have come in a row.
    pub(super) fn count(&mut self, passed: bool, rules: &Rules) -> Option<bool> {
        if self.last == Some(passed) {
            self.run = self.run.saturating_add(1);
        } else {
            self.last = Some(passed);
            self.run = 1;
        }
        let needed = if passed { rules.successes } else { rules.failures };
        (self.run >= needed).then_some(passed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(probe: serde_json::Value) -> Rules {
        Rules::of(&serde_json::from_value(probe).unwrap())
    }

    #[test]
    fn a_probe_without_numbers_has_a_kubelets() {
        let rules = rules(serde_json::json!({}));
        assert_eq!(
            (
                rules.period.as_secs(),
                rules.timeout.as_secs(),
                rules.initial_delay.as_secs()
            ),
            (10, 1, 0)
        );
        assert_eq!((rules.successes, rules.failures), (1, 3));
    }

    #[test]
    fn a_result_counts_only_when_it_came_often_enough_in_a_row() {
        let rules = rules(serde_json::json!({"successThreshold": 2, "failureThreshold": 3}));
        let mut tally = Tally::default();
        let results = [true, true, true, false, false, true, false, false, false, false];
        let counted: Vec<_> = results.iter().map(|r| tally.count(*r, &rules)).collect();
        let (yes, no) = (Some(true), Some(false));
        assert_eq!(counted, [None, yes, yes, None, None, None, None, None, no, no]);
    }

    #[test]
    fn only_readiness_counts_before_a_period_is_over_when_no_delay_is_given() {
        let plain = rules(serde_json::json!({"periodSeconds": 7}));
        let delayed = rules(serde_json::json!({"periodSeconds": 7, "initialDelaySeconds": 1}));
        let firsts = |r: Rules| Kind::ALL.map(|k| r.first(k).as_secs());
        assert_eq!(firsts(plain), [7, 7, 1]);
        assert_eq!(firsts(delayed), [0, 0, 0]);
    }
}
