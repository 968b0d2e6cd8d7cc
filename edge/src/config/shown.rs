//! What `/configz` shows of the settings, as fields of a `KubeletConfiguration`.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::Config;
use crate::cgroup::Driver;
use crate::eviction::{Amount, Threshold};

/// The settings that have a field in a kubelet's configuration, by its name.
pub(crate) fn shown(config: &Config) -> Vec<(String, Value)> {
    let duties = &config.duties;
    let eviction = &duties.eviction;
    let hard = |t: &&Threshold| t.is_hard();
    let soft = |t: &&Threshold| !t.is_hard();
    let thresholds = || eviction.thresholds.iter();
    let below = |t: &Threshold| t.below.to_string();
    let mut fields = vec![
        (
            "containerLogMaxSize",
            json!(Amount::Absolute(duties.logs.max_bytes).to_string()),
        ),
        ("containerLogMaxFiles", json!(duties.logs.max_files)),
        ("containerLogMonitorInterval", json!(duration(duties.logs.every))),
        ("imageGCHighThresholdPercent", json!(duties.images.high_percent)),
        ("imageGCLowThresholdPercent", json!(duties.images.low_percent)),
        ("imageMinimumGCAge", json!(duration(duties.images.min_age))),
        ("imageMaximumGCAge", json!(duration(duties.images.max_age))),
        ("evictionHard", by_signal(thresholds().filter(hard), below)),
        ("evictionSoft", by_signal(thresholds().filter(soft), below)),
        (
            "evictionSoftGracePeriod",
            by_signal(thresholds().filter(soft), |t| duration(t.grace)),
        ),
        (
            "evictionMinimumReclaim",
            by_signal(thresholds().filter(|t| t.reclaim != Amount::Absolute(0)), |t| {
                t.reclaim.to_string()
            }),
        ),
        ("evictionPressureTransitionPeriod", json!(duration(eviction.hold))),
        ("evictionMaxPodGracePeriod", json!(eviction.max_grace.as_secs())),
        ("shutdownGracePeriod", json!(duration(duties.shutdown.grace))),
        (
            "shutdownGracePeriodCriticalPods",
            json!(duration(duties.shutdown.critical)),
        ),
        ("seccompDefault", json!(duties.seccomp_default)),
        ("maxParallelImagePulls", json!(duties.parallel_pulls)),
        ("systemReserved", reserved(config)),
        (
            "cgroupDriver",
            json!(match config.cgroup_driver {
                Driver::Systemd => "systemd",
                Driver::Cgroupfs => "cgroupfs",
            }),
        ),
    ];
    if let Some(limit) = config.pod_pids_limit {
        fields.push(("podPidsLimit", json!(limit)));
    }
    if let Some(manifests) = &duties.manifests {
        fields.push(("staticPodPath", json!(manifests.directory)));
        fields.push(("fileCheckFrequency", json!(duration(manifests.every))));
    }
    fields
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

fn by_signal<'a>(
    thresholds: impl Iterator<Item = &'a Threshold>,
    value: impl Fn(&Threshold) -> String,
) -> Value {
    let map: Map<String, Value> = thresholds
        .map(|threshold| (threshold.signal.name().to_owned(), json!(value(threshold))))
        .collect();
    Value::Object(map)
}

fn reserved(config: &Config) -> Value {
    let kept = config.shares.reserved;
    let bytes = |n: u64| json!(Amount::Absolute(n).to_string());
    let mut map = Map::new();
    if kept.cpu_milli > 0 {
        map.insert("cpu".to_owned(), json!(format!("{}m", kept.cpu_milli)));
    }
    if kept.memory_bytes > 0 {
        map.insert("memory".to_owned(), bytes(kept.memory_bytes));
    }
    if kept.ephemeral_bytes > 0 {
        map.insert("ephemeral-storage".to_owned(), bytes(kept.ephemeral_bytes));
    }
    Value::Object(map)
}

/// A duration in the notation of Go, which Kubernetes reads: `1h0m0s`, `10s`, `500ms`.
fn duration(value: Duration) -> String {
    let seconds = value.as_secs();
    match (seconds / 3600, seconds / 60 % 60) {
        (0, 0) if seconds == 0 && !value.is_zero() => format!("{}ms", value.as_millis()),
        (0, 0) => format!("{}s", value.as_secs_f64()),
        (0, minutes) => format!("{minutes}m{}s", seconds % 60),
        (hours, minutes) => format!("{hours}h{minutes}m{}s", seconds % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{DutySettings, Settings};
    use super::*;

    #[test]
    fn the_settings_are_shown_as_they_are_set_and_as_the_defaults_are() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("edge.toml");
        std::fs::write(&file, "").unwrap();
        let settings = Settings {
            reserved_cpu: Some("250m".into()),
            duties: DutySettings {
                container_log_max_size: Some("2Ki".into()),
                eviction_hard: Some("memory.available<5%".into()),
                eviction_soft: Some("nodefs.available<2Gi".into()),
                eviction_soft_grace_period: Some("nodefs.available=1m30s".into()),
                ..DutySettings::default()
            },
            ..Settings::default()
        };
        let config = settings.resolve(Some(&file)).unwrap();
        let fields: Map<String, Value> = shown(&config).into_iter().collect();
        assert_eq!(fields["containerLogMaxSize"], "2Ki");
        assert_eq!(fields["containerLogMaxFiles"], 5);
        assert_eq!(fields["evictionHard"], json!({"memory.available": "5%"}));
        assert_eq!(fields["evictionSoft"], json!({"nodefs.available": "2Gi"}));
        assert_eq!(
            fields["evictionSoftGracePeriod"],
            json!({"nodefs.available": "1m30s"})
        );
        assert_eq!(fields["evictionMinimumReclaim"], json!({}));
        assert_eq!(fields["systemReserved"], json!({"cpu": "250m"}));
        assert_eq!(fields["imageMaximumGCAge"], "0s");
        assert!(!fields.contains_key("podPidsLimit"));
    }

    #[test]
    fn durations_are_written_as_go_reads_them() {
        for (millis, text) in [
            (0, "0s"),
            (500, "500ms"),
            (1500, "1.5s"),
            (10_000, "10s"),
            (300_000, "5m0s"),
            (3_600_000, "1h0m0s"),
        ] {
            assert_eq!(duration(Duration::from_millis(millis)), text);
        }
    }
}
