//! Which thresholds hold, since when, and what that means now: a pure state machine.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::threshold::{Signal, Threshold};

/// What a signal shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// What is left.
    pub available: u64,
    /// What there is in all.
    pub capacity: u64,
}

/// All signals that could be read.
pub type Observations = BTreeMap<Signal, Observation>;

/// What runs short: the Node's conditions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    /// `MemoryPressure`.
    pub memory: bool,
    /// `DiskPressure`.
    pub disk: bool,
    /// `PIDPressure`.
    pub pids: bool,
}

/// A threshold that is crossed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Crossed {
    /// Which.
    pub threshold: Threshold,
    /// By what.
    pub observed: Observation,
}

impl Crossed {
    /// The value that it is below.
    pub fn limit(&self) -> u64 {
        self.threshold.below.of(self.observed.capacity)
    }
}

/// Remembers what was crossed when.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Thresholds that are crossed, by their place in the list, and since when.
    since: BTreeMap<usize, Instant>,
    /// Thresholds whose grace was over at the last look: they hold until enough is reclaimed.
    driving: Vec<usize>,
    /// When each condition was last seen.
    seen: BTreeMap<Condition, Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Condition {
    Memory,
    Disk,
    Pids,
}

fn condition(signal: Signal) -> Condition {
    match signal {
        Signal::MemoryAvailable => Condition::Memory,
        Signal::PidAvailable => Condition::Pids,
        _ => Condition::Disk,
    }
}

/// Whether a threshold is crossed; `resolving` asks for the minimum reclaim on top.
pub(super) fn crosses(threshold: &Threshold, observed: Observation, resolving: bool) -> bool {
    let mut limit = threshold.below.of(observed.capacity);
    if resolving {
        limit = limit.saturating_add(threshold.reclaim.of(observed.capacity));
    }
    observed.available < limit
}

impl State {
    /// Takes a look into account. Answers the conditions, which are held for `hold` after they were last seen, and
    /// the thresholds whose grace is over, the most urgent first.
    pub(super) fn update(
        &mut self,
        thresholds: &[Threshold],
        observations: &Observations,
        hold: Duration,
        now: Instant,
    ) -> (Pressure, Vec<Crossed>) {
        let mut crossed = BTreeMap::new();
        for (place, threshold) in thresholds.iter().enumerate() {
            // What cannot be read is not crossed.
            let Some(observed) = observations.get(&threshold.signal) else {
                continue;
            };
            let resolving = self.driving.contains(&place);
            if crosses(threshold, *observed, resolving) {
                let found = Crossed {
                    threshold: *threshold,
                    observed: *observed,
                };
                crossed.insert(place, found);
            }
        }
        self.since.retain(|place, _| crossed.contains_key(place));
        for (place, found) in &crossed {
            self.since.entry(*place).or_insert(now);
            self.seen.insert(condition(found.threshold.signal), now);
        }
        self.seen
            .retain(|_, seen| now.duration_since(*seen) < hold || *seen == now);
        let pressure = Pressure {
            memory: self.seen.contains_key(&Condition::Memory),
            disk: self.seen.contains_key(&Condition::Disk),
            pids: self.seen.contains_key(&Condition::Pids),
        };
        let over = |place: &usize, found: &Crossed| {
            let since = self.since.get(place).copied().unwrap_or(now);
            now.duration_since(since) >= found.threshold.grace
        };
        let due: Vec<(usize, Crossed)> = crossed
            .into_iter()
            .filter(|(place, found)| over(place, found))
            .collect();
        self.driving = due.iter().map(|(place, _)| *place).collect();
        let mut due: Vec<Crossed> = due.into_iter().map(|(_, found)| found).collect();
        // Of one signal the hard threshold counts: it allows less grace.
        due.sort_by_key(|found| (found.threshold.signal, !found.threshold.is_hard()));
        (pressure, due)
    }
}

#[cfg(test)]
mod tests {
    use super::super::threshold::Amount;
    use super::*;

    const HOLD: Duration = Duration::from_secs(300);

    fn threshold(signal: Signal, below: u64, grace: u64, reclaim: u64) -> Threshold {
        Threshold {
            signal,
            below: Amount::Absolute(below),
            grace: Duration::from_secs(grace),
            reclaim: Amount::Absolute(reclaim),
        }
    }

    fn memory(available: u64) -> Observations {
        let observed = Observation {
            available,
            capacity: 1000,
        };
        [(Signal::MemoryAvailable, observed)].into()
    }

    #[tokio::test(start_paused = true)]
    async fn a_condition_is_held_for_a_while_after_it_was_last_seen() {
        let mut state = State::default();
        let all = [threshold(Signal::MemoryAvailable, 100, 0, 0)];
        let mut look = async |available, after| {
            tokio::time::advance(Duration::from_secs(after)).await;
            let (pressure, due) = state.update(&all, &memory(available), HOLD, Instant::now());
            (pressure.memory, due.len())
        };
        assert_eq!(look(100, 0).await, (false, 0));
        assert_eq!(look(99, 10).await, (true, 1));
        assert_eq!(look(500, 10).await, (true, 0));
        assert_eq!(look(500, 289).await, (true, 0));
        assert_eq!(look(500, 1).await, (false, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_soft_threshold_acts_when_it_was_crossed_for_its_grace_without_a_break() {
        let mut state = State::default();
        let all = [threshold(Signal::MemoryAvailable, 100, 30, 0)];
        let mut look = async |available, after| {
            tokio::time::advance(Duration::from_secs(after)).await;
            let (pressure, due) = state.update(&all, &memory(available), HOLD, Instant::now());
            (pressure.memory, due.len())
        };
        assert_eq!(look(50, 0).await, (true, 0));
        assert_eq!(look(50, 29).await, (true, 0));
        assert_eq!(look(150, 1).await, (true, 0));
        assert_eq!(look(50, 1).await, (true, 0));
        assert_eq!(look(50, 30).await, (true, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn once_it_acts_the_minimum_reclaim_must_be_reached() {
        let mut state = State::default();
        let all = [threshold(Signal::MemoryAvailable, 100, 0, 50)];
        let mut due = |available| {
            state
                .update(&all, &memory(available), HOLD, Instant::now())
                .1
                .len()
        };
        assert_eq!(due(120), 0);
        assert_eq!(due(99), 1);
        assert_eq!(due(120), 1);
        assert_eq!(due(150), 0);
        assert_eq!(due(120), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn memory_comes_first_and_what_is_not_seen_is_not_crossed() {
        let mut state = State::default();
        let all = [
            threshold(Signal::PidAvailable, 100, 0, 0),
            threshold(Signal::NodeFsAvailable, 100, 0, 0),
            threshold(Signal::MemoryAvailable, 100, 0, 0),
        ];
        let low = Observation {
            available: 1,
            capacity: 1000,
        };
        let mut seen = memory(1);
        seen.insert(Signal::PidAvailable, low);
        let (pressure, due) = state.update(&all, &seen, HOLD, Instant::now());
        let signals: Vec<Signal> = due.iter().map(|c| c.threshold.signal).collect();
        assert_eq!(signals, [Signal::MemoryAvailable, Signal::PidAvailable]);
        assert!(pressure.memory && pressure.pids && !pressure.disk);
    }
}
