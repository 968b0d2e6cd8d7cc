//! Looks, and acts: frees what nobody needs, then ends one pod at a time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use nix::sys::statvfs::statvfs;
use skerry_proto::SiteName;
use skerry_proto::stats::{FsStats, NodeStats, PodStats, Snapshot};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::rank::{Candidate, Layout, rank};
use super::state::{Crossed, Observation, Observations, Pressure, State, crosses};
use super::threshold::Signal;
use super::{Policy, limits, message};
use crate::images::Collector;
use crate::pods::{Ending, Level, NodeEvents, Pods, is_critical};
use crate::runtime::Runtime;
use crate::stats::Stats;

/// Grace of a pod that goes at once.
const AT_ONCE: Duration = Duration::from_secs(1);
/// Pods are measured anew for every look that acts.
const FRESH: Duration = Duration::from_millis(500);
/// So often pods are looked at for limits of their own, when the node is not short of anything.
const LIMITS: Duration = Duration::from_secs(10);

/// What the eviction manager works with.
pub struct Deps {
    /// The Node, for its events.
    pub node: SiteName,
    /// Where images are.
    pub runtime: Arc<dyn Runtime>,
    /// What is measured.
    pub stats: Stats,
    /// What is ended.
    pub pods: Pods,
    /// What is freed first.
    pub images: Collector,
    /// Where it is told.
    pub events: NodeEvents,
}

/// Watches the signals and evicts until `stop`; `pressure` shows the Node's conditions.
pub async fn run(policy: Policy, deps: Deps, pressure: watch::Sender<Pressure>, stop: CancellationToken) {
    let mut manager = Manager {
        policy,
        deps,
        state: State::default(),
        limits_at: None,
        images_at: None,
    };
    let mut look = tokio::time::interval(manager.policy.every);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        manager.look(&pressure).await;
    }
}

struct Manager {
    policy: Policy,
    deps: Deps,
    state: State,
    limits_at: Option<Instant>,
    /// A directory on the images' file system.
    images_at: Option<PathBuf>,
}

impl Manager {
    async fn look(&mut self, pressure: &watch::Sender<Pressure>) {
        // The node alone is a few small files; pods are measured only when something has to be done about them.
        let mut observations = observe(&self.deps.stats.node());
        observations.extend(self.observe_images().await);
        let now = Instant::now();
        let (conditions, due) =
            self.state
                .update(&self.policy.thresholds, &observations, self.policy.hold, now);
        pressure.send_if_modified(|old| std::mem::replace(old, conditions) != conditions);
        if self.enforce_limits().await {
            return;
        }
        if let Some(crossed) = due.first() {
            self.reclaim(crossed).await;
        }
    }

    /// The images' file system, which does not move: the runtime is asked once where it is.
    async fn observe_images(&mut self) -> Observations {
        if self.images_at.is_none() {
            let asked = self.deps.runtime.image_fs_info().await.unwrap_or_default();
            self.images_at = asked.into_iter().next().map(|fs| fs.mountpoint);
        }
        let mut seen = Observations::new();
        let Some(size) = self.images_at.as_ref().and_then(|path| statvfs(path).ok()) else {
            return seen;
        };
        let (bytes, inodes) = (size.fragment_size(), size.files());
        for (signal, available, capacity) in [
            (
                Signal::ImageFsAvailable,
                size.blocks_available() * bytes,
                size.blocks() * bytes,
            ),
            (Signal::ImageFsInodesFree, size.files_available(), inodes),
        ] {
            if capacity > 0 {
                seen.insert(signal, Observation { available, capacity });
            }
        }
        seen
    }

    fn limits_due(&self) -> bool {
        self.limits_at
            .is_none_or(|at| at.elapsed() >= LIMITS.min(self.policy.every))
    }

    /// Ends pods that use more local storage than they may; answers whether there was one.
    async fn enforce_limits(&mut self) -> bool {
        if !self.limits_due() {
            return false;
        }
        self.limits_at = Some(Instant::now());
        let limited: Vec<_> = self
            .deps
            .pods
            .active()
            .into_iter()
            .filter(|(_, pod)| has_limit(pod) && !is_critical(pod))
            .collect();
        if limited.is_empty() {
            return false;
        }
        let watched = limited.iter().map(|(uid, _)| uid.clone()).collect();
        let Ok(snapshot) = self.deps.stats.snapshot_watching(watched).await else {
            return false;
        };
        let layout = layout(&snapshot.summary.node);
        let mut found = false;
        for (uid, pod) in limited {
            let Some(stats) = stats_of(&snapshot, uid.as_str()) else {
                continue;
            };
            if let Some(message) = limits::exceeded(&pod, stats, layout) {
                found = true;
                self.deps.pods.end(&uid, evicted(message, AT_ONCE, None));
            }
        }
        found
    }

    async fn reclaim(&mut self, crossed: &Crossed) {
        let signal = crossed.threshold.signal;
        let text = format!("Attempting to reclaim {}", signal.resource());
        tracing::warn!(
            signal = signal.name(),
            available = crossed.observed.available,
            limit = crossed.limit(),
            "the machine runs short; room is made"
        );
        self.deps
            .events
            .emit(&self.deps.node, Level::Warning, "EvictionThresholdMet", text)
            .await;
        if signal.is_disk() && self.free(crossed).await {
            return;
        }
        let Ok(snapshot) = self.deps.stats.snapshot(FRESH).await else {
            tracing::warn!("pods cannot be measured, so none is evicted yet");
            return;
        };
        let mut candidates: Vec<Candidate> = self
            .deps
            .pods
            .active()
            .into_iter()
            .map(|(uid, pod)| Candidate {
                stats: stats_of(&snapshot, uid.as_str()).cloned(),
                uid,
                pod,
            })
            .collect();
        rank(&mut candidates, signal, layout(&snapshot.summary.node));
        let Some(first) = candidates.first() else {
            tracing::error!(
                signal = signal.name(),
                "the machine runs short, and there is no pod that could be evicted"
            );
            return;
        };
        let grace = if crossed.threshold.is_hard() {
            AT_ONCE
        } else {
            let own = first
                .pod
                .spec
                .as_ref()
                .and_then(|s| s.termination_grace_period_seconds);
            let own = Duration::from_secs(own.and_then(|s| u64::try_from(s).ok()).unwrap_or(30));
            own.min(self.policy.max_grace)
        };
        let message = message::shortage(&first.pod, first.stats.as_ref(), crossed);
        self.deps
            .pods
            .end(&first.uid, evicted(message.clone(), grace, Some(message)));
    }

