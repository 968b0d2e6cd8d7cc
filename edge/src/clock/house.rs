//! A wall clock that remembers when it was set.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::Clock;
use crate::identity::TrustedTime;
use crate::store::{Store, StoreError};

/// A change of the wall clock against the steady one that is a jump; less is what a clock's discipline does.
const JUMP: SignedDuration = SignedDuration::from_secs(2);
/// Most settings that are remembered of one boot; the oldest are forgotten.
const MOST: usize = 64;
/// Where they are kept.
const ROOM: &str = "clock";
const RECORD: &str = "settings";

/// The clock of the daemon's rooms: the system's, with durations that survive its being set.
///
/// It notes how far the wall clock is ahead of the steady one. While that stays the same a timestamp belongs to that
/// *setting*; after a jump another one begins. A timestamp is found back in the setting in which it was made, so the time
/// since then is told by the steady clock alone. Settings are kept in the store, so that this holds over a restart of the
/// daemon; a restart of the machine begins anew, and then only the wall clock can tell.
pub struct HouseClock {
    base: Arc<dyn Clock>,
    time: Arc<TrustedTime>,
    settings: Mutex<Vec<Setting>>,
    keep: Keep,
}

/// Writes the settings down.
type Keep = Box<dyn Fn(&[Setting]) + Send + Sync>;

/// How the wall clock stands against the steady one, from some moment of the steady clock on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Setting {
    /// Steady milliseconds.
    from: i64,
    /// Wall milliseconds since 1970 at steady zero.
    zero: i64,
}

/// What is in the store: settings of that boot.
#[derive(Serialize, Deserialize)]
struct Kept {
    boot: String,
    settings: Vec<Setting>,
}

impl HouseClock {
    /// Goes on with what the store knows of this boot.
    pub fn stored(
        store: &Store,
        boot: &str,
        base: Arc<dyn Clock>,
        time: Arc<TrustedTime>,
    ) -> Result<Self, StoreError> {
        let kept: Option<Kept> = store.state_get(ROOM, RECORD)?;
        let known = kept.filter(|kept| kept.boot == boot && !boot.is_empty());
        let (store, boot) = (store.clone(), boot.to_owned());
        let settings = known.map(|kept| kept.settings).unwrap_or_default();
        Ok(Self::new(base, time, settings, move |settings| {
            let record = Kept {
                boot: boot.clone(),
                settings: settings.to_vec(),
            };
            if let Err(error) = store.queue_state(ROOM, RECORD, &record) {
                tracing::warn!(%error, "that the clock was set is not kept");
            }
        }))
    }

    fn new(
        base: Arc<dyn Clock>,
        time: Arc<TrustedTime>,
        settings: Vec<Setting>,
        keep: impl Fn(&[Setting]) + Send + Sync + 'static,
    ) -> Self {
        let clock = Self {
            base,
            time,
            settings: Mutex::new(settings),
            keep: Box::new(keep),
        };
        drop(clock.look());
        clock
    }

    /// Reads both clocks and notes a jump. Answers the wall clock, the steady milliseconds and the settings.
    fn look(&self) -> (Timestamp, i64, std::sync::MutexGuard<'_, Vec<Setting>>) {
        let mut settings = self.settings.lock().unwrap_or_else(PoisonError::into_inner);
        let wall = self.base.now();
        let steady = millis(self.base.steady());
        let zero = wall.as_millisecond() - steady;
        let jump = settings.last().map(|last| zero - last.zero);
        if jump.is_none_or(|jump| jump.unsigned_abs() >= JUMP.unsigned_abs().as_millis() as u64) {
            if let Some(jump) = jump {
                tracing::warn!(
                    seconds = jump / 1_000,
                    "the machine's clock was set; what is timed goes on as before"
                );
            }
            settings.push(Setting { from: steady, zero });
            let surplus = settings.len().saturating_sub(MOST);
            settings.drain(..surplus);
            (self.keep)(&settings);
        }
        (wall, steady, settings)
    }
}

impl Clock for HouseClock {
    fn now(&self) -> Timestamp {
        self.look().0
    }

    fn steady(&self) -> Duration {
        self.base.steady()
    }

    fn elapsed(&self, then: Timestamp) -> Duration {
        let (_, steady, settings) = self.look();
        Duration::from_millis(since(&settings, steady, then.as_millisecond()))
    }

    fn cloud(&self) -> Timestamp {
        self.time.now()
    }
}

