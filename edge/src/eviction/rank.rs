//! Which pod goes first. Source: kubelet, eviction helpers.

use std::cmp::{Ordering, Reverse};
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::object::Uid;
use skerry_proto::stats::{FsStats, PodStats};

use super::threshold::Signal;
use crate::pods::{is_critical, requests};

/// A pod that may be evicted, with what it uses.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    pub(super) uid: Uid,
    pub(super) pod: Arc<Pod>,
    /// Absent when it could not be measured.
    pub(super) stats: Option<PodStats>,
}

/// Where writable layers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    /// On the file system of volumes and logs.
    Shared,
    /// On one of their own, with the images.
    Dedicated,
}

/// Puts first what is to go first: pods that could not be measured, then those above their requests; lower priority;
/// the largest excess. Critical and static pods are left out: they are never evicted.
pub(super) fn rank(candidates: &mut Vec<Candidate>, signal: Signal, layout: Layout) {
    candidates.retain(|candidate| !is_critical(&candidate.pod));
    candidates.sort_by(|a, b| order(a, b, signal, layout));
}

fn order(a: &Candidate, b: &Candidate, signal: Signal, layout: Layout) -> Ordering {
    let key = |candidate: &Candidate| {
        let used = candidate.stats.as_ref().map(|stats| usage(stats, signal, layout));
        // A process has no request.
        let requested = match signal {
            Signal::PidAvailable => 0,
            _ => request(&candidate.pod, signal.resource()),
        };
        let above = used.map(|used| i128::from(used) - requested);
        let exceeds = match signal {
            Signal::PidAvailable => false,
            _ => above.is_none_or(|above| above > 0),
        };
        let priority = candidate.pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0);
        (above.is_some(), !exceeds, priority, Reverse(above))
    };
    key(a).cmp(&key(b))
}

/// What a pod requests of a resource, in whole units.
pub(super) fn request(pod: &Pod, resource: &str) -> i128 {
    requests(pod).get(resource).map_or(0, |amount| amount.value())
}

/// What a pod uses of what a signal measures.
pub(super) fn usage(stats: &PodStats, signal: Signal, layout: Layout) -> u64 {
    let of = |fs: Option<&FsStats>, inodes: bool| {
        let fs = fs.cloned().unwrap_or_default();
        if inodes { fs.inodes_used } else { fs.used_bytes }.unwrap_or(0)
    };
    let layers = |inodes| {
        stats
            .containers
            .iter()
            .map(|c| of(c.rootfs.as_ref(), inodes))
            .sum::<u64>()
    };
    let local = |inodes| {
        let logs: u64 = stats.containers.iter().map(|c| of(c.logs.as_ref(), inodes)).sum();
        let volumes: u64 = stats.volumes.iter().map(|v| of(Some(&v.fs), inodes)).sum();
        logs + volumes
    };
    match signal {
        Signal::MemoryAvailable => stats
            .memory
            .as_ref()
            .and_then(|m| m.working_set_bytes)
            .unwrap_or(0),
        Signal::PidAvailable => stats.process_stats.as_ref().map_or(0, |p| p.process_count),
        Signal::NodeFsAvailable | Signal::NodeFsInodesFree => {
            let inodes = signal == Signal::NodeFsInodesFree;
            let own = match layout {
                Layout::Shared => layers(inodes),
                Layout::Dedicated => 0,
            };
            own + local(inodes)
        }
        Signal::ImageFsAvailable | Signal::ContainerFsAvailable => layers(false),
        Signal::ImageFsInodesFree | Signal::ContainerFsInodesFree => layers(true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use skerry_proto::stats::MemoryStats;

    fn pod(name: &str, spec: Value, used: Option<u64>) -> Candidate {
        let mut pod: Pod = serde_json::from_value(
            json!({"metadata": {"name": name, "uid": name}, "spec": {"containers": []}}),
        )
        .unwrap();
        pod.spec = serde_json::from_value(spec).unwrap();
        Candidate {
            uid: Uid::from(name),
            pod: Arc::new(pod),
            stats: used.map(|used| PodStats {
                memory: Some(MemoryStats {
                    working_set_bytes: Some(used),
                    ..MemoryStats::default()
                }),
                ..PodStats::default()
            }),
        }
    }

    fn with(request: &str, priority: i32) -> Value {
        json!({"priority": priority, "containers": [{"name": "c", "resources": {"requests": {"memory": request}}}]})
    }

    #[test]
    fn above_the_request_goes_before_priority_before_the_excess() {
        let mut all = vec![
            pod("modest", with("1Gi", 0), Some(500)),
            pod("important", with("1", 10), Some(100_000)),
            pod("small", with("1", 0), Some(100)),
            pod("large", with("1", 0), Some(1_000)),
            pod("unknown", with("1Gi", 100), None),
        ];
        rank(&mut all, Signal::MemoryAvailable, Layout::Shared);
        let names: Vec<&str> = all.iter().map(|c| c.uid.as_str()).collect();
        assert_eq!(names, ["unknown", "large", "small", "important", "modest"]);
    }

    #[test]
    fn critical_and_static_pods_are_never_evicted() {
        let mut fixed = pod("static", with("1", 0), Some(9));
        let mut changed = (*fixed.pod).clone();
        changed.metadata.annotations = Some([("kubernetes.io/config.source".into(), "file".into())].into());
        fixed.pod = Arc::new(changed);
        let mut all = vec![pod("critical", with("1", 2_000_000_000), Some(9)), fixed];
        rank(&mut all, Signal::MemoryAvailable, Layout::Shared);
        assert!(all.is_empty(), "{all:?}");
    }

    #[test]
    fn writable_layers_count_where_they_are() {
        let fs = |bytes| {
            Some(FsStats {
                used_bytes: Some(bytes),
                ..FsStats::default()
            })
        };
        let mut stats = PodStats::default();
        stats.containers.push(skerry_proto::stats::ContainerStats {
            rootfs: fs(100),
            logs: fs(10),
            ..Default::default()
        });
        assert_eq!(usage(&stats, Signal::NodeFsAvailable, Layout::Shared), 110);
        assert_eq!(usage(&stats, Signal::NodeFsAvailable, Layout::Dedicated), 10);
        assert_eq!(usage(&stats, Signal::ImageFsAvailable, Layout::Dedicated), 100);
    }
}
