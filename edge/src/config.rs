//! Settings of the edge daemon: flags over environment over file over defaults.

mod duties;
mod outbox;
mod shown;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Deserialize;
use serde::de::IgnoredAny;
use skerry_telemetry::config;

use crate::cgroup::Driver;
use crate::identity::ProxyRules;
use crate::link::BulkPolicy;
use crate::node::{Reserved, Shares};

pub use duties::{Duties, DutySettings};
pub use outbox::OutboxSettings;
pub(crate) use shown::shown;
pub use skerry_telemetry::config::ConfigError;

/// Read when it exists and no other file is named.
pub const DEFAULT_FILE: &str = "/etc/skerry/edge.toml";
/// Where everything is kept unless told otherwise.
pub const DEFAULT_DATA_DIR: &str = "/var/lib/skerry";

/// Which runtime runs the containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RuntimeKind {
    /// containerd or CRI-O, over their socket.
    Cri,
    /// No container engine: commands run as supervised processes of the host.
    Process,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// Who makes cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum CgroupDriver {
    /// The engine itself.
    Cgroupfs,
    /// systemd.
    Systemd,
}

/// A quantity in units of so many thousandths, 0 when absent.
fn reserved(key: &str, text: Option<&str>, unit: i128) -> Result<u64, ConfigError> {
    let Some(text) = text else { return Ok(0) };
    crate::pods::quantity_milli(text)
        .and_then(|milli| u64::try_from(milli / unit).ok())
        .ok_or_else(|| ConfigError::Value(format!("{key} {text:?} must be a quantity such as 250m or 256Mi")))
}

/// Settings as flags and environment variables give them; each may also stand in the file.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// Directory of the store, the identity and the pods' files [default: /var/lib/skerry]
    #[arg(long, env = "SKERRY_DATA_DIR", value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Provider to dial, HOST:PORT [default: the one that was joined]
    #[arg(long, env = "SKERRY_PROVIDER", value_name = "HOST:PORT")]
    pub provider: Option<String>,
    /// HTTP proxy to the provider, http://[USER:PASSWORD@]HOST:PORT, or none
    /// [default: HTTPS_PROXY and NO_PROXY of the environment]
    #[arg(long, env = "SKERRY_PROXY", value_name = "URL|none", hide_env_values = true)]
    pub proxy: Option<String>,
    /// Whether bulk data keeps the line's queue short, on or off [default: on]
    #[arg(long, env = "SKERRY_LINK_PACING", value_name = "on|off")]
    pub link_pacing: Option<Switch>,
    /// Congestion control of bulk data, for example bbr, where the kernel has it [default: the kernel's]
    #[arg(long, env = "SKERRY_LINK_CONGESTION", value_name = "NAME")]
    pub link_congestion: Option<String>,
    /// What runs the containers [default: cri]
    #[arg(long, env = "SKERRY_RUNTIME", value_name = "RUNTIME")]
    pub runtime: Option<RuntimeKind>,
    /// Socket of the container engine [default: unix:///run/containerd/containerd.sock]
    #[arg(long, env = "SKERRY_RUNTIME_ENDPOINT", value_name = "unix://PATH")]
    pub runtime_endpoint: Option<String>,
    /// Directory of container logs [default: /var/log/pods as root, else <data-dir>/pod-logs]
    #[arg(long, env = "SKERRY_POD_LOG_DIR", value_name = "DIR")]
    pub pod_log_dir: Option<PathBuf>,
    /// Directory of the pods' volumes [default: <data-dir>/pods]
    #[arg(long, env = "SKERRY_ROOT_DIR", value_name = "DIR")]
    pub root_dir: Option<PathBuf>,
    /// Address of the site, shown as hostIP of its pods [default: that of the route to the provider]
    #[arg(long, env = "SKERRY_NODE_IP", value_name = "IP")]
    pub node_ip: Option<IpAddr>,
    /// Name server of the cluster; may be repeated. Without one, pods use the machine's resolver
    #[arg(long, env = "SKERRY_CLUSTER_DNS", value_name = "IP", value_delimiter = ',')]
    #[serde(default)]
    pub cluster_dns: Vec<IpAddr>,
    /// DNS domain of the cluster [default: cluster.local]
    #[arg(long, env = "SKERRY_CLUSTER_DOMAIN", value_name = "DOMAIN")]
    pub cluster_domain: Option<String>,
    /// Most pods on this site [default: 110]
    #[arg(long, env = "SKERRY_MAX_PODS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_pods: Option<u32>,
    /// Processors kept back from pods, for example 250m [default: 0]
    #[arg(long, env = "SKERRY_RESERVED_CPU", value_name = "QUANTITY")]
    pub reserved_cpu: Option<String>,
    /// Memory kept back from pods, for example 256Mi [default: 0]
    #[arg(long, env = "SKERRY_RESERVED_MEMORY", value_name = "QUANTITY")]
    pub reserved_memory: Option<String>,
    /// Part of the node's file system kept back from pods, for example 1Gi [default: 0]
    #[arg(long, env = "SKERRY_RESERVED_EPHEMERAL_STORAGE", value_name = "QUANTITY")]
    pub reserved_ephemeral_storage: Option<String>,
    /// Most processes and threads in a pod [default: no limit]
    #[arg(long, env = "SKERRY_POD_PIDS_LIMIT", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub pod_pids_limit: Option<u64>,
    /// Who makes cgroups in an engine that does not tell (containerd before 2.0): cgroupfs or systemd
    /// [default: cgroupfs]
    #[arg(long, env = "SKERRY_CGROUP_DRIVER", value_name = "DRIVER")]
    pub cgroup_driver: Option<CgroupDriver>,
    /// Modbus TCP server of Devices that name none
    #[arg(long, env = "SKERRY_MODBUS_ENDPOINT", value_name = "HOST:PORT")]
    pub modbus_endpoint: Option<String>,
    /// Address of /healthz, /readyz and /metrics; loopback only [default: 127.0.0.1:9441]
    #[arg(long, env = "SKERRY_METRICS_LISTEN", value_name = "IP:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// What is logged: levels, or targets with their levels, for example info,skerry_edge=debug [default: info]
    #[arg(long, env = "SKERRY_LOG", value_name = "FILTER")]
    pub log: Option<String>,
    /// How log lines look: text or json [default: text]
    #[arg(long, env = "SKERRY_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// What the node does by itself.
    #[command(flatten)]
    #[serde(flatten)]
    pub duties: DutySettings,
    /// What the outbox keeps.
    #[command(flatten)]
    #[serde(flatten)]
    pub outbox: OutboxSettings,
    /// Keys of the file that nobody knows; [`Settings::resolve`] refuses them.
    #[arg(skip)]
    #[serde(flatten)]
    pub unknown: BTreeMap<String, IgnoredAny>,
}

