//! The whole room over a scripted runtime in memory: only for paths that a real runtime cannot be brought into at
//! will (it forgets everything, the daemon restarts between two steps). What a real one does is tested end to end.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde_json::{Value, json};
use skerry_proto::link::{Kind, PodStatusReport, Remove, Report, Upsert, change, report};
use skerry_proto::object::{ContentHash, pack};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::fixtures::UID;
use super::{Pods, PodsConfig, Summary};
use crate::clock::SystemClock;
use crate::runtime::{
    Container, ContainerConfig, ContainerId, ContainerState, ExecOutput, ExecRequest, Image, Inventory,
    RegistryAuth, Runtime, RuntimeError, RuntimeStatus, RuntimeVersion, Sandbox, SandboxConfig, SandboxId,
    SandboxState, StreamEndpoint, labels,
};
use crate::store::Store;

/// As a command in [`Scripted::answer`]: every start of a container fails with that code.
const START: &str = "(start)";

struct Scripted {
    state: Mutex<Inventory>,
    ids: AtomicU64,
    changes: watch::Sender<u64>,
    execs: Mutex<Vec<Vec<String>>>,
    /// Exit codes of commands by their first word; others succeed.
    codes: Mutex<std::collections::HashMap<String, i32>>,
    ran: watch::Sender<usize>,
    /// Pulls under way, and the most that there have been; each ends with a permit.
    pulls: Mutex<(usize, usize)>,
    pull_ends: tokio::sync::Semaphore,
}

impl Scripted {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            ids: AtomicU64::new(0),
            changes: watch::Sender::new(0),
            execs: Mutex::default(),
            codes: Mutex::default(),
            ran: watch::Sender::new(0),
            pulls: Mutex::default(),
            pull_ends: tokio::sync::Semaphore::new(0),
        })
    }

    fn answer(&self, command: &str, code: i32) {
        self.codes.lock().unwrap().insert(command.into(), code);
    }

    fn times(&self, command: &str) -> usize {
        let execs = self.execs.lock().unwrap();
        execs.iter().filter(|e| e[0] == command).count()
    }

    /// Waits until a command has been run that often.
    async fn has_run(&self, command: &str, times: usize) {
        let mut ran = self.ran.subscribe();
        let wait = ran.wait_for(|_| self.times(command) >= times);
        let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
        assert!(waited.is_ok(), "{command} ran {} times", self.times(command));
    }

    fn edit<T>(&self, change: impl FnOnce(&mut Inventory) -> T) -> T {
        let result = change(&mut self.state.lock().unwrap());
        self.changes.send_modify(|n| *n += 1);
        result
    }

    fn id(&self) -> String {
        format!("id{}", self.ids.fetch_add(1, Ordering::Relaxed))
    }

    fn exit(&self, id: &ContainerId, code: i32) {
        self.edit(|i| {
            for c in i.containers.iter_mut().filter(|c| c.id == *id) {
                if !matches!(c.state, ContainerState::Exited { .. }) {
                    c.state = ContainerState::Exited {
                        started_at: Some(Timestamp::now()),
                        finished_at: Timestamp::now(),
                        code,
                        reason: String::new(),
                        message: String::new(),
                    };
                }
            }
        });
    }
}

