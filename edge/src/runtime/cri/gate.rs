//! Which of many calls that cost the engine much are under way at the same time.
//!
//! Making a sandbox or a container is work: namespaces, a network, a root file system, several short processes. Fifty
//! pods that start at once finish no sooner for having all been begun at once; each only waits for all. So a few calls
//! run at a time, and those that bring a pod nearer to its end come first: a pod whose sandbox is there gets its
//! containers before the next sandbox is begun, and what is only tidied up comes last. So it is when many pods end: one
//! whose containers have stopped is finished before the next is told to stop, and half of them are gone when half of the
//! work is done, not all at its end.
//!
//! A call that takes unusually long is waiting for something, not working; it gives its place to another. A container that
//! is told to stop works for as long as it likes: there, that moment comes soon.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// A call that is still under way after that does not count any more.
const HOLD: Duration = Duration::from_secs(3);
/// The same for a container's stop: what one that ends at once takes. Fifty that all take their whole grace have their
/// signals within four seconds on a machine with two processors.
const SIGNAL_HOLD: Duration = Duration::from_millis(250);

/// Who goes first; smaller is earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Turn {
    /// The last step of a pod's end.
    Stop,
    /// A container is told to end, and waited for.
    Signal,
    /// A container of a pod that has its sandbox, made or removed.
    Container,
    /// A new pod.
    Sandbox,
    /// Nobody waits for it.
    Tidy,
}

impl Turn {
    /// How long a call of this kind keeps its place.
    fn hold(self) -> Duration {
        match self {
            Self::Signal => SIGNAL_HOLD,
            Self::Stop | Self::Container | Self::Sandbox | Self::Tidy => HOLD,
        }
    }
}

/// The gate. Clones are the same one.
#[derive(Clone)]
pub(super) struct Gate(Arc<Mutex<State>>);

struct State {
    free: usize,
    /// By turn, then by arrival.
    waiting: BTreeMap<(Turn, u64), oneshot::Sender<Pass>>,
    arrivals: u64,
}

/// A place. Dropping it lets the next one in.
struct Pass(Gate);

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Gate {
    pub(super) fn new(places: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            free: places.max(1),
            waiting: BTreeMap::new(),
            arrivals: 0,
        })))
    }

    /// Makes a call when it is its turn.
    pub(super) async fn pass<T>(&self, turn: Turn, call: impl Future<Output = T>) -> T {
        let pass = self.enter(turn).await;
        let mut call = std::pin::pin!(call);
        tokio::select! {
            biased;
            done = &mut call => return done,
            () = tokio::time::sleep(turn.hold()) => drop(pass),
        }
        call.await
    }

    async fn enter(&self, turn: Turn) -> Pass {
        let called = {
            let mut state = self.lock();
            if state.free > 0 {
                state.free -= 1;
                return Pass(self.clone());
            }
            let (call, called) = oneshot::channel();
            state.arrivals += 1;
            let place = (turn, state.arrivals);
            state.waiting.insert(place, call);
            called
        };
        match called.await {
            Ok(pass) => pass,
            // A sender is dropped only after it has sent. Without a place is better than never.
            Err(_) => {
                self.lock().free += 1;
                Pass(self.clone())
            }
        }
    }

    fn leave(&self) {
        let mut state = self.lock();
        while let Some((_, next)) = state.waiting.pop_first() {
            if next.is_closed() {
                continue;
            }
            drop(state);
            // Whoever has gone meanwhile drops the pass, which comes back here.
            let _ = next.send(Pass(self.clone()));
            return;
        }
        state.free += 1;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code panics while it holds the lock.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets all tasks get as far as they can.
    async fn settle() {
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_nearer_to_its_end_goes_first() {
        let gate = Gate::new(1);
        let order = Arc::new(Mutex::new(Vec::new()));
        let (release, held) = oneshot::channel::<()>();
        let first = gate.clone();
        tokio::spawn(async move { first.pass(Turn::Sandbox, held).await });
        settle().await;
        let mut calls = tokio::task::JoinSet::new();
        for turn in [
            Turn::Tidy,
            Turn::Sandbox,
            Turn::Container,
            Turn::Sandbox,
            Turn::Signal,
            Turn::Stop,
        ] {
            let (gate, order) = (gate.clone(), Arc::clone(&order));
            calls.spawn(async move { gate.pass(turn, async { order.lock().unwrap().push(turn) }).await });
            settle().await;
        }
        assert!(order.lock().unwrap().is_empty());
        release.send(()).unwrap();
        while calls.join_next().await.is_some() {}
        assert_eq!(
            *order.lock().unwrap(),
            [
                Turn::Stop,
                Turn::Signal,
                Turn::Container,
                Turn::Sandbox,
                Turn::Sandbox,
                Turn::Tidy
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_gives_up_waiting_takes_no_place_with_him() {
        let gate = Gate::new(1);
        let (release, held) = oneshot::channel::<()>();
        let first = gate.clone();
        let holder = tokio::spawn(async move { first.pass(Turn::Sandbox, held).await });
        settle().await;
        let waiting = gate.clone();
        let impatient = tokio::spawn(async move { waiting.pass(Turn::Container, async {}).await });
        settle().await;
        impatient.abort();
        settle().await;
        release.send(()).unwrap();
        holder.await.unwrap().unwrap();
        gate.pass(Turn::Sandbox, async {}).await;
        assert_eq!(gate.lock().free, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_hangs_keeps_nobody_out() {
        let gate = Gate::new(1);
        let stuck = gate.clone();
        tokio::spawn(async move { stuck.pass(Turn::Sandbox, std::future::pending::<()>()).await });
        settle().await;
        gate.pass(Turn::Sandbox, async {}).await;
    }

    #[tokio::test(start_paused = true)]
    async fn of_containers_that_take_their_grace_each_is_told_within_a_moment_of_the_last() {
        let gate = Gate::new(1);
        let began = tokio::time::Instant::now();
        for told in 0..4_u32 {
            let (gate, (tell, heard)) = (gate.clone(), oneshot::channel::<()>());
            tokio::spawn(async move {
                let stop = async {
                    let _ = tell.send(());
                    std::future::pending::<()>().await;
                };
                gate.pass(Turn::Signal, stop).await;
            });
            heard.await.unwrap();
            assert_eq!(began.elapsed().as_millis(), (SIGNAL_HOLD * told).as_millis());
        }
    }
}