/// Settings complete with defaults.
#[derive(Clone, Debug)]
pub struct Config {
    /// See [`Settings::data_dir`].
    pub data_dir: PathBuf,
    /// See [`Settings::provider`].
    pub provider: Option<String>,
    /// See [`Settings::proxy`].
    pub proxies: ProxyRules,
    /// How bulk data is sent.
    pub bulk: BulkPolicy,
    /// See [`Settings::runtime`].
    pub runtime: RuntimeKind,
    /// Path of the engine's socket.
    pub runtime_socket: PathBuf,
    /// See [`Settings::pod_log_dir`].
    pub pod_log_dir: PathBuf,
    /// See [`Settings::root_dir`].
    pub root_dir: PathBuf,
    /// See [`Settings::node_ip`].
    pub node_ip: Option<IpAddr>,
    /// See [`Settings::cluster_dns`].
    pub cluster_dns: Vec<IpAddr>,
    /// See [`Settings::cluster_domain`].
    pub cluster_domain: String,
    /// What of the machine is for pods.
    pub shares: Shares,
    /// See [`Settings::pod_pids_limit`].
    pub pod_pids_limit: Option<u64>,
    /// See [`Settings::cgroup_driver`].
    pub cgroup_driver: Driver,
    /// See [`Settings::modbus_endpoint`].
    pub modbus_endpoint: Option<String>,
    /// See [`Settings::metrics_listen`].
    pub metrics_listen: SocketAddr,
    /// See [`Settings::log`].
    pub log: String,
    /// See [`Settings::log_format`].
    pub log_format: skerry_telemetry::logging::LogFormat,
    /// What the node does by itself.
    pub duties: Duties,
    /// What the outbox keeps.
    pub retention: crate::store::Retention,
}

impl Settings {
    /// Fills what flags and environment leave open from the file, then from the defaults.
    ///
    /// `file`: the one that the user named; else [`DEFAULT_FILE`] is read if it exists.
    pub fn resolve(self, file: Option<&Path>) -> Result<Config, ConfigError> {
        let from_file: Self = config::read(file, Path::new(DEFAULT_FILE))?;
        self.with_file(from_file, file.unwrap_or(Path::new(DEFAULT_FILE)))
    }

