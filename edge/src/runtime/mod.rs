//! The only way to containers.
//!
//! [`Runtime`] has the shape of CRI v1, reduced to what a node needs: pod sandboxes, containers in them, images.
//! [`cri`] speaks it to containerd or CRI-O; [`process`] runs a container's command as a supervised process of the
//! host. The lifecycle code above (`pods/`) is one and the same for both.
//!
//! What must always hold:
//! * Everything that a runtime runs for Skerry outlives the daemon: after `kill -9` and a restart, [`Runtime::list`]
//!   shows the same ids, start times and exit codes.
//! * Stopping and removing are idempotent: an id that is gone is success.
//! * A container is found by labels that the runtime keeps ([`labels`]), never by what the daemon remembers.

pub mod cri;
mod features;
pub mod process;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use skerry_proto::object::Uid;
use tokio::sync::watch;

pub use features::{Features, Handler};

/// Label and annotation keys that tie a sandbox or container to its pod; the ones that a kubelet uses.
pub mod labels {
    /// Pod name.
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    /// Pod namespace.
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    /// Pod UID.
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
    /// Container name within the pod.
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    /// Annotation: hash of the container's spec, to see a definition change.
    pub const CONTAINER_HASH: &str = "io.kubernetes.container.hash";
    /// Annotation: restart count of this instance, decimal.
    pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    /// Annotation: `terminationMessagePath` of the container.
    pub const TERMINATION_MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    /// Annotation: `terminationMessagePolicy` of the container.
    pub const TERMINATION_MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    /// Label: marks what this daemon made, so that a shared containerd's other pods are left alone.
    pub const MANAGED_BY: &str = "edge.skerry.dev/managed-by";
}

/// Names a sandbox within its runtime.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SandboxId(pub String);

/// Names a container within its runtime, without the `containerd://` prefix.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(pub String);

/// Why a runtime operation failed.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// The runtime does not answer. Retry; nothing is known about the outcome.
    #[error("the container runtime at {endpoint} does not answer: {message}")]
    Unavailable {
        /// Where it was sought.
        endpoint: String,
        /// The transport's words.
        message: String,
    },
    /// No such sandbox, container or image.
    #[error("{0} not found")]
    NotFound(String),
    /// The request can never succeed as it stands (bad command, bad mount); a change of the pod is needed.
    #[error("{0}")]
    Invalid(String),
    /// This runtime does not offer what was asked; the message says what and why.
    #[error("the {runtime} runtime does not support {what}")]
    Unsupported {
        /// Name of the runtime.
        runtime: &'static str,
        /// What was asked.
        what: String,
    },
    /// The operation took longer than its limit.
    #[error("{0} timed out")]
    Timeout(String),
    /// The runtime has too much to do, in its own words. Retry later.
    #[error("{0}")]
    Busy(String),
    /// Anything else, in the runtime's own words. Retry with back-off.
    #[error("{0}")]
    Failed(String),
}

/// What runs here, for `nodeInfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeVersion {
    /// `containerd`, `cri-o`, `process`.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// Whether the runtime can take work; each a node condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeStatus {
    /// Containers can be run.
    pub ready: bool,
    /// Pods get a network.
    pub network_ready: bool,
    /// Why not, empty when all is well.
    pub message: String,
}

/// Lifecycle of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SandboxState {
    /// Its namespaces exist and containers can be started in it.
    Ready,
    /// It ended, or was lost in a reboot.
    NotReady,
}

/// One pod sandbox as the runtime sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sandbox {
    /// Its id.
    pub id: SandboxId,
    /// UID of the pod, from the labels.
    pub pod_uid: Uid,
    /// Name of the pod, from the labels.
    pub pod_name: String,
    /// Namespace of the pod, from the labels.
    pub pod_namespace: String,
    /// How many sandboxes this pod had before.
    pub attempt: u32,
    /// Its state.
    pub state: SandboxState,
    /// When it was made.
    pub created_at: Timestamp,
    /// Its addresses, empty for host network or when not ready.
    pub ips: Vec<IpAddr>,
    /// Shares the host's network.
    pub host_network: bool,
}

