//! The part of a measurement that is about pods.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use jiff::Timestamp;
use skerry_proto::object::Uid;
use skerry_proto::stats::{
    ContainerDetail, ContainerStats, CpuStats, FsStats, IoStats, MemoryStats, PodReference, PodStats,
    ProcessStats, Snapshot, SwapStats, VolumeStats,
};

use super::cgroup::{self, Reading};
use super::disk::Disks;
use super::{DISK_AGE, StatsConfig, WATCHED_DISK_AGE, host};
use crate::runtime::{
    Container, ContainerState, ContainerUse, DiskUse, Inventory, RuntimeUse, Sandbox, SandboxState,
};

/// Measures every pod that has a running container; what the summary has no field for goes into `snapshot`.
pub(super) fn measure(
    config: &StatsConfig,
    inventory: &Inventory,
    used: &RuntimeUse,
    watched: &HashSet<Uid>,
    disks: &mut Disks,
    snapshot: &mut Snapshot,
    now: Timestamp,
) -> Vec<PodStats> {
    let node_fs = host::fs(&config.root_dir, now);
    let mut running: HashMap<&str, Vec<(&Container, Timestamp)>> = HashMap::new();
    for container in &inventory.containers {
        if let ContainerState::Running { started_at } = container.state {
            let all = running.entry(container.pod_uid.as_str()).or_default();
            all.push((container, started_at));
        }
    }
    let mut pods = Vec::new();
    let ready = |sandbox: &&Sandbox| sandbox.state == SandboxState::Ready;
    for sandbox in inventory.sandboxes.iter().filter(ready) {
        let Some(containers) = running.remove(sandbox.pod_uid.as_str()) else {
            continue;
        };
        let mut pod = Pod {
            config,
            used,
            disks,
            disk_age: match watched.contains(&sandbox.pod_uid) {
                true => WATCHED_DISK_AGE,
                false => DISK_AGE,
            },
            snapshot,
            now,
            sandbox,
            node_fs: node_fs.as_ref(),
        };
        pods.push(pod.measure(&containers));
    }
    pods
}

struct Pod<'a> {
    config: &'a StatsConfig,
    used: &'a RuntimeUse,
    disks: &'a mut Disks,
    disk_age: Duration,
    snapshot: &'a mut Snapshot,
    now: Timestamp,
    sandbox: &'a Sandbox,
    node_fs: Option<&'a FsStats>,
}