    /// The same with the text of a file.
    pub fn resolve_text(self, text: &str) -> Result<Config, ConfigError> {
        let file = Path::new(DEFAULT_FILE);
        let from_file = config::parse(text, file)?;
        self.with_file(from_file, file)
    }

    fn with_file(self, from_file: Self, file: &Path) -> Result<Config, ConfigError> {
        if let Some(key) = from_file.unknown.keys().next() {
            return Err(ConfigError::Parse {
                file: file.to_owned(),
                reason: format!(
                    "unknown key `{key}`; skerry-edge run --help lists the flags, which are the keys"
                ),
            });
        }
        self.over(from_file).complete()
    }

    fn over(self, file: Self) -> Self {
        Self {
            data_dir: self.data_dir.or(file.data_dir),
            provider: self.provider.or(file.provider),
            proxy: self.proxy.or(file.proxy),
            link_pacing: self.link_pacing.or(file.link_pacing),
            link_congestion: self.link_congestion.or(file.link_congestion),
            runtime: self.runtime.or(file.runtime),
            runtime_endpoint: self.runtime_endpoint.or(file.runtime_endpoint),
            pod_log_dir: self.pod_log_dir.or(file.pod_log_dir),
            root_dir: self.root_dir.or(file.root_dir),
            node_ip: self.node_ip.or(file.node_ip),
            cluster_dns: if self.cluster_dns.is_empty() {
                file.cluster_dns
            } else {
                self.cluster_dns
            },
            cluster_domain: self.cluster_domain.or(file.cluster_domain),
            max_pods: self.max_pods.or(file.max_pods),
            reserved_cpu: self.reserved_cpu.or(file.reserved_cpu),
            reserved_memory: self.reserved_memory.or(file.reserved_memory),
            reserved_ephemeral_storage: self
                .reserved_ephemeral_storage
                .or(file.reserved_ephemeral_storage),
            pod_pids_limit: self.pod_pids_limit.or(file.pod_pids_limit),
            cgroup_driver: self.cgroup_driver.or(file.cgroup_driver),
            modbus_endpoint: self.modbus_endpoint.or(file.modbus_endpoint),
            metrics_listen: self.metrics_listen.or(file.metrics_listen),
            log: self.log.or(file.log),
            log_format: self.log_format.or(file.log_format),
            duties: self.duties.over(file.duties),
            outbox: self.outbox.over(file.outbox),
            unknown: BTreeMap::new(),
        }
    }