/// Lifecycle of a container.
#[derive(Clone, Debug, PartialEq)]
pub enum ContainerState {
    /// Made, not started.
    Created,
    /// Running since then.
    Running {
        /// When the process started.
        started_at: Timestamp,
    },
    /// Ended.
    Exited {
        /// When the process started; absent when it never did.
        started_at: Option<Timestamp>,
        /// When it ended.
        finished_at: Timestamp,
        /// Exit code, 128 + signal when killed.
        code: i32,
        /// `Completed`, `Error`, `OOMKilled`, `StartError`, `Unknown`.
        reason: String,
        /// The runtime's explanation, may be empty.
        message: String,
    },
    /// The runtime has lost track of it.
    Unknown,
}

/// One container as the runtime sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Container {
    /// Its id.
    pub id: ContainerId,
    /// The sandbox that it is in.
    pub sandbox: SandboxId,
    /// UID of the pod, from the labels.
    pub pod_uid: Uid,
    /// Name in the pod spec.
    pub name: String,
    /// Restart count of this instance, from the annotation.
    pub restart_count: u32,
    /// Hash of the container's spec, from the annotation.
    pub spec_hash: String,
    /// Its state.
    pub state: ContainerState,
    /// When it was made.
    pub created_at: Timestamp,
    /// The image as the pod spec named it.
    pub image: String,
    /// The image's id or digest reference (`status.containerStatuses[].imageID`).
    pub image_ref: String,
    /// Absolute path of its log file.
    pub log_path: PathBuf,
    /// Annotations as given in [`ContainerConfig::annotations`].
    pub annotations: BTreeMap<String, String>,
    /// As whom its first process was started; containerd before 2.0 does not tell.
    pub user: Option<ContainerUser>,
}

/// Identity of a container's first process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerUser {
    /// Its user.
    pub uid: i64,
    /// Its primary group.
    pub gid: i64,
    /// Its other groups.
    pub groups: Vec<i64>,
}

/// Everything that Skerry runs, seen at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Inventory {
    /// All sandboxes with our label.
    pub sandboxes: Vec<Sandbox>,
    /// All containers with our label.
    pub containers: Vec<Container>,
}

/// Which namespaces a pod shares.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceOptions {
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `spec.hostPID`.
    pub host_pid: bool,
    /// `spec.hostIPC`.
    pub host_ipc: bool,
    /// `spec.shareProcessNamespace`.
    pub share_process: bool,
}

/// Port published on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortMapping {
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// Port in the pod.
    pub container_port: u16,
    /// Port on the host.
    pub host_port: u16,
    /// Address on the host, empty for all.
    pub host_ip: String,
}

/// Resolver settings of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsConfig {
    /// Name servers, at most three.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options such as `ndots:5`.
    pub options: Vec<String>,
}

/// What a sandbox is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct SandboxConfig {
    /// Pod name.
    pub name: String,
    /// Pod namespace.
    pub namespace: String,
    /// Pod UID.
    pub uid: Uid,
    /// Sandboxes before this one.
    pub attempt: u32,
    /// Hostname inside the pod; empty for host network.
    pub hostname: String,
    /// `/var/log/pods/<ns>_<pod>_<uid>`; exists.
    pub log_directory: PathBuf,
    /// Resolver settings; `None` leaves the runtime's default.
    pub dns: Option<DnsConfig>,
    /// Published ports.
    pub ports: Vec<PortMapping>,
    /// Labels: the pod's plus [`labels`].
    pub labels: BTreeMap<String, String>,
    /// Annotations: the pod's.
    pub annotations: BTreeMap<String, String>,
    /// Parent of the containers' cgroups, relative to the controllers' roots; empty leaves the runtime's default.
    pub cgroup_parent: String,
    /// Shared namespaces.
    pub namespaces: NamespaceOptions,
    /// Kernel parameters.
    pub sysctls: BTreeMap<String, String>,
    /// A container in it will be privileged.
    pub privileged: bool,
    /// `RuntimeClass` handler, empty for the default.
    pub runtime_handler: String,
    /// `securityContext.supplementalGroups` and `fsGroup`.
    pub supplemental_groups: Vec<i64>,
    /// `supplementalGroupsPolicy: Strict`: no groups of the image.
    pub strict_groups: bool,
    /// `securityContext.runAsUser` of the pod.
    pub run_as_user: Option<i64>,
    /// `securityContext.runAsGroup` of the pod.
    pub run_as_group: Option<i64>,
    /// `securityContext.seLinuxOptions` of the pod.
    pub selinux: Option<SeLinux>,
    /// The pod has a user namespace of its own.
    pub user_namespace: Option<IdRange>,
}

