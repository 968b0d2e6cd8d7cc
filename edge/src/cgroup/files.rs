//! Directories and files: making, setting, reading and removing cgroups.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::hierarchy::{CONTROLLERS, Hierarchy};
use super::{PERIOD, Values, weight};

/// A value that could not be set, or a directory that could not be made.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {error}")]
pub struct FileError {
    /// The file or directory.
    pub path: PathBuf,
    /// Why.
    pub error: io::Error,
}

/// The files of one controller and what is written into them, in order.
fn settings(controller: &str, v2: bool, values: &Values) -> Vec<(String, String)> {
    let mut out = Vec::new();
    let mut put = |file: &str, value: String| out.push((file.to_owned(), value));
    match (controller, v2) {
        ("cpu", false) => {
            if let Some(shares) = values.cpu_shares {
                put("cpu.shares", shares.max(2).to_string());
            }
            if let Some(quota) = values.cpu_quota {
                put("cpu.cfs_period_us", PERIOD.to_string());
                put("cpu.cfs_quota_us", quota.max(-1).to_string());
            }
        }
        ("cpu", true) => {
            if let Some(shares) = values.cpu_shares {
                put("cpu.weight", weight(shares).to_string());
            }
            if let Some(quota) = values.cpu_quota {
                put("cpu.max", format!("{} {PERIOD}", or_max(quota)));
            }
        }
        ("memory", false) => {
            if let Some(bytes) = values.memory_bytes {
                put("memory.limit_in_bytes", bytes.max(-1).to_string());
            }
        }
        ("memory", true) => {
            if let Some(bytes) = values.memory_bytes {
                put("memory.max", or_max(bytes));
            }
            if values.die_together {
                put("memory.oom.group", "1".to_owned());
            }
        }
        ("pids", _) => {
            if let Some(pids) = values.pids {
                put("pids.max", pids.to_string());
            }
        }
        ("hugetlb", _) => {
            let suffix = if v2 { "max" } else { "limit_in_bytes" };
            for (size, bytes) in &values.huge_pages {
                put(&format!("hugetlb.{size}.{suffix}"), bytes.to_string());
            }
        }
        _ => {}
    }
    out
}

fn or_max(value: i64) -> String {
    if value < 0 {
        "max".to_owned()
    } else {
        value.to_string()
    }
}

/// Makes a cgroup in every hierarchy of the controllers.
pub(super) fn make(hierarchy: &Hierarchy, relative: &str) -> Result<Vec<PathBuf>, FileError> {
    let dirs: Vec<PathBuf> = match hierarchy {
        Hierarchy::V1 { controllers, .. } => controllers.values().map(|root| root.join(relative)).collect(),
        Hierarchy::V2(root) => {
            delegate(root, relative);
            vec![root.join(relative)]
        }
        Hierarchy::None => Vec::new(),
    };
    for dir in &dirs {
        fs::create_dir_all(dir).map_err(|error| FileError {
            path: dir.clone(),
            error,
        })?;
    }
    Ok(dirs)
}

/// Sets what `values` says. Answers every value that the kernel did not take; the others are set all the same.
///
/// Huge pages: a size that this kernel does not limit is passed over.
pub(super) fn set(hierarchy: &Hierarchy, relative: &str, values: &Values) -> Vec<FileError> {
    let v2 = matches!(hierarchy, Hierarchy::V2(_));
    let mut errors = Vec::new();
    for controller in CONTROLLERS {
        let Some(dir) = hierarchy.of(controller, relative) else {
            continue;
        };
        for (file, value) in settings(controller, v2, values) {
            let path = dir.join(file);
            match fs::write(&path, &value) {
                Ok(()) => {}
                Err(error) if controller == "hugetlb" && error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => errors.push(FileError { path, error }),
            }
        }
    }
    errors
}

