//! Back-off as a kubelet does it: 10 s, doubled, at most 300 s, forgotten after calm.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The first delay.
const FIRST: Duration = Duration::from_secs(10);
/// The longest delay.
const LONGEST: Duration = Duration::from_secs(300);

/// Tells what has passed since a moment, however the clock was set meanwhile.
pub(crate) type Since<'a> = &'a dyn Fn(Timestamp) -> Duration;

/// Where one thing that keeps failing stands.
///
/// The first failure costs nothing: the delay applies from the second on. A failure that comes more than twice the
/// longest delay after the last step starts anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Backoff {
    /// What it is about (an image): another key is another story.
    key: String,
    delay: Duration,
    updated: Timestamp,
}

impl Backoff {
    /// How long to wait still, for a failure that happened at `failed`; `None` = go ahead.
    pub(crate) fn remaining(
        this: Option<&Self>,
        key: &str,
        failed: Timestamp,
        since: Since<'_>,
    ) -> Option<Duration> {
        let this = this.filter(|b| b.key == key && !b.expired(failed, since))?;
        this.delay.checked_sub(since(failed)).filter(|d| !d.is_zero())
    }

    /// Takes note that another try is made `now`, after a failure at `failed`.
    pub(crate) fn step(
        this: Option<&Self>,
        key: &str,
        failed: Timestamp,
        now: Timestamp,
        since: Since<'_>,
    ) -> Self {
        let delay = match this {
            Some(b) if b.key == key && !b.expired(failed, since) => (b.delay * 2).min(LONGEST),
            _ => FIRST,
        };
        Self {
            key: key.to_owned(),
            delay,
            updated: now,
        }
    }

    /// The whole delay.
    pub(crate) fn delay(&self) -> Duration {
        self.delay
    }

    /// Between two timestamps a clock may have been set, so what has passed since each is asked for.
    fn expired(&self, failed: Timestamp, since: Since<'_>) -> bool {
        since(self.updated).saturating_sub(since(failed)) > 2 * LONGEST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).unwrap()
    }

    /// What has passed since a moment when the clock shows `now` and was never set.
    fn now(now: i64) -> impl Fn(Timestamp) -> Duration {
        move |then| at(now).duration_since(then).try_into().unwrap_or_default()
    }

    #[test]
    fn the_first_failure_waits_for_nothing_and_the_second_for_ten_seconds() {
        assert_eq!(Backoff::remaining(None, "i", at(0), &now(0)), None);
        let one = Backoff::step(None, "i", at(0), at(0), &now(0));
        assert_eq!(Backoff::remaining(Some(&one), "i", at(5), &now(5)), Some(FIRST));
        assert_eq!(Backoff::remaining(Some(&one), "i", at(5), &now(15)), None);
    }

    #[test]
    fn the_delay_doubles_up_to_five_minutes() {
        let mut state = None;
        let mut delays = Vec::new();
        for _ in 0..8 {
            let next = Backoff::step(state.as_ref(), "i", at(0), at(0), &now(0));
            delays.push(next.delay().as_secs());
            state = Some(next);
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300, 300]);
    }

    fn long_failing() -> Backoff {
        let mut state = Backoff::step(None, "i", at(0), at(0), &now(0));
        for _ in 0..5 {
            state = Backoff::step(Some(&state), "i", at(0), at(0), &now(0));
        }
        state
    }

    #[test]
    fn after_ten_calm_minutes_the_story_starts_anew() {
        let state = long_failing();
        assert_eq!(Backoff::remaining(Some(&state), "i", at(601), &now(601)), None);
        assert_eq!(
            Backoff::step(Some(&state), "i", at(601), at(601), &now(601)).delay(),
            FIRST
        );
        assert_eq!(
            Backoff::step(Some(&state), "i", at(600), at(600), &now(600)).delay(),
            LONGEST
        );
    }

    #[test]
    fn a_clock_that_is_set_is_no_calm() {
        let state = long_failing();
        // The clock was set five hours ahead after the last step; it failed twenty seconds after that step.
        let failed = at(18_020);
        let since = |then: Timestamp| {
            if then == failed {
                Duration::from_secs(1)
            } else {
                Duration::from_secs(21)
            }
        };
        assert_eq!(
            Backoff::remaining(Some(&state), "i", failed, &since),
            Some(LONGEST - Duration::from_secs(1))
        );
        assert_eq!(
            Backoff::step(Some(&state), "i", failed, failed, &since).delay(),
            LONGEST
        );
    }

    #[test]
    fn another_image_starts_anew() {
        let state = Backoff::step(None, "i", at(0), at(0), &now(0));
        assert_eq!(Backoff::remaining(Some(&state), "j", at(1), &now(1)), None);
    }
}
