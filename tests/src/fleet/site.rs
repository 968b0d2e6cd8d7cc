//! One site of a fleet: the edge's link, store and identity, and what its other rooms would report.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use skerry_edge::identity::{Dialer, Identity};
use skerry_edge::link::{Greeting, Link, LinkStatus, boot_id};
use skerry_edge::metrics::Metrics;
use skerry_edge::runtime::process::ProcessRuntime;
use skerry_edge::store::{NewReport, ObjectChanged, Store, StoredObject};
use skerry_edge::streams::{PodLookup, Streams};
use skerry_proto::SiteName;
use skerry_proto::link::{Kind, NodeStatusReport, PodStatusReport, report};
use skerry_proto::object::Uid;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::line::Line;

/// What all sites of a fleet share.
pub(super) struct Common {
    pub(super) line: Arc<Line>,
    streams: Arc<Streams>,
    boot_id: String,
}

impl Common {
    pub(super) fn new(line: Arc<Line>, dir: &Path) -> Arc<Self> {
        let runtime = ProcessRuntime::new(&dir.join("process"), Vec::new()).expect("the process runtime");
        let streams = Streams::new(Arc::new(runtime), Arc::new(NoPods), dir.join("logs"));
        Arc::new(Self {
            line,
            streams: Arc::new(streams),
            boot_id: boot_id(),
        })
    }
}

/// No pod of a fleet has a container, so there is nothing to look into.
struct NoPods;

impl PodLookup for NoPods {
    fn pod(&self, _: &str, _: &str) -> Option<Pod> {
        None
    }
}

pub(super) struct FleetSite {
    name: SiteName,
    store: Store,
    link: watch::Receiver<LinkStatus>,
    stop: DropGuard,
}

impl FleetSite {
    /// Starts an enrolled site.
    pub(super) async fn start(dir: &Path, provider: SocketAddr, common: &Arc<Common>) -> Self {
        let identity = Identity::load(dir).expect("the site has joined");
        let name = identity.site.clone();
        // The certificate outlives the run: nobody renews it.
        let (_, identity) = watch::channel(Arc::new(identity));
        let dialer = Dialer::new(&provider.to_string(), identity).expect("an address");
        let path = dir.to_owned();
        let open = move || {
            let store = Store::open(&path).expect("the store opens");
            let incarnation = store.begin_life().expect("the store takes writes");
            (store, incarnation)
        };
        let opened = tokio::task::spawn_blocking(open).await;
        let (store, incarnation) = opened.expect("opening a store does not panic");
        let greeting = Greeting {
            site: name.clone(),
            boot_id: common.boot_id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            incarnation,
            instance: name.to_string(),
        };
        let link = Arc::new(Link::new(
            store.clone(),
            Arc::clone(&common.streams),
            common.line.over(dialer),
            greeting,
            Arc::new(Metrics::new(&name)),
        ));
        let stop = CancellationToken::new();
        let status = link.status();
        let rooms = Rooms {
            store: store.clone(),
            said: HashMap::new(),
        };
        tokio::spawn(rooms.run(status.clone(), store.changes(), stop.clone()));
        tokio::spawn(link.run(stop.clone()));
        Self {
            name,
            store,
            link: status,
            stop: stop.drop_guard(),
        }
    }

    pub(super) fn name(&self) -> &SiteName {
        &self.name
    }

    pub(super) fn is_online(&self) -> bool {
        self.link.borrow().online
    }

    pub(super) fn last_error(&self) -> String {
        self.link.borrow().last_error.clone()
    }

    /// Holds everything, and has told everything.
    pub(super) fn is_quiet(&self) -> bool {
        self.link.borrow().synced && self.store.outbox_len().expect("the store can be read") == 0
    }

    pub(super) fn stop(&self) {
        self.stop.token().cancel();
    }
}

/// In place of the daemon's node and pods rooms: the Node is reported at each reconnection, and so is every pod; a new pod
/// runs at once, and one under deletion has ended at once.
struct Rooms {
    store: Store,
    /// The status of each pod, the same at each report.
    said: HashMap<Uid, Value>,
}

