//! What time it is, as far as certificates are concerned, on a machine whose clock may be wrong.
//!
//! A site's clock may stand at 1970 (a dead battery) or years ahead, and nobody comes by to set it. Three sources say
//! more than it does:
//! * **Attested time**: the provider tells its clock in every Welcome, over a connection whose certificates were checked.
//!   From then on time is counted by the machine's steady clock, whatever is done to the wall clock, until the machine
//!   restarts.
//! * **The floor**: the latest attested time is kept in the store, and the site's own certificate says when it was made. It
//!   cannot be earlier than that.
//! * **Proof of freshness**: a certificate that the CA has just signed for a key that was made a moment ago. Only the holder
//!   of the CA's key can do that, so an old certificate of the provider that somebody has stolen does not help him.
//!
//! Without attested time the local clock counts, but never less than the floor. When it lies before the floor, or when it
//! contradicts the provider's certificate, it is in doubt: no session is begun before a renewal has proven the time.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustls::pki_types::UnixTime;
use rustls::time_provider::TimeProvider;

use super::Identity;
use crate::clock::Clock;
use crate::store::{Store, StoreError};

/// A clock may be this far behind the floor before it is called wrong: clocks are set by small steps, too.
const TOLERANCE: SignedDuration = SignedDuration::from_mins(5);
/// The attested time is kept on disk when it has moved this far.
const KEEP: SignedDuration = SignedDuration::from_mins(10);
/// Where the attested time is kept, seconds since 1970.
const ROOM: &str = "identity";
const RECORD: &str = "attested-time";

/// Why the local clock is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Doubt {
    /// It lies before a time that has certainly passed.
    #[error(
        "this machine's clock says {local}, but it was {floor} already; the site's certificate is renewed first, which proves the time"
    )]
    Behind {
        /// What it says.
        local: Timestamp,
        /// What has passed.
        floor: Timestamp,
    },
    /// By it, the provider's certificate would be out of its time.
    #[error(
        "by this machine's clock ({local}) the provider's certificate is out of its time; the site's certificate is renewed first, which proves the time"
    )]
    Contradicted {
        /// What it says.
        local: Timestamp,
    },
}

/// Time for certificates. Shared by all who dial.
pub struct TrustedTime {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    keep: Box<dyn Fn(Timestamp) + Send + Sync>,
}

struct State {
    floor: Timestamp,
    anchor: Option<Anchor>,
    contradicted: bool,
    kept: Option<Timestamp>,
}

/// Attested time, and what the steady clock said then.
struct Anchor {
    time: Timestamp,
    steady: Duration,
}

impl TrustedTime {
    /// Time that is at least `issued`, when the site's own certificate was made, and at least `kept`, what an earlier
    /// run has given to `keep`, which must not block.
    pub fn new(
        clock: Arc<dyn Clock>,
        issued: Timestamp,
        kept: Option<Timestamp>,
        keep: impl Fn(Timestamp) + Send + Sync + 'static,
    ) -> Self {
        Self {
            clock,
            state: Mutex::new(State {
                floor: kept.map_or(issued, |kept| kept.max(issued)),
                anchor: None,
                contradicted: false,
                kept,
            }),
            keep: Box::new(keep),
        }
    }

    /// Time of a site with that identity and store; the store also keeps what is learnt.
    pub fn stored(store: &Store, identity: &Identity, clock: Arc<dyn Clock>) -> Result<Self, StoreError> {
        let kept: Option<i64> = store.state_get(ROOM, RECORD)?;
        let kept = kept.and_then(|seconds| Timestamp::from_second(seconds).ok());
        let store = store.clone();
        Ok(Self::new(clock, identity.not_before, kept, move |time| {
            // On disk a little later; the floor need not be exact.
            if let Err(error) = store.queue_state(ROOM, RECORD, &time.as_second()) {
                tracing::warn!(%error, "the time of the last contact with the provider is not kept");
            }
        }))
    }

    /// The best that is known.
    pub fn now(&self) -> Timestamp {
        let state = self.state();
        match &state.anchor {
            Some(anchor) => {
                let passed = self.clock.steady().saturating_sub(anchor.steady);
                let passed = SignedDuration::try_from(passed).unwrap_or(SignedDuration::MAX);
                anchor.time.saturating_add(passed).unwrap_or(Timestamp::MAX)
            }
            None => self.clock.now().max(state.floor),
        }
    }

    /// Why the time must be proven before it is relied on; `None` when it need not.
    pub fn doubt(&self) -> Option<Doubt> {
        let local = self.clock.now();
        let state = self.state();
        if state.contradicted {
            return Some(Doubt::Contradicted { local });
        }
        let behind = local.saturating_add(TOLERANCE).unwrap_or(Timestamp::MAX) < state.floor;
        (state.anchor.is_none() && behind).then_some(Doubt::Behind {
            local,
            floor: state.floor,
        })
    }

