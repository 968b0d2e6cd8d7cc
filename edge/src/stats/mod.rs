//! What the machine and its pods use.
//!
//! In: `/proc`, control groups, file systems, and what the runtime counts. Out: a [`Snapshot`]: the kubelet's summary
//! and the counters of its other metrics. Who asks says how old the answer may be; nothing is measured unasked, and
//! askers at the same time share one measurement.
//!
//! * [`Stats::node`] reads the node alone: a dozen small files, no call to the runtime; for who looks every few seconds;
//! * [`Stats::snapshot`] reads everything: pods, containers, volumes, images.
//!
//! What must always hold: a counter comes from one source for the life of its container, so that it never goes back;
//! what cannot be read is absent, never zero.

pub(crate) mod cgroup;
mod disk;
mod host;
mod pods;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use skerry_proto::object::Uid;
use skerry_proto::stats::{
    ContainerStats, CpuStats, FsStats, MemoryStats, NodeStats, RuntimeStats, Snapshot, Summary,
};
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::runtime::{DiskUse, Inventory, Runtime, RuntimeError, RuntimeUse};
use disk::Disks;

/// An age that suits who reads metrics: two scrapers cost no more than one.
pub const SCRAPE_AGE: Duration = Duration::from_secs(5);

/// How long a directory's size is remembered.
const DISK_AGE: Duration = Duration::from_secs(60);

/// The same for pods that are watched: less than the ten seconds between two looks at limits.
const WATCHED_DISK_AGE: Duration = Duration::from_secs(8);

/// A rate is the difference of two readings not closer than this.
const RATE_SPAN: Duration = Duration::from_secs(1);

/// Settings of the room.
#[derive(Clone, Debug)]
pub struct StatsConfig {
    /// The Node's name.
    pub node_name: String,
    /// Directory of the pods' volumes, one subdirectory per UID; its file system is the node's.
    pub root_dir: PathBuf,
    /// Directory of container logs.
    pub pod_log_dir: PathBuf,
    /// Shown where the machine has no id of its own.
    pub fallback_machine_id: String,
}

/// Measures. Clones share what they remember.
#[derive(Clone)]
pub struct Stats {
    config: Arc<StatsConfig>,
    runtime: Arc<dyn Runtime>,
    memory: Arc<Mutex<Memory>>,
}

/// What is kept between two measurements.
#[derive(Default)]
struct Memory {
    last: Option<(Instant, Arc<Snapshot>)>,
    /// Processor time at the reading that the next rate starts from, by what it is of.
    rates: HashMap<String, (Instant, u64, Option<u64>)>,
    disks: Disks,
}

impl Stats {
    /// Measures the pods of `runtime`.
    pub fn new(config: StatsConfig, runtime: Arc<dyn Runtime>) -> Self {
        Self {
            config: Arc::new(config),
            runtime,
            memory: Arc::default(),
        }
    }

    /// The node alone, now: memory, swap, processes, file system. Without the runtime's file systems, rates and
    /// system containers.
    ///
    /// `memory.availableBytes` is capacity less working set, the kubelet's signal `memory.available`; `fs` is `nodefs`;
    /// `rlimit` is `pid`.
    pub fn node(&self) -> NodeStats {
        let now = Timestamp::now();
        let (memory, swap) = host::memory(now).unzip();
        NodeStats {
            node_name: self.config.node_name.clone(),
            start_time: host::boot_time(),
            cpu: host::cpu(now),
            memory,
            io: host::io(now),
            network: host::network(None, now).map(|(stats, _)| stats),
            fs: host::fs(&self.config.root_dir, now),
            rlimit: Some(host::rlimit(now)),
            swap,
            ..NodeStats::default()
        }
    }