    /// Frees what nobody needs; answers whether that was enough, the minimum reclaim included.
    async fn free(&self, crossed: &Crossed) -> bool {
        self.deps.pods.remove_dead().await;
        if let Err(error) = self.deps.images.remove_unused().await {
            tracing::warn!(%error, "unused images could not be removed");
        }
        let Ok(snapshot) = self.deps.stats.snapshot(Duration::ZERO).await else {
            return false;
        };
        let seen = observe(&snapshot.summary.node);
        let threshold = &crossed.threshold;
        seen.get(&threshold.signal)
            .is_some_and(|now| !crosses(threshold, *now, true))
    }
}

fn evicted(message: String, grace: Duration, disruption: Option<String>) -> Ending {
    Ending {
        reason: "Evicted".to_owned(),
        message,
        grace,
        disruption,
        event: true,
    }
}

fn has_limit(pod: &Pod) -> bool {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    let mut sizes = volumes.filter_map(|v| v.empty_dir.as_ref()?.size_limit.as_ref());
    sizes.next().is_some() || crate::pods::limits(pod).contains_key("ephemeral-storage")
}

fn stats_of<'a>(snapshot: &'a Arc<Snapshot>, uid: &str) -> Option<&'a PodStats> {
    snapshot.summary.pods.iter().find(|p| p.pod_ref.uid == uid)
}

/// Whether writable layers are on a file system of their own: one of another size than the node's.
fn layout(node: &NodeStats) -> Layout {
    let size = |fs: Option<&FsStats>| fs.map(|fs| (fs.capacity_bytes, fs.inodes));
    let images = node.runtime.as_ref().and_then(|r| r.image_fs.as_ref());
    match (size(images), size(node.fs.as_ref())) {
        (Some(images), Some(node)) if images != node => Layout::Dedicated,
        _ => Layout::Shared,
    }
}

fn observe(node: &NodeStats) -> Observations {
    let mut seen = Observations::new();
    let mut put = |signal, available: Option<u64>, capacity: Option<u64>| {
        // A file system without a fixed number of inodes says zero.
        if let (Some(available), Some(capacity)) = (available, capacity.filter(|c| *c > 0)) {
            seen.insert(signal, Observation { available, capacity });
        }
    };
    if let Some(memory) = &node.memory {
        let capacity = memory
            .available_bytes
            .zip(memory.working_set_bytes)
            .map(|(a, w)| a + w);
        put(Signal::MemoryAvailable, memory.available_bytes, capacity);
    }
    let mut fs = |fs: Option<&FsStats>, bytes, inodes| {
        if let Some(fs) = fs {
            put(bytes, fs.available_bytes, fs.capacity_bytes);
            put(inodes, fs.inodes_free, fs.inodes);
        }
    };
    fs(
        node.fs.as_ref(),
        Signal::NodeFsAvailable,
        Signal::NodeFsInodesFree,
    );
    if let Some(runtime) = &node.runtime {
        fs(
            runtime.image_fs.as_ref(),
            Signal::ImageFsAvailable,
            Signal::ImageFsInodesFree,
        );
        fs(
            runtime.container_fs.as_ref(),
            Signal::ContainerFsAvailable,
            Signal::ContainerFsInodesFree,
        );
    }
    if let Some(processes) = &node.rlimit {
        let free = processes.max_pid.saturating_sub(processes.current);
        put(Signal::PidAvailable, Some(free), Some(processes.max_pid));
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_proto::stats::{MemoryStats, RlimitStats, RuntimeStats};

    #[test]
    fn signals_are_read_from_the_summary_and_what_has_no_size_is_left_out() {
        let fs = |available, inodes| FsStats {
            available_bytes: Some(available),
            capacity_bytes: Some(100),
            inodes_free: Some(inodes),
            inodes: Some(inodes * 2),
            ..FsStats::default()
        };
        let node = NodeStats {
            memory: Some(MemoryStats {
                available_bytes: Some(30),
                working_set_bytes: Some(70),
                ..MemoryStats::default()
            }),
            fs: Some(fs(40, 0)),
            runtime: Some(RuntimeStats {
                image_fs: Some(fs(50, 7)),
                container_fs: None,
            }),
            rlimit: Some(RlimitStats {
                time: None,
                max_pid: 1000,
                current: 990,
            }),
            ..NodeStats::default()
        };
        let seen = observe(&node);
        let at = |signal| seen.get(&signal).map(|o| (o.available, o.capacity));
        assert_eq!(at(Signal::MemoryAvailable), Some((30, 100)));
        assert_eq!(at(Signal::NodeFsAvailable), Some((40, 100)));
        assert_eq!(at(Signal::NodeFsInodesFree), None);
        assert_eq!(at(Signal::ImageFsInodesFree), Some((7, 14)));
        assert_eq!(at(Signal::PidAvailable), Some((10, 1000)));
        assert_eq!(layout(&node), Layout::Dedicated);
    }
}
