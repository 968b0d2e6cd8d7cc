//! Judges and binds Devices as they and the Nodes change.
//!
//! One task owns all: two watches feed it, and a queue of Devices to look at, each with the time from which it may be
//! looked at. A failed write comes back into the queue with a jittered, growing wait. A Device whose status already
//! says what it should causes no write, so the watch event of the own write ends the matter.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures::{Stream, StreamExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, DynamicObject};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use rand::Rng;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::api::{all, apply_status};
use super::binding::Nodes;
use super::judge::Judgement;

/// Field manager of the controller's part of a status.
const MANAGER: &str = "skerry-devices";
/// Bounds of the wait after a failed write.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_MOST: Duration = Duration::from_secs(60);

type Key = (String, String);

/// When to look at a Device again, and the wait that led there.
struct Pending {
    at: Instant,
    wait: Duration,
}

struct Controller {
    client: Client,
    devices: BTreeMap<Key, DynamicObject>,
    nodes: Nodes,
    /// False until the first full list of nodes: nothing is called unbound before that.
    nodes_known: bool,
    pending: HashMap<Key, Pending>,
    /// Collects a list while a watch starts anew.
    relisted_devices: BTreeMap<Key, DynamicObject>,
    relisted_nodes: Nodes,
}

/// Runs the controller until `stop`. Watches start again by themselves for ever.
pub async fn run(client: Client, stop: CancellationToken) {
    let config = watcher::Config::default;
    let devices = watcher(all(client.clone()), config()).default_backoff().boxed();
    let nodes = watcher(Api::<Node>::all(client.clone()), config())
        .default_backoff()
        .boxed();
    let controller = Controller {
        client,
        devices: BTreeMap::new(),
        nodes: Nodes::new(),
        nodes_known: false,
        pending: HashMap::new(),
        relisted_devices: BTreeMap::new(),
        relisted_nodes: Nodes::new(),
    };
    controller.run(devices, nodes, stop).await;
}

impl Controller {
    async fn run(
        mut self,
        mut devices: impl Stream<Item = watcher::Result<watcher::Event<DynamicObject>>> + Unpin,
        mut nodes: impl Stream<Item = watcher::Result<watcher::Event<Node>>> + Unpin,
        stop: CancellationToken,
    ) {
        loop {
            let next = self.next_time();
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(event) = nodes.next() => self.node_event(event),
                Some(event) = devices.next() => self.device_event(event),
                () = sleep_until(next) => self.work().await,
            }
        }
    }

    fn next_time(&self) -> Instant {
        let far = Instant::now() + Duration::from_secs(3600);
        if self.nodes_known {
            self.pending
                .values()
                .map(|pending| pending.at)
                .min()
                .unwrap_or(far)
        } else {
            far
        }
    }

    fn look_at(&mut self, key: Key) {
        let now = Pending {
            at: Instant::now(),
            wait: Duration::ZERO,
        };
        // One that waits after a failure keeps its time.
        self.pending.entry(key).or_insert(now);
    }

    fn look_at_all(&mut self) {
        let keys: Vec<_> = self.devices.keys().cloned().collect();
        keys.into_iter().for_each(|key| self.look_at(key));
    }

    fn device_event(&mut self, event: watcher::Result<watcher::Event<DynamicObject>>) {
        let key = |device: &DynamicObject| (device.namespace().unwrap_or_default(), device.name_any());
        match event {
            Ok(watcher::Event::Init) => self.relisted_devices.clear(),
            Ok(watcher::Event::InitApply(device)) => {
                self.relisted_devices.insert(key(&device), device);
            }
            Ok(watcher::Event::InitDone) => {
                self.devices = std::mem::take(&mut self.relisted_devices);
                self.look_at_all();
            }
            Ok(watcher::Event::Apply(device)) => {
                let key = key(&device);
                self.devices.insert(key.clone(), device);
                self.look_at(key);
            }
            Ok(watcher::Event::Delete(device)) => {
                self.devices.remove(&key(&device));
            }
            Err(error) => tracing::warn!(%error, "the watch of devices failed, trying again"),
        }
    }

    fn node_event(&mut self, event: watcher::Result<watcher::Event<Node>>) {
        let entry = |node: Node| (node.name_any(), node.metadata.labels.unwrap_or_default());
        match event {
            Ok(watcher::Event::Init) => self.relisted_nodes.clear(),
            Ok(watcher::Event::InitApply(node)) => self.relisted_nodes.extend([entry(node)]),
            Ok(watcher::Event::InitDone) => {
                self.nodes = std::mem::take(&mut self.relisted_nodes);
                self.nodes_known = true;
                self.look_at_all();
            }
            Ok(watcher::Event::Apply(node)) => {
                let (name, labels) = entry(node);
                // Nodes change all the time; only their labels matter here.
                if self.nodes.get(&name) != Some(&labels) {
                    self.nodes.insert(name, labels);
                    self.look_at_all();
                }
            }
            Ok(watcher::Event::Delete(node)) => {
                if self.nodes.remove(&node.name_any()).is_some() {
                    self.look_at_all();
                }
            }
            Err(error) => tracing::warn!(%error, "the watch of nodes failed, trying again"),
        }
    }

    /// Looks at one Device that is due; the watches get their turn in between.
    async fn work(&mut self) {
        let now = Instant::now();
        let due = self.pending.iter().filter(|(_, pending)| pending.at <= now);
        let Some(key) = due
            .min_by_key(|(_, pending)| pending.at)
            .map(|(key, _)| key.clone())
        else {
            return;
        };
        let wait = self
            .pending
            .remove(&key)
            .map_or(Duration::ZERO, |pending| pending.wait);
        let Some(device) = self.devices.get(&key) else {
            return;
        };
        let judgement = Judgement::of(device, &self.nodes, Timestamp::now());
        if judgement.stands_in(device) {
            return;
        }
        match apply_status(&self.client, device, MANAGER, &judgement.part()).await {
            Ok(device) => {
                self.devices.insert(key, device);
            }
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => {
                let (namespace, name) = &key;
                tracing::warn!(device = %name, %namespace, %error, "a device's status cannot be written, trying again");
                let wait = (wait * 2).clamp(RETRY_FIRST, RETRY_MOST);
                let at = now + wait.mul_f64(rand::rng().random_range(0.5..=1.0));
                self.pending.insert(key, Pending { at, wait });
            }
        }
    }
}