impl Rooms {
    async fn run(
        mut self,
        mut link: watch::Receiver<LinkStatus>,
        mut changes: broadcast::Receiver<ObjectChanged>,
        stop: CancellationToken,
    ) {
        let mut synced = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                changed = link.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let now = link.borrow_and_update().synced;
                    if now && !synced {
                        self.report_all();
                    }
                    synced = now;
                }
                change = changes.recv() => match change {
                    Ok(ObjectChanged { key, removed: false, .. }) if key.kind == Kind::Pod => {
                        if let Ok(Some(object)) = self.store.get(&key) {
                            self.report_pod(&object);
                        }
                    }
                    Ok(ObjectChanged { key, removed: true, .. }) => {
                        self.said.remove(&key.uid);
                    }
                    Ok(_) => {}
                    Err(RecvError::Lagged(_)) => self.report_all(),
                    Err(RecvError::Closed) => return,
                }
            }
        }
    }

    fn report_all(&mut self) {
        let labels = [("kubernetes.io/os", "linux"), ("kubernetes.io/arch", "amd64")];
        let node = NodeStatusReport {
            status_json: node_status().to_string().into(),
            labels: labels
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
        };
        self.queue("node", report::Report::NodeStatus(node));
        for object in self.store.list(Kind::Pod).expect("the store can be read") {
            self.report_pod(&object);
        }
    }

    fn report_pod(&mut self, object: &StoredObject) {
        let pod: Pod = object.decode().expect("a pod");
        let uid = object.key.uid.clone();
        let finished = pod.metadata.deletion_timestamp.is_some();
        let status = self.said.entry(uid.clone()).or_insert_with(|| running(&pod));
        if finished {
            status["phase"] = Value::from("Succeeded");
        }
        let body = PodStatusReport {
            uid: uid.to_string(),
            namespace: object.namespace.clone(),
            name: object.name.clone(),
            status_json: status.to_string().into(),
            finished,
            ..Default::default()
        };
        self.queue(&format!("pod/{uid}"), report::Report::PodStatus(body));
    }

    fn queue(&self, coalesce: &str, body: report::Report) {
        let written = self.store.queue_report(NewReport {
            coalesce: Some(coalesce.to_owned()),
            observed: Timestamp::now(),
            body,
        });
        // The link takes it from the outbox once it is there; a failure is logged by the store.
        drop(written);
    }
}

fn node_status() -> Value {
    let condition = |kind: &str, status: &str, reason: &str| json!({"type": kind, "status": status, "reason": reason, "message": "kubelet has nothing to complain about"});
    let resources = json!({"cpu": "4", "memory": "4Gi", "ephemeral-storage": "32Gi", "pods": "110"});
    json!({
        "capacity": resources, "allocatable": resources,
        "conditions": [
            condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
            condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
            condition("PIDPressure", "False", "KubeletHasSufficientPID"),
            condition("Ready", "True", "KubeletReady"),
        ],
        "nodeInfo": {
            "machineID": "fleet", "systemUUID": "fleet", "bootID": "fleet", "kernelVersion": "6.1", "osImage": "fleet",
            "containerRuntimeVersion": "fleet://1", "kubeletVersion": "v1.36.3", "kubeProxyVersion": "",
            "operatingSystem": "linux", "architecture": "amd64",
        },
        "images": [{"names": ["docker.io/library/busybox:1.36"], "sizeBytes": 1_000_000}],
    })
}

fn running(pod: &Pod) -> Value {
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let condition = |kind: &str| json!({"type": kind, "status": "True", "lastTransitionTime": now});
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let statuses: Vec<Value> = containers
        .map(|container| {
            json!({"name": container.name, "image": container.image, "imageID": "fleet", "containerID": "fleet://c",
                "ready": true, "started": true, "restartCount": 0, "state": {"running": {"startedAt": now}}, "lastState": {}})
        })
        .collect();
    let conditions = [
        "PodReadyToStartContainers",
        "Initialized",
        "Ready",
        "ContainersReady",
        "PodScheduled",
    ];
    let conditions = conditions.map(condition);
    json!({
        "phase": "Running", "startTime": now, "hostIP": "10.0.0.1", "podIP": "10.0.0.2",
        "hostIPs": [{"ip": "10.0.0.1"}], "podIPs": [{"ip": "10.0.0.2"}], "containerStatuses": statuses,
        "conditions": conditions,
    })
}
