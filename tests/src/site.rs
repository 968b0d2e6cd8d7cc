//! A site: an edge daemon, its runtime, and the line to the provider.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::cluster::{Cluster, http_get};
use crate::containerd::Containerd;
use crate::kubectl::{Kubectl, condition};
use crate::process::{Daemon, free_port, kill_below, text, workspace_binary};
use crate::relay::Relay;
use crate::uplink::Uplink;
use crate::wait::{SOON, eventually, same};

/// The image that every site has.
pub const IMAGE: &str = "docker.io/library/busybox:1.36";

/// What runs a site's containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Runtime {
    /// containerd over CRI.
    Containerd,
    /// Processes of the host.
    Process,
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Containerd => "containerd",
            Self::Process => "process",
        })
    }
}

/// An enrolled site. Dropping it ends its daemon and its containers.
pub struct Site {
    name: String,
    runtime: Runtime,
    dir: PathBuf,
    kubectl: Kubectl,
    containerd: Option<Containerd>,
    relay: Relay,
    uplink: Option<(Uplink, SocketAddr)>,
    /// Name of the provider, resolved by a hosts file of the site's own.
    provider_name: Option<String>,
    modbus: Option<SocketAddr>,
    flags: Vec<String>,
    metrics: SocketAddr,
    edge: Option<Daemon>,
}

impl Site {
    /// Declares, enrols and starts a site named `name`; answers once its Node is Ready.
    ///
    /// # Panics
    /// When it does not get that far.
    pub fn start(cluster: &Cluster, name: &str, runtime: Runtime) -> Self {
        let mut site = Self::enrol(cluster, name, runtime);
        site.start_edge();
        site.wait_ready();
        site
    }

    /// The same, in a network namespace of its own: its line is a real one, and [`Site::line`] is not used.
    ///
    /// # Panics
    /// When it does not get that far.
    pub fn start_on_uplink(cluster: &Cluster, name: &str, runtime: Runtime) -> Self {
        let mut site = Self::enrol_on_uplink(cluster, name, runtime);
        site.start_edge();
        site.wait_ready();
        site
    }

    /// Declares and enrols a site in a network namespace of its own; its daemon is not running yet.
    ///
    /// # Panics
    /// When that fails.
    pub fn enrol_on_uplink(cluster: &Cluster, name: &str, runtime: Runtime) -> Self {
        let mut site = Self::enrol(cluster, name, runtime);
        let uplink = Uplink::new();
        let provider = SocketAddr::from((uplink.cloud(), cluster.link().port()));
        site.uplink = Some((uplink, provider));
        site
    }

    /// The site dials a name, from the next start of the daemon on; [`Site::set_hosts`] says where it is. For sites on an uplink.
    pub fn name_provider(&mut self, name: &str) {
        self.provider_name = Some(name.into());
    }

    /// What the site's `/etc/hosts` says from now on.
    pub fn set_hosts(&self, text: &str) {
        // In place: the file is mounted.
        std::fs::write(self.dir.join("hosts"), text).expect("the hosts file can be written");
    }

    /// Its real line.
    ///
    /// # Panics
    /// When it has none.
    pub fn uplink(&self) -> &Uplink {
        &self.uplink.as_ref().expect("the site has an uplink").0
    }

    /// Declares and enrols a site; its daemon is not running yet.
    ///
    /// # Panics
    /// When that fails.
    pub fn enrol(cluster: &Cluster, name: &str, runtime: Runtime) -> Self {
        let site = Self::prepare(cluster, name, runtime);
        cluster.declare(name);
        let out = site.join(&cluster.token(name, &[]));
        assert!(out.status.success(), "skerry-edge join: {}", text(&out));
        site
    }

    /// Makes the site's machine: directory, runtime, line. Nothing is declared or enrolled.
    pub fn prepare(cluster: &Cluster, name: &str, runtime: Runtime) -> Self {
        let dir = cluster.dir().join("sites").join(name);
        std::fs::create_dir_all(&dir).expect("the site's directory can be made");
        Self {
            name: name.into(),
            runtime,
            kubectl: cluster.kubectl().clone(),
            containerd: (runtime == Runtime::Containerd).then(|| Containerd::start(&dir.join("containerd"))),
            relay: Relay::to(cluster.link()),
            uplink: None,
            provider_name: None,
            modbus: None,
            flags: Vec::new(),
            metrics: SocketAddr::from(([127, 0, 0, 1], free_port())),
            edge: None,
            dir,
        }
    }

    /// Its name, also the Node's.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its runtime.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// Its line to the provider.
    pub fn line(&self) -> &Relay {
        &self.relay
    }

