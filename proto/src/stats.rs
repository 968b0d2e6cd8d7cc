//! What a node and its pods use: the answer of the kubelet's `/stats/summary`, and what its metrics need beyond that.
//!
//! [`Summary`] has the field names of `stats.k8s.io/v1alpha1`, so it is served as it stands. A [`Snapshot`] travels over
//! the link as JSON; fields that a side does not know are ignored.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// One look at a node, complete.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Snapshot {
    /// What `/stats/summary` answers.
    pub summary: Summary,
    /// The machine.
    pub machine: Machine,
    /// Counters of each running container that the summary has no field for.
    pub containers: Vec<ContainerDetail>,
    /// Counters of each interface that the summary has no field for.
    pub interfaces: Vec<InterfaceDetail>,
}

/// Counters of one interface, beyond the summary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InterfaceDetail {
    /// Namespace of the pod, empty for the host's own interfaces.
    pub namespace: String,
    /// Name of the pod, empty for the host's own interfaces.
    pub pod: String,
    /// Name of the interface.
    pub name: String,
    /// Packets received.
    pub rx_packets: u64,
    /// Packets lost on their way in.
    pub rx_dropped: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Packets lost on their way out.
    pub tx_dropped: u64,
}

/// The machine, as cAdvisor describes one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Machine {
    /// Processors that are online.
    pub cores: u64,
    /// Physical memory in bytes.
    pub memory_bytes: u64,
    /// Swap space in bytes.
    pub swap_bytes: u64,
    /// `/etc/machine-id`.
    pub machine_id: String,
    /// Changes with every boot.
    pub boot_id: String,
    /// `product_uuid`, may be empty.
    pub system_uuid: String,
    /// Kernel release.
    pub kernel_version: String,
    /// Name of the distribution.
    pub os_version: String,
}

/// Counters and limits of one container, beyond the summary.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerDetail {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// Name of the container.
    pub container: String,
    /// Its id in the runtime.
    pub id: String,
    /// The image as the pod names it.
    pub image: String,
    /// Path below the cgroup roots, the `id` label of cAdvisor; the container's id where it has no cgroup.
    pub cgroup: String,
    /// Processor time in user mode, nanoseconds.
    pub cpu_user_nanos: Option<u64>,
    /// Processor time in the kernel, nanoseconds.
    pub cpu_system_nanos: Option<u64>,
    /// CFS periods that have elapsed.
    pub cfs_periods: Option<u64>,
    /// Those of them in which the quota was used up.
    pub cfs_throttled_periods: Option<u64>,
    /// Time spent waiting for the next period, nanoseconds.
    pub cfs_throttled_nanos: Option<u64>,
    /// CFS period in microseconds, where there is a quota.
    pub cpu_period_micros: Option<u64>,
    /// CFS quota in microseconds, where there is one.
    pub cpu_quota_micros: Option<u64>,
    /// cgroup v1 shares, converted from v2's weight.
    pub cpu_shares: Option<u64>,
    /// Memory limit in bytes, where there is one.
    pub memory_limit_bytes: Option<u64>,
    /// Page cache in bytes.
    pub memory_cache_bytes: Option<u64>,
    /// Mapped files in bytes.
    pub memory_mapped_file_bytes: Option<u64>,
    /// Highest use in bytes.
    pub memory_max_usage_bytes: Option<u64>,
    /// How often the limit was hit.
    pub memory_failures: Option<u64>,
    /// Processes killed for want of memory.
    pub oom_events: Option<u64>,
    /// Processes.
    pub processes: Option<u64>,
    /// Bytes read from block devices.
    pub fs_reads_bytes: Option<u64>,
    /// Bytes written to block devices.
    pub fs_writes_bytes: Option<u64>,
}

/// `/stats/summary`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Summary {
    /// The node.
    pub node: NodeStats,
    /// Pods with a sandbox.
    pub pods: Vec<PodStats>,
}

/// The node as a whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeStats {
    /// The Node's name.
    pub node_name: String,
    /// Parts of the node that are no pods: `kubelet`, `pods`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub system_containers: Vec<ContainerStats>,
    /// When the machine booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Timestamp>,
    /// Processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuStats>,
    /// Memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryStats>,
    /// Block devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<IoStats>,
    /// The host's interfaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkStats>,
    /// The file system of volumes and logs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fs: Option<FsStats>,
    /// The runtime's file systems.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub runtime: Option<RuntimeStats>,
    /// Process ids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rlimit: Option<RlimitStats>,
    /// Swap space.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap: Option<SwapStats>,
}

/// The runtime's file systems.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuntimeStats {
    /// Where images are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_fs: Option<FsStats>,
    /// Where containers write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_fs: Option<FsStats>,
}

/// Process ids of the node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RlimitStats {
    /// When it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Timestamp>,
    /// Highest number of processes.
    #[serde(rename = "maxpid")]
    pub max_pid: u64,
    /// Processes and threads now.
    #[serde(rename = "curproc")]
    pub current: u64,
}

