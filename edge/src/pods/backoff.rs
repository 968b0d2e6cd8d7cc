//! Back-off as a kubelet does it: 10 s, doubled, at most 300 s, forgotten after calm.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// The first delay.
const FIRST: Duration = Duration::from_secs(10);
/// The longest delay.
const LONGEST: Duration = Duration::from_secs(300);

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
    /// How long to wait still, for a failure that happened at `failed`, since when `waited` has passed; `None` = go ahead.
    pub(crate) fn remaining(
        this: Option<&Self>,
        key: &str,
        failed: Timestamp,
        waited: Duration,
    ) -> Option<Duration> {
        let this = this.filter(|b| b.key == key && !b.expired(failed))?;
        this.delay.checked_sub(waited).filter(|d| !d.is_zero())
    }

    /// Takes note that another try is made now, after a failure at `failed`.
    pub(crate) fn step(this: Option<&Self>, key: &str, failed: Timestamp, now: Timestamp) -> Self {
        let delay = match this {
            Some(b) if b.key == key && !b.expired(failed) => (b.delay * 2).min(LONGEST),
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

    fn expired(&self, failed: Timestamp) -> bool {
        failed.duration_since(self.updated) > SignedDuration::from_secs(2 * LONGEST.as_secs().cast_signed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_000_000 + second).unwrap()
    }

    #[test]
    fn the_first_failure_waits_for_nothing_and_the_second_for_ten_seconds() {
        assert_eq!(Backoff::remaining(None, "i", at(0), Duration::from_secs(0)), None);
        let one = Backoff::step(None, "i", at(0), at(0));
        assert_eq!(
            Backoff::remaining(Some(&one), "i", at(5), Duration::from_secs(0)),
            Some(FIRST)
        );
        assert_eq!(
            Backoff::remaining(Some(&one), "i", at(5), Duration::from_secs(10)),
            None
        );
    }

    #[test]
    fn the_delay_doubles_up_to_five_minutes() {
        let mut state = None;
        let mut delays = Vec::new();
        for _ in 0..8 {
            let next = Backoff::step(state.as_ref(), "i", at(0), at(0));
            delays.push(next.delay().as_secs());
            state = Some(next);
        }
        assert_eq!(delays, [10, 20, 40, 80, 160, 300, 300, 300]);
    }

    #[test]
    fn after_ten_calm_minutes_the_story_starts_anew() {
        let mut state = Backoff::step(None, "i", at(0), at(0));
        for _ in 0..5 {
            state = Backoff::step(Some(&state), "i", at(0), at(0));
        }
        assert_eq!(
            Backoff::remaining(Some(&state), "i", at(601), Duration::from_secs(0)),
            None
        );
        assert_eq!(Backoff::step(Some(&state), "i", at(601), at(601)).delay(), FIRST);
        assert_eq!(
            Backoff::step(Some(&state), "i", at(600), at(600)).delay(),
            LONGEST
        );
    }

    #[test]
    fn another_image_starts_anew() {
        let state = Backoff::step(None, "i", at(0), at(0));
        assert_eq!(
            Backoff::remaining(Some(&state), "j", at(1), Duration::from_secs(0)),
            None
        );
    }
}