/// Ids on the host that a pod's user namespace maps to the same number of ids from 0 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IdRange {
    /// First id on the host.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// An SELinux label; empty parts are the runtime's choice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeLinux {
    /// User part.
    pub user: String,
    /// Role part.
    pub role: String,
    /// Type part.
    pub kind: String,
    /// Level part.
    pub level: String,
}

/// How mounts travel between the host and a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Propagation {
    /// Not at all.
    #[default]
    Private,
    /// Host to container.
    HostToContainer,
    /// Both ways.
    Bidirectional,
}

/// A host path or an image seen in a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// Path in the container.
    pub container_path: String,
    /// Path on the host; exists. Empty for an image.
    pub host_path: PathBuf,
    /// No writes.
    pub readonly: bool,
    /// No writes in mounts below it either; needs a handler with that feature.
    pub recursive_readonly: bool,
    /// Give it the container's SELinux label.
    pub selinux_relabel: bool,
    /// Mount propagation.
    pub propagation: Propagation,
    /// An image in the place of a host path.
    pub image: Option<ImageMount>,
}

/// An image as a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageMount {
    /// What [`Runtime::pull_image`] answered.
    pub reference: String,
    /// The image as the pod spec names it.
    pub image: String,
    /// Path in the image; empty for its root.
    pub sub_path: String,
}

/// A block or character device of the host in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Path in the container.
    pub container_path: String,
    /// Path on the host; exists.
    pub host_path: PathBuf,
    /// No writes.
    pub readonly: bool,
}

/// cgroup settings; `None` or zero leaves the kernel's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// cgroup v1 `cpu.shares`; converted for v2.
    pub cpu_shares: i64,
    /// CFS quota in microseconds per period; 0 = no limit.
    pub cpu_quota: i64,
    /// CFS period in microseconds.
    pub cpu_period: i64,
    /// Memory limit in bytes; 0 = no limit.
    pub memory_limit_bytes: i64,
    /// `oom_score_adj`.
    pub oom_score_adj: i64,
    /// Memory and swap together in bytes; 0 = no limit. cgroup v1 only.
    pub memory_swap_bytes: i64,
    /// Limits of huge pages in bytes, by size as the kernel names it (`2MB`).
    pub huge_pages: BTreeMap<String, u64>,
    /// Files of cgroup v2 and their values.
    pub unified: BTreeMap<String, String>,
}

/// Identity and powers of a container's process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Security {
    /// User id; `None` = the image's.
    pub run_as_user: Option<i64>,
    /// User name, where the image names its user so and no id is given.
    pub run_as_username: String,
    /// Group id; `None` = the image's.
    pub run_as_group: Option<i64>,
    /// Further groups.
    pub supplemental_groups: Vec<i64>,
    /// `supplementalGroupsPolicy: Strict`: no groups of the image.
    pub strict_groups: bool,
    /// All powers.
    pub privileged: bool,
    /// Root file system without writes.
    pub readonly_rootfs: bool,
    /// `allowPrivilegeEscalation: false`.
    pub no_new_privileges: bool,
    /// Capabilities to add, without `CAP_`.
    pub add_capabilities: Vec<String>,
    /// Capabilities to drop, without `CAP_`; `ALL` for every one.
    pub drop_capabilities: Vec<String>,
    /// `Unconfined`, `RuntimeDefault` or `Localhost/<path>`; empty = unconfined.
    pub seccomp: String,
    /// `Unconfined`, `RuntimeDefault` or `Localhost/<name>`; empty leaves it to the runtime.
    pub apparmor: String,
    /// SELinux label; `None` leaves it to the runtime.
    pub selinux: Option<SeLinux>,
    /// `procMount: Unmasked`.
    pub unmasked_proc: bool,
}

