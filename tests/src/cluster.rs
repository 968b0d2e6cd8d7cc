//! The control plane and the provider that all scenarios share.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::kubectl::Kubectl;
use crate::process::{
    Daemon, complain, free_port, hack, is_root, kill_below, repository, text, try_hack, workspace_binary,
};
use crate::wait::{SOON, eventually};

/// Bridge whose address stands in Node status, since the API server does not proxy to loopback.
const INTERFACE: &str = "sktest";
const INTERFACE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 88, 255, 1);

/// A running control plane with a provider. Dropping it stops both.
pub struct Cluster {
    dir: PathBuf,
    kubectl: Kubectl,
    provider: Option<Daemon>,
    link: SocketAddr,
    metrics: SocketAddr,
    /// The bridge with the Nodes' address is its own.
    owns_interface: bool,
}

impl Cluster {
    /// Starts everything, after removing what an interrupted run may have left.
    ///
    /// # Panics
    /// When something does not start, with the end of its log.
    pub fn start() -> Self {
        let target = workspace_binary("");
        let target = target.parent().expect("the target directory");
        // Two runs at one time need two.
        let dir = std::env::var_os("SKERRY_E2E_DIR").map_or_else(|| target.join("e2e"), PathBuf::from);
        remove_leftovers(&dir);
        Self::start_in(dir, true)
    }

    /// Another control plane with a provider, for a scenario that would spoil the shared one. Its Nodes have no ports of
    /// their own.
    pub fn another(&self, name: &str) -> Self {
        Self::start_in(self.dir.join(name), false)
    }

    fn start_in(dir: PathBuf, owns_interface: bool) -> Self {
        std::fs::create_dir_all(dir.join("sites")).expect("the state directory can be made");

        let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let (link, metrics) = (local(free_port()), local(free_port()));
        let kubectl = Kubectl::new(dir.join("control-plane/admin.kubeconfig"));
        // Made first: whatever fails from here on, dropping it cleans up.
        let mut cluster = Self {
            dir,
            kubectl,
            provider: None,
            link,
            metrics,
            owns_interface,
        };
        hack("control-plane/up", &[path(&cluster.dir.join("control-plane"))]);
        cluster
            .kubectl
            .run(&["apply", "-k", path(&repository().join("manifests"))]);
        cluster.kubectl.run(&[
            "wait",
            "--for",
            "condition=Established",
            "--timeout",
            "30s",
            "crd",
            "--all",
        ]);
        cluster.write_provider_kubeconfig();
        cluster.start_provider();
        cluster
    }

    /// Where the state of this run is; logs stay there after the end.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// kubectl as an administrator.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    /// Where the provider accepts sites.
    pub fn link(&self) -> SocketAddr {
        self.link
    }

    /// Where the provider serves health and metrics.
    pub fn metrics(&self) -> SocketAddr {
        self.metrics
    }

    /// Declares a Site.
    pub fn declare(&self, site: &str) {
        self.kubectl.apply(&format!(
            "{{apiVersion: edge.skerry.dev/v1alpha1, kind: Site, metadata: {{name: {site}}}}}"
        ));
    }