    fn complete(self) -> Result<Config, ConfigError> {
        // Paths end up in mounts and in children with another working directory.
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        let data_dir = absolute(self.data_dir.unwrap_or_else(|| PathBuf::from(DEFAULT_DATA_DIR)));
        let endpoint = self
            .runtime_endpoint
            .unwrap_or_else(|| "unix:///run/containerd/containerd.sock".to_owned());
        let socket = endpoint
            .strip_prefix("unix://")
            .filter(|path| path.starts_with('/'))
            .ok_or_else(|| {
                ConfigError::Value(format!(
                    "runtime-endpoint {endpoint:?} must be a socket: unix:///path/to/engine.sock"
                ))
            })?;
        let metrics_listen = self
            .metrics_listen
            .unwrap_or(SocketAddr::from(([127, 0, 0, 1], 9441)));
        if !metrics_listen.ip().is_loopback() {
            return Err(ConfigError::Value(format!(
                "metrics-listen {metrics_listen} must be a loopback address: the site's network is not trusted"
            )));
        }
        if let Some(endpoint) = &self.modbus_endpoint
            && !endpoint
                .rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        {
            return Err(ConfigError::Value(format!(
                "modbus-endpoint {endpoint:?} must be HOST:PORT"
            )));
        }
        let reserved = Reserved {
            cpu_milli: reserved("reserved-cpu", self.reserved_cpu.as_deref(), 1)?,
            memory_bytes: reserved("reserved-memory", self.reserved_memory.as_deref(), 1000)?,
            ephemeral_bytes: reserved(
                "reserved-ephemeral-storage",
                self.reserved_ephemeral_storage.as_deref(),
                1000,
            )?,
        };
        let default_logs = if nix::unistd::geteuid().is_root() {
            PathBuf::from("/var/log/pods")
        } else {
            data_dir.join("pod-logs")
        };
        let format = self.log_format.as_deref().unwrap_or("text");
        Ok(Config {
            provider: self.provider,
            proxies: ProxyRules::new(self.proxy.as_deref(), |name| std::env::var(name).ok())
                .map_err(ConfigError::Value)?,
            bulk: BulkPolicy {
                paced: self.link_pacing != Some(Switch::Off),
                congestion: self.link_congestion,
            },
            runtime: self.runtime.unwrap_or(RuntimeKind::Cri),
            runtime_socket: PathBuf::from(socket),
            pod_log_dir: self.pod_log_dir.map_or(default_logs, absolute),
            root_dir: self.root_dir.map_or_else(|| data_dir.join("pods"), absolute),
            node_ip: self.node_ip,
            cluster_dns: self.cluster_dns,
            cluster_domain: self.cluster_domain.unwrap_or_else(|| "cluster.local".to_owned()),
            shares: Shares {
                max_pods: self.max_pods.unwrap_or(110),
                reserved,
                ..Shares::default()
            },
            pod_pids_limit: self.pod_pids_limit,
            cgroup_driver: match self.cgroup_driver {
                Some(CgroupDriver::Systemd) => Driver::Systemd,
                Some(CgroupDriver::Cgroupfs) | None => Driver::Cgroupfs,
            },
            modbus_endpoint: self.modbus_endpoint,
            metrics_listen,
            log: self.log.unwrap_or_else(|| "info".to_owned()),
            log_format: format
                .parse()
                .map_err(|e| ConfigError::Value(format!("log-format: {e}")))?,
            duties: self.duties.complete(&data_dir)?,
            retention: self.outbox.complete()?,
            data_dir,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(text: &str, flags: Settings) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("edge.toml");
        std::fs::write(&file, text).unwrap();
        flags.resolve(Some(&file))
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let flags = Settings {
            max_pods: Some(5),
            ..Default::default()
        };
        let config = resolve("max-pods = 9\nruntime = 'process'\ndata-dir = '/data'\n", flags).unwrap();
        assert_eq!(config.shares.max_pods, 5);
        assert_eq!(config.runtime, RuntimeKind::Process);
        assert_eq!(config.root_dir, Path::new("/data/pods"));
        let flags = Settings {
            duties: DutySettings {
                container_log_max_files: Some(3),
                ..Default::default()
            },
            ..Default::default()
        };
        let file = "container-log-max-files = 9\ncontainer-log-max-size = '2Ki'\n";
        let logs = resolve(file, flags).unwrap().duties.logs;
        assert_eq!((logs.max_files, logs.max_bytes), (3, 2048));
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = resolve("max-podz = 1\n", Settings::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("max-podz") && error.contains("edge.toml"),
            "{error}"
        );
    }

    #[test]
    fn what_is_reserved_is_read_as_quantities() {
        let config = resolve(
            "reserved-cpu = '250m'\nreserved-memory = '1Gi'\n",
            Settings::default(),
        )
        .unwrap();
        assert_eq!(config.shares.reserved.cpu_milli, 250);
        assert_eq!(config.shares.reserved.memory_bytes, 1 << 30);
    }

    #[test]
    fn what_the_outbox_keeps_has_defaults_and_settings() {
        use crate::store::{Lane, Retention};
        let file = "outbox-events-max-age = '0s'\noutbox-status-max-size = '1Ki'\noutbox-max-size = '1Mi'\n";
        let given = resolve(file, Settings::default()).unwrap().retention;
        assert_eq!(given.lane(Lane::Events).max_age, None);
        assert_eq!(given.lane(Lane::Status).max_bytes, 1024);
        assert_eq!(given.max_bytes, 1 << 20);
        let silent = resolve("", Settings::default()).unwrap().retention;
        assert_eq!(silent, Retention::default());
    }

    #[test]
    fn values_that_cannot_work_are_refused() {
        for wrong in [
            "runtime-endpoint = 'tcp://x'",
            "runtime = 'docker'",
            "metrics-listen = '0.0.0.0:1'",
            "modbus-endpoint = 'host'",
            "log-format = 'xml'",
            "reserved-cpu = 'much'",
            "reserved-memory = '-1Gi'",
            "cgroup-driver = 'x'",
            "proxy = 'socks5://x:1'",
            "container-log-max-size = 'much'",
            "container-log-max-files = 1",
            "container-log-monitor-interval = '0s'",
            "image-gc-low-threshold-percent = 90",
            "eviction-hard = 'disk<1'",
            "shutdown-grace-period = '1s'",
            "outbox-max-size = '0'",
            "outbox-events-max-age = 'a day'",
        ] {
            assert!(resolve(wrong, Settings::default()).is_err(), "{wrong}");
        }
    }
}
