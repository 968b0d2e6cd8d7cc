//! Containers as supervised processes of the host: no container engine, no images, no root needed.
//!
//! # Layout
//!
//! ```text
//! <root>/sandboxes/<id>/sandbox.json       what the sandbox is; a sandbox is only a record
//! <root>/containers/<id>/container.json    what the container is and how to run it   (daemon, once)
//! <root>/containers/<id>/run.json          shim, process, boot, start time           (shim, once)
//! <root>/containers/<id>/exit.json         exit code, times, reason                  (shim, once)
//! <root>/containers/<id>/{upper,work,rootfs,memory}/                                 mounts, see [`rootfs`]
//! ```
//!
//! Every record is written aside, synced and renamed. A container without `run.json` and `exit.json` was made and not
//! started; with `exit.json` it has ended, whatever else is there; with `run.json` alone it runs if its process is
//! alive: same number, same start time, same boot. If not, it was lost (power cut, killed shim): exit code 255, reason
//! `Unknown`. A record that cannot be read costs only its own container.
//!
//! # Supervision
//!
//! Each container has a [`shim`]: the daemon's binary re-executed in a session of its own. It starts the program, copies
//! its output into the CRI log file, waits for it, kills what it left behind and writes `exit.json`. The daemon may be
//! killed and started again at any time. A service manager must therefore only stop the daemon's main process (systemd:
//! `KillMode=process`).
//!
//! # What differs from a container engine
//!
//! * Network, PID and IPC namespaces, hostname and resolver are the host's; `hostNetwork: true` or not. Published ports
//!   need nothing, the process listens on the host itself. Sysctls are refused.
//! * There are no images: `command` is required and is found on the host. Every image name counts as present.
//! * As root the file system is the host's with private writes, and volumes at their mount paths. As an ordinary user
//!   with user namespaces the same holds, but writes outside of volumes go to the host as far as that user may.
//!   Without user namespaces volumes are *not* mounted; the container's log says so in its first line.
//! * Capabilities are limited to the set that container engines grant, unless privileged. Seccomp: `RuntimeDefault` is
//!   this runtime's default, which is unconfined; `Localhost` profiles are refused.
//! * As an ordinary user the pod's `runAsUser` is the number that the process sees; on the host it is the daemon's user.
//! * A `runAsUser` without `runAsGroup` gets the group that the host's user database gives, else the group of the same
//!   number.
//! * `port_forward` connects to the host's loopback, where the pod's ports are; and everybody else's.

mod attach;
mod attached;
mod child;
mod exec;
mod launch;
mod log;
mod record;
mod reopen;
mod rootfs;
pub mod shim;
mod store;
mod usage;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::AsyncReadExt;
use tokio::process::Command;
use tokio::sync::watch;

use self::record::{ContainerRecord, ExitRecord, ProcessIdentity, RunRecord, SandboxRecord};
use self::store::Store;
use super::{
    ContainerConfig, ContainerId, ExecOutput, ExecRequest, Features, Image, ImageFs, Inventory, RegistryAuth,
    Resources, Runtime, RuntimeError, RuntimeStatus, RuntimeUse, RuntimeVersion, SandboxConfig, SandboxId,
    StreamEndpoint,
};

/// Names of the records in a state directory.
mod files {
    pub(super) const SANDBOX: &str = "sandbox.json";
    pub(super) const CONTAINER: &str = "container.json";
    pub(super) const RUN: &str = "run.json";
    pub(super) const EXIT: &str = "exit.json";
}

/// Scheme of container ids, and the runtime's name.
const NAME: &str = "process";
/// How often exits of containers that an earlier daemon started are looked for.
const POLL: Duration = Duration::from_millis(500);
/// How often a stop looks whether the container has ended.
const STOP_POLL: Duration = Duration::from_millis(20);
/// A shim that has not started its program by then is stuck.
const START_LIMIT: Duration = Duration::from_secs(30);
/// The shim's time to clean up after a kill.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Runs containers as processes of the host.
pub struct ProcessRuntime {
    shared: Arc<Shared>,
    shim_command: Vec<OsString>,
}

struct Shared {
    store: Store,
    changes: watch::Sender<u64>,
}

impl Shared {
    fn bump(&self) {
        self.changes.send_modify(|n| *n += 1);
    }
}

