//! The site's hardware as a Node's status.
//!
//! In: `/proc`, `/sys`, the file system, the runtime. Out: `NodeStatusReport`s through the outbox: at start, when
//! something changes, every six hours, when the provider asks, and once after each reconnection.

pub(crate) mod capacity;
mod measure;
mod problems;
mod skew;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_proto::SiteName;
use skerry_proto::link::{NodeStatusReport, report};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::eviction::Pressure;
use crate::identity::TrustedTime;
use crate::link::LinkStatus;
use crate::pods::NodeEvents;
use crate::runtime::{Runtime, RuntimeError};
use crate::store::{NewReport, Store};
pub use capacity::{Reserved, Shares};
pub(crate) use measure::KUBELET_VERSION;
use measure::Machine;
pub(crate) use measure::architecture;

/// How often the machine is looked at.
const LOOK: Duration = Duration::from_secs(10);
/// An unchanged status is reported again after this long. The provider keeps the times of its conditions fresh meanwhile,
/// and asks when the Node is gone.
const REPEAT: Duration = Duration::from_secs(6 * 3600);
/// Most images named in the status, the largest first, and names per image; as a kubelet does.
const IMAGES: usize = 50;
const NAMES: usize = 5;

/// Settings of the node room.
#[derive(Clone)]
pub struct NodeConfig {
    /// The site.
    pub site: SiteName,
    /// File system whose size is the node's ephemeral storage.
    pub data_dir: PathBuf,
    /// What of the machine is for pods.
    pub shares: Shares,
    /// `nodeInfo.machineID` where the machine has none.
    pub fallback_machine_id: String,
    /// Changes with every boot of the machine.
    pub boot_id: String,
    /// What the machine is short of.
    pub pressure: watch::Receiver<Pressure>,
    /// The machine is going down.
    pub going: watch::Receiver<bool>,
    /// What time it is elsewhere.
    pub time: Arc<TrustedTime>,
    /// Where changes are told.
    pub events: NodeEvents,
}

/// Reports the node's status until `stop`.
pub async fn run(
    mut config: NodeConfig,
    store: Store,
    runtime: Arc<dyn Runtime>,
    mut link: watch::Receiver<LinkStatus>,
    stop: CancellationToken,
) {
    let mut look = tokio::time::interval(LOOK);
    let mut last: Option<(Value, Instant)> = None;
    let mut synced = false;
    let mut asked = 0;
    problems::say_start(&store, &config.events, &config.site, &config.boot_id).await;
    tokio::spawn(problems::watch_kernel(
        config.events.clone(),
        config.site.clone(),
        stop.clone(),
    ));
    loop {
        let mut force = false;
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
            // Their senders live as long as the daemon; without them the tick goes on.
            Ok(()) = config.pressure.changed() => {}
            Ok(()) = config.going.changed() => {}
            changed = link.changed() => {
                if changed.is_err() {
                    return;
                }
                let status = link.borrow_and_update().clone();
                force = status.synced && (!synced || status.node_asked != asked);
                synced = status.synced;
                asked = status.node_asked;
                if !force {
                    continue;
                }
            }
        }
        let status = status(&config, runtime.as_ref()).await;
        let due = last
            .as_ref()
            .is_none_or(|(old, at)| *old != status || at.elapsed() >= REPEAT);
        if !due && !force {
            continue;
        }
        let before = last.as_ref().map(|(old, _)| old);
        problems::say_changes(&config.events, &config.site, before, &status).await;
        match store.report(new_report(&config, &status)).await {
            Ok(_) => last = Some((status, Instant::now())),
            Err(error) => tracing::error!(%error, "the node's status cannot be stored; it is tried again"),
        }
    }
}

fn new_report(config: &NodeConfig, status: &Value) -> NewReport {
    let labels = HashMap::from([
        ("kubernetes.io/hostname".to_owned(), config.site.to_string()),
        ("kubernetes.io/os".to_owned(), "linux".to_owned()),
        (
            "kubernetes.io/arch".to_owned(),
            measure::architecture().to_owned(),
        ),
    ]);
    NewReport {
        coalesce: Some("node".to_owned()),
        observed: Timestamp::now(),
        body: report::Report::NodeStatus(NodeStatusReport {
            status_json: status.to_string().into(),
            labels,
        }),
    }
}

/// Memory of this machine in bytes.
pub(crate) fn memory_capacity(data_dir: &std::path::Path) -> i64 {
    i64::try_from(Machine::measure(data_dir).memory_bytes).unwrap_or(i64::MAX)
}