#[async_trait]
impl Runtime for Scripted {
    fn scheme(&self) -> &'static str {
        "scripted"
    }
    fn isolated(&self) -> bool {
        true
    }
    async fn version(&self) -> Result<RuntimeVersion, RuntimeError> {
        Ok(RuntimeVersion {
            name: "scripted".into(),
            version: "1".into(),
        })
    }
    async fn status(&self) -> Result<RuntimeStatus, RuntimeError> {
        Ok(RuntimeStatus {
            ready: true,
            network_ready: true,
            message: String::new(),
        })
    }
    async fn list(&self) -> Result<Inventory, RuntimeError> {
        Ok(self.state.lock().unwrap().clone())
    }
    async fn stats(&self, _: &Inventory) -> Result<crate::runtime::RuntimeUse, RuntimeError> {
        Ok(crate::runtime::RuntimeUse::default())
    }
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
    async fn run_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId, RuntimeError> {
        let id = SandboxId(self.id());
        let sandbox = Sandbox {
            id: id.clone(),
            pod_uid: config.uid.clone(),
            pod_name: config.name.clone(),
            pod_namespace: config.namespace.clone(),
            attempt: config.attempt,
            state: SandboxState::Ready,
            created_at: Timestamp::now(),
            ips: vec!["10.1.0.2".parse().unwrap()],
            host_network: config.namespaces.host_network,
        };
        self.edit(|i| i.sandboxes.push(sandbox));
        Ok(id)
    }
    async fn stop_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.edit(|i| {
            for s in i.sandboxes.iter_mut().filter(|s| s.id == *id) {
                s.state = SandboxState::NotReady;
            }
        });
        Ok(())
    }
    async fn remove_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        self.edit(|i| i.sandboxes.retain(|s| s.id != *id));
        Ok(())
    }
    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: &ContainerConfig,
        sandbox_config: &SandboxConfig,
    ) -> Result<ContainerId, RuntimeError> {
        let id = ContainerId(self.id());
        let container = Container {
            id: id.clone(),
            sandbox: sandbox.clone(),
            pod_uid: sandbox_config.uid.clone(),
            name: config.name.clone(),
            restart_count: config.annotations[labels::RESTART_COUNT].parse().unwrap(),
            spec_hash: config.annotations[labels::CONTAINER_HASH].clone(),
            state: ContainerState::Created,
            created_at: Timestamp::now(),
            image: config.image.clone(),
            image_ref: config.image_ref.clone(),
            log_path: sandbox_config.log_directory.join(&config.log_path),
            annotations: config.annotations.clone(),
            user: None,
        };
        self.edit(|i| i.containers.push(container));
        Ok(id)
    }
    async fn start_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        if let Some(code) = self.codes.lock().unwrap().get(START).copied() {
            self.exit(id, code);
            return Err(RuntimeError::Failed("it does not start".to_owned()));
        }
        self.edit(|i| {
            for c in i.containers.iter_mut().filter(|c| c.id == *id) {
                c.state = ContainerState::Running {
                    started_at: Timestamp::now(),
                };
            }
        });
        Ok(())
    }
    async fn stop_container(&self, id: &ContainerId, _: Duration) -> Result<(), RuntimeError> {
        self.exit(id, 0);
        Ok(())
    }
    async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.edit(|i| i.containers.retain(|c| c.id != *id));
        Ok(())
    }
    async fn image_status(&self, image: &str) -> Result<Option<Image>, RuntimeError> {
        let (id, none) = (image.to_owned(), String::new());
        Ok(Some(Image {
            id,
            tags: vec![],
            digests: vec![],
            size_bytes: 1,
            uid: None,
            username: none,
        }))
    }
    async fn pull_image(&self, image: &str, _: Option<&RegistryAuth>) -> Result<String, RuntimeError> {
        {
            let mut pulls = self.pulls.lock().unwrap();
            pulls.0 += 1;
            pulls.1 = pulls.1.max(pulls.0);
        }
        self.pull_ends.acquire().await.unwrap().forget();
        self.pulls.lock().unwrap().0 -= 1;
        Ok(image.to_owned())
    }
    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError> {
        Ok(vec![])
    }
    async fn exec_sync(
        &self,
        _: &ContainerId,
        command: &[String],
        _: Duration,
    ) -> Result<ExecOutput, RuntimeError> {
        self.execs.lock().unwrap().push(command.to_vec());
        self.ran.send_modify(|n| *n += 1);
        let code = self.codes.lock().unwrap().get(&command[0]).copied().unwrap_or(0);
        Ok(ExecOutput {
            stdout: b"out".to_vec(),
            stderr: vec![],
            code,
        })
    }
    async fn exec(&self, _: &ContainerId, _: &ExecRequest) -> Result<StreamEndpoint, RuntimeError> {
        Err(RuntimeError::NotFound("exec".into()))
    }
    async fn attach(&self, _: &ContainerId, _: &ExecRequest) -> Result<StreamEndpoint, RuntimeError> {
        Err(RuntimeError::NotFound("attach".into()))
    }
    async fn port_forward(&self, _: &SandboxId, _: &[u16]) -> Result<StreamEndpoint, RuntimeError> {
        Err(RuntimeError::NotFound("port-forward".into()))
    }
}

