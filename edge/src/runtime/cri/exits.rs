//! containerd's own notice that a task has ended.
//!
//! containerd serves its events on the CRI socket in every release, so the end of a container is known at once even
//! where CRI has no events. Only ends are asked for: starts are our own doing.
//!
//! Two things need care. The stream of a quiet engine does not open before its first event, so that a subscription
//! looks the same as a request that hangs: [`follow`] sends an event of its own until it comes back. And CRI hears of
//! an end by the same event as we do, so it may still call the container running: [`settled`] waits until it does not.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use prost::Message;
use tokio::sync::watch;
use tonic::{Status, Streaming};

use super::api;
use super::changes::Counter;
use super::client::Client;
use super::containerd::{Envelope, TaskExit};
use crate::runtime::RuntimeError;

/// containerd's namespace of all that CRI makes.
const NAMESPACE: &str = "k8s.io";
/// A process of a task has ended.
const EXIT: &str = "/tasks/exit";
/// Our own, which shows that the subscription works.
const HELLO: &str = "/skerry/subscribed";
/// Between two of our own events; the first may come before the subscription.
const HELLO_EVERY: Duration = Duration::from_millis(100);
/// How long CRI may take to see an end that containerd has told.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
/// First pause between two looks at whether it has.
const SETTLE_FIRST: Duration = Duration::from_millis(2);

/// Moves the counter with every container or sandbox that ends, until the events do. Says in `events_come` when it
/// has made sure that they come.
pub(super) async fn follow(client: &Client, counter: &Counter, events_come: &watch::Sender<bool>) -> Status {
    let mut events = match subscribe(client).await {
        Ok(events) => events,
        Err(status) => return status,
    };
    events_come.send_replace(true);
    counter.bump();
    let mut settling = FuturesUnordered::new();
    loop {
        tokio::select! {
            message = events.message() => match message {
                Ok(Some(envelope)) => settling.extend(ended_task(&envelope).map(|id| settled(client, id))),
                Ok(None) => return Status::unavailable("containerd ended the stream of events"),
                Err(status) => return status,
            },
            Some(()) = settling.next() => counter.bump(),
        }
    }
}

/// A subscription from which at least one event has come.
async fn subscribe(client: &Client) -> Result<Streaming<Envelope>, Status> {
    let filters = [EXIT, HELLO].map(|topic| format!("namespace=={NAMESPACE},topic==\"{topic}\""));
    let opening = client.containerd_events(filters.into());
    let greeting = async {
        loop {
            tokio::time::sleep(HELLO_EVERY).await;
            if let Err(status) = client.publish(NAMESPACE, HELLO).await {
                return status;
            }
        }
    };
    tokio::select! {
        opened = opening => opened,
        status = greeting => Err(status),
    }
}

/// The task that an event says has ended: not when only a command in it has.
fn ended_task(envelope: &Envelope) -> Option<String> {
    if envelope.topic != EXIT {
        return None;
    }
    let content = envelope.event.as_ref()?;
    let exit = TaskExit::decode(content.value.as_slice()).ok()?;
    (exit.id == exit.container_id).then_some(exit.container_id)
}

/// Hostile bytes as an event.
pub(super) fn decode_any(bytes: &[u8]) {
    if let Ok(envelope) = Envelope::decode(bytes) {
        let _ = ended_task(&envelope);
    }
}

pub(super) fn seeds() -> Vec<Vec<u8>> {
    let exit = TaskExit {
        container_id: "c".to_owned(),
        id: "c".to_owned(),
    };
    let envelope = Envelope {
        topic: EXIT.to_owned(),
        event: Some(super::containerd::Content {
            type_url: String::new(),
            value: exit.encode_to_vec(),
        }),
        ..Envelope::default()
    };
    vec![envelope.encode_to_vec()]
}

/// Waits until CRI knows of the end of a task too, or does not know the task at all.
async fn settled(client: &Client, id: String) {
    let looking = async {
        let mut pause = SETTLE_FIRST;
        while seems_alive(client, &id).await {
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    };
    // After that the comparison of the lists finds it, whenever it shows.
    let _ = tokio::time::timeout(SETTLE_LIMIT, looking).await;
}

async fn seems_alive(client: &Client, id: &str) -> bool {
    match client.container_status(id).await {
        Ok(status) => status.state() == api::ContainerState::ContainerRunning,
        Err(RuntimeError::NotFound(_)) => client
            .pod_sandbox_status(id)
            .await
            .is_ok_and(|status| status.state() == api::PodSandboxState::SandboxReady),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::containerd::Content;
    use super::*;

    fn envelope(topic: &str, container: &str, process: &str) -> Envelope {
        let exit = TaskExit {
            container_id: container.to_owned(),
            id: process.to_owned(),
        };
        Envelope {
            namespace: NAMESPACE.to_owned(),
            topic: topic.to_owned(),
            event: Some(Content {
                type_url: "containerd.events.TaskExit".to_owned(),
                value: exit.encode_to_vec(),
            }),
        }
    }

    #[test]
    fn the_end_of_a_command_in_a_container_is_not_the_containers_end() {
        assert_eq!(ended_task(&envelope(EXIT, "c", "c")).as_deref(), Some("c"));
        assert_eq!(ended_task(&envelope(EXIT, "c", "probe")), None);
        assert_eq!(ended_task(&envelope(HELLO, "c", "c")), None);
    }
}