    /// Where the daemon keeps its state.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Where the harness keeps its files for this site.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Names the site's Modbus endpoint, from the next start of the daemon on.
    pub fn set_modbus(&mut self, endpoint: SocketAddr) {
        self.modbus = Some(endpoint);
    }

    /// Further flags of `skerry-edge run`, from the next start of the daemon on.
    pub fn set_flags(&mut self, flags: &[&str]) {
        self.flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    }

    /// `skerry-edge join` with that token, through the relay.
    pub fn join(&self, token: &str) -> Output {
        join(&self.relay.address().to_string(), token, &self.data_dir())
    }

    /// The command line of that.
    pub fn join_command(&self, token: &str) -> Command {
        self.join_command_to(token, &self.data_dir())
    }

    /// The command line of that for another machine.
    pub fn join_command_to(&self, token: &str, data_dir: &Path) -> Command {
        join_command(&self.relay.address().to_string(), token, data_dir)
    }

    /// The same on a machine that is a site already.
    pub fn rejoin(&self, token: &str) -> Output {
        join_command(&self.relay.address().to_string(), token, &self.data_dir())
            .arg("--force")
            .output()
            .expect("skerry-edge runs")
    }

    /// The command line of `skerry-edge run` for this site.
    pub fn edge_command(&self) -> Command {
        let program = workspace_binary("skerry-edge");
        let mut command = match &self.uplink {
            None => Command::new(program),
            Some((uplink, provider)) => {
                let program = program.to_str().expect("the path is text");
                match &self.provider_name {
                    None => {
                        let mut command = uplink.command(program);
                        command.env("SKERRY_PROVIDER", provider.to_string());
                        command
                    }
                    Some(name) => {
                        let script = "mount --bind \"$HOSTS\" /etc/hosts && exec \"$0\" \"$@\"";
                        let mut command = uplink.command("unshare");
                        command.args(["--mount", "--propagation", "slave", "sh", "-c", script, program]);
                        command.env("HOSTS", self.dir.join("hosts"));
                        command.env("SKERRY_PROVIDER", format!("{name}:{}", provider.port()));
                        command
                    }
                }
            }
        };
        command.arg("run").arg("--data-dir").arg(self.data_dir());
        match &self.containerd {
            Some(containerd) => {
                command.args(["--runtime", "cri", "--runtime-endpoint", &containerd.endpoint()])
            }
            None => command.args(["--runtime", "process"]),
        };
        command.arg("--pod-log-dir").arg(self.dir.join("pod-logs"));
        command.args(["--metrics-listen", &self.metrics.to_string()]);
        command.args(&self.flags);
        if self.clock().exists() {
            let library = std::fs::read_dir("/usr/lib")
                .into_iter()
                .flatten()
                .flatten()
                .map(|arch| arch.path().join("faketime/libfaketimeMT.so.1"))
                .find(|library| library.exists())
                .expect("libfaketime is installed (hack/test --prepare)");
            // The wall clock alone: the kernel's steady ones are right on every machine.
            command
                .env("LD_PRELOAD", library)
                .env("FAKETIME_TIMESTAMP_FILE", self.clock())
                .env("FAKETIME_CACHE_DURATION", "1")
                .env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
        }
        // The disk that the tests fill is shared with whatever else this machine does: a full one must not take pods
        // and images from scenarios about other things.
        for (flag, calm) in [
            ("--eviction-hard", "memory.available<10Mi"),
            ("--image-gc-high-threshold-percent", "100"),
        ] {
            if !self.flags.iter().any(|given| given.starts_with(flag)) {
                command.arg(format!("{flag}={calm}"));
            }
        }
        if let Some(endpoint) = self.modbus {
            command.args(["--modbus-endpoint", &endpoint.to_string()]);
        }
        command
    }

    fn clock(&self) -> PathBuf {
        self.dir.join("clock")
    }

    /// Sets the wall clock of the site's machine that many seconds ahead of the true one; negative is behind. Called
    /// before the daemon's start, it works from then on, also while the daemon runs.
    ///
    /// # Panics
    /// When that fails.
    pub fn set_clock(&self, seconds_ahead: i64) {
        let next = self.dir.join("clock.new");
        std::fs::write(&next, format!("{seconds_ahead:+}\n")).expect("the clock can be set");
        std::fs::rename(&next, self.clock()).expect("the clock can be set");
    }

    /// Starts the daemon.
    pub fn start_edge(&mut self) {
        let daemon = Daemon::start("skerry-edge", self.edge_command(), &self.dir.join("edge.log"));
        self.edge = Some(daemon);
    }