impl Pod<'_> {
    fn measure(&mut self, containers: &[(&Container, Timestamp)]) -> PodStats {
        let uid = self.sandbox.pod_uid.as_str();
        let mut stats = PodStats {
            pod_ref: PodReference {
                name: self.sandbox.pod_name.clone(),
                namespace: self.sandbox.pod_namespace.clone(),
                uid: uid.to_owned(),
            },
            start_time: Some(self.sandbox.created_at),
            ..PodStats::default()
        };
        let mut disk = DiskUse::default();
        let mut readings = Vec::new();
        let mut whole = None;
        let mut network_pid = None;
        for (container, started_at) in containers {
            let Some(found) = self.used.containers.get(&container.id) else {
                continue;
            };
            let reading = read(found);
            whole = whole.or_else(|| cgroup::of_pod(&found.cgroups, uid));
            network_pid = network_pid.or(found.network_pid);
            let mut one = self::container(&container.name, Some(*started_at), &reading, self.now);
            let written = found
                .writable_layer
                .or_else(|| Some(self.disks.used(found.writable_dir.as_ref()?, self.disk_age)));
            let logged = container
                .log_path
                .parent()
                .filter(|dir| dir.starts_with(&self.config.pod_log_dir))
                .map(|dir| self.disks.used(dir, super::RATE_SPAN));
            one.rootfs = written.map(|used| self.on_node(used));
            one.logs = logged.map(|used| self.on_node(used));
            for used in written.into_iter().chain(logged) {
                disk.bytes += used.bytes;
                disk.inodes += used.inodes;
            }
            stats.containers.push(one);
            self.detail(container, found, &reading);
            readings.push(reading);
        }
        let total = whole.map_or_else(Reading::default, |paths| cgroup::read(&paths));
        let total = completed(total, sum(&readings));
        let all = self::container("", None, &total, self.now);
        (stats.cpu, stats.memory, stats.io, stats.swap) = (all.cpu, all.memory, all.io, all.swap);
        stats.process_stats = total
            .processes
            .map(|process_count| ProcessStats { process_count });
        if let Some((network, mut details)) = network_pid.and_then(|pid| host::network(Some(pid), self.now)) {
            stats.network = Some(network);
            for detail in &mut details {
                detail.namespace.clone_from(&self.sandbox.pod_namespace);
                detail.pod.clone_from(&self.sandbox.pod_name);
            }
            self.snapshot.interfaces.append(&mut details);
        }
        stats.volumes = self.volumes(uid, &mut disk);
        stats.ephemeral_storage = Some(self.on_node(disk));
        stats
    }

    /// What the pod's volume directories hold. Those on the node's disk count into `disk`, too.
    fn volumes(&mut self, uid: &str, disk: &mut DiskUse) -> Vec<VolumeStats> {
        let pod_dir = self.config.root_dir.join(uid);
        let Ok(own) = std::fs::metadata(&pod_dir) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        for dir in subdirectories(&pod_dir.join("volumes"))
            .iter()
            .flat_map(|kind| subdirectories(kind))
        {
            let Some(name) = dir.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            let Ok(is) = std::fs::metadata(&dir) else { continue };
            let fs = if is.dev() == own.dev() {
                let used = self.disks.used(&dir, self.disk_age);
                disk.bytes += used.bytes;
                disk.inodes += used.inodes;
                Some(self.on_node(used))
            } else {
                // A file system of its own, in memory for instance.
                host::fs(&dir, self.now)
            };
            found.push(VolumeStats {
                fs: fs.unwrap_or_default(),
                name: name.to_owned(),
            });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    /// Use of a part of the node's file system.
    fn on_node(&self, used: DiskUse) -> FsStats {
        FsStats {
            time: Some(self.now),
            used_bytes: Some(used.bytes),
            inodes_used: Some(used.inodes),
            ..self.node_fs.cloned().unwrap_or_default()
        }
    }

    fn detail(&mut self, container: &Container, found: &ContainerUse, reading: &Reading) {
        self.snapshot.containers.push(ContainerDetail {
            namespace: self.sandbox.pod_namespace.clone(),
            pod: self.sandbox.pod_name.clone(),
            container: container.name.clone(),
            id: container.id.0.clone(),
            image: container.image.clone(),
            cgroup: cgroup::name(&found.cgroups).unwrap_or_else(|| format!("/{}", container.id.0)),
            cpu_user_nanos: reading.cpu_user_nanos,
            cpu_system_nanos: reading.cpu_system_nanos,
            cfs_periods: reading.cfs_periods,
            cfs_throttled_periods: reading.cfs_throttled_periods,
            cfs_throttled_nanos: reading.cfs_throttled_nanos,
            cpu_period_micros: reading.cpu_period_micros,
            cpu_quota_micros: reading.cpu_quota_micros,
            cpu_shares: reading.cpu_shares,
            memory_limit_bytes: reading.memory_limit,
            memory_cache_bytes: reading.memory_cache,
            memory_mapped_file_bytes: reading.memory_mapped_file,
            memory_max_usage_bytes: reading.memory_max_usage,
            memory_failures: reading.memory_failures,
            oom_events: reading.oom_kills,
            processes: reading.processes,
            fs_reads_bytes: reading.read_bytes,
            fs_writes_bytes: reading.written_bytes,
        });
    }
}

fn subdirectories(dir: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path()).collect()
}