    /// `skerry-provider token create SITE` with further arguments; the token.
    ///
    /// # Panics
    /// When there is none.
    pub fn token(&self, site: &str, args: &[&str]) -> String {
        let out = self.token_output(site, args);
        assert!(out.status.success(), "token create {site}: {}", text(&out));
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    /// `skerry-provider token create SITE` with further arguments.
    pub fn token_output(&self, site: &str, args: &[&str]) -> Output {
        Command::new(workspace_binary("skerry-provider"))
            .args([
                "token",
                "create",
                site,
                "--kubeconfig",
                path(&self.provider_kubeconfig()),
            ])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .expect("skerry-provider runs")
    }

    /// `skerry-provider` with these arguments, as an operator runs it.
    pub fn provider_command(&self, args: &[&str]) -> Output {
        Command::new(workspace_binary("skerry-provider"))
            .args(args)
            .args(["--kubeconfig", path(&self.provider_kubeconfig())])
            .stdin(Stdio::null())
            .output()
            .expect("skerry-provider runs")
    }

    /// The last lines that the provider has logged.
    pub fn provider_log(&self) -> String {
        self.provider.as_ref().map(Daemon::log_tail).unwrap_or_default()
    }

    /// Whether the provider has logged that.
    pub fn provider_said(&self, words: &str) -> bool {
        self.provider
            .as_ref()
            .is_some_and(|daemon| daemon.log().contains(words))
    }

    /// The provider's resident memory.
    ///
    /// # Panics
    /// When it does not run.
    pub fn provider_memory_kib(&self) -> u64 {
        let pid = self.provider.as_ref().expect("the provider runs").pid();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the provider runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        kib.and_then(|kib| kib.parse().ok()).expect("the kernel tells")
    }

    fn provider_kubeconfig(&self) -> PathBuf {
        self.dir.join("provider.kubeconfig")
    }

    /// The provider acts as its own ServiceAccount, so that a missing permission shows.
    fn write_provider_kubeconfig(&self) {
        self.write_kubeconfig("skerry-system", "skerry-provider", &self.provider_kubeconfig());
    }

    /// Writes a kubeconfig by which a program acts as a ServiceAccount.
    ///
    /// # Panics
    /// When there is no such ServiceAccount.
    pub fn write_kubeconfig(&self, namespace: &str, account: &str, file: &Path) {
        let kubectl = self.kubectl.in_namespace(namespace);
        let token = kubectl.run(&["create", "token", account, "--duration", "24h"]);
        let server = self
            .kubectl
            .run(&["config", "view", "-o", "jsonpath={.clusters[0].cluster.server}"]);
        let ca = self.dir.join("control-plane/ca.crt");
        let text = format!(
            r#"{{"apiVersion": "v1", "kind": "Config", "current-context": "default",
 "contexts": [{{"name": "default", "context": {{"cluster": "default", "user": "default"}}}}],
 "clusters": [{{"name": "default", "cluster": {{"server": "{server}", "certificate-authority": "{}"}}}}],
 "users": [{{"name": "default", "user": {{"token": "{}"}}}}]}}"#,
            path(&ca),
            token.trim()
        );
        std::fs::write(file, text).expect("the kubeconfig can be written");
    }

    /// Copies what etcd holds. The control plane is down meanwhile.
    pub fn back_up(&self) {
        self.swap_etcd(&[("etcd", "etcd.backup")]);
    }

    /// Puts back what etcd held at the last [`Cluster::back_up`].
    pub fn restore(&self) {
        self.swap_etcd(&[("etcd.backup", "etcd")]);
    }

    fn swap_etcd(&self, copies: &[(&str, &str)]) {
        let dir = self.dir.join("control-plane");
        hack("control-plane/down", &[path(&dir)]);
        for (from, to) in copies {
            let _ = std::fs::remove_dir_all(dir.join(to));
            let copied = Command::new("cp")
                .arg("-a")
                .args([dir.join(from), dir.join(to)])
                .output()
                .expect("cp runs");
            assert!(copied.status.success(), "cp {from} {to}: {}", text(&copied));
        }
        hack("control-plane/up", &[path(&dir)]);
    }

    /// `kill -9` of the provider.
    pub fn kill_provider(&mut self) {
        if let Some(provider) = self.provider.take() {
            provider.kill();
        }
    }

    /// Fails when the provider has ended by itself.
    ///
    /// # Panics
    /// Then, with the end of its log.
    pub fn check_provider(&mut self) {
        let provider = self.provider.as_mut().expect("the provider was started");
        provider.check().unwrap_or_else(|e| panic!("{e}"));
    }

    /// Starts the provider, on the same link address as before.
    ///
    /// # Panics
    /// When it does not become ready.
    pub fn start_provider(&mut self) {
        let node_address = if self.owns_interface {
            make_node_address()
        } else {
            node_address()
        };
        let kubelet = SocketAddr::new(node_address, free_port());
        let mut command = Command::new(workspace_binary("skerry-provider"));
        command
            .arg("run")
            .arg("--kubeconfig")
            .arg(self.provider_kubeconfig());
        for (flag, value) in [
            // Sites in network namespaces of their own come over other interfaces.
            ("--link-listen", format!("0.0.0.0:{}", self.link.port())),
            ("--link-address", self.link.ip().to_string()),
            ("--kubelet-listen", kubelet.to_string()),
            ("--node-address", node_address.to_string()),
            ("--metrics-listen", self.metrics.to_string()),
        ] {
            command.args([flag, &value]);
        }
        // Many scenarios wait until a site is noticed to be away. A bench brings its own.
        for (variable, value) in [
            ("SKERRY_HEARTBEAT_SECONDS", "5"),
            ("SKERRY_DEADLINE_SECONDS", "15"),
        ] {
            if std::env::var_os(variable).is_none() {
                command.env(variable, value);
            }
        }
        if !self.owns_interface {
            command.args(["--node-ports", "none"]);
        }
        let mut daemon = Daemon::start("skerry-provider", command, &self.dir.join("provider.log"));
        eventually(SOON, "the provider is ready", || {
            daemon.check()?;
            crate::wait::same(http_get(self.metrics, "/readyz")?.0, 200)
        });
        self.provider = Some(daemon);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.provider = None;
        complain(try_hack(
            "control-plane/down",
            &[path(&self.dir.join("control-plane"))],
        ));
        if self.owns_interface {
            remove_interface();
        }
    }
}

