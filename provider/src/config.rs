//! Settings of the provider: flags over environment over file over defaults.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;
use skerry_proto::{CRITICAL_PRIORITY, TrustDomain};
use skerry_telemetry::config;

use crate::link::{Timing, Timings};
use crate::pki::{GRACE, LEAF_LIFE};

pub use skerry_telemetry::config::ConfigError;

/// Read when it exists and no other file is named.
pub const DEFAULT_FILE: &str = "/etc/skerry/provider.toml";

/// Settings as flags and environment variables give them; each may also stand in the file.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    /// Kubeconfig file; without it the Pod's ServiceAccount is used, or ~/.kube/config
    #[arg(long, env = "SKERRY_KUBECONFIG", value_name = "FILE", global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace of the CA and the join tokens [default: skerry-system]
    #[arg(long, env = "SKERRY_NAMESPACE", value_name = "NAME", global = true)]
    pub namespace: Option<String>,
    /// SPIFFE trust domain of all certificates [default: skerry.local]
    #[arg(long, env = "SKERRY_TRUST_DOMAIN", value_name = "DOMAIN", global = true)]
    pub trust_domain: Option<String>,
    /// Address on which sites connect [default: 0.0.0.0:10443]
    #[arg(long, env = "SKERRY_LINK_LISTEN", value_name = "IP:PORT")]
    pub link_listen: Option<SocketAddr>,
    /// Further name or address for the link's certificate; may be repeated. Sites check the SPIFFE ID, not these
    #[arg(long, env = "SKERRY_LINK_ADDRESS", value_name = "NAME", value_delimiter = ',')]
    #[serde(default)]
    pub link_address: Vec<String>,
    /// Address of the kubelet API for kubectl logs, exec and attach [default: 0.0.0.0:10250]
    #[arg(long, env = "SKERRY_KUBELET_LISTEN", value_name = "IP:PORT")]
    pub kubelet_listen: Option<SocketAddr>,
    /// Ports of the kubelet API's address, one for each site's Node, so that metrics and kubectl top work; none: every
    /// Node has the port of --kubelet-listen [default: 20000-29999]
    #[arg(long, env = "SKERRY_NODE_PORTS", value_name = "FIRST-LAST|none")]
    pub node_ports: Option<String>,
    /// PEM file with the CA of the API server's kubelet client certificate; without it the ConfigMap
    /// kube-system/extension-apiserver-authentication is read
    #[arg(long, env = "SKERRY_KUBELET_CLIENT_CA", value_name = "FILE")]
    pub kubelet_client_ca: Option<PathBuf>,
    /// Address under which the API server reaches this provider, published as InternalIP of every site's Node.
    /// Needed unless --kubelet-listen names one
    #[arg(long, env = "SKERRY_NODE_ADDRESS", value_name = "IP")]
    pub node_address: Option<IpAddr>,
    /// Address of /healthz, /readyz and /metrics [default: 0.0.0.0:9440]
    #[arg(long, env = "SKERRY_METRICS_LISTEN", value_name = "IP:PORT")]
    pub metrics_listen: Option<SocketAddr>,
    /// How often sites of class standard send a heartbeat [default: 20 seconds]
    #[arg(long, env = "SKERRY_HEARTBEAT_SECONDS", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=600))]
    pub heartbeat_seconds: Option<u64>,
    /// Silence after which a site of class standard is taken to be away; at least twice its heartbeat
    /// [default: three heartbeats]
    #[arg(long, env = "SKERRY_DEADLINE_SECONDS", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(2..=3600))]
    pub deadline_seconds: Option<u64>,
    /// The same for sites of class critical [default: 2 seconds]
    #[arg(long, env = "SKERRY_CRITICAL_HEARTBEAT_SECONDS", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=600))]
    pub critical_heartbeat_seconds: Option<u64>,
    /// The same for sites of class critical [default: five heartbeats]
    #[arg(long, env = "SKERRY_CRITICAL_DEADLINE_SECONDS", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(2..=3600))]
    pub critical_deadline_seconds: Option<u64>,
    /// The same for sites of class best-effort [default: 60 seconds]
    #[arg(long, env = "SKERRY_BEST_EFFORT_HEARTBEAT_SECONDS", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=600))]
    pub best_effort_heartbeat_seconds: Option<u64>,
    /// The same for sites of class best-effort [default: three heartbeats]
    #[arg(long, env = "SKERRY_BEST_EFFORT_DEADLINE_SECONDS", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(2..=3600))]
    pub best_effort_deadline_seconds: Option<u64>,
    /// Priority from which on a pod is of class critical, unless it names its class [default: 1000000000]
    #[arg(long, env = "SKERRY_CRITICAL_PRIORITY", value_name = "N", value_parser = clap::value_parser!(i32).range(1..))]
    pub critical_priority: Option<i32>,
    /// Life of the certificates of sites and of the provider itself, in days; each is renewed after two thirds of it
    /// [default: 90]
    #[arg(long, env = "SKERRY_CERTIFICATE_DAYS", value_name = "DAYS", value_parser = clap::value_parser!(u64).range(1..=825))]
    pub certificate_days: Option<u64>,
    /// How long after its end the certificate of a site that was away may still be renewed by the site itself, in
    /// days; later the site must join again [default: 180]
    #[arg(long, env = "SKERRY_EXPIRED_GRACE_DAYS", value_name = "DAYS", value_parser = clap::value_parser!(u64).range(0..=3650))]
    pub expired_grace_days: Option<u64>,
    /// What is logged: levels, or targets with their levels, for example info,skerry_provider=debug [default: info]
    #[arg(long, env = "SKERRY_LOG", value_name = "FILTER", global = true)]
    pub log: Option<String>,
    /// How log lines look: text or json [default: text]
    #[arg(long, env = "SKERRY_LOG_FORMAT", value_name = "FORMAT", global = true)]
    pub log_format: Option<String>,
}