    /// Starts the daemon on a machine that says it was booted under that id: the kernel's own cannot be changed, but
    /// what the daemon sees of it can. As root only.
    pub fn start_edge_after_boot(&mut self, boot_id: &str) {
        let file = self.dir.join("boot_id");
        std::fs::write(&file, format!("{boot_id}\n")).expect("the file can be written");
        let edge = self.edge_command();
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-c"])
            .arg("mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"")
            .arg(&file)
            .arg(edge.get_program())
            .args(edge.get_args());
        let daemon = Daemon::start("skerry-edge", command, &self.dir.join("edge.log"));
        self.edge = Some(daemon);
    }

    /// `kill -9` of the daemon alone.
    pub fn kill_edge(&mut self) {
        self.edge.take().expect("the daemon runs").kill();
    }

    /// SIGTERM to the daemon; its exit code.
    pub fn stop_edge(&mut self) -> i32 {
        self.edge.take().expect("the daemon runs").terminate()
    }

    /// What a power cut does: the daemon and every container are gone at once, the disk stays. Then containerd
    /// starts, but not the daemon.
    pub fn power_cut(&mut self) {
        if self.edge.is_some() {
            self.kill_edge();
        }
        match &self.containerd {
            Some(containerd) => {
                containerd.power_cut();
                containerd.up();
            }
            None => kill_below(&self.dir),
        }
    }

    /// Whether the daemon was started and not stopped since.
    pub fn running(&self) -> bool {
        self.edge.is_some()
    }

    /// Waits until the Node is Ready.
    pub fn wait_ready(&mut self) {
        eventually(SOON, &format!("node {} is Ready", self.name), || {
            if let Some(edge) = &mut self.edge {
                edge.check()?;
            }
            let node = self.kubectl.get("node", &self.name)?;
            same(condition(&node, "Ready")["status"].as_str(), Some("True")).map_err(|e| {
                format!(
                    "{e}\n{}",
                    self.edge.as_ref().map(Daemon::log_tail).unwrap_or_default()
                )
            })
        });
    }

    /// Body of the daemon's `/metrics`, `/healthz` or `/readyz`, with its status.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn http(&self, path: &str) -> Result<(u16, String), String> {
        match &self.uplink {
            None => http_get(self.metrics, path),
            Some((uplink, _)) => uplink.http(self.metrics, path).map(|body| (200, body)),
        }
    }

    /// Number of the daemon's process.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self) -> u32 {
        self.edge.as_ref().expect("the daemon runs").pid()
    }

    /// What the daemon has logged since its start.
    pub fn log(&self) -> String {
        self.edge
            .as_ref()
            .map(Daemon::log_since_start)
            .unwrap_or_default()
    }

    /// The last lines that the daemon has logged.
    pub fn log_tail(&self) -> String {
        self.edge.as_ref().map(Daemon::log_tail).unwrap_or_default()
    }

    /// A Pod for this site: `spec` completed with the node, the image and a short grace period where it names none.
    pub fn pod(&self, name: &str, spec: Value) -> String {
        let spec = self.complete(spec);
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}).to_string()
    }

    /// A pod spec completed as by [`Site::pod`], for templates.
    pub fn complete(&self, mut spec: Value) -> Value {
        spec["nodeSelector"] = json!({"kubernetes.io/hostname": self.name});
        if spec.get("terminationGracePeriodSeconds").is_none() {
            spec["terminationGracePeriodSeconds"] = json!(2);
        }
        for list in ["initContainers", "containers"] {
            for (index, container) in spec[list].as_array_mut().into_iter().flatten().enumerate() {
                for (key, value) in [("image", json!(IMAGE)), ("name", json!(format!("c{index}")))] {
                    if container.get(key).is_none() {
                        container[key] = value;
                    }
                }
            }
            if spec[list].is_null() {
                spec.as_object_mut()
                    .expect("a pod spec is an object")
                    .remove(list);
            }
        }
        spec
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.edge = None;
        kill_below(&self.data_dir());
        self.containerd = None;
        // The data directory itself may be a mount.
        kill_below(&self.dir);
        // A Site that has gone for good takes its Node with it, so that the scheduler forgets it.
        let _ = self
            .kubectl
            .output(&["delete", "site", &self.name, "--ignore-not-found", "--wait=false"]);
        let _ = self
            .kubectl
            .output(&["delete", "node", &self.name, "--ignore-not-found", "--wait=false"]);
    }
}

/// `skerry-edge join`.
pub fn join(provider: &str, token: &str, data_dir: &Path) -> Output {
    join_command(provider, token, data_dir)
        .output()
        .expect("skerry-edge runs")
}

fn join_command(provider: &str, token: &str, data_dir: &Path) -> Command {
    let mut command = Command::new(workspace_binary("skerry-edge"));
    command
        .args(["join", "--provider", provider, "--token", token, "--data-dir"])
        .arg(data_dir)
        .stdin(Stdio::null());
    command
}

/// How long a provider may take to notice a line that has gone silent.
pub const NOTICED: Duration = Duration::from_secs(75);