struct Site {
    dir: tempfile::TempDir,
    store: Store,
    runtime: Arc<Scripted>,
}

struct Running {
    pods: Pods,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        Self {
            dir,
            store,
            runtime: Scripted::new(),
        }
    }

    async fn put(&self, object: &Value) {
        let upsert = Upsert {
            kind: Kind::Pod.into(),
            uid: object["metadata"]["uid"].as_str().unwrap().into(),
            namespace: "default".into(),
            name: object["metadata"]["name"].as_str().unwrap().into(),
            hash: ContentHash::of(object).0.to_vec().into(),
            json_zstd: pack(object).unwrap().into(),
            expires_unix: 0,
        };
        self.store
            .apply(vec![change::Change::Upsert(upsert)])
            .await
            .unwrap();
    }

    async fn remove(&self) {
        let remove = Remove {
            kind: Kind::Pod.into(),
            uid: UID.into(),
        };
        self.store
            .apply(vec![change::Change::Remove(remove)])
            .await
            .unwrap();
    }

    fn start(&self) -> Running {
        let config = PodsConfig {
            node_name: "harbour".into(),
            node_ip: "10.0.0.1".parse().ok(),
            root_dir: self.dir.path().join("pods"),
            pod_log_dir: self.dir.path().join("logs"),
            ..PodsConfig::default()
        };
        let pods = Pods::new(
            config,
            self.store.clone(),
            self.runtime.clone(),
            Arc::new(SystemClock),
        );
        let stop = CancellationToken::new();
        let token = stop.clone();
        let running = pods.clone();
        let task = tokio::spawn(async move { running.run(token).await.unwrap() });
        Running { pods, stop, task }
    }

    /// Waits until the runtime looks like that.
    async fn until<T>(&self, mut seen: impl FnMut(&Inventory) -> Option<T>) -> T {
        let mut changes = self.runtime.changes();
        let wait = async {
            loop {
                if let Some(found) = seen(&self.runtime.state.lock().unwrap()) {
                    return found;
                }
                changes.changed().await.unwrap();
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
        waited.unwrap_or_else(|_| panic!("never: {:?}", self.runtime.state.lock().unwrap()))
    }

    async fn running(&self, restart_count: u32) -> Container {
        self.until(|i| {
            let up = |c: &&Container| {
                matches!(c.state, ContainerState::Running { .. }) && c.restart_count == restart_count
            };
            i.containers.iter().find(up).cloned()
        })
        .await
    }

    /// Waits for a status report that fits.
    async fn reported(&self, fits: impl Fn(&PodStatusReport, &Value) -> bool) {
        let mut moved = self.store.outbox_moved();
        let wait = async {
            loop {
                let reports = self.store.waiting_reports(0, 1000).unwrap();
                let hit = reports.iter().any(|r: &Report| match &r.report {
                    Some(report::Report::PodStatus(s)) => {
                        fits(s, &serde_json::from_slice(&s.status_json).unwrap())
                    }
                    _ => false,
                });
                if hit {
                    return;
                }
                moved.changed().await.unwrap();
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(20), wait).await;
        assert!(
            waited.is_ok(),
            "never reported: {:?}",
            self.store.waiting_reports(0, 1000).unwrap().last()
        );
    }
}

fn pod(policy: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "namespace": "default", "uid": UID, "generation": 1},
        "spec": {"restartPolicy": policy, "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "c", "image": "busybox:1", "imagePullPolicy": "IfNotPresent"}]}})
}

#[tokio::test]
async fn a_pod_starts_is_adopted_by_the_next_daemon_and_restarts_from_the_store_after_a_reboot() {
    let site = Site::new();
    site.put(&pod("Always")).await;
    let first = site.start();
    let before = site.running(0).await;
    site.reported(|_, s| s["phase"] == "Running" && s["podIP"] == "10.1.0.2")
        .await;
    first.stop().await;
    let second = site.start();
    site.reported(|_, s| s["phase"] == "Running").await;
    assert_eq!(site.running(0).await.id, before.id);
    second.stop().await;
    assert_eq!(site.running(0).await.id, before.id);
    // The reboot: the runtime has forgotten everything.
    site.runtime.edit(|i| *i = Inventory::default());
    let third = site.start();
    let after = site.running(1).await;
    assert_ne!(after.id, before.id);
    assert_eq!(site.runtime.state.lock().unwrap().sandboxes[0].attempt, 1);
    site.reported(|_, s| s["containerStatuses"][0]["restartCount"] == 1 && s["phase"] == "Running")
        .await;
    third.stop().await;
}

#[tokio::test]
async fn a_pod_that_succeeded_never_runs_again_even_after_a_reboot() {
    let site = Site::new();
    site.put(&pod("Never")).await;
    let first = site.start();
    let c = site.running(0).await;
    site.runtime.exit(&c.id, 0);
    site.reported(|_, s| s["phase"] == "Succeeded").await;
    first.stop().await;
    site.runtime.edit(|i| *i = Inventory::default());
    let before = site.store.state_list::<Value>("pods").unwrap();
    let second = site.start();
    // Another pod that has gone through its whole start is the fence: the first one has had its look.
    let mut other = pod("Always");
    other["metadata"]["uid"] = json!("another");
    other["metadata"]["name"] = json!("q");
    site.put(&other).await;
    let c = site.running(0).await;
    assert_eq!(c.pod_uid.as_str(), "another");
    second.stop().await;
    assert_eq!(site.runtime.state.lock().unwrap().containers.len(), 1);
    assert_eq!(before[0].1["end"]["succeeded"], true);
}

#[tokio::test]
async fn a_pod_that_has_ended_rests_without_a_worker_until_its_object_is_deleted() {
    let site = Site::new();
    site.put(&pod("Never")).await;
    let daemon = site.start();
    let c = site.running(0).await;
    site.runtime.exit(&c.id, 0);
    let mut summary = daemon.pods.summary();
    let rests = |s: &Summary| s.by_phase.get("Succeeded") == Some(&1);
    summary.wait_for(rests).await.unwrap();
    resting(&daemon.pods).await;
    // Until the object shows the end, each round reports it again.
    let reports = || site.store.waiting_reports(0, 1000).unwrap();
    let last = |reports: &[Report]| {
        let of_pod = |r: &&Report| matches!(&r.report, Some(report::Report::PodStatus(_)));
        reports.iter().filter(of_pod).map(|r| r.seq).max().unwrap()
    };
    let before = last(&reports());
    daemon.pods.report_all();
    let mut moved = site.store.outbox_moved();
    while last(&reports()) == before {
        moved.changed().await.unwrap();
    }
    let mut shown = pod("Never");
    shown["status"] = json!({"phase": "Succeeded"});
    site.put(&shown).await;
    // The next daemon lets it rest at once, and has nothing to say of it.
    daemon.stop().await;
    let daemon = site.start();
    let mut summary = daemon.pods.summary();
    summary.wait_for(|s| s.synced).await.unwrap();
    assert_eq!(daemon.pods.pod_count(), 0);
    let before = last(&reports());
    daemon.pods.report_all();
    let mut deleted = shown;
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    deleted["metadata"]["deletionGracePeriodSeconds"] = json!(1);
    site.put(&deleted).await;
    site.reported(|r, s| r.finished && s["phase"] == "Succeeded")
        .await;
    assert!(last(&reports()) > before);
    site.remove().await;
    site.until(|i| (i.containers.is_empty() && i.sandboxes.is_empty()).then_some(()))
        .await;
    daemon.stop().await;
}

/// Waits until no pod has a worker.
async fn resting(pods: &Pods) {
    let wait = async {
        while pods.pod_count() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait).await.unwrap();
}

#[tokio::test]
async fn a_deletion_stops_the_pod_reports_it_finished_and_the_removal_leaves_nothing() {
    let site = Site::new();
    site.put(&pod("Always")).await;
    let daemon = site.start();
    site.running(0).await;
    let mut deleted = pod("Always");
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    deleted["metadata"]["deletionGracePeriodSeconds"] = json!(1);
    site.put(&deleted).await;
    site.reported(|r, s| r.finished && s["phase"] == "Succeeded")
        .await;
    assert!(!site.dir.path().join("pods").join(UID).exists());
    site.remove().await;
    site.until(|i| (i.containers.is_empty() && i.sandboxes.is_empty()).then_some(()))
        .await;
    daemon.stop().await;
}

#[tokio::test]
async fn what_runs_without_a_pod_in_the_store_is_stopped_and_what_has_one_is_not() {
    let site = Site::new();
    site.put(&pod("Always")).await;
    let daemon = site.start();
    site.running(0).await;
    daemon.stop().await;
    site.runtime.edit(|i| {
        let mut orphan = i.containers[0].clone();
        orphan.pod_uid = "orphan".into();
        orphan.id = ContainerId("orphan".into());
        i.containers.push(orphan);
    });
    let daemon = site.start();
    site.until(|i| (i.containers.len() == 1).then_some(())).await;
    assert!(matches!(
        site.running(0).await.state,
        ContainerState::Running { .. }
    ));
    daemon.stop().await;
}

#[tokio::test]
async fn a_pre_stop_command_runs_once_before_the_pod_stops() {
    let site = Site::new();
    let mut deleted = pod("Always");
    deleted["spec"]["containers"][0]["lifecycle"] = json!({"preStop": {"exec": {"command": ["drain"]}}});
    site.put(&deleted).await;
    let daemon = site.start();
    site.running(0).await;
    assert!(site.runtime.execs.lock().unwrap().is_empty());
    deleted["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    site.put(&deleted).await;
    site.reported(|r, _| r.finished).await;
    assert_eq!(*site.runtime.execs.lock().unwrap(), [["drain"]]);
    daemon.stop().await;
}

fn probe(command: &str, rest: Value) -> Value {
    let mut probe = json!({"exec": {"command": [command]}, "periodSeconds": 1, "failureThreshold": 1});
    probe
        .as_object_mut()
        .unwrap()
        .extend(rest.as_object().unwrap().clone());
    probe
}

fn probed(probes: Value) -> Value {
    let mut probed = pod("Always");
    let container = probed["spec"]["containers"][0].as_object_mut().unwrap();
    container.extend(probes.as_object().unwrap().clone());
    probed
}

#[tokio::test]
async fn startup_gates_the_other_probes_and_a_failed_liveness_probe_restarts_the_container() {
    let site = Site::new();
    site.runtime.answer("up", 1);
    site.put(&probed(json!({
        "startupProbe": probe("up", json!({"failureThreshold": 100})),
        "readinessProbe": probe("ready", json!({})),
        "livenessProbe": probe("live", json!({})),
    })))
    .await;
    let daemon = site.start();
    site.runtime.has_run("up", 3).await;
    site.reported(|_, s| {
        let c = &s["containerStatuses"][0];
        c["state"]["running"].is_object() && c["started"] == false && c["ready"] == false
    })
    .await;
    assert_eq!((site.runtime.times("ready"), site.runtime.times("live")), (0, 0));
    site.runtime.answer("up", 0);
    site.reported(|_, s| {
        s["containerStatuses"][0]["started"] == true && s["containerStatuses"][0]["ready"] == true
    })
    .await;
    let ups = site.runtime.times("up");
    site.runtime.has_run("live", 2).await;
    assert_eq!(
        site.runtime.times("up"),
        ups,
        "a startup probe that has passed is not asked again"
    );
    site.runtime.answer("live", 1);
    site.running(1).await;
    site.runtime.answer("live", 0);
    site.reported(|_, s| {
        let c = &s["containerStatuses"][0];
        c["restartCount"] == 1 && c["ready"] == true
    })
    .await;
    daemon.stop().await;
}

#[tokio::test]
async fn ready_survives_the_daemon_and_is_kept_until_the_probe_says_otherwise() {
    let site = Site::new();
    let slow = json!({"periodSeconds": 3600, "initialDelaySeconds": 0});
    site.put(&probed(json!({"readinessProbe": probe("ready", slow)})))
        .await;
    let first = site.start();
    site.reported(|_, s| s["containerStatuses"][0]["ready"] == true)
        .await;
    first.stop().await;
    let asked = site.runtime.times("ready");
    let second = site.start();
    // Another pod that has gone through its whole start is the fence: the first one has had its look.
    let mut other = pod("Always");
    other["metadata"]["uid"] = json!("another");
    other["metadata"]["name"] = json!("q");
    site.put(&other).await;
    site.reported(|r, s| r.uid == "another" && s["phase"] == "Running")
        .await;
    second.stop().await;
    let record = site.store.state_get::<Value>("pods", UID).unwrap().unwrap();
    assert_eq!(record["containers"]["c"]["ready"], true, "{record}");
    assert_eq!(record["status"]["containerStatuses"][0]["ready"], true);
    assert_eq!(
        site.runtime.times("ready"),
        asked,
        "it was kept, not asked for again"
    );
}

#[test]
fn only_what_the_runtime_shows_may_be_passed_over() {
    let last = super::worker::Orders::default();
    let moved = super::worker::Orders {
        runtime_moves: 1,
        ..last.clone()
    };
    assert!(moved.only_runtime_moved(&last));
    let ending = Some(Arc::new(super::Ending {
        reason: String::new(),
        message: String::new(),
        grace: Duration::ZERO,
        disruption: None,
        event: false,
    }));
    let told = [
        super::worker::Orders {
            ending,
            ..last.clone()
        },
        super::worker::Orders {
            preempted: true,
            ..last.clone()
        },
        super::worker::Orders {
            removed: true,
            ..last.clone()
        },
        super::worker::Orders {
            wakes: 1,
            ..last.clone()
        },
        super::worker::Orders {
            pod: Some(Arc::default()),
            ..last.clone()
        },
    ];
    for orders in told {
        assert!(!orders.only_runtime_moved(&last), "{orders:?}");
    }
}

#[tokio::test]
async fn no_more_images_are_pulled_at_a_time_than_the_node_allows() {
    const PODS: usize = 5;
    let site = Site::new();
    let daemon = site.start();
    for number in 0..PODS {
        let mut object = pod("Always");
        let (name, container) = (format!("p{number}"), &mut object["spec"]["containers"][0]);
        container["image"] = json!(format!("registry/{name}:1"));
        container["imagePullPolicy"] = json!("Always");
        object["metadata"]["uid"] = json!(name);
        object["metadata"]["name"] = json!(name);
        site.put(&object).await;
    }
    // Each has said that it pulls before any of them may end.
    let mut moved = site.store.outbox_moved();
    let asking = || {
        let reports = site.store.waiting_reports(0, 1000).unwrap();
        let pulling =
            |r: &&Report| matches!(&r.report, Some(report::Report::Event(e)) if e.reason == "Pulling");
        reports.iter().filter(pulling).count()
    };
    while asking() < PODS {
        moved.changed().await.unwrap();
    }
    site.runtime.pull_ends.add_permits(PODS);
    site.until(|i| {
        let up = |c: &&Container| matches!(c.state, ContainerState::Running { .. });
        (i.containers.iter().filter(up).count() == PODS).then_some(())
    })
    .await;
    let most = PodsConfig::default().parallel_pulls;
    assert_eq!(*site.runtime.pulls.lock().unwrap(), (0, most));
    daemon.stop().await;
}

#[tokio::test]
async fn a_container_that_cannot_start_waits_for_its_back_off_like_one_that_crashes() {
    let site = Site::new();
    site.runtime.answer(START, 128);
    site.put(&pod("Always")).await;
    let daemon = site.start();
    site.reported(|_, s| {
        let c = &s["containerStatuses"][0];
        c["state"]["waiting"]["reason"] == "CrashLoopBackOff" && c["restartCount"] == 1
    })
    .await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_container_whose_post_start_hook_fails_is_stopped_and_says_so() {
    let site = Site::new();
    site.runtime.answer("greet", 7);
    site.put(&probed(
        json!({"lifecycle": {"postStart": {"exec": {"command": ["greet"]}}}}),
    ))
    .await;
    let daemon = site.start();
    site.reported(|_, s| {
        let c = &s["containerStatuses"][0];
        c["state"]["waiting"]["reason"] == "PostStartHookError"
            || c["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    })
    .await;
    assert!(site.runtime.times("greet") >= 1);
    site.runtime.edit(|i| {
        assert!(
            !i.containers
                .iter()
                .any(|c| matches!(c.state, ContainerState::Running { .. }))
        )
    });
    daemon.stop().await;
}
