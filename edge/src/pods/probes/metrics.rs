//! Counts of probe runs, as a kubelet shows them at `/metrics/probes`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::rules::Kind;

/// Upper bounds of the durations, in seconds.
const BOUNDS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// Which probe is counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Subject {
    pub(super) kind: Kind,
    pub(super) container: String,
    pub(super) pod: String,
    pub(super) namespace: String,
    pub(super) uid: String,
}

#[derive(Clone, Debug, Default)]
struct Counts {
    successful: u64,
    failed: u64,
    /// Durations of runs that passed, by bound; the last is beyond all.
    durations: [u64; BOUNDS.len() + 1],
    sum: f64,
}

/// Runs of every probe since the daemon started; those of a pod are forgotten with it.
#[derive(Debug, Default)]
pub struct ProbeMetrics {
    counts: Mutex<BTreeMap<Subject, Counts>>,
}

impl ProbeMetrics {
    /// Counts a run; `took` is observed for those that passed, as a kubelet does.
    pub(super) fn count(&self, subject: &Subject, passed: bool, took: Duration) {
        let mut all = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.contains_key(subject) {
            all.insert(subject.clone(), Counts::default());
        }
        let Some(counts) = all.get_mut(subject) else {
            return;
        };
        if !passed {
            counts.failed += 1;
            return;
        }
        counts.successful += 1;
        let seconds = took.as_secs_f64();
        let bucket = BOUNDS.iter().position(|b| seconds <= *b).unwrap_or(BOUNDS.len());
        counts.durations[bucket] += 1;
        counts.sum += seconds;
    }

    /// Forgets a pod that is gone.
    pub(in crate::pods) fn forget(&self, uid: &str) {
        let mut all = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|subject, _| subject.uid != uid);
    }

    /// `prober_probe_total` and `prober_probe_duration_seconds` in Prometheus' text format.
    pub fn text(&self) -> String {
        let all = self.counts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "# HELP prober_probe_duration_seconds [ALPHA] Duration in seconds for a probe response.\n\
             # TYPE prober_probe_duration_seconds histogram"
        );
        for (subject, counts) in all.iter().filter(|(_, c)| c.successful > 0) {
            let labels = subject.labels();
            let mut below = 0;
            for (bound, count) in BOUNDS
                .iter()
                .map(ToString::to_string)
                .chain(["+Inf".to_owned()])
                .zip(counts.durations)
            {
                below += count;
                let _ = writeln!(
                    out,
                    "prober_probe_duration_seconds_bucket{{{labels},le=\"{bound}\"}} {below}"
                );
            }
            let _ = writeln!(
                out,
                "prober_probe_duration_seconds_sum{{{labels}}} {}",
                counts.sum
            );
            let _ = writeln!(out, "prober_probe_duration_seconds_count{{{labels}}} {below}");
        }
        let _ = writeln!(
            out,
            "# HELP prober_probe_total [BETA] Cumulative number of a liveness, readiness or startup probe for a \
             container by result.\n# TYPE prober_probe_total counter"
        );
        for (subject, counts) in &all {
            for (result, count) in [("failed", counts.failed), ("successful", counts.successful)] {
                if count > 0 {
                    let (labels, uid) = (subject.labels(), &subject.uid);
                    let _ = writeln!(
                        out,
                        "prober_probe_total{{{labels},pod_uid=\"{uid}\",result=\"{result}\"}} {count}"
                    );
                }
            }
        }
        out
    }
}

impl Subject {
    /// Names of Kubernetes need no escaping.
    fn labels(&self) -> String {
        format!(
            "container=\"{}\",namespace=\"{}\",pod=\"{}\",probe_type=\"{}\"",
            self.container,
            self.namespace,
            self.pod,
            self.kind.text()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_shown_as_a_kubelet_shows_them_until_the_pod_is_gone() {
        let metrics = ProbeMetrics::default();
        let subject = Subject {
            kind: Kind::Liveness,
            container: "c".into(),
            pod: "p".into(),
            namespace: "n".into(),
            uid: "u".into(),
        };
        metrics.count(&subject, true, Duration::from_millis(20));
        metrics.count(&subject, true, Duration::from_secs(60));
        metrics.count(&subject, false, Duration::from_secs(1));
        let text = metrics.text();
        let labels = "container=\"c\",namespace=\"n\",pod=\"p\",probe_type=\"Liveness\"";
        for line in [
            format!("prober_probe_total{{{labels},pod_uid=\"u\",result=\"successful\"}} 2"),
            format!("prober_probe_total{{{labels},pod_uid=\"u\",result=\"failed\"}} 1"),
            format!("prober_probe_duration_seconds_bucket{{{labels},le=\"0.01\"}} 0"),
            format!("prober_probe_duration_seconds_bucket{{{labels},le=\"0.025\"}} 1"),
            format!("prober_probe_duration_seconds_bucket{{{labels},le=\"10\"}} 1"),
            format!("prober_probe_duration_seconds_bucket{{{labels},le=\"+Inf\"}} 2"),
            format!("prober_probe_duration_seconds_count{{{labels}}} 2"),
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\nin\n{text}");
        }
        metrics.forget("u");
        assert!(!metrics.text().contains("pod_uid"));
    }
}