    /// Everything, measured at most `max_age` ago. Sizes of directories may be a minute older.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn snapshot(&self, max_age: Duration) -> Result<Arc<Snapshot>, RuntimeError> {
        self.measured(max_age, HashSet::new()).await
    }

    /// Everything, measured now. Sizes of the directories of the `watched` pods are of the last seconds, as far as
    /// counting them does not take long.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn snapshot_watching(&self, watched: HashSet<Uid>) -> Result<Arc<Snapshot>, RuntimeError> {
        self.measured(Duration::ZERO, watched).await
    }

    async fn measured(
        &self,
        max_age: Duration,
        watched: HashSet<Uid>,
    ) -> Result<Arc<Snapshot>, RuntimeError> {
        let mut memory = self.memory.lock().await;
        if let Some((at, snapshot)) = &memory.last
            && at.elapsed() < max_age
        {
            return Ok(Arc::clone(snapshot));
        }
        let inventory = self.runtime.list().await?;
        let used = self.runtime.stats(&inventory).await?;
        let (stats, mut kept) = (self.clone(), std::mem::take(&mut *memory));
        let measured = tokio::task::spawn_blocking(move || {
            let snapshot = stats.measure(&inventory, &used, &watched, &mut kept);
            (kept, snapshot)
        });
        let (kept, snapshot) = measured
            .await
            .map_err(|error| RuntimeError::Failed(format!("measuring the node failed: {error}")))?;
        *memory = kept;
        let snapshot = Arc::new(snapshot);
        memory.last = Some((Instant::now(), Arc::clone(&snapshot)));
        Ok(snapshot)
    }

    fn measure(
        &self,
        inventory: &Inventory,
        used: &RuntimeUse,
        watched: &HashSet<Uid>,
        memory: &mut Memory,
    ) -> Snapshot {
        let mut node = self.node();
        let now = Timestamp::now();
        memory.disks.forget_older(DISK_AGE * 5);
        node.runtime = Some(runtime_fs(used, node.fs.as_ref(), now));
        node.system_containers = system_containers(now);
        let mut snapshot = Snapshot {
            machine: host::machine(&self.config.fallback_machine_id),
            ..Snapshot::default()
        };
        if let Some((_, details)) = host::network(None, now) {
            snapshot.interfaces = details;
        }
        let mut pods = pods::measure(
            &self.config,
            inventory,
            used,
            watched,
            &mut memory.disks,
            &mut snapshot,
            now,
        );
        memory.rate("node", node.cpu.as_mut());
        for container in &mut node.system_containers {
            memory.rate(&format!("system/{}", container.name), container.cpu.as_mut());
        }
        for pod in &mut pods {
            let uid = pod.pod_ref.uid.clone();
            memory.rate(&uid, pod.cpu.as_mut());
            for container in &mut pod.containers {
                // A restarted container is another one.
                let started = container.start_time.map(Timestamp::as_nanosecond).unwrap_or(0);
                let key = format!("{uid}/{}/{started}", container.name);
                memory.rate(&key, container.cpu.as_mut());
            }
        }
        memory.rates.retain(|_, (at, ..)| at.elapsed() < DISK_AGE * 5);
        snapshot.summary = Summary { node, pods };
        snapshot
    }
}

impl Memory {
    /// Fills in the rate since the reading before.
    fn rate(&mut self, key: &str, cpu: Option<&mut CpuStats>) {
        let Some(cpu) = cpu else { return };
        let Some(total) = cpu.usage_core_nano_seconds else {
            return;
        };
        let now = Instant::now();
        let Some((at, before, last)) = self.rates.get(key).copied() else {
            self.rates.insert(key.to_owned(), (now, total, None));
            return;
        };
        let span = now.duration_since(at);
        if span < RATE_SPAN {
            cpu.usage_nano_cores = last;
            return;
        }
        let rate = u128::from(total.saturating_sub(before)) * 1_000_000_000 / span.as_nanos();
        cpu.usage_nano_cores = u64::try_from(rate).ok();
        self.rates
            .insert(key.to_owned(), (now, total, cpu.usage_nano_cores));
    }
}

/// The runtime's file systems. A runtime without images has the node's.
fn runtime_fs(used: &RuntimeUse, node: Option<&FsStats>, now: Timestamp) -> RuntimeStats {
    let Some((dir, images)) = &used.images else {
        let mut own = node.cloned();
        if let Some(fs) = &mut own {
            fs.used_bytes = Some(0);
            fs.inodes_used = Some(0);
        }
        return RuntimeStats {
            image_fs: own,
            container_fs: node.cloned(),
        };
    };
    let on = |dir: &std::path::Path, used: Option<&DiskUse>| {
        let mut fs = host::fs(dir, now)?;
        if let Some(used) = used {
            fs.used_bytes = Some(used.bytes);
            fs.inodes_used = Some(used.inodes);
        }
        Some(fs)
    };
    let image_fs = on(dir, Some(images));
    let container_fs = on(used.layers.as_deref().unwrap_or(dir), None);
    RuntimeStats {
        image_fs,
        container_fs,
    }
}

/// The daemon itself, as `kubelet`, and all pods together. The engine and the rest of the machine are not told apart.
fn system_containers(now: Timestamp) -> Vec<ContainerStats> {
    let mut found = Vec::new();
    if let Some((cpu, resident)) = host::own() {
        found.push(ContainerStats {
            name: "kubelet".to_owned(),
            cpu: Some(CpuStats {
                time: Some(now),
                usage_core_nano_seconds: Some(cpu),
                ..CpuStats::default()
            }),
            memory: Some(MemoryStats {
                time: Some(now),
                usage_bytes: Some(resident),
                working_set_bytes: Some(resident),
                rss_bytes: Some(resident),
                ..MemoryStats::default()
            }),
            ..ContainerStats::default()
        });
    }
    let all = cgroup::read(&cgroup::paths_below_roots("kubepods"));
    if all.memory_usage.is_some() || all.cpu_nanos.is_some() {
        found.push(pods::container("pods", None, &all, now));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(total: u64) -> CpuStats {
        CpuStats {
            usage_core_nano_seconds: Some(total),
            ..CpuStats::default()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_is_the_use_between_two_readings() {
        let mut memory = Memory::default();
        let mut read = |total: u64| {
            let mut cpu = cpu(total);
            memory.rate("x", Some(&mut cpu));
            cpu.usage_nano_cores
        };
        assert_eq!(read(1_000), None);
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(read(1_000_001_000), Some(500_000_000));
        // Too close for a new one.
        tokio::time::advance(Duration::from_millis(10)).await;
        assert_eq!(read(1_000_001_001), Some(500_000_000));
    }
}