/// What is set now. A value that cannot be read is `None`.
pub(super) fn get(hierarchy: &Hierarchy, relative: &str) -> Values {
    let read = |controller: &str, file: &str| {
        let text = fs::read_to_string(hierarchy.of(controller, relative)?.join(file)).ok()?;
        Some(text.trim().to_owned())
    };
    if matches!(hierarchy, Hierarchy::V2(_)) {
        let limit = |text: String| {
            if text == "max" {
                Some(-1)
            } else {
                text.parse().ok()
            }
        };
        return Values {
            // v2 has weights only, and several shares have the same one: what was set cannot be told exactly.
            cpu_shares: None,
            cpu_quota: read("cpu", "cpu.max").and_then(|t| limit(t.split(' ').next()?.to_owned())),
            memory_bytes: read("memory", "memory.max").and_then(limit),
            ..Values::default()
        };
    }
    Values {
        cpu_shares: read("cpu", "cpu.shares").and_then(|t| t.parse().ok()),
        cpu_quota: read("cpu", "cpu.cfs_quota_us").and_then(|t| t.parse().ok()),
        // No limit is a number of the order of 2^63, which depends on the page size.
        memory_bytes: read("memory", "memory.limit_in_bytes")
            .and_then(|t| t.parse::<u64>().ok())
            .map(|bytes| i64::try_from(bytes).ok().filter(|b| *b < 1 << 62).unwrap_or(-1)),
        ..Values::default()
    }
}

/// Bytes of memory in use, page cache included.
pub(super) fn memory_usage(hierarchy: &Hierarchy, relative: &str) -> Option<u64> {
    let dir = hierarchy.of("memory", relative)?;
    let file = if matches!(hierarchy, Hierarchy::V2(_)) {
        "memory.current"
    } else {
        "memory.usage_in_bytes"
    };
    fs::read_to_string(dir.join(file)).ok()?.trim().parse().ok()
}

/// The cgroup of a container below its pod's: whatever the runtime calls it, the container's id is in the name.
pub(super) fn child_of(hierarchy: &Hierarchy, relative: &str, id: &str) -> Option<String> {
    let dir = hierarchy.of("memory", relative)?;
    let children = fs::read_dir(dir).ok()?.flatten();
    let names = children.filter_map(|entry| entry.file_name().into_string().ok());
    let name = names.into_iter().find(|name| name.contains(id))?;
    Some(format!("{relative}/{name}"))
}

/// Kills what is left in a cgroup and below it, and removes it from every hierarchy. What is still there afterwards
/// (a process that the kernel cannot end yet) is removed by the next call.
pub(super) fn destroy(hierarchy: &Hierarchy, relative: &str) -> bool {
    let mut gone = true;
    for dir in hierarchy.places(relative) {
        kill_below(&dir);
        gone &= remove_below(&dir);
    }
    gone
}