/// What a container is made from.
#[derive(Clone, Debug, PartialEq)]
pub struct ContainerConfig {
    /// Name in the pod spec.
    pub name: String,
    /// Instances before this one.
    pub attempt: u32,
    /// The image as the pod spec names it.
    pub image: String,
    /// What [`Runtime::image_status`] or [`Runtime::pull_image`] answered.
    pub image_ref: String,
    /// Entry point; empty = the image's.
    pub command: Vec<String>,
    /// Arguments; empty = the image's, unless `command` is given.
    pub args: Vec<String>,
    /// Working directory; empty = the image's.
    pub working_dir: String,
    /// Environment, in order, later wins.
    pub env: Vec<(String, String)>,
    /// Mounts, in order.
    pub mounts: Vec<Mount>,
    /// Devices.
    pub devices: Vec<Device>,
    /// Labels: [`labels`].
    pub labels: BTreeMap<String, String>,
    /// Annotations: hash, restart count, termination message.
    pub annotations: BTreeMap<String, String>,
    /// Relative to the sandbox's log directory: `<container>/<attempt>.log`; its directory exists.
    pub log_path: PathBuf,
    /// Keep stdin open.
    pub stdin: bool,
    /// Close stdin after the first attach ends.
    pub stdin_once: bool,
    /// Allocate a terminal.
    pub tty: bool,
    /// See the processes of this container of the same pod, instead of what the sandbox says.
    pub target: Option<ContainerId>,
    /// `SIGUSR1`, say, instead of the image's stop signal; empty = the image's, or `SIGTERM`.
    pub stop_signal: String,
    /// cgroup settings.
    pub resources: Resources,
    /// Identity and powers.
    pub security: Security,
}

/// An image that the runtime has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Id (a digest).
    pub id: String,
    /// Names by which it is known.
    pub tags: Vec<String>,
    /// Names by digest.
    pub digests: Vec<String>,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Numeric user of the image, when it names one.
    pub uid: Option<i64>,
    /// User name of the image, when it names one.
    pub username: String,
}

/// A file system that holds images or containers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFs {
    /// A directory on it, on this machine.
    pub mountpoint: PathBuf,
    /// Bytes that images use, as far as the runtime says.
    pub used_bytes: u64,
    /// Inodes that images use, as far as the runtime says.
    pub inodes_used: u64,
}

/// Credentials for one registry.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistryAuth {
    /// User.
    pub username: String,
    /// Password.
    pub password: String,
    /// Token for `auth` style credentials, empty when unused.
    pub identity_token: String,
}

impl std::fmt::Debug for RegistryAuth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RegistryAuth({}, ...)", self.username)
    }
}

/// What a command run to its end printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutput {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code.
    pub code: i32,
}

/// A request for a long-lived stream into a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecRequest {
    /// Command and arguments.
    pub command: Vec<String>,
    /// Connect stdin.
    pub stdin: bool,
    /// Connect stdout.
    pub stdout: bool,
    /// Connect stderr (never together with `tty`).
    pub stderr: bool,
    /// Allocate a terminal.
    pub tty: bool,
}

/// How the bytes of an exec or attach are reached.
pub enum StreamEndpoint {
    /// The runtime serves the upgraded connection itself: replay the client's upgrade request to this URL.
    Url(String),
    /// A process with plain pipes or a terminal: the daemon speaks the client's protocol (SPDY or WebSocket) itself.
    Process(StreamedProcess),
    /// For a port-forward: the pod's ports are the host's own, on its loopback addresses.
    Host,
}

/// A process whose streams the daemon connects to a client. Dropping it kills the process.
pub struct StreamedProcess {
    /// Its stdin, when asked for. Dropping it is end of file.
    pub stdin: Option<Box<dyn tokio::io::AsyncWrite + Send + Unpin>>,
    /// Its stdout, or the terminal's output.
    pub stdout: Option<Box<dyn tokio::io::AsyncRead + Send + Unpin>>,
    /// Its stderr; `None` with a terminal.
    pub stderr: Option<Box<dyn tokio::io::AsyncRead + Send + Unpin>>,
    /// Takes `(columns, rows)` when there is a terminal.
    pub resize: Option<tokio::sync::mpsc::Sender<(u16, u16)>>,
    /// Resolves to the exit code once the process has ended.
    pub exit: tokio::sync::oneshot::Receiver<i32>,
}