    /// Takes the time from who has proven to know it. Ends every doubt; may also go back.
    pub fn attest(&self, time: Timestamp) {
        let keep = {
            let mut state = self.state();
            state.anchor = Some(Anchor {
                time,
                steady: self.clock.steady(),
            });
            state.floor = time;
            state.contradicted = false;
            let moved = state
                .kept
                .is_none_or(|kept| time.duration_since(kept).abs() >= KEEP);
            if moved {
                state.kept = Some(time);
            }
            moved
        };
        if keep {
            (self.keep)(time);
        }
    }

    /// Notes that the provider's certificate would be out of its time.
    pub fn contradict(&self) {
        self.state().contradicted = true;
    }

    /// How far the local clock is ahead of attested time, negative when it is behind; `None` before the first
    /// attestation since the daemon's start.
    pub fn skew(&self) -> Option<SignedDuration> {
        self.state().anchor.as_ref()?;
        Some(self.clock.now().duration_since(self.now()))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for TrustedTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustedTime({})", self.now())
    }
}

impl TimeProvider for TrustedTime {
    fn current_time(&self) -> Option<UnixTime> {
        let seconds = u64::try_from(self.now().as_second()).ok()?;
        Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Hand;
    use super::*;

    fn stamp(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    const HOUR: Duration = Duration::from_secs(3_600);

    #[test]
    fn a_clock_before_the_floor_is_in_doubt_and_the_floor_counts() {
        let clock = Hand::at("1970-01-01T00:00:10Z");
        let time = TrustedTime::new(
            clock.clone(),
            stamp("2026-01-01T00:00:00Z"),
            Some(stamp("2026-02-01T00:00:00Z")),
            |_| {},
        );
        assert_eq!(time.now(), stamp("2026-02-01T00:00:00Z"));
        assert!(matches!(time.doubt(), Some(Doubt::Behind { .. })));
        assert_eq!(time.skew(), None);
        time.attest(stamp("2026-03-01T00:00:00Z"));
        assert_eq!(time.doubt(), None);
        clock.pass(HOUR);
        assert_eq!(time.now(), stamp("2026-03-01T01:00:00Z"));
    }

    #[test]
    fn a_clock_that_is_a_little_behind_or_right_is_believed() {
        let clock = Hand::at("2026-01-31T23:58:00Z");
        let time = TrustedTime::new(
            clock.clone(),
            stamp("2026-01-01T00:00:00Z"),
            Some(stamp("2026-02-01T00:00:00Z")),
            |_| {},
        );
        assert_eq!(time.doubt(), None);
        clock.pass(HOUR);
        assert_eq!(time.now(), clock.now());
    }

    #[test]
    fn after_an_attestation_a_wall_clock_that_jumps_changes_nothing_but_the_skew() {
        let clock = Hand::at("2026-01-01T00:00:00Z");
        let time = TrustedTime::new(clock.clone(), stamp("2026-01-01T00:00:00Z"), None, |_| {});
        time.attest(stamp("2026-01-01T00:00:02Z"));
        for jump in ["2031-01-01T00:00:00Z", "1970-01-01T00:00:00Z"] {
            clock.set(jump);
            assert_eq!(time.now(), stamp("2026-01-01T00:00:02Z"));
            assert_eq!(time.doubt(), None);
            let skew = stamp(jump).duration_since(stamp("2026-01-01T00:00:02Z"));
            assert_eq!(time.skew(), Some(skew));
        }
    }

    #[test]
    fn a_contradiction_lasts_until_the_time_is_proven_even_if_it_goes_back() {
        let clock = Hand::at("2040-01-01T00:00:00Z");
        let time = TrustedTime::new(clock, stamp("2026-01-01T00:00:00Z"), None, |_| {});
        assert_eq!(time.doubt(), None);
        time.contradict();
        assert!(matches!(time.doubt(), Some(Doubt::Contradicted { .. })));
        time.attest(stamp("2026-03-01T00:00:00Z"));
        assert_eq!(time.doubt(), None);
        assert_eq!(time.now(), stamp("2026-03-01T00:00:00Z"));
    }

    #[test]
    fn attested_time_is_kept_seldom() {
        let kept = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&kept);
        let clock = Hand::at("2026-01-01T00:00:00Z");
        let time = TrustedTime::new(clock, stamp("2026-01-01T00:00:00Z"), None, move |time| {
            into.lock().unwrap().push(time);
        });
        for text in [
            "2026-01-01T00:00:00Z",
            "2026-01-01T00:09:59Z",
            "2026-01-01T00:10:00Z",
        ] {
            time.attest(stamp(text));
        }
        assert_eq!(
            *kept.lock().unwrap(),
            [stamp("2026-01-01T00:00:00Z"), stamp("2026-01-01T00:10:00Z")]
        );
    }
}