/// Settings complete with defaults.
#[derive(Clone, Debug)]
pub struct Config {
    /// See [`Settings::kubeconfig`].
    pub kubeconfig: Option<PathBuf>,
    /// See [`Settings::namespace`].
    pub namespace: String,
    /// See [`Settings::trust_domain`].
    pub trust_domain: TrustDomain,
    /// See [`Settings::link_listen`].
    pub link_listen: SocketAddr,
    /// See [`Settings::link_address`].
    pub link_address: Vec<String>,
    /// See [`Settings::kubelet_listen`].
    pub kubelet_listen: SocketAddr,
    /// See [`Settings::node_ports`].
    pub node_ports: Option<RangeInclusive<u16>>,
    /// See [`Settings::kubelet_client_ca`].
    pub kubelet_client_ca: Option<PathBuf>,
    /// See [`Settings::node_address`]; checked by [`Config::published_address`].
    pub node_address: Option<IpAddr>,
    /// See [`Settings::metrics_listen`].
    pub metrics_listen: SocketAddr,
    /// What each class of site means for its link.
    pub timings: Timings,
    /// See [`Settings::certificate_days`].
    pub certificate_life: std::time::Duration,
    /// See [`Settings::expired_grace_days`].
    pub expired_grace: std::time::Duration,
    /// See [`Settings::log`].
    pub log: String,
    /// See [`Settings::log_format`].
    pub log_format: skerry_telemetry::logging::LogFormat,
}

impl Settings {
    /// Fills what flags and environment leave open from the file, then from the defaults.
    ///
    /// `file`: the one that the user named; else [`DEFAULT_FILE`] is read if it exists.
    pub fn resolve(self, file: Option<&Path>) -> Result<Config, ConfigError> {
        let from_file = config::read(file, Path::new(DEFAULT_FILE))?;
        self.over(from_file).complete()
    }

