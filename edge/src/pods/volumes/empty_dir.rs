//! emptyDir volumes: a directory of the node's disk or memory that lives as long as its pod.

use std::collections::BTreeSet;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Pod};

use super::owner::FsGroup;
use super::{is_root, make_dir, tmpfs};
use crate::pods::env::Facts;
use crate::pods::quantity;

/// Makes the volume at `path`; one that is there stays as it is.
pub(super) fn set_up(facts: &Facts<'_>, source: &EmptyDirVolumeSource, path: &Path) -> Result<(), String> {
    let words = |e: io::Error| format!("{}: {e}", path.display());
    let medium = source.medium.as_deref().unwrap_or_default();
    if !matches!(medium, "" | "Memory") {
        return Err(format!(
            "emptyDir medium {medium} is not supported by this node: use Memory or leave it out"
        ));
    }
    let mut fresh = !path.exists();
    make_dir(path).map_err(words)?;
    let mut mode = 0o777;
    if medium == "Memory" && is_root() {
        // As a tmpfs is made: who may write here may not remove what others have.
        mode = 0o1777;
        fresh |= tmpfs(path, memory_size(facts, source)).map_err(words)?;
    }
    if fresh {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(words)?;
        if let Some(group) = FsGroup::of(facts.pod) {
            group.apply(path, false).map_err(words)?;
        }
    }
    Ok(())
}

/// Size of a memory volume: the least of what the node gives to pods, what the pod may use, and what it asks for.
fn memory_size(facts: &Facts<'_>, source: &EmptyDirVolumeSource) -> Option<i64> {
    let node = facts.objects.node();
    let allocatable = node.and_then(|n| n.status?.allocatable?.get("memory").and_then(quantity::value));
    let asked = source.size_limit.as_ref().and_then(quantity::value);
    [allocatable, pod_memory_limit(facts.pod), asked]
        .into_iter()
        .flatten()
        .filter(|bytes| *bytes > 0)
        .min()
}

/// The memory that a pod's containers may use together; `None` when one of them has no limit.
fn pod_memory_limit(pod: &Pod) -> Option<i64> {
    let spec = pod.spec.as_ref()?;
    let limit = |resources: Option<&k8s_openapi::api::core::v1::ResourceRequirements>| {
        resources?
            .limits
            .as_ref()?
            .get("memory")
            .and_then(quantity::value)
    };
    if let Some(own) = limit(spec.resources.as_ref()) {
        return Some(own);
    }
    let mut sum = 0_i64;
    for container in &spec.containers {
        sum = sum.saturating_add(limit(container.resources.as_ref())?);
    }
    Some(sum)
}

/// What an emptyDir volume takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeUse {
    /// The volume's name in the pod.
    pub name: String,
    /// Bytes that it takes.
    pub bytes: u64,
    /// Files and directories in it.
    pub files: u64,
    /// `sizeLimit` in bytes, where it has one.
    pub limit: Option<u64>,
    /// It is in memory, not on the node's disk.
    pub memory: bool,
}

/// Measures the emptyDir volumes of a pod; those that are not made yet take nothing.
pub(crate) fn measure(pod: &Pod, pod_dir: &Path) -> Vec<VolumeUse> {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    let places = volumes.filter_map(|v| Some((v, v.empty_dir.as_ref()?)));
    places
        .map(|(volume, source)| {
            let path = place(pod_dir, &volume.name);
            let (bytes, files) = usage(&path);
            let limit = source.size_limit.as_ref().and_then(quantity::value);
            VolumeUse {
                name: volume.name.clone(),
                bytes,
                files,
                limit: limit.and_then(|l| u64::try_from(l).ok()).filter(|l| *l > 0),
                memory: source.medium.as_deref() == Some("Memory"),
            }
        })
        .collect()
}

fn place(pod_dir: &Path, name: &str) -> PathBuf {
    pod_dir.join("volumes/kubernetes.io~empty-dir").join(name)
}

/// Bytes and files that a tree takes on its own file system; files that vanish meanwhile count nothing. Reads the
/// whole tree: not for an async task.
fn usage(root: &Path) -> (u64, u64) {
    let Ok(device) = std::fs::symlink_metadata(root).map(|m| m.dev()) else {
        return (0, 0);
    };
    let mut seen = BTreeSet::new();
    let (mut bytes, mut files) = (0_u64, 0_u64);
    let mut stack = vec![root.to_owned()];
    while let Some(path) = stack.pop() {
        let Ok(metadata) = std::fs::symlink_metadata(&path) else {
            continue;
        };
        // A name of a file that was counted, or another volume mounted inside.
        if metadata.dev() != device
            || (metadata.nlink() > 1 && !metadata.is_dir() && !seen.insert(metadata.ino()))
        {
            continue;
        }
        bytes = bytes.saturating_add(metadata.blocks().saturating_mul(512));
        files += 1;
        if metadata.is_dir() {
            let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
            stack.extend(entries.map(|entry| entry.path()));
        }
    }
    (bytes, files)
}

#[cfg(test)]
mod tests {
    use super::super::super::fixtures::pod;
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_is_limited_only_when_every_container_is() {
        let with = |second: serde_json::Value| {
            pod_memory_limit(&pod(json!({"containers": [
                {"name": "a", "resources": {"limits": {"memory": "64Mi"}}}, {"name": "b", "resources": second}]})))
        };
        assert_eq!(with(json!({"limits": {"memory": "32Mi"}})), Some(96 << 20));
        assert_eq!(with(json!({})), None);
    }

    #[test]
    fn a_pod_s_volumes_are_measured_beside_their_limits() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(json!({"containers": [], "volumes": [
            {"name": "v", "emptyDir": {"sizeLimit": "1Mi"}}, {"name": "w", "hostPath": {"path": "/"}}]}));
        std::fs::create_dir_all(place(dir.path(), "v")).unwrap();
        std::fs::write(place(dir.path(), "v").join("f"), vec![1; 50_000]).unwrap();
        let found = measure(&pod, dir.path());
        assert_eq!(found.len(), 1);
        assert!(found[0].bytes >= 50_000 && found[0].limit == Some(1 << 20) && !found[0].memory);
    }

    #[test]
    fn what_a_volume_takes_is_measured_once_per_file() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        std::fs::write(dir.path().join("d/a"), vec![1; 100_000]).unwrap();
        let (before, files) = usage(dir.path());
        assert!(before >= 100_000, "{before}");
        assert_eq!(files, 3);
        std::fs::hard_link(dir.path().join("d/a"), dir.path().join("b")).unwrap();
        assert_eq!(usage(dir.path()), (before, files));
        assert_eq!(usage(Path::new("/nowhere/at/all")), (0, 0));
    }
}
