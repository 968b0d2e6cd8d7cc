//! Notices that something in the runtime has changed.
//!
//! Two sources move one counter. Events are the quick one: containerd's own ([`super::exits`]), or CRI's where another
//! engine has them. The lists are also compared, every second until events are known to come, and rarely after that,
//! as a net below the events. A comparison moves the counter only on a difference, so a quiet node costs two small
//! calls per round and no work in the daemon.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tonic::Status;

use super::client::Client;
use super::exits;
use crate::runtime::RuntimeError;

/// Between two comparisons while no events come.
const COMPARE_EVERY: Duration = Duration::from_secs(1);
/// Between two comparisons while events come. Below the ten seconds that `Runtime::changes` promises.
const COMPARE_BESIDE_EVENTS: Duration = Duration::from_secs(8);
/// Longest pause between two attempts to reach the engine.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The counter. Clones move the same one.
#[derive(Clone)]
pub(super) struct Counter(Arc<watch::Sender<u64>>);

impl Default for Counter {
    fn default() -> Self {
        Counter(Arc::new(watch::Sender::new(0)))
    }
}

impl Counter {
    /// Something may have changed.
    pub(super) fn bump(&self) {
        self.0.send_modify(|count| *count = count.wrapping_add(1));
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.0.subscribe()
    }
}

/// Runs until dropped.
pub(super) async fn watch_for_changes(client: Client, counter: Counter) {
    let mut pause = Pause::default();
    loop {
        let error = watch_one_connection(&client, &counter, &mut pause).await;
        tracing::debug!(%error, "cannot watch the container runtime; trying again");
        tokio::time::sleep(pause.next()).await;
    }
}

/// Watches until the engine fails to answer. Moves the counter at the beginning, for what was missed before.
async fn watch_one_connection(client: &Client, counter: &Counter, pause: &mut Pause) -> RuntimeError {
    let engine = match client.version().await {
        Ok(version) => version.name,
        Err(error) => return error,
    };
    let events_come = watch::Sender::new(false);
    tokio::select! {
        error = compare(client, counter, pause, events_come.subscribe()) => error,
        never = follow_events(client, counter, &engine, &events_come) => match never {},
    }
}

/// Moves the counter with every event, for as long as there are any. Never ends: without events, comparing goes on.
async fn follow_events(
    client: &Client,
    counter: &Counter,
    engine: &str,
    events_come: &watch::Sender<bool>,
) -> std::convert::Infallible {
    let mut pause = Pause::default();
    // containerd's own events first: its GetContainerEvents is absent before 1.7 and shared among all who call it.
    let mut own = engine == "containerd";
    loop {
        let ended = if own {
            exits::follow(client, counter, events_come).await
        } else {
            follow_cri(client, counter, events_come).await
        };
        if events_come.send_replace(false) {
            pause = Pause::default();
            // What happened since is found by the next comparison.
            counter.bump();
        }
        match ended.code() {
            tonic::Code::Unimplemented if own => own = false,
            // An engine that has been exchanged for a newer one has also broken the connection.
            tonic::Code::Unimplemented => return std::future::pending().await,
            _ => tracing::debug!(status = %ended, "no container events; comparing lists instead"),
        }
        tokio::time::sleep(pause.next()).await;
    }
}

/// CRI's container events, until they end.
async fn follow_cri(client: &Client, counter: &Counter, events_come: &watch::Sender<bool>) -> Status {
    let mut events = match client.events().await {
        Ok(events) => events,
        Err(status) => return status,
    };
    events_come.send_replace(true);
    counter.bump();
    loop {
        match events.message().await {
            Ok(Some(_)) => counter.bump(),
            Ok(None) => return Status::unavailable("the engine ended the stream of events"),
            Err(status) => return status,
        }
    }
}

/// Moves the counter whenever the lists differ from the last ones; ends when the engine fails to answer.
async fn compare(
    client: &Client,
    counter: &Counter,
    pause: &mut Pause,
    mut events_come: watch::Receiver<bool>,
) -> RuntimeError {
    let mut last = None;
    loop {
        match fingerprint(client).await {
            Ok(now) => {
                *pause = Pause::default();
                if last.as_ref() != Some(&now) {
                    last = Some(now);
                    counter.bump();
                }
            }
            Err(error) => return error,
        }
        let interval = if *events_come.borrow_and_update() {
            COMPARE_BESIDE_EVENTS
        } else {
            COMPARE_EVERY
        };
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            // The sender outlives this task. A change of pace starts with a comparison.
            _ = events_come.changed() => {}
        }
    }
}

/// State by id, of all that is ours.
async fn fingerprint(client: &Client) -> Result<BTreeMap<String, i32>, RuntimeError> {
    let (sandboxes, containers) = tokio::try_join!(
        client.list_pod_sandboxes(None),
        client.list_containers(None, None)
    )?;
    let sandboxes = sandboxes.into_iter().map(|sandbox| (sandbox.id, sandbox.state));
    let containers = containers
        .into_iter()
        .map(|container| (container.id, container.state));
    Ok(sandboxes.chain(containers).collect())
}

/// Jittered, doubling pauses up to [`LONGEST_PAUSE`].
struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Pause(Duration::from_millis(250))
    }
}

impl Pause {
    fn next(&mut self) -> Duration {
        let now = self.0;
        self.0 = (now * 2).min(LONGEST_PAUSE);
        now.mul_f64(rand::random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_with_jitter_up_to_the_longest() {
        let mut pause = Pause::default();
        let first = pause.next();
        assert!(first >= Duration::from_millis(125) && first <= Duration::from_millis(250));
        let last = (0..10).map(|_| pause.next()).last().unwrap();
        assert!(last >= LONGEST_PAUSE / 2 && last <= LONGEST_PAUSE);
    }

    #[test]
    fn a_bump_wakes_a_subscriber() {
        let counter = Counter::default();
        let seen = counter.subscribe();
        counter.bump();
        assert!(seen.has_changed().unwrap());
    }
}