    fn over(self, file: Self) -> Self {
        Self {
            kubeconfig: self.kubeconfig.or(file.kubeconfig),
            namespace: self.namespace.or(file.namespace),
            trust_domain: self.trust_domain.or(file.trust_domain),
            link_listen: self.link_listen.or(file.link_listen),
            link_address: if self.link_address.is_empty() {
                file.link_address
            } else {
                self.link_address
            },
            kubelet_listen: self.kubelet_listen.or(file.kubelet_listen),
            node_ports: self.node_ports.or(file.node_ports),
            kubelet_client_ca: self.kubelet_client_ca.or(file.kubelet_client_ca),
            node_address: self.node_address.or(file.node_address),
            metrics_listen: self.metrics_listen.or(file.metrics_listen),
            heartbeat_seconds: self.heartbeat_seconds.or(file.heartbeat_seconds),
            deadline_seconds: self.deadline_seconds.or(file.deadline_seconds),
            critical_heartbeat_seconds: self
                .critical_heartbeat_seconds
                .or(file.critical_heartbeat_seconds),
            critical_deadline_seconds: self.critical_deadline_seconds.or(file.critical_deadline_seconds),
            best_effort_heartbeat_seconds: self
                .best_effort_heartbeat_seconds
                .or(file.best_effort_heartbeat_seconds),
            best_effort_deadline_seconds: self
                .best_effort_deadline_seconds
                .or(file.best_effort_deadline_seconds),
            critical_priority: self.critical_priority.or(file.critical_priority),
            certificate_days: self.certificate_days.or(file.certificate_days),
            expired_grace_days: self.expired_grace_days.or(file.expired_grace_days),
            log: self.log.or(file.log),
            log_format: self.log_format.or(file.log_format),
        }
    }

    fn timings(&self) -> Result<Timings, ConfigError> {
        let critical_priority = self.critical_priority.unwrap_or(CRITICAL_PRIORITY);
        if critical_priority < 1 {
            return Err(ConfigError::Value(format!(
                "critical-priority ({critical_priority}) must be above zero: most pods have priority 0"
            )));
        }
        let given = [
            (self.critical_heartbeat_seconds, self.critical_deadline_seconds),
            (self.heartbeat_seconds, self.deadline_seconds),
            (
                self.best_effort_heartbeat_seconds,
                self.best_effort_deadline_seconds,
            ),
        ];
        Ok(Timings {
            critical: timing("critical-", given[0], 2, 5)?,
            standard: timing("", given[1], 20, 3)?,
            best_effort: timing("best-effort-", given[2], 60, 3)?,
            critical_priority,
        })
    }

    fn complete(self) -> Result<Config, ConfigError> {
        let any = |port| SocketAddr::from(([0, 0, 0, 0], port));
        let timings = self.timings()?;
        let domain = self.trust_domain.unwrap_or_else(|| "skerry.local".to_owned());
        let format = self.log_format.as_deref().unwrap_or("text");
        Ok(Config {
            kubeconfig: self.kubeconfig,
            namespace: self.namespace.unwrap_or_else(|| "skerry-system".to_owned()),
            trust_domain: domain
                .parse()
                .map_err(|e| ConfigError::Value(format!("trust-domain: {e}")))?,
            link_listen: self.link_listen.unwrap_or(any(10443)),
            link_address: self.link_address,
            kubelet_listen: self.kubelet_listen.unwrap_or(any(10250)),
            node_ports: node_ports(self.node_ports.as_deref().unwrap_or("20000-29999"))?,
            kubelet_client_ca: self.kubelet_client_ca,
            node_address: self.node_address,
            metrics_listen: self.metrics_listen.unwrap_or(any(9440)),
            timings,
            certificate_life: days("certificate-days", self.certificate_days, LEAF_LIFE, 1..=825)?,
            expired_grace: days("expired-grace-days", self.expired_grace_days, GRACE, 0..=3650)?,
            log: self.log.unwrap_or_else(|| "info".to_owned()),
            log_format: format
                .parse()
                .map_err(|e| ConfigError::Value(format!("log-format: {e}")))?,
        })
    }
}

/// Heartbeat and deadline of one class; `patience`: how many heartbeats the deadline is when it is not given.
fn timing(
    prefix: &str,
    (heartbeat, deadline): (Option<u64>, Option<u64>),
    default: u64,
    patience: u64,
) -> Result<Timing, ConfigError> {
    let heartbeat = heartbeat.unwrap_or(default);
    let deadline = deadline.unwrap_or(heartbeat.saturating_mul(patience));
    if !(1..=600).contains(&heartbeat) || !(2..=3600).contains(&deadline) || deadline < heartbeat * 2 {
        return Err(ConfigError::Value(format!(
            "{prefix}deadline-seconds ({deadline}) must be at least twice {prefix}heartbeat-seconds ({heartbeat}), which \
             is 1 to 600"
        )));
    }
    Ok(Timing::seconds(heartbeat, deadline))
}

