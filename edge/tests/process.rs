//! The process runtime with real processes.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use skerry_edge::runtime::process::ProcessRuntime;
use skerry_edge::runtime::{
    Container, ContainerConfig, ContainerId, ContainerState, ExecRequest, Inventory, Mount, NamespaceOptions,
    Resources, Runtime, RuntimeError, SandboxConfig, SandboxId, Security, StreamEndpoint,
};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;

const DEADLINE: Duration = Duration::from_secs(30);

struct Site {
    dir: TempDir,
    runtime: ProcessRuntime,
    pod: SandboxConfig,
    sandbox: SandboxId,
}

fn open(root: &Path) -> ProcessRuntime {
    let shim: Vec<OsString> = vec![env!("CARGO_BIN_EXE_skerry-edge").into(), "shim".into()];
    ProcessRuntime::new(root, shim).unwrap()
}

impl Site {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = open(&dir.path().join("state"));
        let pod = SandboxConfig {
            name: "web".into(),
            namespace: "default".into(),
            uid: "uid-1".into(),
            attempt: 0,
            hostname: String::new(),
            log_directory: dir.path().join("logs"),
            dns: None,
            ports: vec![],
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            cgroup_parent: String::new(),
            namespaces: NamespaceOptions::default(),
            sysctls: BTreeMap::new(),
            privileged: false,
            runtime_handler: String::new(),
            supplemental_groups: vec![],
            strict_groups: false,
            run_as_user: None,
            run_as_group: None,
            selinux: None,
            user_namespace: None,
        };
        let sandbox = runtime.run_sandbox(&pod).await.unwrap();
        Self {
            dir,
            runtime,
            pod,
            sandbox,
        }
    }

    async fn create(&self, config: &ContainerConfig) -> Result<ContainerId, RuntimeError> {
        self.runtime
            .create_container(&self.sandbox, config, &self.pod)
            .await
    }

    async fn start(&self, config: &ContainerConfig) -> ContainerId {
        let id = self.create(config).await.unwrap();
        self.runtime.start_container(&id).await.unwrap();
        id
    }

    async fn find(&self, id: &ContainerId) -> Container {
        let list = self.runtime.list().await.unwrap();
        list.containers.into_iter().find(|c| c.id == *id).unwrap()
    }

    /// Waits on the runtime's change counter until the container has ended.
    async fn ended(&self, id: &ContainerId) -> ContainerState {
        let mut changes = self.runtime.changes();
        let wait = async {
            loop {
                let state = self.find(id).await.state;
                if matches!(state, ContainerState::Exited { .. }) {
                    return state;
                }
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.unwrap()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("logs/main/0.log")).unwrap()
    }

    /// Waits until the container's log holds the text.
    async fn logged(&self, text: &str) {
        let mut ticks = tokio::time::interval(Duration::from_millis(10));
        let wait = async {
            while !fs::read_to_string(self.dir.path().join("logs/main/0.log")).is_ok_and(|l| l.contains(text))
            {
                ticks.tick().await;
            }
        };
        tokio::time::timeout(DEADLINE, wait).await.unwrap();
    }
}

