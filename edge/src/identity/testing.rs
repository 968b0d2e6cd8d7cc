//! Clocks for tests.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::clock::Clock;

/// A wall clock and a steady one, moved by hand.
pub(crate) struct Hand(Mutex<(Timestamp, Duration)>);

impl Hand {
    pub(crate) fn at(time: &str) -> Arc<Self> {
        Arc::new(Self(Mutex::new((time.parse().unwrap(), Duration::ZERO))))
    }

    /// Time passes.
    pub(crate) fn pass(&self, duration: Duration) {
        let mut both = self.0.lock().unwrap();
        both.0 += SignedDuration::try_from(duration).unwrap();
        both.1 += duration;
    }

    /// Somebody sets the wall clock.
    pub(crate) fn set(&self, time: &str) {
        self.0.lock().unwrap().0 = time.parse().unwrap();
    }
}

impl Clock for Hand {
    fn now(&self) -> Timestamp {
        self.0.lock().unwrap().0
    }

    fn steady(&self) -> Duration {
        self.0.lock().unwrap().1
    }
}