impl ProcessRuntime {
    /// Opens or makes the state below `root`. `shim_command` is what starts [`shim::main`], normally the daemon's own
    /// executable and `shim`. Must be called in a tokio runtime.
    ///
    /// # Errors
    /// When the directories can neither be found nor made.
    pub fn new(root: &Path, shim_command: Vec<OsString>) -> Result<Self, RuntimeError> {
        let store = Store::open(root).map_err(|e| {
            RuntimeError::Failed(format!(
                "cannot make the process runtime's directory {}: {e}",
                root.display()
            ))
        })?;
        let shared = Arc::new(Shared {
            store,
            changes: watch::Sender::new(0),
        });
        let weak = Arc::downgrade(&shared);
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(POLL);
            loop {
                ticks.tick().await;
                let Some(shared) = weak.upgrade() else { return };
                if shared.store.something_ended() {
                    shared.bump();
                }
            }
        });
        Ok(Self { shared, shim_command })
    }

    fn store(&self) -> &Store {
        &self.shared.store
    }

    fn shim(&self, verb: &str, dir: &Path) -> Result<Command, RuntimeError> {
        let (program, args) = self
            .shim_command
            .split_first()
            .ok_or_else(|| RuntimeError::Failed("the process runtime was given no shim command".into()))?;
        let mut command = Command::new(program);
        command.args(args).arg(verb).arg(dir);
        Ok(command)
    }

    /// Ends a container: signals its process, then waits for the shim's `exit.json`.
    async fn end(&self, id: &str, grace: Duration) -> Result<(), RuntimeError> {
        let dir = self.store().container_dir(id)?;
        let failed =
            |e: io::Error| RuntimeError::Failed(format!("cannot read the state of container {id}: {e}"));
        if record::read::<ExitRecord>(&dir, files::EXIT)
            .ok()
            .flatten()
            .is_some()
        {
            return Ok(());
        }
        let Some(run) = record::read::<RunRecord>(&dir, files::RUN).map_err(failed)? else {
            return Ok(());
        };
        if run.boot_id != record::boot_id() {
            return Ok(());
        }
        let asked = record::read::<ContainerRecord>(&dir, files::CONTAINER)
            .ok()
            .flatten();
        let asked = asked.and_then(|record| record.stop_signal.parse().ok());
        signal(&run.process, asked.unwrap_or(Signal::SIGTERM));
        if !ended_within(&dir, &run, grace).await {
            signal(&run.process, Signal::SIGKILL);
            if !ended_within(&dir, &run, KILL_LIMIT).await {
                return Err(RuntimeError::Timeout(format!("killing container {id}")));
            }
        }
        self.shared.bump();
        Ok(())
    }

    async fn remove(&self, id: &str) -> Result<(), RuntimeError> {
        match self.end(id, Duration::ZERO).await {
            Err(RuntimeError::NotFound(_)) => return Ok(()),
            // Unreadable state must not keep its directory for ever.
            Err(RuntimeError::Failed(message)) => {
                tracing::warn!(container = id, message, "removing a garbled container")
            }
            other => other?,
        }
        self.store().remove_container(id)?;
        self.shared.bump();
        Ok(())
    }

    fn record(&self, id: &ContainerId) -> Result<(PathBuf, ContainerRecord), RuntimeError> {
        let dir = self.store().container_dir(&id.0)?;
        match record::read(&dir, files::CONTAINER) {
            Ok(Some(record)) => Ok((dir, record)),
            Ok(None) => Err(RuntimeError::NotFound(format!("container {}", id.0))),
            Err(e) => Err(RuntimeError::Failed(format!(
                "cannot read the state of container {}: {e}",
                id.0
            ))),
        }
    }
}

fn signal(process: &ProcessIdentity, signal: Signal) {
    if process.is_alive() {
        // It may end in between; then there is nothing left to signal.
        let _ = kill(Pid::from_raw(process.pid), signal);
    }
}

async fn ended_within(dir: &Path, run: &RunRecord, limit: Duration) -> bool {
    let wait = async {
        // Without its shim nobody writes exit.json: then the process's own end counts.
        while !dir.join(files::EXIT).exists() && (run.shim.is_alive() || run.process.is_alive()) {
            tokio::time::sleep(STOP_POLL).await;
        }
    };
    tokio::time::timeout(limit, wait).await.is_ok()
}

fn unsupported(what: impl Into<String>) -> RuntimeError {
    RuntimeError::Unsupported {
        runtime: NAME,
        what: what.into(),
    }
}