/// Where the use of one running container can be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerUse {
    /// Its control groups.
    pub cgroups: CgroupPaths,
    /// A process in its network namespace; `None` when it has the host's.
    pub network_pid: Option<i32>,
    /// Its processes descend from this one, which is not its own. For what the control groups do not tell.
    pub supervisor: Option<i32>,
    /// What it has written beside its volumes, as far as the runtime keeps count.
    pub writable_layer: Option<DiskUse>,
    /// A directory with what it has written beside its volumes, to be counted.
    pub writable_dir: Option<PathBuf>,
}

/// Directories of a container's control groups, by what they count. On a unified hierarchy all are one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CgroupPaths {
    /// Processor time used.
    pub cpuacct: Option<PathBuf>,
    /// Processor limits.
    pub cpu: Option<PathBuf>,
    /// Memory.
    pub memory: Option<PathBuf>,
    /// Processes.
    pub pids: Option<PathBuf>,
    /// Block devices.
    pub blkio: Option<PathBuf>,
    /// The unified hierarchy: everything, where there is no other.
    pub unified: Option<PathBuf>,
}

/// Bytes and inodes in use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskUse {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// What a runtime says of the use of its containers and disks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuntimeUse {
    /// Running containers.
    pub containers: std::collections::HashMap<ContainerId, ContainerUse>,
    /// A directory on the file system of the images, and what they use; `None` without images.
    pub images: Option<(PathBuf, DiskUse)>,
    /// A directory on the file system of the writable layers, when it is another one than the images'.
    pub layers: Option<PathBuf>,
}

