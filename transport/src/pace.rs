//! How much bulk data may be under way: as much as makes the line's queue no longer than a target.
//!
//! TCP alone fills whatever queue the bottleneck has, and a heartbeat that comes behind it waits: at 256 kbit/s each
//! 6.4 kB is 200 ms. So the window of a bulk connection follows the delay that its own segments see beyond the bare
//! round trip: it grows while that is short of [`TARGET`] and shrinks beyond it. Without a queue it grows as TCP does, so that a fast line is
//! used whole. It is never less than two segments: one would wait for the peer's delayed acknowledgement.
//!
//! Source: LEDBAT (RFC 6817), with the kernel's smoothed and least round trips for its delays (they are of the two ways
//! together, which for a life sign with its answer is what counts), and a multiplicative decrease as in LEDBAT++.

use std::time::Duration;

use tokio::time::Instant;

use crate::TcpInfo;

/// The delay that bulk may add to the line.
pub const TARGET: Duration = Duration::from_millis(60);

/// The window before anything was measured: some segments, as TCP starts with.
const FIRST: u64 = 14_000;
/// Beyond this TCP's own window decides.
const MOST: u64 = 16 * 1024 * 1024;
/// Least segments under way.
const LEAST_SEGMENTS: u64 = 2;

/// The window of one connection.
#[derive(Debug)]
pub struct Pacer {
    /// Bytes that may be under way.
    window: u64,
    /// No queue was seen yet: the window doubles with each round trip.
    starting: bool,
    /// `acknowledged` of the sample before.
    acknowledged: u64,
    /// The window shrinks once in a round trip at most.
    shrunk: Option<Instant>,
}

impl Default for Pacer {
    fn default() -> Self {
        Self {
            window: FIRST,
            starting: true,
            acknowledged: 0,
            shrunk: None,
        }
    }
}

impl Pacer {
    /// How many bytes may be written now. 0: ask again after [`pause`].
    pub fn admit(&mut self, info: &TcpInfo, now: Instant) -> u64 {
        let segment = u64::from(info.segment.max(1));
        let news = info.acknowledged.saturating_sub(self.acknowledged);
        self.acknowledged = info.acknowledged;
        let delay = info.rtt.saturating_sub(info.min_rtt);
        // A window that is not used says nothing of the line.
        let used = (info.under_way + news) * 2 >= self.window;
        if delay > TARGET {
            self.starting = false;
            if self.shrunk.is_none_or(|at| now.duration_since(at) >= info.rtt) {
                self.shrunk = Some(now);
                let beyond = (delay - TARGET).as_secs_f64() / TARGET.as_secs_f64();
                self.scale(1.0 - (beyond * 0.25).min(0.5));
            }
        } else if used && self.starting && delay < TARGET / 2 {
            self.window += news;
        } else if used {
            self.starting = false;
            let short = 1.0 - delay.as_secs_f64() / TARGET.as_secs_f64();
            #[allow(
                clippy::cast_precision_loss,
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss
            )]
            {
                self.window += (short * news as f64 * segment as f64 / self.window.max(1) as f64) as u64;
            }
        }
        self.window = self
            .window
            .clamp(LEAST_SEGMENTS * segment, MOST.max(LEAST_SEGMENTS * segment));
        self.window.saturating_sub(info.under_way)
    }

    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss
    )]
    fn scale(&mut self, by: f64) {
        self.window = (self.window as f64 * by) as u64;
    }
}

/// How long to wait before asking again: a part of a round trip, so that the line does not fall idle.
pub fn pause(info: &TcpInfo) -> Duration {
    (info.rtt / 8).clamp(Duration::from_millis(1), Duration::from_millis(20))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line with a first-in, first-out queue, as the pacer sees it.
    struct Line {
        bytes_per_second: u64,
        bare: Duration,
        queued: f64,
        acknowledged: u64,
        rtt: Duration,
    }

    const STEP: Duration = Duration::from_millis(5);

    impl Line {
        fn run(&mut self, pacer: &mut Pacer, now: Instant) {
            let info = TcpInfo {
                rtt: self.rtt,
                min_rtt: self.bare,
                segment: 1448,
                under_way: self.queued as u64,
                acknowledged: self.acknowledged,
            };
            self.queued += pacer.admit(&info, now) as f64;
            // What fits on the line without waiting is under way, too.
            let out = (self.bytes_per_second as f64 * STEP.as_secs_f64()).min(self.queued);
            self.queued -= out;
            self.acknowledged += out as u64;
            let inherent = self.bare.as_secs_f64() * self.bytes_per_second as f64;
            let wait = (self.queued - inherent).max(0.0) / self.bytes_per_second as f64;
            let seen = self.bare + Duration::from_secs_f64(wait);
            self.rtt = (self.rtt * 7 + seen) / 8;
        }
    }

    fn settled(bytes_per_second: u64, bare: Duration, seconds: u64) -> (Line, Pacer) {
        let mut line = Line {
            bytes_per_second,
            bare,
            queued: 0.0,
            acknowledged: 0,
            rtt: bare,
        };
        let mut pacer = Pacer::default();
        let start = Instant::now();
        for step in 0..seconds * 200 {
            line.run(&mut pacer, start + STEP * u32::try_from(step).unwrap());
        }
        (line, pacer)
    }

    #[tokio::test(start_paused = true)]
    async fn a_narrow_line_keeps_a_queue_near_the_target() {
        // 256 kbit/s.
        let (line, pacer) = settled(32_000, Duration::from_millis(20), 30);
        let delay = line.rtt - line.bare;
        assert!(delay < Duration::from_millis(110), "{delay:?} {pacer:?}");
        // And the line is in use.
        assert!(line.acknowledged > 32_000 * 30 * 8 / 10, "{}", line.acknowledged);
    }

    #[tokio::test(start_paused = true)]
    async fn a_fast_line_is_used() {
        let (line, pacer) = settled(12_500_000, Duration::from_millis(50), 30);
        assert!(
            line.acknowledged > 12_500_000 * 30 * 7 / 10,
            "{} {pacer:?}",
            line.acknowledged
        );
    }

    #[test]
    fn two_segments_are_always_allowed() {
        let mut pacer = Pacer::default();
        let info = TcpInfo {
            rtt: Duration::from_secs(3),
            min_rtt: Duration::from_millis(10),
            segment: 1448,
            under_way: 0,
            acknowledged: 0,
        };
        let now = Instant::now();
        for round in 0..100 {
            assert!(pacer.admit(&info, now + Duration::from_secs(3) * round) >= 2 * 1448);
        }
        assert_eq!(pacer.admit(&info, now), 2 * 1448);
    }
}
