//! Settings of what a node does by itself, under the names that a kubelet gives them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde::Deserialize;
use skerry_proto::device::parse_duration;

use super::ConfigError;
use crate::eviction::{Policy as EvictionPolicy, Texts};
use crate::images::Policy as ImagePolicy;
use crate::manifests::ManifestsConfig;
use crate::pods::{DeadPolicy, quantity};
use crate::rotation::Policy as LogPolicy;
use crate::shutdown::{Fate, Policy as ShutdownPolicy};

/// Declares settings once: as flags, variables and keys of the file, each optional, the first given one winning.
macro_rules! settings {
    ($(#[$about:meta])* $name:ident { $($(#[$meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$about])*
        #[derive(Args, Clone, Debug, Default, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub struct $name {
            $($(#[$meta])* pub $field: Option<$type>,)*
        }

        impl $name {
            /// Takes from `file` what is not given here.
            pub(super) fn over(self, file: Self) -> Self {
                Self { $($field: self.$field.or(file.$field),)* }
            }
        }
    };
}

pub(super) use settings;

settings! {
    /// What a node does by itself, as flags, environment variables and the file give it.
    DutySettings {
        /// Size at which a container's log is rotated [default: 10Mi]
        #[arg(long, env = "SKERRY_CONTAINER_LOG_MAX_SIZE", value_name = "QUANTITY")]
        container_log_max_size: String,
        /// Most log files per container, the current one included; at least 2 [default: 5]
        #[arg(long, env = "SKERRY_CONTAINER_LOG_MAX_FILES", value_name = "N")]
        container_log_max_files: u32,
        /// How often the sizes of logs are looked at [default: 10s]
        #[arg(long, env = "SKERRY_CONTAINER_LOG_MONITOR_INTERVAL", value_name = "DURATION")]
        container_log_monitor_interval: String,
        /// Used share of the images' file system at which unused images are removed, in percent [default: 85]
        #[arg(long, env = "SKERRY_IMAGE_GC_HIGH_THRESHOLD_PERCENT", value_name = "PERCENT")]
        image_gc_high_threshold_percent: u8,
        /// Used share down to which unused images are removed, in percent [default: 80]
        #[arg(long, env = "SKERRY_IMAGE_GC_LOW_THRESHOLD_PERCENT", value_name = "PERCENT")]
        image_gc_low_threshold_percent: u8,
        /// Images that came later than this ago are not removed [default: 2m]
        #[arg(long, env = "SKERRY_IMAGE_MINIMUM_GC_AGE", value_name = "DURATION")]
        image_minimum_gc_age: String,
        /// Unused images older than this are removed even where there is room; 0s = never [default: 0s]
        #[arg(long, env = "SKERRY_IMAGE_MAXIMUM_GC_AGE", value_name = "DURATION")]
        image_maximum_gc_age: String,
        /// How often unused images are looked for [default: 5m]
        #[arg(long, env = "SKERRY_IMAGE_GC_PERIOD", value_name = "DURATION")]
        image_gc_period: String,
        /// Dead containers younger than this are not removed [default: 0s]
        #[arg(long, env = "SKERRY_MINIMUM_CONTAINER_TTL_DURATION", value_name = "DURATION")]
        minimum_container_ttl_duration: String,
        /// Dead instances to keep of each container, for logs --previous [default: 1]
        #[arg(long, env = "SKERRY_MAXIMUM_DEAD_CONTAINERS_PER_CONTAINER", value_name = "N")]
        maximum_dead_containers_per_container: u32,
        /// Directory of static pods, one manifest a file; they run also without any cloud
        #[arg(long, env = "SKERRY_STATIC_POD_PATH", value_name = "DIR")]
        static_pod_path: PathBuf,
        /// How often that directory is read again, whatever is noticed of its changes [default: 20s]
        #[arg(long, env = "SKERRY_FILE_CHECK_FREQUENCY", value_name = "DURATION")]
        file_check_frequency: String,
        /// How long pods may take to end when the machine shuts down (skerry-edge drain) [default: 2m]
        #[arg(long, env = "SKERRY_SHUTDOWN_GRACE_PERIOD", value_name = "DURATION")]
        shutdown_grace_period: String,
        /// Of that, for critical and static pods at the end [default: 20s]
        #[arg(long, env = "SKERRY_SHUTDOWN_GRACE_PERIOD_CRITICAL_PODS", value_name = "DURATION")]
        shutdown_grace_period_critical_pods: String,
        /// What becomes of pods that a shutdown ends: fail (controllers replace them) or restart with the next boot
        /// [default: fail]
        #[arg(long, env = "SKERRY_SHUTDOWN_PODS", value_name = "FATE")]
        shutdown_pods: Fate,
        /// What is too little, at once: memory.available<100Mi,nodefs.available<10%,... [default: that and a kubelet's others]
        #[arg(long, env = "SKERRY_EVICTION_HARD", value_name = "SIGNAL<AMOUNT,...")]
        eviction_hard: String,
        /// What is too little when it lasts
        #[arg(long, env = "SKERRY_EVICTION_SOFT", value_name = "SIGNAL<AMOUNT,...")]
        eviction_soft: String,
        /// How long it must last, for each signal of eviction-soft
        #[arg(long, env = "SKERRY_EVICTION_SOFT_GRACE_PERIOD", value_name = "SIGNAL=DURATION,...")]
        eviction_soft_grace_period: String,
        /// How far above its threshold a signal must rise once it was too low
        #[arg(long, env = "SKERRY_EVICTION_MINIMUM_RECLAIM", value_name = "SIGNAL=AMOUNT,...")]
        eviction_minimum_reclaim: String,
        /// How long a pressure condition is held after it was last seen [default: 5m]
        #[arg(long, env = "SKERRY_EVICTION_PRESSURE_TRANSITION_PERIOD", value_name = "DURATION")]
        eviction_pressure_transition_period: String,
        /// Longest grace of pods that a soft threshold evicts, in seconds [default: 0]
        #[arg(long, env = "SKERRY_EVICTION_MAX_POD_GRACE_PERIOD", value_name = "SECONDS")]
        eviction_max_pod_grace_period: u32,
        /// Directory of the seccomp profiles that pods name as Localhost [default: /var/lib/kubelet/seccomp]
        #[arg(long, env = "SKERRY_SECCOMP_PROFILE_ROOT", value_name = "DIR")]
        seccomp_profile_root: PathBuf,
        /// Containers without a seccomp profile get the engine's own instead of none [default: false]
        #[arg(long, env = "SKERRY_SECCOMP_DEFAULT", value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
        seccomp_default: bool,
        /// Most images that are pulled at one time [default: 3]
        #[arg(long, env = "SKERRY_MAX_PARALLEL_IMAGE_PULLS", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        max_parallel_image_pulls: u32,
        /// How often the signals are looked at [default: 10s]
        #[arg(long, env = "SKERRY_EVICTION_MONITORING_PERIOD", value_name = "DURATION")]
        eviction_monitoring_period: String,
    }
}

/// [`DutySettings`] complete with defaults.
#[derive(Clone, Debug)]
pub struct Duties {
    /// When and how logs are rotated.
    pub logs: LogPolicy,
    /// When unused images are removed.
    pub images: ImagePolicy,
    /// Which dead containers are kept.
    pub dead: DeadPolicy,
    /// When the machine counts as short of something.
    pub eviction: EvictionPolicy,
    /// Where static pods come from; `None` = there are none.
    pub manifests: Option<ManifestsConfig>,
    /// How the machine's shutdown ends pods.
    pub shutdown: ShutdownPolicy,
    /// Where the seccomp profiles of pods are.
    pub seccomp_dir: PathBuf,
    /// Containers without a seccomp profile get the engine's own.
    pub seccomp_default: bool,
    /// Most images that are pulled at one time.
    pub parallel_pulls: usize,
}

impl DutySettings {
    pub(super) fn complete(self, data_dir: &Path) -> Result<Duties, ConfigError> {
        let defaults = LogPolicy::default();
        let logs = LogPolicy {
            max_bytes: bytes(
                "container-log-max-size",
                self.container_log_max_size,
                defaults.max_bytes,
            )?,
            max_files: match self.container_log_max_files {
                None => defaults.max_files,
                Some(files) if files >= 2 => files as usize,
                Some(files) => {
                    return Err(ConfigError::Value(format!(
                        "container-log-max-files {files} must be 2 at least: the current file and one before it"
                    )));
                }
            },
            every: duration(
                "container-log-monitor-interval",
                self.container_log_monitor_interval,
                defaults.every,
            )?,
        };
        let defaults = ImagePolicy::default();
        let images = ImagePolicy {
            high_percent: self
                .image_gc_high_threshold_percent
                .unwrap_or(defaults.high_percent),
            low_percent: self
                .image_gc_low_threshold_percent
                .unwrap_or(defaults.low_percent),
            min_age: period(
                "image-minimum-gc-age",
                self.image_minimum_gc_age,
                defaults.min_age,
            )?,
            max_age: period(
                "image-maximum-gc-age",
                self.image_maximum_gc_age,
                defaults.max_age,
            )?,
            every: duration("image-gc-period", self.image_gc_period, defaults.every)?,
        };
        if images.high_percent > 100 || images.low_percent > images.high_percent {
            return Err(ConfigError::Value(format!(
                "image-gc-low-threshold-percent {} must not be above image-gc-high-threshold-percent {}, and that not \
                 above 100",
                images.low_percent, images.high_percent
            )));
        }
        let defaults = DeadPolicy::default();
        let dead = DeadPolicy {
            min_age: period(
                "minimum-container-ttl-duration",
                self.minimum_container_ttl_duration,
                defaults.min_age,
            )?,
            per_container: self
                .maximum_dead_containers_per_container
                .map_or(defaults.per_container, |n| n as usize),
        };
        let texts = Texts {
            hard: self.eviction_hard,
            soft: self.eviction_soft,
            soft_grace: self.eviction_soft_grace_period,
            reclaim: self.eviction_minimum_reclaim,
        };
        let eviction = EvictionPolicy {
            thresholds: texts
                .parse()
                .map_err(|error| ConfigError::Value(error.to_string()))?,
            hold: period(
                "eviction-pressure-transition-period",
                self.eviction_pressure_transition_period,
                Duration::from_secs(300),
            )?,
            max_grace: Duration::from_secs(self.eviction_max_pod_grace_period.unwrap_or(0).into()),
            every: duration(
                "eviction-monitoring-period",
                self.eviction_monitoring_period,
                Duration::from_secs(10),
            )?,
        };
        let every = duration(
            "file-check-frequency",
            self.file_check_frequency,
            Duration::from_secs(20),
        )?;
        let manifests = self.static_pod_path.map(|directory| ManifestsConfig {
            directory: std::path::absolute(&directory).unwrap_or(directory),
            every,
        });
        let shutdown = ShutdownPolicy {
            grace: duration(
                "shutdown-grace-period",
                self.shutdown_grace_period,
                Duration::from_secs(120),
            )?,
            critical: period(
                "shutdown-grace-period-critical-pods",
                self.shutdown_grace_period_critical_pods,
                Duration::from_secs(20),
            )?,
            fate: self.shutdown_pods.unwrap_or_default(),
            data_dir: data_dir.to_owned(),
        };
        if shutdown.critical > shutdown.grace {
            return Err(ConfigError::Value(
                "shutdown-grace-period-critical-pods is a part of shutdown-grace-period and must not be longer".to_owned(),
            ));
        }
        Ok(Duties {
            logs,
            images,
            dead,
            eviction,
            manifests,
            shutdown,
            seccomp_dir: self.seccomp_profile_root.map_or_else(
                || PathBuf::from("/var/lib/kubelet/seccomp"),
                |directory| std::path::absolute(&directory).unwrap_or(directory),
            ),
            seccomp_default: self.seccomp_default.unwrap_or(false),
            parallel_pulls: self.max_parallel_image_pulls.map_or(3, |n| n as usize),
        })
    }
}

/// A size such as `10Mi`, above zero.
pub(super) fn bytes(key: &str, given: Option<String>, default: u64) -> Result<u64, ConfigError> {
    let Some(text) = given else { return Ok(default) };
    quantity::value(&Quantity(text.clone()))
        .and_then(|value| u64::try_from(value).ok())
        .filter(|value| *value > 0)
        .ok_or_else(|| {
            ConfigError::Value(format!(
                "{key} {text:?} must be a size above zero, for example 10Mi"
            ))
        })
}

/// A duration such as `1m30s`, above zero.
fn duration(key: &str, given: Option<String>, default: Duration) -> Result<Duration, ConfigError> {
    match period(key, given, default)? {
        Duration::ZERO => Err(ConfigError::Value(format!("{key} must be above zero"))),
        value => Ok(value),
    }
}

/// A duration such as `1m30s`, or none at all.
pub(super) fn period(key: &str, given: Option<String>, default: Duration) -> Result<Duration, ConfigError> {
    let Some(text) = given else { return Ok(default) };
    parse_duration(&text).map_err(|error| ConfigError::Value(format!("{key}: {error}")))
}
