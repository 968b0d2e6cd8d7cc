//! One physical bus: its connection, and its devices' turns.
//!
//! Every point has its own due time. When some are due, the device's due points are read in one batch; a device that
//! falls behind skips samples instead of hurrying. When the connection fails it is closed and opened anew, with a
//! jittered wait from [`RETRY_FIRST`] to [`RETRY_MOST`], so that unplugging and plugging in both show within seconds.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rand::Rng;
use skerry_proto::device::{DeviceState, QualityReason};
use skerry_proto::object::Uid;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::drivers::{Batch, BusError, Driver};
use super::shadow::Shadow;
use super::{Assigned, Deps, numeric};

/// Wait after the first failure.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest wait between two attempts.
const RETRY_MOST: Duration = Duration::from_secs(10);

/// A device's turn.
struct Turn {
    assigned: Arc<Assigned>,
    shadow: Shadow,
    /// When each point is due, in the order of the plan.
    due: Vec<Instant>,
}

/// The connection.
enum Line {
    /// Open.
    Up,
    /// Closed; not to be opened before `retry_at`.
    Down {
        retry_at: Instant,
        /// The wait that led to `retry_at`, before jitter.
        wait: Duration,
    },
}

pub(crate) struct Bus {
    deps: Deps,
    driver: Box<dyn Driver>,
    devices: watch::Receiver<Vec<Arc<Assigned>>>,
    turns: HashMap<Uid, Turn>,
    line: Line,
}

impl Bus {
    pub(crate) fn new(
        deps: Deps,
        driver: Box<dyn Driver>,
        mut devices: watch::Receiver<Vec<Arc<Assigned>>>,
    ) -> Self {
        devices.mark_changed();
        Self {
            deps,
            driver,
            devices,
            turns: HashMap::new(),
            line: Line::Down {
                retry_at: Instant::now(),
                wait: Duration::ZERO,
            },
        }
    }

    /// Runs until `stop`, or until the room has no device for this bus any more.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        loop {
            let next = self.next_due();
            tokio::select! {
                () = stop.cancelled() => break,
                changed = self.devices.changed() => match changed {
                    Ok(()) => self.adopt().await,
                    Err(_) => break,
                },
                () = sleep_until(next) => tokio::select! {
                    () = stop.cancelled() => break,
                    () = self.poll() => {}
                },
            }
        }
        self.driver.close().await;
    }

    fn next_due(&self) -> Instant {
        let far = Instant::now() + Duration::from_secs(3600);
        let due = self
            .turns
            .values()
            .flat_map(|turn| turn.due.iter().copied())
            .min()
            .unwrap_or(far);
        match &self.line {
            Line::Up => due,
            Line::Down { retry_at, .. } => due.max(*retry_at),
        }
    }

    async fn adopt(&mut self) {
        let wanted = self.devices.borrow_and_update().clone();
        let mut old = std::mem::take(&mut self.turns);
        for assigned in wanted {
            let uid = assigned.object.uid.clone();
            let known = old.remove(&uid);
            if let Some(turn) = known {
                if turn.assigned.plan == assigned.plan && turn.assigned.generation == assigned.generation {
                    self.turns.insert(uid, Turn { assigned, ..turn });
                    continue;
                }
                self.insert(assigned, turn.shadow);
            } else {
                let shadow = Shadow::load(&self.deps, &assigned.object).await;
                self.insert(assigned, shadow);
            }
        }
    }

    fn insert(&mut self, assigned: Arc<Assigned>, mut shadow: Shadow) {
        shadow.adopt(
            &assigned.object,
            assigned.generation,
            &assigned.plan,
            self.deps.clock.now(),
        );
        let due = vec![Instant::now(); assigned.plan.points.len()];
        let uid = assigned.object.uid.clone();
        self.turns.insert(
            uid,
            Turn {
                assigned,
                shadow,
                due,
            },
        );
    }

    /// Gives every device that is due its turn.
    async fn poll(&mut self) {
        let now = Instant::now();
        let mut waiting: Vec<(Instant, Uid)> = self
            .turns
            .iter()
            .filter_map(|(uid, turn)| Some((turn.due.iter().copied().min()?, uid.clone())))
            .filter(|(due, _)| *due <= now)
            .collect();
        waiting.sort();
        for (_, uid) in waiting {
            if !self.connected().await {
                return;
            }
            self.read(&uid).await;
        }
    }

    /// Opens the connection when it is closed and its time has come.
    async fn connected(&mut self) -> bool {
        let Line::Down { retry_at, wait } = self.line else {
            return true;
        };
        if Instant::now() < retry_at {
            return false;
        }
        match self.driver.connect().await {
            Ok(()) => {
                self.line = Line::Up;
                true
            }
            Err(error) => {
                self.line = retry_after(wait);
                self.all_failed(&error).await;
                false
            }
        }
    }

    async fn all_failed(&mut self, error: &BusError) {
        let now = self.deps.clock.now();
        for turn in self.turns.values_mut() {
            turn.shadow.failed(error, DeviceState::Disconnected, now);
            turn.shadow.report_if_due(&self.deps).await;
        }
    }

    async fn read(&mut self, uid: &Uid) {
        let Some(turn) = self.turns.get_mut(uid) else {
            return;
        };
        let now = Instant::now();
        let plan = &turn.assigned.plan;
        let due: Vec<usize> = (0..turn.due.len()).filter(|&i| turn.due[i] <= now).collect();
        for &index in &due {
            let interval = plan.points[index].interval;
            turn.due[index] = (turn.due[index] + interval).max(now + interval / 2);
        }
        let batch = Batch {
            unit: plan.unit,
            timeout: plan.timeout,
            addresses: due.iter().map(|&i| plan.points[i].address).collect(),
        };
        let answer = self.driver.read(&batch).await;
        let time = self.deps.clock.now();
        match answer {
            Ok(results) => {
                let points = due.iter().map(|&index| &plan.points[index]);
                let decoded = points
                    .zip(results)
                    .map(|(point, result)| (point, result.and_then(|raw| numeric::decode(point, &raw))));
                turn.shadow.answered(plan, decoded, time);
                turn.shadow.report_if_due(&self.deps).await;
            }
            Err(error) => {
                // A timeout is this device's; a broken connection is everybody's, which the next attempt will show.
                let state = match error.reason {
                    QualityReason::Timeout => DeviceState::Offline,
                    _ => DeviceState::Disconnected,
                };
                turn.shadow.failed(&error, state, time);
                turn.shadow.report_if_due(&self.deps).await;
                self.driver.close().await;
                // The others keep their turn: opening anew is tried at once, and only its failure makes all wait.
                self.line = Line::Down {
                    retry_at: now,
                    wait: Duration::ZERO,
                };
            }
        }
    }
}

/// Twice the last wait within the bounds, and up to a fifth less by chance.
fn retry_after(last: Duration) -> Line {
    let wait = (last * 2).clamp(RETRY_FIRST, RETRY_MOST);
    let jittered = wait.mul_f64(rand::rng().random_range(0.8..=1.0));
    Line::Down {
        retry_at: Instant::now() + jittered,
        wait,
    }
}
