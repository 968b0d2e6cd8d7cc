//! When the machine runs short of memory, disk or process ids.
//!
//! **In:** what the node and its pods use ([`crate::stats`]). **Out:** the Node's pressure conditions, from which the
//! control plane makes taints; images and dead containers that nobody needs are removed; pods are ended, one at a time.
//!
//! * `threshold`: what counts as short; `state`: since when, and what that means now;
//! * `rank`: which pod goes first; `limits`: pods that use more local storage than they may;
//! * `message`: what their status says; `manager`: does it.
//!
//! What must always hold: critical and static pods are never evicted, and nothing that a stored pod needs is freed.
//!
//! Source: kubelet, eviction manager.

mod limits;
mod manager;
mod message;
mod rank;
mod state;
mod threshold;

use std::time::Duration;

pub use manager::{Deps, run};
pub use state::{Crossed, Observation, Observations, Pressure};
pub use threshold::{Amount, Signal, Texts, Threshold, ThresholdError};

/// When pods are evicted, and how.
#[derive(Clone, Debug)]
pub struct Policy {
    /// What counts as short.
    pub thresholds: Vec<Threshold>,
    /// How long a condition is held after it was last seen, so that it does not flap.
    pub hold: Duration,
    /// Longest grace of a pod under a soft threshold.
    pub max_grace: Duration,
    /// How often it is looked.
    pub every: Duration,
}