/// Ends what a run that was interrupted has left, then removes its files.
fn remove_leftovers(dir: &Path) {
    if dir.exists() {
        for site in std::fs::read_dir(dir.join("sites"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let containerd = site.path().join("containerd");
            if containerd.exists() {
                complain(try_hack("containerd", &["down", path(&containerd)]));
            }
        }
        complain(try_hack(
            "control-plane/down",
            &[path(&dir.join("control-plane"))],
        ));
        kill_below(dir);
        std::fs::remove_dir_all(dir).expect("the state of an earlier run can be removed");
    }
    remove_interface();
}

fn remove_interface() {
    if is_root() {
        let _ = Command::new("ip").args(["link", "delete", INTERFACE]).output();
    }
}

/// The address that every Node shows.
pub fn node_address() -> IpAddr {
    IpAddr::V4(if is_root() {
        INTERFACE_ADDRESS
    } else {
        Ipv4Addr::LOCALHOST
    })
}

fn make_node_address() -> IpAddr {
    if !is_root() {
        return IpAddr::V4(Ipv4Addr::LOCALHOST);
    }
    // One may be left by a run that was killed.
    remove_interface();
    for args in [
        format!("link add {INTERFACE} type bridge"),
        format!("address add {INTERFACE_ADDRESS}/32 dev {INTERFACE}"),
        format!("link set {INTERFACE} up"),
    ] {
        let out = Command::new("ip")
            .args(args.split(' '))
            .output()
            .expect("ip runs");
        assert!(out.status.success(), "ip {args}: {}", text(&out));
    }
    IpAddr::V4(INTERFACE_ADDRESS)
}

/// Status and body of a plain GET.
///
/// # Errors
/// When there is no answer.
pub fn http_get(address: SocketAddr, path: &str) -> Result<(u16, String), String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).map_err(|e| format!("{address}: {e}"))?;
    let mut answer = String::new();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )
    .and_then(|()| stream.read_to_string(&mut answer))
    .map_err(|e| format!("{address}: {e}"))?;
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|s| s.parse().ok())
        .ok_or("no HTTP answer")?;
    Ok((
        status,
        answer
            .split_once("\r\n\r\n")
            .map(|(_, body)| body.to_owned())
            .unwrap_or_default(),
    ))
}

fn path(path: &Path) -> &str {
    path.to_str().expect("the path is text")
}