/// The range is also checked here, since the file is not read by clap.
fn days(
    name: &str,
    given: Option<u64>,
    default: std::time::Duration,
    range: RangeInclusive<u64>,
) -> Result<std::time::Duration, ConfigError> {
    match given {
        None => Ok(default),
        Some(days) if range.contains(&days) => Ok(std::time::Duration::from_secs(days * 86_400)),
        Some(days) => Err(ConfigError::Value(format!(
            "{name} ({days}) must be from {} to {}",
            range.start(),
            range.end()
        ))),
    }
}

fn node_ports(text: &str) -> Result<Option<RangeInclusive<u16>>, ConfigError> {
    if text == "none" {
        return Ok(None);
    }
    let read = || {
        let (first, last) = text.split_once('-')?;
        let (first, last) = (
            first.trim().parse::<u16>().ok()?,
            last.trim().parse::<u16>().ok()?,
        );
        (first > 0 && first <= last).then_some(first..=last)
    };
    let wrong = || ConfigError::Value(format!("node-ports {text:?} must be FIRST-LAST, or none"));
    read().map(Some).ok_or_else(wrong)
}

impl Config {
    /// The address that every Node publishes.
    pub fn published_address(&self) -> Result<IpAddr, ConfigError> {
        let listen = self.kubelet_listen.ip();
        self.node_address.or((!listen.is_unspecified()).then_some(listen)).ok_or_else(|| {
            ConfigError::Value(
                "node-address is needed: the address under which the API server reaches this provider (in a Pod, the \
                 Pod's IP: set SKERRY_NODE_ADDRESS from status.podIP)"
                    .to_owned(),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(text: &str, flags: Settings) -> Result<Config, ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("provider.toml");
        std::fs::write(&file, text).unwrap();
        flags.resolve(Some(&file))
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let flags = Settings {
            namespace: Some("flag".to_owned()),
            ..Default::default()
        };
        let config = resolve("namespace = 'file'\ntrust-domain = 'file.example'\n", flags).unwrap();
        assert_eq!(config.namespace, "flag");
        assert_eq!(config.trust_domain.as_str(), "file.example");
        assert_eq!(config.link_listen.port(), 10443);
    }

    #[test]
    fn node_ports_are_a_range_or_none() {
        assert_eq!(node_ports("20000-20010").unwrap(), Some(20000..=20010));
        assert_eq!(node_ports("none").unwrap(), None);
        for wrong in ["", "5", "0-9", "9-5", "1-70000", "a-b"] {
            assert!(node_ports(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        let error = resolve("namespaze = 'x'\n", Settings::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("namespaze") && error.contains("provider.toml"),
            "{error}"
        );
    }

    #[test]
    fn each_class_has_timings_of_its_own_that_make_sense() {
        let config = resolve("", Settings::default()).unwrap();
        assert_eq!(config.timings, Timings::default());
        let text =
            "critical-heartbeat-seconds = 1\nbest-effort-deadline-seconds = 200\nheartbeat-seconds = 10\n";
        let timings = resolve(text, Settings::default()).unwrap().timings;
        assert_eq!(timings.critical, Timing::seconds(1, 5));
        assert_eq!(timings.standard, Timing::seconds(10, 30));
        assert_eq!(timings.best_effort, Timing::seconds(60, 200));
        for wrong in [
            "critical-deadline-seconds = 3",
            "best-effort-heartbeat-seconds = 0",
            "critical-priority = 0",
        ] {
            let error = resolve(wrong, Settings::default()).unwrap_err().to_string();
            assert!(error.contains(wrong.split(' ').next().unwrap()), "{error}");
        }
    }

    #[test]
    fn a_named_file_must_exist_and_values_must_make_sense() {
        assert!(matches!(
            Settings::default().resolve(Some(Path::new("/nonexistent/x.toml"))),
            Err(ConfigError::Read { .. })
        ));
        assert!(
            resolve(
                "heartbeat-seconds = 10\ndeadline-seconds = 12\n",
                Settings::default()
            )
            .is_err()
        );
        assert!(resolve("trust-domain = 'Not Valid'\n", Settings::default()).is_err());
        assert!(resolve("certificate-days = 0\n", Settings::default()).is_err());
        assert!(resolve("expired-grace-days = 4000\n", Settings::default()).is_err());
        assert!(
            resolve("", Settings::default())
                .unwrap()
                .published_address()
                .is_err()
        );
    }
}