/// Milliseconds since the wall clock showed `then`, by settings that are ordered and cover the time up to `now`.
fn since(settings: &[Setting], now: i64, then: i64) -> u64 {
    let mut end = now;
    for (index, setting) in settings.iter().enumerate().rev() {
        let at = then - setting.zero;
        // Before the first setting nothing is known: the clock is taken to have been right.
        let begun = index == 0 || at >= setting.from;
        // Of a clock that drifts, the end of one setting and the begin of the next differ by less than a jump.
        if begun && at <= end + JUMP.as_millis() as i64 {
            return u64::try_from(now - at).unwrap_or(0);
        }
        end = setting.from;
    }
    // A moment that no clock of this machine has shown.
    settings
        .last()
        .map_or(0, |last| u64::try_from(now + last.zero - then).unwrap_or(0))
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::testing::Hand;

    const SECOND: Duration = Duration::from_secs(1);
    const MINUTE: Duration = Duration::from_secs(60);

    fn stamp(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn house(hand: &Arc<Hand>) -> HouseClock {
        let time = Arc::new(TrustedTime::new(
            hand.clone(),
            stamp("2026-01-01T00:00:00Z"),
            None,
            |_| {},
        ));
        HouseClock::new(hand.clone(), time, Vec::new(), |_| {})
    }

    #[test]
    fn durations_survive_a_clock_that_is_set_ahead_and_back() {
        let hand = Hand::at("2026-03-01T10:00:00Z");
        let clock = house(&hand);
        let start = clock.now();
        hand.pass(3 * MINUTE);
        hand.set("2026-03-01T13:05:00Z");
        assert_eq!(clock.elapsed(start), 3 * MINUTE);
        let later = clock.now();
        hand.pass(MINUTE);
        assert_eq!((clock.elapsed(start), clock.elapsed(later)), (4 * MINUTE, MINUTE));
        hand.set("1970-01-01T00:00:00Z");
        hand.pass(MINUTE);
        assert_eq!(
            (clock.elapsed(start), clock.elapsed(later)),
            (5 * MINUTE, 2 * MINUTE)
        );
        assert_eq!(clock.elapsed(clock.now()), Duration::ZERO);
    }

    #[test]
    fn what_was_before_the_start_counts_by_the_wall_clock_and_the_future_not_at_all() {
        let hand = Hand::at("2026-03-01T10:00:00Z");
        let clock = house(&hand);
        assert_eq!(clock.elapsed(stamp("2026-03-01T09:59:00Z")), MINUTE);
        assert_eq!(clock.elapsed(stamp("2026-03-01T10:05:00Z")), Duration::ZERO);
        hand.set("2026-03-01T20:00:00Z");
        assert_eq!(clock.elapsed(stamp("2026-03-01T09:59:00Z")), MINUTE);
    }

    #[test]
    fn a_clock_that_drifts_or_is_slewed_is_followed() {
        let hand = Hand::at("2026-03-01T10:00:00Z");
        let clock = house(&hand);
        for _ in 0..10 {
            hand.pass(MINUTE);
            hand.set(&(hand.now() - SignedDuration::from_millis(900)).to_string());
            let seen = clock.elapsed(clock.now());
            assert!(seen <= 2 * SECOND, "{seen:?}");
        }
        let seen = clock.elapsed(stamp("2026-03-01T10:00:00Z"));
        assert!(seen.abs_diff(10 * MINUTE) <= 2 * SECOND, "{seen:?}");
    }

    #[test]
    fn a_daemon_that_starts_again_remembers_how_the_clock_was_set_in_this_boot_alone() {
        let dir = tempfile::tempdir().unwrap();
        let hand = Hand::at("2026-03-01T10:00:00Z");
        let time = || {
            let issued = stamp("2026-01-01T00:00:00Z");
            Arc::new(TrustedTime::new(hand.clone(), issued, None, |_| {}))
        };
        let open = |boot: &str| {
            let store = Store::open(dir.path()).unwrap();
            HouseClock::stored(&store, boot, hand.clone(), time()).unwrap()
        };
        let clock = open("a");
        let start = clock.now();
        drop(clock);
        hand.pass(MINUTE);
        hand.set("2026-03-01T15:00:00Z");
        let clock = open("a");
        assert_eq!(clock.elapsed(start), MINUTE);
        drop(clock);
        // After a restart of the machine, nobody knows better than the clock.
        let clock = open("b");
        assert_eq!(clock.elapsed(start), 300 * MINUTE);
    }

    #[test]
    fn the_settings_of_a_clock_that_is_set_all_the_time_are_bounded() {
        let hand = Hand::at("2026-03-01T10:00:00Z");
        let clock = house(&hand);
        for hour in 0..500 {
            hand.set(&(stamp("2026-03-01T10:00:00Z") + SignedDuration::from_hours(hour)).to_string());
            clock.now();
        }
        assert_eq!(clock.settings.lock().unwrap().len(), MOST);
    }
}
