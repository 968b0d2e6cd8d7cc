//! Where the time of a pod's start goes.
//!
//! Each worker notes how long the steps of its pod's first start took. When the pod runs, the steps go into a histogram
//! by step, and as one line into the log at level `debug`, which
//! `--log info,skerry_edge::pods::trace=debug` shows without the rest.

use std::fmt::Write as _;
use std::time::Duration;

use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tokio::time::Instant;

/// Upper bounds in seconds: an admission takes microseconds, a sandbox tens of milliseconds, a pull minutes.
const BUCKETS: [f64; 13] = [
    0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0,
];
/// More steps than this belong to a pod with dozens of containers or to one that does not come up; the first tell enough.
const MOST_STEPS: usize = 64;

/// A step of a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// From the worker's first turn until the node has given it room.
    Admission,
    /// Volumes made and filled.
    Volumes,
    /// The pod's own control group.
    Cgroup,
    /// The runtime's sandbox: namespaces, pause process, network.
    Sandbox,
    /// The image looked for, or waited for.
    Image,
    /// Environment, mounts and security settings, put together for the runtime.
    Configure,
    /// The runtime makes a container.
    Create,
    /// The runtime starts it.
    Start,
    /// The runtime asked how the pod is.
    Look,
    /// What the round wrote comes to the disk.
    Disk,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Self::Admission => "admission",
            Self::Volumes => "volumes",
            Self::Cgroup => "cgroup",
            Self::Sandbox => "sandbox",
            Self::Image => "image",
            Self::Configure => "configure",
            Self::Create => "create",
            Self::Start => "start",
            Self::Look => "look",
            Self::Disk => "disk",
        }
    }
}

type Labels = [(&'static str, &'static str); 1];

/// The steps of all pods that started while this daemon ran. Clones count together.
#[derive(Clone, Debug)]
pub(super) struct Steps {
    seconds: Family<Labels, Histogram, fn() -> Histogram>,
}

impl Default for Steps {
    fn default() -> Self {
        Self {
            seconds: Family::new_with_constructor(|| Histogram::new(BUCKETS)),
        }
    }
}

impl Steps {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "skerry_pod_start_step_seconds",
            "Duration in seconds of one step of a pod's first start on this node",
            self.seconds.clone(),
        );
    }
}

/// One pod's first start.
#[derive(Debug)]
pub(super) struct Trace {
    began: Instant,
    /// What was done, when it was begun, counted from the start, and how long it took.
    steps: Vec<(Stage, Duration, Duration)>,
    over: bool,
}

impl Trace {
    /// The start begins now.
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            steps: Vec::new(),
            over: false,
        }
    }

    /// There is nothing to trace: the pod ran before.
    pub(super) fn skip(&mut self) {
        self.over = true;
    }

    /// A step that was begun at `begun` is done.
    pub(super) fn note(&mut self, step: Stage, begun: Instant) {
        if !self.over && self.steps.len() < MOST_STEPS {
            self.steps
                .push((step, begun.duration_since(self.began), begun.elapsed()));
        }
    }

    /// The pod runs. Tells once.
    pub(super) fn running(&mut self, all: &Steps, namespace: &str, name: &str) {
        if std::mem::replace(&mut self.over, true) {
            return;
        }
        for &(step, _, took) in &self.steps {
            all.seconds
                .get_or_create(&[("step", step.name())])
                .observe(took.as_secs_f64());
        }
        tracing::debug!(pod = %format_args!("{namespace}/{name}"), total_ms = millis(self.began.elapsed()), steps = %self.story(), "a pod has started");
        self.steps = Vec::new();
    }

    /// `step@begun+took`, milliseconds.
    fn story(&self) -> String {
        let mut story = String::new();
        for (step, begun, took) in &self.steps {
            // Writing to a string does not fail.
            let _ = write!(
                story,
                "{}@{:.1}+{:.1} ",
                step.name(),
                millis(*begun),
                millis(*took)
            );
        }
        story.truncate(story.trim_end().len());
        story
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn step(trace: &mut Trace, step: Stage, millis: u64) {
        let begun = Instant::now();
        tokio::time::advance(Duration::from_millis(millis)).await;
        trace.note(step, begun);
    }

    fn shown(all: &Steps) -> String {
        let mut registry = Registry::default();
        all.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        text
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_is_told_once_with_its_steps_in_order() {
        let (mut trace, all) = (Trace::new(), Steps::default());
        step(&mut trace, Stage::Admission, 2).await;
        step(&mut trace, Stage::Sandbox, 40).await;
        assert_eq!(trace.story(), "admission@0.0+2.0 sandbox@2.0+40.0");
        trace.running(&all, "default", "a");
        step(&mut trace, Stage::Look, 1).await;
        trace.running(&all, "default", "a");
        let text = shown(&all);
        assert!(
            text.contains(r#"skerry_pod_start_step_seconds_count{step="sandbox"} 1"#),
            "{text}"
        );
        assert!(!text.contains("look"), "{text}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_never_comes_up_costs_a_bounded_memory() {
        let mut trace = Trace::new();
        for _ in 0..1_000 {
            step(&mut trace, Stage::Look, 1).await;
        }
        assert_eq!(trace.steps.len(), MOST_STEPS);
    }
}