fn shell(script: &str) -> ContainerConfig {
    ContainerConfig {
        name: "main".into(),
        attempt: 0,
        image: "busybox".into(),
        image_ref: "busybox".into(),
        command: vec!["sh".into(), "-c".into(), script.into()],
        args: vec![],
        working_dir: String::new(),
        env: vec![("GREETING".into(), "hello".into())],
        mounts: vec![],
        devices: vec![],
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        log_path: PathBuf::from("main/0.log"),
        stdin: false,
        stdin_once: false,
        tty: false,
        target: None,
        stop_signal: String::new(),
        resources: Resources::default(),
        security: Security::default(),
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

fn exit_of(state: &ContainerState) -> (i32, &str) {
    match state {
        ContainerState::Exited { code, reason, .. } => (*code, reason),
        other => panic!("not ended: {other:?}"),
    }
}

fn argv(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}

#[tokio::test]
async fn output_is_logged_in_cri_format_and_the_exit_code_is_kept() {
    let site = Site::new().await;
    let id = site.start(&shell("echo $GREETING; echo oops >&2; exit 3")).await;
    assert_eq!(exit_of(&site.ended(&id).await), (3, "Error"));
    let log = site.log();
    assert!(log.lines().any(|l| l.ends_with("Z stdout F hello")), "{log}");
    assert!(log.lines().any(|l| l.ends_with("Z stderr F oops")), "{log}");
    let id = site.start(&shell("true")).await;
    assert_eq!(exit_of(&site.ended(&id).await), (0, "Completed"));
}

#[tokio::test]
async fn a_container_outlives_the_runtime_and_its_exit_is_seen_by_the_next() {
    let mut site = Site::new().await;
    let id = site.start(&shell("echo up; exec sleep 1000")).await;
    let before = site.runtime.list().await.unwrap();
    site.runtime = open(&site.dir.path().join("state"));
    assert_eq!(site.runtime.list().await.unwrap(), before);
    assert!(matches!(
        site.find(&id).await.state,
        ContainerState::Running { .. }
    ));
    let out = site
        .runtime
        .exec_sync(&id, &argv(&["sh", "-c", "echo $GREETING"]), DEADLINE)
        .await
        .unwrap();
    assert_eq!((out.code, out.stdout.as_slice()), (0, b"hello\n".as_slice()));
    site.runtime.stop_container(&id, Duration::ZERO).await.unwrap();
    assert!(exit_of(&site.ended(&id).await).0 > 128);
    site.runtime.remove_sandbox(&site.sandbox).await.unwrap();
    assert_eq!(site.runtime.list().await.unwrap(), Inventory::default());
}

#[tokio::test]
async fn a_container_that_handles_the_stop_signal_ends_by_itself() {
    let site = Site::new().await;
    let id = site
        .start(&shell(
            "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done",
        ))
        .await;
    site.logged("up").await;
    site.runtime.stop_container(&id, DEADLINE).await.unwrap();
    assert_eq!(exit_of(&site.find(&id).await.state), (7, "Error"));
    assert!(site.log().contains("stdout F bye"));
    site.runtime.stop_container(&id, DEADLINE).await.unwrap();
    site.runtime.remove_container(&id).await.unwrap();
    site.runtime.remove_container(&id).await.unwrap();
}

#[tokio::test]
async fn a_container_that_ignores_the_stop_signal_is_killed_with_its_descendants() {
    let site = Site::new().await;
    let id = site
        .start(&shell(
            "trap '' TERM; setsid sleep 4321 & echo child $!; while :; do sleep 0.05; done",
        ))
        .await;
    site.logged("child ").await;
    let log = site.log();
    let child: i32 = log.trim().rsplit(' ').next().unwrap().parse().unwrap();
    site.runtime
        .stop_container(&id, Duration::from_millis(100))
        .await
        .unwrap();
    assert_eq!(exit_of(&site.find(&id).await.state), (137, "Error"));
    assert!(!Path::new(&format!("/proc/{child}")).exists());
}

#[tokio::test]
async fn volumes_are_at_their_mount_paths_and_nothing_appears_on_the_host() {
    if !is_root() {
        return;
    }
    let site = Site::new().await;
    let (data, token) = (site.dir.path().join("data"), site.dir.path().join("token"));
    for dir in [&data, &token] {
        fs::create_dir(dir).unwrap();
    }
    fs::write(token.join("token"), "secret").unwrap();
    let mount = |path: &str, host: &Path, readonly| Mount {
        container_path: path.into(),
        host_path: host.to_owned(),
        readonly,
        ..Mount::default()
    };
    let mut config = shell(
        "cat /var/run/secrets/skerry-test/token; echo; echo x > /skerry-test-data/out; \
         echo x > /var/run/secrets/skerry-test/new || echo refused; echo up; exec sleep 1000",
    );
    config.mounts = vec![
        mount("/var/run/secrets/skerry-test", &token, true),
        mount("/skerry-test-data", &data, false),
    ];
    let id = site.start(&config).await;
    site.logged("up").await;
    assert!(site.log().contains("stdout F secret"), "{}", site.log());
    assert!(site.log().contains("stdout F refused"), "{}", site.log());
    assert_eq!(fs::read_to_string(data.join("out")).unwrap(), "x\n");
    let seen = site
        .runtime
        .exec_sync(&id, &argv(&["cat", "/skerry-test-data/out"]), DEADLINE)
        .await
        .unwrap();
    assert_eq!(seen.stdout, b"x\n");
    assert!(!Path::new("/skerry-test-data").exists());
    assert!(!Path::new("/var/run/secrets/skerry-test").exists());
    site.runtime.remove_sandbox(&site.sandbox).await.unwrap();
}

#[tokio::test]
async fn identity_and_powers_are_those_of_the_pod() {
    if !is_root() {
        return;
    }
    let site = Site::new().await;
    let mut config = shell("id -u; id -g; grep -E 'CapBnd|NoNewPrivs' /proc/self/status");
    config.security = Security {
        run_as_user: Some(65_534),
        run_as_group: Some(4_242),
        no_new_privileges: true,
        drop_capabilities: vec!["ALL".into()],
        ..Security::default()
    };
    let id = site.start(&config).await;
    site.ended(&id).await;
    let log = site.log();
    for expected in ["F 65534", "F 4242", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(log.contains(expected), "{expected}: {log}");
    }
}

#[tokio::test]
async fn exec_with_a_terminal_has_one() {
    let site = Site::new().await;
    let id = site.start(&shell("exec sleep 1000")).await;
    let request = ExecRequest {
        command: argv(&["tty"]),
        stdin: true,
        stdout: true,
        stderr: false,
        tty: true,
    };
    let StreamEndpoint::Process(mut process) = site.runtime.exec(&id, &request).await.unwrap() else {
        panic!("not a process")
    };
    let mut text = String::new();
    let mut out = process.stdout.take().unwrap();
    tokio::time::timeout(DEADLINE, out.read_to_string(&mut text))
        .await
        .unwrap()
        .unwrap();
    assert!(text.starts_with("/dev/pts/"), "{text}");
    assert_eq!(process.exit.await.unwrap(), 0);
    site.runtime.remove_sandbox(&site.sandbox).await.unwrap();
}

#[tokio::test]
async fn a_command_that_does_not_exist_is_a_start_error() {
    let site = Site::new().await;
    let mut config = shell("");
    config.command = argv(&["no-such-thing"]);
    let id = site.create(&config).await.unwrap();
    let error = site.runtime.start_container(&id).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "exec: \"no-such-thing\": executable file not found in $PATH"
    );
    assert_eq!(exit_of(&site.find(&id).await.state), (128, "StartError"));
}

#[tokio::test]
async fn a_container_without_a_command_is_invalid() {
    let site = Site::new().await;
    let mut config = shell("");
    config.command.clear();
    let error = site.create(&config).await.unwrap_err();
    assert!(
        matches!(&error, RuntimeError::Invalid(m) if m.contains("it has no images")),
        "{error}"
    );
}

#[tokio::test]
async fn garbled_state_of_one_container_costs_no_other() {
    let site = Site::new().await;
    let good = site.create(&shell("true")).await.unwrap();
    let garbled = site.dir.path().join("state/containers/deadbeef");
    fs::create_dir(&garbled).unwrap();
    fs::write(garbled.join("container.json"), "{\"sandbox\":").unwrap();
    let list = site.runtime.list().await.unwrap();
    assert_eq!(list.containers.iter().map(|c| &c.id).collect::<Vec<_>>(), [&good]);
}

#[tokio::test]
async fn a_container_of_an_earlier_boot_is_lost_once_and_for_all() {
    let site = Site::new().await;
    let id = site.create(&shell("true")).await.unwrap();
    let dir = site.dir.path().join("state/containers").join(&id.0);
    let me = std::process::id();
    let run = format!(
        r#"{{"shim":{{"pid":{me},"startTicks":1}},"process":{{"pid":{me},"startTicks":1}},"bootId":"other",
        "startedAt":"2026-01-01T00:00:00Z","userNamespace":false,"mountNamespace":false,"cgroups":[],"notes":[]}}"#
    );
    fs::write(dir.join("run.json"), run).unwrap();
    let first = site.find(&id).await.state;
    assert_eq!(exit_of(&first), (255, "Unknown"));
    assert_eq!(site.find(&id).await.state, first);
}