/// One pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStats {
    /// Which one.
    pub pod_ref: PodReference,
    /// When its sandbox was made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Timestamp>,
    /// Its running containers.
    pub containers: Vec<ContainerStats>,
    /// All of it: processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuStats>,
    /// All of it: memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryStats>,
    /// All of it: block devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<IoStats>,
    /// Its interfaces; absent for pods in the host's network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkStats>,
    /// Volumes that the node keeps for it.
    #[serde(rename = "volume", skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeStats>,
    /// Disk that goes with it: writable layers, logs, volumes on disk.
    #[serde(rename = "ephemeral-storage", skip_serializing_if = "Option::is_none")]
    pub ephemeral_storage: Option<FsStats>,
    /// Its processes.
    #[serde(rename = "process_stats", skip_serializing_if = "Option::is_none")]
    pub process_stats: Option<ProcessStats>,
    /// All of it: swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap: Option<SwapStats>,
}

/// Names a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodReference {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its UID.
    pub uid: String,
}

/// Processes of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessStats {
    /// How many.
    pub process_count: u64,
}

/// One running container, or a part of the system.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerStats {
    /// Its name.
    pub name: String,
    /// When it started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Timestamp>,
    /// Processors.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<CpuStats>,
    /// Memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryStats>,
    /// Block devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<IoStats>,
    /// Its writable layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rootfs: Option<FsStats>,
    /// Its logs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logs: Option<FsStats>,
    /// Swap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap: Option<SwapStats>,
}

/// Processor time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CpuStats {
    /// When it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Timestamp>,
    /// Use since the look before, in billionths of a processor; absent at the first look.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage_nano_cores: Option<u64>,
    /// Use since the start, nanoseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage_core_nano_seconds: Option<u64>,
    /// Time lost waiting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Psi>,
}

/// Memory in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MemoryStats {
    /// When it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Timestamp>,
    /// Limit (of the node: capacity) less working set; absent without a limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// All memory in use, caches included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage_bytes: Option<u64>,
    /// Memory that cannot be given back easily: use less inactive file pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_set_bytes: Option<u64>,
    /// Anonymous memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rss_bytes: Option<u64>,
    /// Minor page faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_faults: Option<u64>,
    /// Major page faults.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub major_page_faults: Option<u64>,
    /// Time lost waiting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Psi>,
}

/// Block devices.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct IoStats {
    /// When it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Timestamp>,
    /// Time lost waiting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub psi: Option<Psi>,
}

/// Swap in bytes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SwapStats {
    /// When it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Timestamp>,
    /// Swap that may still be used.
    #[serde(rename = "swapAvailableBytes", skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// Swap in use.
    #[serde(rename = "swapUsageBytes", skip_serializing_if = "Option::is_none")]
    pub usage_bytes: Option<u64>,
}

/// A file system, or a part of one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct FsStats {
    /// When it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Timestamp>,
    /// Free for ordinary users.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<u64>,
    /// Size of the file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity_bytes: Option<u64>,
    /// In use by what this describes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used_bytes: Option<u64>,
    /// Free inodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inodes_free: Option<u64>,
    /// Inodes of the file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inodes: Option<u64>,
    /// Inodes in use by what this describes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inodes_used: Option<u64>,
}

/// A volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeStats {
    /// Its size and use.
    #[serde(flatten)]
    pub fs: FsStats,
    /// Its name in the pod.
    pub name: String,
}

/// Network interfaces.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkStats {
    /// When it was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time: Option<Timestamp>,
    /// The one with the default route.
    #[serde(flatten)]
    pub main: InterfaceStats,
    /// All but the loopback.
    pub interfaces: Vec<InterfaceStats>,
}

/// One network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct InterfaceStats {
    /// Its name.
    pub name: String,
    /// Bytes received.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_bytes: Option<u64>,
    /// Errors while receiving.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rx_errors: Option<u64>,
    /// Bytes sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_bytes: Option<u64>,
    /// Errors while sending.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tx_errors: Option<u64>,
}

/// Pressure stall information.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Psi {
    /// Everything waited.
    pub full: PsiData,
    /// Something waited.
    pub some: PsiData,
}

/// One line of a pressure file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PsiData {
    /// Time lost in all, nanoseconds.
    pub total: u64,
    /// Share of the last 10 s, percent.
    pub avg10: f64,
    /// Share of the last minute, percent.
    pub avg60: f64,
    /// Share of the last five minutes, percent.
    pub avg300: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_has_the_field_names_of_the_kubelet() {
        let pod = PodStats {
            pod_ref: PodReference {
                name: "p".into(),
                namespace: "n".into(),
                uid: "u".into(),
            },
            volumes: vec![VolumeStats {
                fs: FsStats {
                    used_bytes: Some(4096),
                    ..FsStats::default()
                },
                name: "data".into(),
            }],
            ephemeral_storage: Some(FsStats {
                used_bytes: Some(1),
                ..FsStats::default()
            }),
            process_stats: Some(ProcessStats { process_count: 2 }),
            swap: Some(SwapStats {
                usage_bytes: Some(3),
                ..SwapStats::default()
            }),
            ..PodStats::default()
        };
        let text = serde_json::to_value(&pod).unwrap();
        let expected = serde_json::json!({
            "podRef": {"name": "p", "namespace": "n", "uid": "u"},
            "containers": [],
            "volume": [{"usedBytes": 4096, "name": "data"}],
            "ephemeral-storage": {"usedBytes": 1},
            "process_stats": {"process_count": 2},
            "swap": {"swapUsageBytes": 3},
        });
        assert_eq!(text, expected);
        assert_eq!(serde_json::from_value::<PodStats>(text).unwrap(), pod);
    }
}
