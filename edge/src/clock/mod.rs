//! Time, injected: the wall clock, a steady one, and what follows from both when somebody sets the wall clock.
//!
//! Timestamps are for people and for the API; a duration between two of them is wrong when the clock was set in between.
//! Who wants to know how long ago something was asks [`Clock::elapsed`].

mod house;

use std::time::Duration;

use jiff::Timestamp;
use nix::time::{ClockId, clock_gettime};

pub use house::HouseClock;

/// Tells the time; tests bring their own.
pub trait Clock: Send + Sync + 'static {
    /// The wall clock.
    fn now(&self) -> Timestamp;

    /// Since the machine's start, the time that it slept included. Never goes back, whatever is done to the wall clock.
    fn steady(&self) -> Duration {
        // Every kernel that this runs on has this clock.
        clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
    }

    /// How long ago the wall clock showed `then`; nothing for the future.
    fn elapsed(&self, then: Timestamp) -> Duration {
        Duration::try_from(self.now().duration_since(then)).unwrap_or_default()
    }

    /// The cluster's time, to be compared with timestamps that the API server has made.
    fn cloud(&self) -> Timestamp {
        self.now()
    }
}

/// The system's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }
}