/// Reads the control groups, and the processes for what they do not tell.
fn read(found: &ContainerUse) -> Reading {
    let mut reading = cgroup::read(&found.cgroups);
    let missing =
        reading.cpu_nanos.is_none() || reading.memory_usage.is_none() || reading.processes.is_none();
    if let (true, Some(supervisor)) = (missing, found.supervisor) {
        let (cpu, resident, count) = host::tree(supervisor);
        reading.cpu_nanos = reading.cpu_nanos.or(Some(cpu));
        if reading.memory_usage.is_none() {
            reading.memory_usage = Some(resident);
            reading.memory_working_set = Some(resident);
            reading.memory_rss = Some(resident);
        }
        reading.processes = reading.processes.or(Some(count));
    }
    reading
}

/// A pod's own groups win; where they tell nothing of processors, of memory or of processes, its containers' sum does.
fn completed(mut whole: Reading, sum: Reading) -> Reading {
    if whole.cpu_nanos.is_none() {
        whole.cpu_nanos = sum.cpu_nanos;
    }
    if whole.processes.is_none() {
        whole.processes = sum.processes;
    }
    if whole.memory_usage.is_none() {
        return Reading {
            cpu_nanos: whole.cpu_nanos,
            cpu_psi: whole.cpu_psi,
            io_psi: whole.io_psi,
            processes: whole.processes,
            ..sum
        };
    }
    whole
}

/// All containers of a pod.
fn sum(readings: &[Reading]) -> Reading {
    let add = |value: fn(&Reading) -> Option<u64>| {
        let known: Vec<u64> = readings.iter().filter_map(value).collect();
        (!known.is_empty()).then(|| known.iter().sum())
    };
    Reading {
        cpu_nanos: add(|r| r.cpu_nanos),
        memory_usage: add(|r| r.memory_usage),
        memory_working_set: add(|r| r.memory_working_set),
        memory_rss: add(|r| r.memory_rss),
        page_faults: add(|r| r.page_faults),
        major_page_faults: add(|r| r.major_page_faults),
        swap_usage: add(|r| r.swap_usage),
        processes: add(|r| r.processes),
        ..Reading::default()
    }
}

/// A reading in the summary's words.
pub(super) fn container(
    name: &str,
    start_time: Option<Timestamp>,
    reading: &Reading,
    now: Timestamp,
) -> ContainerStats {
    let time = Some(now);
    ContainerStats {
        name: name.to_owned(),
        start_time,
        cpu: reading.cpu_nanos.map(|total| CpuStats {
            time,
            usage_core_nano_seconds: Some(total),
            usage_nano_cores: None,
            psi: reading.cpu_psi.clone(),
        }),
        memory: reading.memory_usage.map(|used| MemoryStats {
            time,
            available_bytes: reading
                .memory_limit
                .zip(reading.memory_working_set)
                .map(|(limit, set)| limit.saturating_sub(set)),
            usage_bytes: Some(used),
            working_set_bytes: reading.memory_working_set,
            rss_bytes: reading.memory_rss,
            page_faults: reading.page_faults,
            major_page_faults: reading.major_page_faults,
            psi: reading.memory_psi.clone(),
        }),
        io: reading.io_psi.clone().map(|psi| IoStats { time, psi: Some(psi) }),
        swap: reading.swap_usage.map(|used| SwapStats {
            time,
            usage_bytes: Some(used),
            available_bytes: reading.swap_limit.map(|limit| limit.saturating_sub(used)),
        }),
        ..ContainerStats::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pods_own_groups_do_not_tell_is_the_sum_of_its_containers() {
        let container = |cpu, memory| Reading {
            cpu_nanos: Some(cpu),
            memory_usage: Some(memory),
            memory_working_set: Some(memory),
            processes: Some(1),
            ..Reading::default()
        };
        let all = sum(&[container(10, 100), container(20, 200)]);
        assert_eq!((all.cpu_nanos, all.memory_usage), (Some(30), Some(300)));
        let own = Reading {
            memory_usage: Some(350),
            memory_working_set: Some(340),
            ..Reading::default()
        };
        let total = completed(own, all.clone());
        assert_eq!((total.cpu_nanos, total.processes), (Some(30), Some(2)));
        assert_eq!(
            (total.memory_usage, total.memory_working_set),
            (Some(350), Some(340))
        );
        assert_eq!(completed(Reading::default(), all.clone()), all);
    }
}
