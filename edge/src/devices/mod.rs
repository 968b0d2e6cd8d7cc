//! The site's field devices.
//!
//! In: Devices from the store, as the provider sent them. Out: their values and conditions as `DeviceStatusReport`s in
//! the durable outbox, newest only. What happens here needs no link: reading goes on while it is down.
//!
//! [`Devices::run`] watches the store and plans: every Device is normalised, and those that can be read are grouped by
//! the physical bus that they hang on. Each bus has one task ([`bus`]) that owns its connection and reads its devices
//! in turn. [`shadow`] holds what is known of one device and decides when to report; [`numeric`] turns registers into
//! values; [`drivers`] speak the protocols.
//!
//! Invariants: a bus has one task and one request in flight. A value is never shown as `Good` unless it was read by this
//! process; after a restart the last one is shown as `Uncertain`. A Device that cannot be run says why in a condition.

mod bus;
pub mod drivers;
mod numeric;
mod ports;
mod shadow;

use std::collections::HashMap;
use std::sync::Arc;

use skerry_proto::device::{Defaults, Device, Endpoint, NormalisedDevice, Problem, Protocol, normalise};
use skerry_proto::object::Uid;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::clock::Clock;
pub(crate) use numeric::any_registers;
pub use ports::{DeviceObject, DeviceStore};

use bus::Bus;
use shadow::Shadow;

/// What the room needs.
#[derive(Clone)]
pub struct Deps {
    /// Devices, records and the outbox.
    pub store: Arc<dyn DeviceStore>,
    /// For time stamps; intervals follow tokio's clock.
    pub clock: Arc<dyn Clock>,
    /// The site's default endpoints.
    pub defaults: Defaults,
}

/// A device that a bus reads.
pub(crate) struct Assigned {
    object: DeviceObject,
    generation: i64,
    plan: NormalisedDevice,
}

/// The room.
pub struct Devices {
    deps: Deps,
    buses: HashMap<(Protocol, Endpoint), watch::Sender<Vec<Arc<Assigned>>>>,
    /// Devices that no bus reads, and what was said about them.
    idle: HashMap<Uid, Shadow>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Devices {
    /// Runs until `stop`; then closes all connections and returns.
    pub async fn run(deps: Deps, stop: CancellationToken) {
        let mut changes = deps.store.changes();
        let mut room = Self {
            deps,
            buses: HashMap::new(),
            idle: HashMap::new(),
            tasks: TaskTracker::new(),
            stop: stop.clone(),
        };
        room.plan().await;
        while room.changed(&mut changes).await {
            room.plan().await;
        }
        room.buses.clear();
        room.tasks.close();
        room.tasks.wait().await;
    }

    /// Waits for a change of a Device; `false`: stop.
    async fn changed(&mut self, changes: &mut broadcast::Receiver<crate::store::ObjectChanged>) -> bool {
        let first = tokio::select! {
            () = self.stop.cancelled() => return false,
            change = next_device_change(changes) => change,
        };
        let mut more = first;
        while let Some(change) = more {
            if change.removed {
                self.deps.store.forget(&change.key.uid).await;
            }
            more = changes
                .try_recv()
                .ok()
                .filter(|c| c.key.kind == skerry_proto::link::Kind::Device);
        }
        !self.stop.is_cancelled()
    }

    /// Brings buses and conditions in line with the store.
    async fn plan(&mut self) {
        let mut wanted: HashMap<(Protocol, Endpoint), Vec<Arc<Assigned>>> = HashMap::new();
        let mut idle = HashMap::new();
        for object in self.deps.store.devices().await {
            let (generation, plan) = match &object.device {
                Ok(device) => (device.generation(), normalise(&device.spec, &self.deps.defaults)),
                Err(problem) => (0, Err(vec![problem.clone()])),
            };
            let endpoint = plan
                .as_ref()
                .ok()
                .filter(|plan| !plan.suspend)
                .and_then(|plan| plan.endpoint.clone());
            match (plan, endpoint) {
                (Ok(plan), Some(endpoint)) => {
                    let key = (plan.protocol, endpoint);
                    let assigned = Assigned {
                        object,
                        generation,
                        plan,
                    };
                    wanted.entry(key).or_default().push(Arc::new(assigned));
                }
                (plan, _) => {
                    let uid = object.uid.clone();
                    let mut shadow = match self.idle.remove(&uid) {
                        Some(shadow) => shadow,
                        None => Shadow::load(&self.deps, &object).await,
                    };
                    shadow.idle(generation, plan.as_ref(), self.deps.clock.now());
                    shadow.report_if_due(&self.deps).await;
                    idle.insert(uid, shadow);
                }
            }
        }
        self.idle = idle;
        // A bus without devices ends when its sender goes.
        self.buses
            .retain(|key, sender| wanted.contains_key(key) && !sender.is_closed());
        for (key, devices) in wanted {
            match self.buses.get(&key) {
                Some(sender) => {
                    sender.send_replace(devices);
                }
                None => {
                    let (sender, receiver) = watch::channel(devices);
                    let driver = drivers::driver_for(key.0, &key.1);
                    let bus = Bus::new(self.deps.clone(), driver, receiver);
                    self.tasks.spawn(bus.run(self.stop.clone()));
                    self.buses.insert(key, sender);
                }
            }
        }
    }
}

/// The next change of a Device; `None` when some were missed and everything must be looked at.
async fn next_device_change(
    changes: &mut broadcast::Receiver<crate::store::ObjectChanged>,
) -> Option<crate::store::ObjectChanged> {
    loop {
        match changes.recv().await {
            Ok(change) if change.key.kind == skerry_proto::link::Kind::Device => return Some(change),
            Ok(_) => {}
            Err(broadcast::error::RecvError::Lagged(_)) => return None,
            // The store lives as long as the daemon; without it nothing changes any more.
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

/// A Device that cannot be decoded, as a problem for its condition.
pub(crate) fn unreadable(error: &dyn std::fmt::Display) -> Problem {
    Problem {
        reason: "InvalidSpec",
        field: "spec".into(),
        message: format!("cannot be read: {error}"),
    }
}

/// A Device as the ports hand it over.
pub(crate) type Decoded = Result<Device, Problem>;
