//! Heartbeats, and the watch over the provider's answers: as often and as patient as the site's class asks for.

use std::time::Duration;

use skerry_proto::Class;
use skerry_proto::link::{Retime, Welcome};
use skerry_transport::{Handle, Lane, LifeSigns, Lines};
use tokio::time::Instant;

use super::{BulkPolicy, SessionError};

/// What the provider says of heartbeats, in Welcome or later.
#[derive(Clone, Copy)]
struct Timing {
    class: Class,
    period: Duration,
    deadline: Duration,
}

impl Timing {
    fn new(class: Class, heartbeat_millis: u32, deadline_millis: u32) -> Self {
        // A provider that asks for a heartbeat every 0 ms is mistaken.
        let period = Duration::from_millis(heartbeat_millis.into()).max(Duration::from_millis(100));
        let deadline = Duration::from_millis(deadline_millis.into()).max(period * 2);
        Self {
            class,
            period,
            deadline,
        }
    }

    fn of_welcome(welcome: &Welcome) -> Self {
        let class = welcome.class().into();
        Self::new(class, welcome.heartbeat_millis, welcome.deadline_millis)
    }

    fn life_signs(&self) -> LifeSigns {
        LifeSigns {
            ask_after: self.period,
            deadline: self.deadline,
        }
    }
}

/// Makes a connection of the session what the class asks for.
pub(super) fn note_line(lines: &Lines, lane: Lane, line: Option<Handle>, welcome: &Welcome) {
    let timing = Timing::of_welcome(welcome);
    if let Some(line) = line {
        lines.add(lane, line, timing.class, timing.life_signs());
    }
}

/// The same for bulk, as the daemon's settings want it.
pub(super) fn note_bulk(lines: &Lines, line: Option<Handle>, welcome: &Welcome, policy: &BulkPolicy) {
    if let (Some(line), Some(algorithm)) = (&line, &policy.congestion) {
        line.set_congestion(algorithm);
    }
    let unpaced = line.clone().filter(|_| !policy.paced);
    note_line(lines, Lane::Bulk, line, welcome);
    if let Some(line) = unpaced {
        line.set_unpaced();
    }
}

/// Heartbeats, and the watch over the provider's answers.
pub(super) struct Beats {
    timing: Timing,
    lines: Lines,
    next: Instant,
    last_heard: Instant,
    sent: Option<(u64, Instant)>,
    round_trip: Duration,
    seq: u64,
}

impl Beats {
    pub(super) fn new(welcome: &Welcome, lines: &Lines) -> Self {
        let now = Instant::now();
        let timing = Timing::of_welcome(welcome);
        Self {
            timing,
            lines: lines.clone(),
            next: now + timing.period,
            last_heard: now,
            sent: None,
            round_trip: Duration::ZERO,
            seq: 0,
        }
    }

    /// The site's class.
    pub(super) fn class(&self) -> Class {
        self.timing.class
    }

    /// The class has changed. The next heartbeat goes out at once, which tells the provider so.
    pub(super) fn retime(&mut self, retime: &Retime) {
        self.timing = Timing::new(
            retime.class().into(),
            retime.heartbeat_millis,
            retime.deadline_millis,
        );
        tracing::info!(class = %self.timing.class, heartbeat = ?self.timing.period, deadline = ?self.timing.deadline,
            "the site's class has changed");
        self.lines.set(self.timing.class, self.timing.life_signs());
        self.next = Instant::now();
    }

    /// When [`Beats::beat`] has something to do.
    pub(super) fn wake(&self) -> Instant {
        self.next.min(self.last_heard + self.timing.deadline)
    }

    /// The newest round trip, 0 before there was one.
    pub(super) fn round_trip_micros(&self) -> u64 {
        u64::try_from(self.round_trip.as_micros()).unwrap_or(u64::MAX)
    }

    pub(super) fn heard(&mut self) {
        self.last_heard = Instant::now();
    }

    /// The number of the heartbeat that is due, if one is, or the finding that the provider is silent.
    pub(super) fn beat(&mut self) -> Result<Option<u64>, SessionError> {
        let now = Instant::now();
        if now.duration_since(self.last_heard) >= self.timing.deadline {
            return Err(SessionError::Silent(self.timing.deadline));
        }
        if now < self.next {
            return Ok(None);
        }
        self.seq += 1;
        self.next = now + self.timing.period;
        self.sent = Some((self.seq, now));
        Ok(Some(self.seq))
    }

    /// The round trip of the newest heartbeat, if this acknowledges it.
    pub(super) fn acknowledged(&mut self, seq: u64) -> Option<Duration> {
        let (_, at) = self.sent.take_if(|(sent, _)| *sent == seq)?;
        self.round_trip = at.elapsed();
        tracing::debug!(class = %self.timing.class, micros = self.round_trip.as_micros(), "a heartbeat was acknowledged");
        Some(self.round_trip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn welcome() -> Welcome {
        Welcome {
            heartbeat_millis: 1_000,
            deadline_millis: 3_000,
            ..Default::default()
        }
    }

    fn beats() -> Beats {
        Beats::new(&welcome(), &Lines::default())
    }

    #[tokio::test(start_paused = true)]
    async fn a_provider_that_falls_silent_is_given_up_at_the_deadline_and_not_a_period_later() {
        let mut beats = beats();
        for expected in 1..=2 {
            tokio::time::sleep_until(beats.wake()).await;
            assert_eq!(beats.beat().unwrap(), Some(expected));
        }
        tokio::time::advance(Duration::from_millis(200)).await;
        beats.heard();
        let heard = Instant::now();
        let lost = loop {
            tokio::time::sleep_until(beats.wake()).await;
            if let Err(error) = beats.beat() {
                break error;
            }
        };
        assert!(matches!(lost, SessionError::Silent(_)));
        assert_eq!(heard.elapsed(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn any_message_counts_as_a_sign_of_life_and_an_ack_gives_the_round_trip() {
        let mut beats = beats();
        for _ in 0..10 {
            tokio::time::advance(Duration::from_secs(2)).await;
            let seq = beats.beat().unwrap().unwrap();
            tokio::time::advance(Duration::from_millis(40)).await;
            beats.heard();
            assert_eq!(beats.acknowledged(seq - 1), None);
            assert_eq!(beats.acknowledged(seq), Some(Duration::from_millis(40)));
            assert_eq!(beats.acknowledged(seq), None);
            assert_eq!(beats.round_trip_micros(), 40_000);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn another_class_takes_effect_with_a_heartbeat_at_once() {
        let mut beats = beats();
        assert_eq!(beats.class(), Class::Standard);
        beats.retime(&Retime {
            heartbeat_millis: 10_000,
            deadline_millis: 30_000,
            class: skerry_proto::link::Class::BestEffort.into(),
        });
        assert_eq!(beats.class(), Class::BestEffort);
        assert_eq!(beats.beat().unwrap(), Some(1));
        assert_eq!(beats.wake(), Instant::now() + Duration::from_secs(10));
        tokio::time::advance(Duration::from_secs(29)).await;
        assert!(beats.beat().is_ok());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(beats.beat().is_err());
    }
}
