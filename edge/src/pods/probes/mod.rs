//! Probes: asking a container whether it has started, lives and is ready.
//!
//! One task with one timer stands for each probe of each running container ([`task`]); it lives as long as that
//! instance of the container is to be asked, and leaves its verdicts in a table that the pod's worker reads
//! ([`Probers`]). Nothing polls: a task that waits costs its timer, and a verdict wakes the worker once.
//!
//! * [`rules`]: when a probe runs and what its results add up to;
//! * [`act`], [`grpc`]: one run;
//! * [`metrics`]: what a kubelet shows at `/metrics/probes`.
//!
//! What must always hold:
//! * A verdict belongs to one instance of a container and is never taken for another's.
//! * Started and ready, once true, survive the daemon: they are in the pod's record, and an adopted container keeps
//!   them until its probes say otherwise.
//! * A container that was condemned is not asked again.

mod act;
mod grpc;
mod metrics;
mod rules;
mod set;
mod task;

pub use metrics::ProbeMetrics;
pub(super) use set::Probers;

/// Who asks, in HTTP and gRPC.
const AGENT: &str = "kube-probe/1.36";