fn kill_below(dir: &Path) {
    for pid in fs::read_to_string(dir.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
    {
        // It may have ended by itself since.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    }
    for child in children(dir) {
        kill_below(&child);
    }
}

fn remove_below(dir: &Path) -> bool {
    for child in children(dir) {
        remove_below(&child);
    }
    match fs::remove_dir(dir) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .map(|e| e.path())
        .collect()
}

/// Lets every level above a cgroup hand out the controllers; a refusal shows when the limits are written.
fn delegate(root: &Path, relative: &str) {
    let mut dir = root.to_owned();
    for part in Path::new(relative).components() {
        for controller in CONTROLLERS {
            let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
        }
        dir.push(part);
        let _ = fs::create_dir(&dir);
    }
}

/// Makes a cgroup with its values, as far as this process may. Answers the directories and what could not be done.
pub(crate) fn create(relative: &str, values: &Values) -> (Vec<PathBuf>, Vec<String>) {
    let hierarchy = Hierarchy::detect();
    let relative = relative.trim_start_matches('/');
    if hierarchy == Hierarchy::None {
        let note = "no cgroup hierarchy is mounted: limits are not enforced".to_owned();
        return (Vec::new(), vec![note]);
    }
    match make(&hierarchy, relative) {
        Ok(dirs) => {
            let errors = set(&hierarchy, relative, values);
            let notes = errors.iter().map(|e| format!("cannot set {e}")).collect();
            (dirs, notes)
        }
        Err(error) => (Vec::new(), vec![format!("cannot make the cgroup {error}")]),
    }
}

/// Puts the calling process into the cgroups.
pub(crate) fn join(dirs: &[PathBuf]) -> io::Result<()> {
    dirs.iter()
        .try_for_each(|dir| fs::write(dir.join("cgroup.procs"), "0"))
}

/// Whether the kernel killed something in the cgroups for want of memory.
pub(crate) fn oom_killed(dirs: &[PathBuf]) -> bool {
    dirs.iter().any(|dir| {
        ["memory.events", "memory.oom_control"].iter().any(|file| {
            fs::read_to_string(dir.join(file)).is_ok_and(|text| {
                text.lines()
                    .any(|line| line.strip_prefix("oom_kill ").is_some_and(|n| n.trim() != "0"))
            })
        })
    })
}

/// Removes cgroups, which must be empty; a busy one stays until its pod's is removed.
pub(crate) fn remove(dirs: &[PathBuf]) {
    for dir in dirs {
        let _ = fs::remove_dir(dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn v1(root: &Path) -> Hierarchy {
        let controllers: BTreeMap<&'static str, PathBuf> = CONTROLLERS
            .into_iter()
            .map(|name| (name, root.join(name)))
            .collect();
        let mounts = controllers.values().cloned().collect();
        Hierarchy::V1 { controllers, mounts }
    }

    fn values() -> Values {
        Values {
            cpu_shares: Some(102),
            cpu_quota: Some(-1),
            memory_bytes: Some(1 << 20),
            pids: Some(7),
            huge_pages: BTreeMap::from([("2MB".to_owned(), 0)]),
            die_together: true,
        }
    }

    #[test]
    fn values_become_the_files_of_v1() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = v1(dir.path());
        make(&hierarchy, "a/b").unwrap();
        assert!(set(&hierarchy, "a/b", &values()).is_empty());
        let read = |file: &str| fs::read_to_string(dir.path().join(file)).unwrap();
        assert_eq!(read("cpu/a/b/cpu.shares"), "102");
        assert_eq!(read("cpu/a/b/cpu.cfs_quota_us"), "-1");
        assert_eq!(read("memory/a/b/memory.limit_in_bytes"), "1048576");
        assert_eq!(read("pids/a/b/pids.max"), "7");
        assert_eq!(read("hugetlb/a/b/hugetlb.2MB.limit_in_bytes"), "0");
        let now = get(&hierarchy, "a/b");
        assert_eq!(
            (now.cpu_shares, now.cpu_quota, now.memory_bytes),
            (Some(102), Some(-1), Some(1 << 20))
        );
    }

    #[test]
    fn values_become_the_files_of_v2() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy::V2(dir.path().to_owned());
        make(&hierarchy, "a/b").unwrap();
        let wide = Values {
            memory_bytes: Some(-1),
            ..values()
        };
        assert!(set(&hierarchy, "a/b", &wide).is_empty());
        let read = |file: &str| fs::read_to_string(dir.path().join("a/b").join(file)).unwrap();
        assert_eq!(read("cpu.weight"), "4");
        assert_eq!(read("cpu.max"), "max 100000");
        assert_eq!(read("memory.max"), "max");
        assert_eq!(read("memory.oom.group"), "1");
        assert_eq!(get(&hierarchy, "a/b").cpu_quota, Some(-1));
    }

    #[test]
    fn the_largest_number_of_v1_is_no_limit() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = v1(dir.path());
        make(&hierarchy, "a").unwrap();
        fs::write(
            dir.path().join("memory/a/memory.limit_in_bytes"),
            "9223372036854771712\n",
        )
        .unwrap();
        assert_eq!(get(&hierarchy, "a").memory_bytes, Some(-1));
    }

    #[test]
    fn a_container_s_cgroup_is_found_by_its_id() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy::V2(dir.path().to_owned());
        make(&hierarchy, "pod/cri-containerd-abc.scope").unwrap();
        assert_eq!(
            child_of(&hierarchy, "pod", "abc").as_deref(),
            Some("pod/cri-containerd-abc.scope")
        );
        assert_eq!(child_of(&hierarchy, "pod", "xyz"), None);
    }

    #[test]
    fn a_cgroup_is_removed_with_everything_below() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = v1(dir.path());
        make(&hierarchy, "pod/a/b").unwrap();
        assert!(destroy(&hierarchy, "pod"));
        assert!(!dir.path().join("memory/pod").exists());
        assert!(destroy(&hierarchy, "pod"));
    }
}