/// What of the optional parts of Kubernetes works here: the API server refuses the rest. Names are Kubernetes', sorted.
fn declared_features(runtime: &dyn Runtime) -> Vec<&'static str> {
    let mut all = vec!["RestartAllContainersOnContainerExits"];
    // An ordinary user may not change cgroups.
    if runtime.isolated() || nix::unistd::geteuid().is_root() {
        all.splice(
            0..0,
            [
                "InPlacePodLevelResourcesVerticalScaling",
                "InPlacePodVerticalScalingInitContainers",
            ],
        );
    }
    all
}

async fn status(config: &NodeConfig, runtime: &dyn Runtime) -> Value {
    let machine = Machine::measure(&config.data_dir);
    let pressure = *config.pressure.borrow();
    let runtime_ready = match *config.going.borrow() {
        true => Err("node is shutting down".to_owned()),
        false => Ok(()),
    };
    let runtime_ready = runtime_ready.and(runtime_condition(runtime.status().await));
    let version = runtime
        .version()
        .await
        .map(|v| format!("{}://{}", v.name, v.version))
        .unwrap_or_default();
    let images = runtime.list_images().await.unwrap_or_default();
    let features = runtime.features().await;
    let mut conditions = conditions(&pressure, &runtime_ready);
    if let (Some(skew), Value::Array(all)) = (skew::condition(config.time.skew()), &mut conditions) {
        // Ready stands last, as a kubelet has it.
        all.insert(all.len().saturating_sub(1), skew);
    }
    json!({
        "capacity": config.shares.capacity(&machine).to_json(),
        "allocatable": config.shares.allocatable(&machine).to_json(),
        "conditions": conditions,
        "nodeInfo": machine.info(&version, &config.fallback_machine_id),
        "images": images_of(images),
        "runtimeHandlers": handlers_of(&features),
        "features": {"supplementalGroupsPolicy": features.supplemental_groups_policy},
        "declaredFeatures": declared_features(runtime),
    })
}

fn handlers_of(features: &crate::runtime::Features) -> Vec<Value> {
    let handler = |h: &crate::runtime::Handler| {
        json!({"name": h.name, "features": {
            "recursiveReadOnlyMounts": h.recursive_readonly, "userNamespaces": h.user_namespaces,
        }})
    };
    features.handlers.iter().map(handler).collect()
}

fn images_of(mut images: Vec<crate::runtime::Image>) -> Vec<Value> {
    images.sort_by(|a, b| b.size_bytes.cmp(&a.size_bytes).then_with(|| a.id.cmp(&b.id)));
    images
        .iter()
        .take(IMAGES)
        .map(|image| {
            let names: Vec<&String> = image.digests.iter().chain(&image.tags).take(NAMES).collect();
            json!({"names": names, "sizeBytes": image.size_bytes})
        })
        .collect()
}

/// Whether the runtime can take pods, else why not.
fn runtime_condition(status: Result<crate::runtime::RuntimeStatus, RuntimeError>) -> Result<(), String> {
    match status {
        Ok(status) if status.ready && status.network_ready => Ok(()),
        Ok(status) if status.ready => Err(format!(
            "container runtime network not ready: NetworkReady=false {}",
            status.message
        )),
        Ok(status) => Err(format!("container runtime is not ready: {}", status.message)),
        Err(error) => Err(format!("container runtime is down: {error}")),
    }
}

fn conditions(pressure: &Pressure, runtime: &Result<(), String>) -> Value {
    let pressured = |kind: &str, on: bool, yes: (&str, &str), no: (&str, &str)| {
        let (reason, message) = if on { yes } else { no };
        json!({"type": kind, "status": if on { "True" } else { "False" }, "reason": reason, "message": message})
    };
    let ready = match runtime {
        Ok(()) => json!({"type": "Ready", "status": "True", "reason": "KubeletReady",
            "message": "kubelet is posting ready status"}),
        Err(why) => json!({"type": "Ready", "status": "False", "reason": "KubeletNotReady",
            "message": why}),
    };
    json!([
        pressured(
            "MemoryPressure",
            pressure.memory,
            (
                "KubeletHasInsufficientMemory",
                "kubelet has insufficient memory available"
            ),
            (
                "KubeletHasSufficientMemory",
                "kubelet has sufficient memory available"
            ),
        ),
        pressured(
            "DiskPressure",
            pressure.disk,
            ("KubeletHasDiskPressure", "kubelet has disk pressure"),
            ("KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        ),
        pressured(
            "PIDPressure",
            pressure.pids,
            (
                "KubeletHasInsufficientPID",
                "kubelet has insufficient PID available"
            ),
            ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ),
        ready,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_stands_last_and_tells_why_the_runtime_is_not() {
        let all = conditions(&Pressure::default(), &Err("no socket".to_owned()));
        let last = all.as_array().unwrap().last().unwrap();
        assert_eq!(last["type"], "Ready");
        assert_eq!(last["status"], "False");
        assert_eq!(last["message"], "no socket");
        assert_eq!(all[0]["status"], "False");
    }
}