/// A container runtime.
///
/// Implementations are cheap to share (`Arc<dyn Runtime>`) and may be called concurrently. Every method is
/// cancellation safe in the sense that a dropped call may or may not have taken effect, which the next
/// [`Runtime::list`] shows.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// Prefix of container IDs in status (`containerd`, `cri-o`, `process`).
    fn scheme(&self) -> &'static str;

    /// Whether pods have their own images and network (CRI), or use the host's (process).
    fn isolated(&self) -> bool;

    /// Name and version.
    async fn version(&self) -> Result<RuntimeVersion, RuntimeError>;

    /// Whether the runtime can take work.
    async fn status(&self) -> Result<RuntimeStatus, RuntimeError>;

    /// What the runtime can do beyond the minimum, as it last said. Asks when it has not said yet.
    async fn features(&self) -> Features {
        Features::default()
    }

    /// Everything that Skerry runs. Complete or an error, never a part.
    async fn list(&self) -> Result<Inventory, RuntimeError>;

    /// Where the use of the running containers in `inventory` can be read. For [`stats`](crate::stats), which reads it;
    /// a container that ends meanwhile is left out.
    async fn stats(&self, inventory: &Inventory) -> Result<RuntimeUse, RuntimeError>;

    /// What runs of one pod: the same as its part of [`Runtime::list`], at a cost that does not grow with the others.
    async fn list_pod(&self, pod: &Uid) -> Result<Inventory, RuntimeError> {
        let mut inventory = self.list().await?;
        inventory.sandboxes.retain(|sandbox| sandbox.pod_uid == *pod);
        inventory.containers.retain(|container| container.pod_uid == *pod);
        Ok(inventory)
    }

    /// A counter that moves whenever something in [`Runtime::list`] may have changed. It may move without cause;
    /// a change is never missed for longer than ten seconds.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Makes and starts a sandbox, network included.
    async fn run_sandbox(&self, config: &SandboxConfig) -> Result<SandboxId, RuntimeError>;

    /// Stops every process in a sandbox and releases its network.
    async fn stop_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError>;

    /// Forgets a stopped sandbox and its containers.
    async fn remove_sandbox(&self, id: &SandboxId) -> Result<(), RuntimeError>;

    /// Makes a container; it does not run yet.
    async fn create_container(
        &self,
        sandbox: &SandboxId,
        config: &ContainerConfig,
        sandbox_config: &SandboxConfig,
    ) -> Result<ContainerId, RuntimeError>;

    /// Starts a container that was created.
    async fn start_container(&self, id: &ContainerId) -> Result<(), RuntimeError>;

    /// Sends the stop signal, waits up to `grace`, then kills. Returns when the container has ended.
    async fn stop_container(&self, id: &ContainerId, grace: Duration) -> Result<(), RuntimeError>;

    /// Forgets a stopped container; its log file stays.
    async fn remove_container(&self, id: &ContainerId) -> Result<(), RuntimeError>;

    /// The image under that name, if the runtime has it.
    async fn image_status(&self, image: &str) -> Result<Option<Image>, RuntimeError>;

    /// Fetches an image; answers its reference. No time limit of its own.
    async fn pull_image(&self, image: &str, auth: Option<&RegistryAuth>) -> Result<String, RuntimeError>;

    /// Every image, for node status and garbage collection.
    async fn list_images(&self) -> Result<Vec<Image>, RuntimeError>;

    /// Forgets an image, by its id, under all of its names. One that is gone is success.
    async fn remove_image(&self, id: &str) -> Result<(), RuntimeError> {
        Err(self.without(format!("removing image {id}")))
    }

    /// Ids and references of the images that must stay whatever our pods say: those that the runtime needs itself,
    /// and those of every container of the runtime, ours or not. Complete or an error.
    async fn images_in_use(&self) -> Result<BTreeSet<String>, RuntimeError> {
        Err(self.without("telling the images in use".to_owned()))
    }

    /// The file systems that images are on; none when the runtime keeps no images.
    async fn image_fs_info(&self) -> Result<Vec<ImageFs>, RuntimeError> {
        Err(self.without("telling the file system of images".to_owned()))
    }

    /// Opens a running container's log file anew, after the old one was renamed. The new file is there afterwards,
    /// and nothing more goes to the old one.
    async fn reopen_log(&self, id: &ContainerId) -> Result<(), RuntimeError> {
        Err(self.without(format!("reopening the log of container {}", id.0)))
    }

    /// The error of an operation that this runtime lacks.
    fn without(&self, what: String) -> RuntimeError {
        RuntimeError::Unsupported {
            runtime: self.scheme(),
            what,
        }
    }

    /// Runs a command in a container to its end, within `timeout`. Output is cut at 16 MiB.
    async fn exec_sync(
        &self,
        id: &ContainerId,
        command: &[String],
        timeout: Duration,
    ) -> Result<ExecOutput, RuntimeError>;

    /// Prepares an exec.
    async fn exec(&self, id: &ContainerId, request: &ExecRequest) -> Result<StreamEndpoint, RuntimeError>;

    /// Prepares an attach to a running container (`request.command` is unused).
    async fn attach(&self, id: &ContainerId, request: &ExecRequest) -> Result<StreamEndpoint, RuntimeError>;

    /// Gives a running container other cgroup values. What a value of zero says is left as it is.
    async fn update_container(&self, _id: &ContainerId, _resources: &Resources) -> Result<(), RuntimeError> {
        Err(RuntimeError::Unsupported {
            runtime: self.scheme(),
            what: "other resources for a running container".to_owned(),
        })
    }

    /// Tells the runtime what its pod as a whole may use from now on, before the pod's cgroup is changed. A runtime
    /// that does not want to know succeeds.
    async fn update_sandbox(&self, _id: &SandboxId, _resources: &Resources) -> Result<(), RuntimeError> {
        Ok(())
    }

    /// Who makes the containers' cgroups.
    async fn cgroup_driver(&self) -> Result<crate::cgroup::Driver, RuntimeError> {
        Ok(crate::cgroup::Driver::Cgroupfs)
    }

    /// Prepares a port-forward into a sandbox.
    async fn port_forward(&self, id: &SandboxId, ports: &[u16]) -> Result<StreamEndpoint, RuntimeError>;
}
