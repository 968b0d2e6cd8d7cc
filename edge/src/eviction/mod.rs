//! When the machine runs short of memory, disk or process ids.
//!
//! [`threshold`]: what counts as short; [`state`]: since when, and what that means now.

mod state;
mod threshold;

use std::time::Duration;

pub(crate) use state::State;
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