#[tokio::test]
async fn an_ordinary_user_can_run_a_container() {
    if !is_root() {
        return; // Then every other test shows it.
    }
    let site = Site::new().await;
    let id = site
        .create(&shell("echo as $(id -u); ls /var/run/secrets/skerry-test; true"))
        .await
        .unwrap();
    // A copy that the user can reach: the build directory may be root's alone.
    let dir = site.dir.path();
    let copy = dir.join("skerry-edge");
    fs::copy(env!("CARGO_BIN_EXE_skerry-edge"), &copy).unwrap();
    for path in [
        dir.to_owned(),
        copy.clone(),
        dir.join("state"),
        dir.join("state/containers"),
    ] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let container = dir.join("state/containers").join(&id.0);
    // The volume is added here, as the record would hold it.
    let token = dir.join("token");
    fs::create_dir(&token).unwrap();
    fs::write(token.join("present"), "").unwrap();
    let volume = format!(
        r#""mounts":[{{"containerPath":"/var/run/secrets/skerry-test","hostPath":"{}","readonly":true,"followHost":false}}]"#,
        token.display()
    );
    let record = fs::read_to_string(container.join("container.json")).unwrap();
    fs::write(
        container.join("container.json"),
        record.replace("\"mounts\":[]", &volume),
    )
    .unwrap();
    for path in [container.clone(), container.join("container.json")] {
        std::os::unix::fs::chown(path, Some(65_534), Some(65_534)).unwrap();
    }
    let mut command = tokio::process::Command::new(&copy);
    command
        .arg("shim")
        .arg("run")
        .arg(&container)
        .uid(65_534)
        .gid(65_534);
    let out = tokio::time::timeout(DEADLINE, command.output())
        .await
        .unwrap()
        .unwrap();
    assert!(out.status.success(), "{out:?}");
    assert_eq!(
        exit_of(&site.find(&id).await.state).0,
        0,
        "{:?} {out:?}",
        site.find(&id).await.state
    );
    assert!(site.log().contains("stdout F as "), "{}", site.log());
    let log = site.log();
    assert!(
        log.contains("stdout F present") || log.contains("volumes are not mounted"),
        "{log}"
    );
    assert!(!Path::new("/var/run/secrets/skerry-test").exists());
}
