//! The CRI runtime against a real containerd.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/containerd.rs"]
mod containerd;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use containerd::{BUSYBOX, Containerd};
use skerry_edge::runtime::cri::CriRuntime;
use skerry_edge::runtime::{
    Container, ContainerConfig, ContainerId, ContainerState, DnsConfig, ExecRequest, Mount, NamespaceOptions,
    Resources, Runtime, RuntimeError, SandboxConfig, SandboxId, SandboxState, Security, StreamEndpoint,
    labels,
};

const LIMIT: Duration = Duration::from_secs(30);

fn pod_labels(pod: &str) -> BTreeMap<String, String> {
    [
        (labels::POD_NAME, pod),
        (labels::POD_NAMESPACE, "default"),
        (labels::POD_UID, "11111111-2222-3333-4444-555555555555"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

fn sandbox_config(pod: &str, engine: &Containerd) -> SandboxConfig {
    SandboxConfig {
        name: pod.to_owned(),
        namespace: "default".to_owned(),
        uid: "11111111-2222-3333-4444-555555555555".into(),
        attempt: 0,
        hostname: pod.to_owned(),
        log_directory: engine.scratch(),
        dns: Some(DnsConfig {
            servers: vec!["10.0.0.10".to_owned()],
            searches: vec!["default.svc.cluster.local".to_owned()],
            options: vec!["ndots:5".to_owned()],
        }),
        ports: Vec::new(),
        labels: pod_labels(pod),
        annotations: BTreeMap::new(),
        cgroup_parent: engine.cgroup_parent(),
        namespaces: NamespaceOptions::default(),
        sysctls: BTreeMap::new(),
        privileged: false,
        runtime_handler: String::new(),
        supplemental_groups: Vec::new(),
        strict_groups: false,
        run_as_user: None,
        run_as_group: None,
        selinux: None,
        user_namespace: None,
    }
}

fn container_config(pod: &str, name: &str, image_ref: &str, script: &str) -> ContainerConfig {
    let mut labels = pod_labels(pod);
    labels.insert(labels::CONTAINER_NAME.to_owned(), name.to_owned());
    ContainerConfig {
        name: name.to_owned(),
        attempt: 0,
        image: BUSYBOX.to_owned(),
        image_ref: image_ref.to_owned(),
        command: vec!["sh".to_owned(), "-c".to_owned(), script.to_owned()],
        args: Vec::new(),
        working_dir: String::new(),
        env: vec![("GREETING".to_owned(), "good morning".to_owned())],
        mounts: Vec::new(),
        devices: Vec::new(),
        labels,
        annotations: BTreeMap::from([
            (labels::CONTAINER_HASH.to_owned(), "abcd".to_owned()),
            (labels::RESTART_COUNT.to_owned(), "3".to_owned()),
        ]),
        log_path: PathBuf::from(format!("{name}/0.log")),
        stdin: false,
        stdin_once: false,
        tty: false,
        target: None,
        stop_signal: String::new(),
        resources: Resources {
            cpu_shares: 102,
            memory_limit_bytes: 64 << 20,
            oom_score_adj: 1000,
            ..Resources::default()
        },
        security: Security {
            no_new_privileges: true,
            drop_capabilities: vec!["ALL".to_owned()],
            seccomp: "RuntimeDefault".to_owned(),
            ..Security::default()
        },
    }
}

/// Waits, driven by the change counter alone, until `wanted` finds something in a container. While the engine does not
/// answer, that it does again is such a change.
async fn wait_for<T>(runtime: &CriRuntime, id: &ContainerId, wanted: impl Fn(&Container) -> Option<T>) -> T {
    let mut changes = runtime.changes();
    let waiting = async {
        loop {
            changes.borrow_and_update();
            match runtime.list().await {
                Ok(inventory) => {
                    let container = inventory.containers.iter().find(|container| container.id == *id);
                    if let Some(found) = container.and_then(&wanted) {
                        return found;
                    }
                }
                Err(RuntimeError::Unavailable { .. }) => {}
                Err(error) => panic!("{error}"),
            }
            changes.changed().await.unwrap();
        }
    };
    tokio::time::timeout(LIMIT, waiting)
        .await
        .expect("the container reaches the state")
}

fn exit_code(container: &Container) -> Option<i32> {
    match container.state {
        ContainerState::Exited { code, .. } => Some(code),
        _ => None,
    }
}

async fn image_ref(runtime: &CriRuntime) -> String {
    runtime
        .image_status(BUSYBOX)
        .await
        .unwrap()
        .expect("the image was imported")
        .id
}

/// A pod with one container that was started.
async fn run(runtime: &CriRuntime, pod: &SandboxConfig, script: &str) -> (SandboxId, ContainerId) {
    fs::create_dir_all(pod.log_directory.join("main")).unwrap();
    let sandbox = runtime.run_sandbox(pod).await.unwrap();
    let config = container_config(&pod.name, "main", &image_ref(runtime).await, script);
    let container = runtime.create_container(&sandbox, &config, pod).await.unwrap();
    runtime.start_container(&container).await.unwrap();
    (sandbox, container)
}

#[tokio::test]
async fn without_an_engine_every_call_names_the_socket_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("engine.sock");
    let runtime = CriRuntime::connect(socket.clone(), "test");
    let error = runtime.list().await.unwrap_err();
    assert!(matches!(error, RuntimeError::Unavailable { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains(socket.to_str().unwrap()), "{message}");
    assert!(message.contains("No such file"), "{message}");
    assert!(message.contains("check that the engine runs"), "{message}");
    assert!(matches!(
        runtime.version().await,
        Err(RuntimeError::Unavailable { .. })
    ));
    assert_eq!(runtime.scheme(), "containerd");
}

#[tokio::test]
async fn a_pod_runs_logs_ends_and_is_still_known_to_a_new_daemon() {
    let engine = Containerd::start(101);
    let runtime = CriRuntime::connect(engine.socket(), "test");
    assert_eq!(runtime.version().await.unwrap().name, "containerd");
    let status = runtime.status().await.unwrap();
    assert!(status.ready && status.network_ready, "{status:?}");

    let pod = sandbox_config("short", &engine);
    let script = "echo $GREETING from $(hostname); cat /etc/resolv.conf; exit 7";
    let (sandbox, container) = run(&runtime, &pod, script).await;
    assert_eq!(wait_for(&runtime, &container, exit_code).await, 7);

    let seen = runtime.list().await.unwrap();
    assert_eq!(seen.sandboxes.len(), 1);
    assert_eq!(seen.sandboxes[0].id, sandbox);
    assert_eq!(seen.sandboxes[0].state, SandboxState::Ready);
    assert_eq!(seen.sandboxes[0].pod_name, "short");
    assert!(
        seen.sandboxes[0].ips[0].to_string().starts_with("10.88.101."),
        "{seen:?}"
    );
    let ended = &seen.containers[0];
    assert_eq!((ended.image.as_str(), ended.name.as_str()), (BUSYBOX, "main"));
    assert_eq!((ended.restart_count, ended.spec_hash.as_str()), (3, "abcd"));
    assert_eq!(ended.annotations.len(), 2, "{:?}", ended.annotations);
    assert!(matches!(&ended.state, ContainerState::Exited { reason, .. } if reason == "Error"));

    assert_eq!(ended.log_path, engine.scratch().join("main/0.log"));
    let log = fs::read_to_string(&ended.log_path).unwrap();
    assert!(log.contains("stdout F good morning from short"), "{log}");
    assert!(log.contains("nameserver 10.0.0.10"), "{log}");

    drop(runtime);
    let again = CriRuntime::connect(engine.socket(), "test");
    assert_eq!(again.list().await.unwrap(), seen);
    let other = CriRuntime::connect(engine.socket(), "other");
    assert_eq!(other.list().await.unwrap().containers, []);

    for _ in 0..2 {
        again.stop_container(&container, Duration::ZERO).await.unwrap();
        again.remove_container(&container).await.unwrap();
        again.stop_sandbox(&sandbox).await.unwrap();
        again.remove_sandbox(&sandbox).await.unwrap();
    }
    assert_eq!(again.list().await.unwrap(), Default::default());
}

#[tokio::test]
async fn commands_run_in_a_container_and_streams_have_a_url() {
    let engine = Containerd::start(102);
    let runtime = CriRuntime::connect(engine.socket(), "test");
    let pod = sandbox_config("long", &engine);
    let (sandbox, container) = run(&runtime, &pod, "exec sleep 1000").await;

    let command = ["sh", "-c", "echo out; echo err >&2; exit 3"].map(str::to_owned);
    let output = runtime.exec_sync(&container, &command, LIMIT).await.unwrap();
    assert_eq!(
        (output.stdout.as_slice(), output.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
    assert_eq!(output.code, 3);
    let slow = ["sleep", "100"].map(str::to_owned);
    let outcome = runtime.exec_sync(&container, &slow, Duration::from_secs(1)).await;
    assert!(matches!(outcome, Err(RuntimeError::Timeout(_))), "{outcome:?}");

    let request = ExecRequest {
        command: vec!["cat".to_owned()],
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };
    for endpoint in [
        runtime.exec(&container, &request).await.unwrap(),
        runtime.attach(&container, &request).await.unwrap(),
        runtime.port_forward(&sandbox, &[80]).await.unwrap(),
    ] {
        assert!(matches!(endpoint, StreamEndpoint::Url(url) if url.starts_with("http://127.0.0.1:")));
    }

    // PID 1 of its namespace ignores a SIGTERM that it does not handle, so the grace runs out.
    runtime
        .stop_container(&container, Duration::from_secs(1))
        .await
        .unwrap();
    assert_eq!(wait_for(&runtime, &container, exit_code).await, 137);
}

#[tokio::test]
async fn what_is_not_there_is_an_error_of_its_own_kind() {
    let engine = Containerd::start(103);
    let runtime = CriRuntime::connect(engine.socket(), "test");
    assert_eq!(runtime.image_status("skerry.test/absent:1").await.unwrap(), None);
    let tags: Vec<_> = runtime
        .list_images()
        .await
        .unwrap()
        .into_iter()
        .flat_map(|image| image.tags)
        .collect();
    assert!(tags.contains(&BUSYBOX.to_owned()), "{tags:?}");

    let pod = sandbox_config("broken", &engine);
    fs::create_dir_all(pod.log_directory.join("main")).unwrap();
    let sandbox = runtime.run_sandbox(&pod).await.unwrap();
    let absent = container_config("broken", "main", "skerry.test/absent:1", "true");
    let outcome = runtime.create_container(&sandbox, &absent, &pod).await;
    assert!(matches!(outcome, Err(RuntimeError::NotFound(_))), "{outcome:?}");

    let mut no_program = container_config("broken", "main", &image_ref(&runtime).await, "");
    no_program.command = vec!["/no/such/program".to_owned()];
    let container = runtime
        .create_container(&sandbox, &no_program, &pod)
        .await
        .unwrap();
    let outcome = runtime.start_container(&container).await;
    assert!(matches!(outcome, Err(RuntimeError::Invalid(_))), "{outcome:?}");
    let command = ["true".to_owned()];
    let outcome = runtime
        .exec_sync(&ContainerId("absent".to_owned()), &command, LIMIT)
        .await;
    assert!(matches!(outcome, Err(RuntimeError::NotFound(_))), "{outcome:?}");
}

#[tokio::test]
async fn a_name_left_taken_by_an_interrupted_creation_is_freed_but_a_running_container_is_kept() {
    let engine = Containerd::start(104);
    let runtime = CriRuntime::connect(engine.socket(), "test");
    let pod = sandbox_config("again", &engine);
    fs::create_dir_all(pod.log_directory.join("main")).unwrap();
    let lost = runtime.run_sandbox(&pod).await.unwrap();
    let sandbox = runtime.run_sandbox(&pod).await.unwrap();
    assert_ne!(sandbox, lost);

    let config = container_config("again", "main", &image_ref(&runtime).await, "exec sleep 1000");
    let lost = runtime.create_container(&sandbox, &config, &pod).await.unwrap();
    let container = runtime.create_container(&sandbox, &config, &pod).await.unwrap();
    assert_ne!(container, lost);

    runtime.start_container(&container).await.unwrap();
    assert!(runtime.create_container(&sandbox, &config, &pod).await.is_err());
    assert!(runtime.run_sandbox(&pod).await.is_err());
    let listed = runtime.list().await.unwrap();
    assert_eq!(listed.containers.len(), 1);
    assert!(matches!(
        listed.containers[0].state,
        ContainerState::Running { .. }
    ));
}

#[tokio::test]
async fn after_a_restart_of_the_engine_the_same_daemon_goes_on_and_sees_changes() {
    let mut engine = Containerd::start(105);
    let runtime = CriRuntime::connect(engine.socket(), "test");
    let pod = sandbox_config("survivor", &engine);
    let (_, container) = run(&runtime, &pod, "exec sleep 1000").await;
    let running =
        |container: &Container| matches!(container.state, ContainerState::Running { .. }).then_some(());
    wait_for(&runtime, &container, running).await;
    let before = runtime.list().await.unwrap();

    engine.restart();
    wait_for(&runtime, &container, running).await;
    assert_eq!(runtime.list().await.unwrap(), before);
    // Ended by somebody else: only the background task can notice.
    let other = CriRuntime::connect(engine.socket(), "test");
    let stop = other.stop_container(&container, Duration::ZERO);
    let (code, stopped) = tokio::join!(wait_for(&runtime, &container, exit_code), stop);
    stopped.unwrap();
    assert_eq!(code, 137);
}

#[tokio::test]
async fn mounts_identity_limits_and_the_hosts_network_reach_the_container() {
    let engine = Containerd::start(106);
    let runtime = CriRuntime::connect(engine.socket(), "test");
    let mut pod = sandbox_config("host", &engine);
    pod.namespaces.host_network = true;
    pod.hostname = String::new();
    let volume = engine.scratch().join("volume");
    fs::create_dir_all(&volume).unwrap();
    fs::write(volume.join("file"), "from the host").unwrap();
    fs::create_dir_all(pod.log_directory.join("main")).unwrap();
    let sandbox = runtime.run_sandbox(&pod).await.unwrap();
    let script = "cat /volume/file; touch /volume/new || echo read-only; id -u; id -g; id -G; \
                  readlink /proc/self/ns/net; grep NoNewPrivs /proc/self/status; grep CapEff /proc/self/status; \
                  cat /proc/self/oom_score_adj; cat /sys/fs/cgroup/memory/memory.limit_in_bytes \
                  /sys/fs/cgroup/memory.max 2>/dev/null; cat /proc/kcore | head -c 1 | wc -c; true";
    let mut config = container_config("host", "main", &image_ref(&runtime).await, script);
    config.mounts = vec![Mount {
        container_path: "/volume".to_owned(),
        host_path: volume.clone(),
        readonly: true,
        ..Mount::default()
    }];
    config.security.run_as_user = Some(1234);
    config.security.run_as_group = Some(2345);
    config.security.supplemental_groups = vec![3456];
    let container = runtime.create_container(&sandbox, &config, &pod).await.unwrap();
    runtime.start_container(&container).await.unwrap();
    assert_eq!(wait_for(&runtime, &container, exit_code).await, 0);

    let seen = runtime.list().await.unwrap();
    assert!(seen.sandboxes[0].host_network);
    assert!(seen.sandboxes[0].ips.is_empty());
    let log = fs::read_to_string(&seen.containers[0].log_path).unwrap();
    let network = fs::read_link("/proc/self/ns/net").unwrap();
    let memory = (64 << 20).to_string();
    for expected in [
        "from the host",
        "read-only",
        "F 1234\n",
        "F 2345\n",
        "2345 3456\n",
        network.to_str().unwrap(),
        "NoNewPrivs:\t1",
        "CapEff:\t0000000000000000",
        "F 1000\n",
        &memory,
    ] {
        assert!(log.contains(expected), "{expected:?} is not in:\n{log}");
    }
    assert!(!volume.join("new").exists());
}
