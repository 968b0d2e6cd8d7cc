//! Jittered, capped, exponential pauses.

use std::time::Duration;

/// Doubles from `first` to `cap`; each pause is drawn between half and the whole of it, so that many sites that lost
/// one provider do not return in step.
pub(crate) struct Backoff {
    first: Duration,
    cap: Duration,
    current: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, cap: Duration) -> Self {
        Self {
            first,
            cap,
            current: first,
        }
    }

    pub(crate) fn reset(&mut self) {
        self.current = self.first;
    }

    pub(crate) fn next(&mut self) -> Duration {
        let whole = self.current;
        self.current = (whole * 2).min(self.cap);
        whole.mul_f64(rand::random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_cap_and_start_small_again_after_a_reset() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(8));
        let pauses: Vec<Duration> = (0..8).map(|_| backoff.next()).collect();
        assert!(pauses[0] <= Duration::from_secs(1));
        assert!(pauses[7] >= Duration::from_secs(4) && pauses[7] <= Duration::from_secs(8));
        backoff.reset();
        assert!(backoff.next() <= Duration::from_secs(1));
    }
}