#[async_trait]
impl Runtime for ProcessRuntime {
    fn scheme(&self) -> &'static str {
        NAME
    }

    fn isolated(&self) -> bool {
        false
    }

    async fn version(&self) -> Result<RuntimeVersion, RuntimeError> {
        Ok(RuntimeVersion {
            name: NAME.into(),
            version: env!("CARGO_PKG_VERSION").into(),
        })
    }

    async fn status(&self) -> Result<RuntimeStatus, RuntimeError> {
        let message = match self.store().check_writable() {
            Ok(()) => String::new(),
            Err(e) => format!("cannot write to {}: {e}", self.store().root().display()),
        };
        Ok(RuntimeStatus {
            ready: message.is_empty(),
            network_ready: true,
            message,
        })
    }

    async fn features(&self) -> Features {
        // There are no images whose groups could be merged: what is asked for is what a process gets.
        Features {
            supplemental_groups_policy: true,
            ..Features::default()
        }
    }

    async fn list(&self) -> Result<Inventory, RuntimeError> {
        self.store().list()
    }

    async fn stats(&self, inventory: &Inventory) -> Result<RuntimeUse, RuntimeError> {
        Ok(usage::read(self.store(), inventory))
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    async fn run_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId, RuntimeError> {
        if !config.sysctls.is_empty() {
            return Err(unsupported("sysctls: a pod shares the host's kernel parameters"));
        }
        if config.user_namespace.is_some() {
            return Err(unsupported("user namespaces: leave hostUsers out"));
        }
        if !config.runtime_handler.is_empty() {
            return Err(unsupported(format!(
                "the handler {:?}: leave runtimeClassName out",
                config.runtime_handler
            )));
        }
        let id = self.store().add_sandbox(&SandboxRecord {
            pod_uid: config.uid.as_str().to_owned(),
            pod_name: config.name.clone(),
            pod_namespace: config.namespace.clone(),
            attempt: config.attempt,
            created_at: jiff::Timestamp::now(),
            boot_id: record::boot_id(),
            stopped: false,
        })?;
        self.shared.bump();
        Ok(SandboxId(id))
    }

    async fn stop_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        for container in self.store().containers_of(&id.0)? {
            match self.end(&container, Duration::ZERO).await {
                Err(RuntimeError::NotFound(_)) => {}
                other => other?,
            }
        }
        self.store().mark_stopped(&id.0)?;
        self.shared.bump();
        Ok(())
    }

    async fn remove_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError> {
        for container in self.store().containers_of(&id.0)? {
            self.remove(&container).await?;
        }
        self.store().remove_sandbox(&id.0)?;
        self.shared.bump();
        Ok(())
    }

    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: &ContainerConfig,
        sandbox_config: &SandboxConfig,
    ) -> Result<ContainerId, RuntimeError> {
        self.store().require_sandbox(&sandbox.0)?;
        let id = store::new_id();
        let record = launch::container_record(&id, sandbox, config, sandbox_config, self.store().root())?;
        self.store().add_container(&id, &record)?;
        self.shared.bump();
        Ok(ContainerId(id))
    }

    async fn start_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let (dir, _) = self.record(id)?;
        if dir.join(files::RUN).exists() || dir.join(files::EXIT).exists() {
            return Err(RuntimeError::Failed(format!(
                "container {} was already started",
                id.0
            )));
        }
        let mut command = self.shim("run", &dir)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|e| RuntimeError::Failed(format!("cannot start the shim of container {}: {e}", id.0)))?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let shared = self.shared.clone();
        tokio::spawn(async move {
            // Collects the shim, and tells at once that its container has ended.
            let _ = child.wait().await;
            shared.bump();
        });
        let hear = async {
            let mut said = Vec::new();
            if let Some(mut out) = out {
                let _ = out.read_to_end(&mut said).await;
            }
            if said.is_empty()
                && let Some(mut err) = err
            {
                let mut text = String::new();
                let _ = err.read_to_string(&mut text).await;
                return Err(RuntimeError::Failed(format!(
                    "the shim of container {} failed: {}",
                    id.0,
                    text.trim()
                )));
            }
            serde_json::from_slice::<shim::StartAnswer>(&said).map_err(|e| {
                RuntimeError::Failed(format!(
                    "the shim of container {} gave a garbled answer: {e}",
                    id.0
                ))
            })
        };
        let answer = tokio::time::timeout(START_LIMIT, hear)
            .await
            .map_err(|_| RuntimeError::Timeout(format!("starting container {}", id.0)))?;
        self.shared.bump();
        let answer = answer?;
        for note in answer.notes {
            self.store().note_once(&note);
        }
        answer
            .error
            .map_or(Ok(()), |message| Err(RuntimeError::Failed(message)))
    }

    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<(), RuntimeError> {
        match self.end(&id.0, grace).await {
            Err(RuntimeError::NotFound(_)) => Ok(()),
            other => other,
        }
    }

    async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        self.remove(&id.0).await
    }

    async fn update_container(&self, id: &ContainerId, resources: &Resources) -> Result<(), RuntimeError> {
        let (dir, mut record) = self.record(id)?;
        record.launch.resize(resources);
        record::write(&dir, files::CONTAINER, &record).map_err(|e| {
            RuntimeError::Failed(format!("cannot write the state of container {}: {e}", id.0))
        })?;
        let (_, notes) = crate::cgroup::create(&record.launch.cgroup, &record.launch.limits());
        match notes.into_iter().next() {
            Some(note) => Err(RuntimeError::Failed(note)),
            None => Ok(()),
        }
    }

    async fn image_status(&self, image: &str) -> Result<Option<Image>, RuntimeError> {
        Ok(Some(Image {
            id: image.to_owned(),
            tags: vec![image.to_owned()],
            digests: Vec::new(),
            size_bytes: 0,
            uid: None,
            username: String::new(),
        }))
    }

    async fn pull_image(&self, image: &str, _auth: Option<&RegistryAuth>) -> Result<String, RuntimeError> {
        Ok(image.to_owned())
    }

    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError> {
        Ok(Vec::new())
    }

    async fn remove_image(&self, _id: &str) -> Result<(), RuntimeError> {
        Ok(())
    }

    async fn images_in_use(&self) -> Result<BTreeSet<String>, RuntimeError> {
        Ok(BTreeSet::new())
    }

    async fn image_fs_info(&self) -> Result<Vec<ImageFs>, RuntimeError> {
        Ok(Vec::new())
    }

    async fn reopen_log(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        let (dir, container) = self.record(id)?;
        reopen::reopen(&dir, &container, &id.0).await
    }

    async fn exec_sync(
        &self,
        id: &ContainerId,
        command: &[String],
        timeout: Duration,
    ) -> Result<ExecOutput, RuntimeError> {
        let shim = self.exec_command(id, command, false)?;
        exec::to_the_end(shim, timeout).await
    }

    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<StreamEndpoint, RuntimeError> {
        let shim = self.exec_command(id, &request.command, request.tty)?;
        let (dir, _) = self.record(id)?;
        exec::streamed(shim, request, self.end_of(dir)).map(StreamEndpoint::Process)
    }

    async fn attach(&self, id: &ContainerId, request: &ExecRequest) -> Result<StreamEndpoint, RuntimeError> {
        let (dir, record) = self.record(id)?;
        attached::connect(&id.0, &dir, record.launch.tty, request)
            .await
            .map(StreamEndpoint::Process)
    }

    async fn port_forward(&self, _id: &SandboxId, _ports: &[u16]) -> Result<StreamEndpoint, RuntimeError> {
        Ok(StreamEndpoint::Host)
    }
}

impl ProcessRuntime {
    /// Resolves when the container in `dir` has ended.
    fn end_of(&self, dir: PathBuf) -> impl Future<Output = ()> + Send + 'static {
        let mut changes = self.shared.changes.subscribe();
        async move {
            while !dir.join(files::EXIT).exists() && dir.exists() {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        }
    }

    fn exec_command(&self, id: &ContainerId, argv: &[String], tty: bool) -> Result<Command, RuntimeError> {
        if argv.is_empty() {
            return Err(RuntimeError::Invalid("exec needs a command".into()));
        }
        let (dir, _) = self.record(id)?;
        let run = record::read::<RunRecord>(&dir, files::RUN).ok().flatten();
        if !run.is_some_and(|r| r.boot_id == record::boot_id() && r.process.is_alive()) {
            return Err(RuntimeError::Failed(format!("container {} is not running", id.0)));
        }
        let request = serde_json::to_string(&shim::ExecCommand {
            argv: argv.to_vec(),
            tty,
        })
        .map_err(|e| RuntimeError::Failed(format!("cannot write down the command: {e}")))?;
        let mut command = self.shim("exec", &dir)?;
        command.arg(request);
        Ok(command)
    }
}
