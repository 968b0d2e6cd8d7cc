//! One cgroup per container, on v1, hybrid and v2 hosts. Best effort: without write access containers run unlimited.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::record::Launch;

/// Which hierarchies limit CPU and memory on this host.
enum Hierarchy {
    V1 {
        cpu: Option<PathBuf>,
        memory: Option<PathBuf>,
    },
    V2(PathBuf),
    None,
}

fn hierarchy(mountinfo: &str) -> Hierarchy {
    let (mut cpu, mut memory, mut unified) = (None, None, None);
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let Some(point) = left.split(' ').nth(4).map(PathBuf::from) else {
            continue;
        };
        let mut right = right.split(' ');
        let (kind, options) = (right.next().unwrap_or(""), right.nth(1).unwrap_or(""));
        match kind {
            "cgroup" => {
                let has = |name: &str| options.split(',').any(|o| o == name);
                if has("cpu") {
                    cpu.get_or_insert_with(|| point.clone());
                }
                if has("memory") {
                    memory.get_or_insert(point);
                }
            }
            "cgroup2" => {
                unified.get_or_insert(point);
            }
            _ => {}
        }
    }
    match (cpu, memory, unified) {
        (None, None, None) => Hierarchy::None,
        (None, None, Some(root)) => Hierarchy::V2(root),
        (cpu, memory, _) => Hierarchy::V1 { cpu, memory },
    }
}

/// Makes the container's cgroups with their limits. Answers the directories and what could not be done.
pub(super) fn create(launch: &Launch) -> (Vec<PathBuf>, Vec<String>) {
    let mut made = Vec::new();
    let mut notes = Vec::new();
    let relative = launch.cgroup.trim_start_matches('/');
    let mut attempt = |root: &Path, settings: Vec<(&str, String)>| {
        let dir = root.join(relative);
        if let Err(error) = fs::create_dir_all(&dir) {
            notes.push(format!("cannot make the cgroup {}: {error}", dir.display()));
            return;
        }
        for (file, value) in settings {
            if let Err(error) = fs::write(dir.join(file), &value) {
                notes.push(format!(
                    "cannot set {file} = {value} in {}: {error}",
                    dir.display()
                ));
            }
        }
        made.push(dir);
    };
    match hierarchy(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()) {
        Hierarchy::None => notes.push("no cgroup hierarchy is mounted: limits are not enforced".into()),
        Hierarchy::V1 { cpu, memory } => {
            if let Some(root) = cpu {
                let mut settings = Vec::new();
                if launch.cpu_shares > 0 {
                    settings.push(("cpu.shares", launch.cpu_shares.max(2).to_string()));
                }
                if launch.cpu_quota > 0 {
                    settings.push(("cpu.cfs_period_us", period(launch).to_string()));
                    settings.push(("cpu.cfs_quota_us", launch.cpu_quota.to_string()));
                }
                attempt(&root, settings);
            }
            if let Some(root) = memory {
                let limit = launch.memory_limit_bytes;
                let settings = if limit > 0 {
                    vec![("memory.limit_in_bytes", limit.to_string())]
                } else {
                    vec![]
                };
                attempt(&root, settings);
            }
        }
        Hierarchy::V2(root) => {
            delegate(&root, relative);
            let mut settings = Vec::new();
            if launch.cpu_shares > 0 {
                settings.push(("cpu.weight", weight(launch.cpu_shares).to_string()));
            }
            if launch.cpu_quota > 0 {
                settings.push(("cpu.max", format!("{} {}", launch.cpu_quota, period(launch))));
            }
            if launch.memory_limit_bytes > 0 {
                settings.push(("memory.max", launch.memory_limit_bytes.to_string()));
            }
            attempt(&root, settings);
        }
    }
    (made, notes)
}

fn period(launch: &Launch) -> i64 {
    if launch.cpu_period > 0 {
        launch.cpu_period
    } else {
        100_000
    }
}

/// v1 shares as v2 weight, by the kubelet's formula.
fn weight(shares: i64) -> i64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

/// Lets every level above the container hand out CPU and memory; a refusal shows when the limits are written.
fn delegate(root: &Path, relative: &str) {
    let mut dir = root.to_owned();
    for part in Path::new(relative).components() {
        for controller in ["+cpu", "+memory"] {
            let _ = fs::write(dir.join("cgroup.subtree_control"), controller);
        }
        dir.push(part);
        let _ = fs::create_dir(&dir);
    }
}

/// Puts the calling process into the cgroups.
pub(super) fn join(dirs: &[PathBuf]) -> io::Result<()> {
    dirs.iter()
        .try_for_each(|dir| fs::write(dir.join("cgroup.procs"), "0"))
}

/// Whether the kernel killed something in the cgroups for want of memory.
pub(super) fn oom_killed(dirs: &[PathBuf]) -> bool {
    dirs.iter().any(|dir| {
        ["memory.events", "memory.oom_control"].iter().any(|file| {
            fs::read_to_string(dir.join(file)).is_ok_and(|text| {
                text.lines()
                    .any(|line| line.strip_prefix("oom_kill ").is_some_and(|n| n.trim() != "0"))
            })
        })
    })
}

/// Removes the cgroups, which must be empty; a busy one stays, harmless.
pub(super) fn remove(dirs: &[PathBuf]) {
    for dir in dirs {
        let _ = fs::remove_dir(dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controllers_are_found_on_hybrid_hosts() {
        let text = "32 31 0:29 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                    35 31 0:32 / /cg/memory rw - cgroup cgroup rw,memory\n\
                    41 31 0:38 / /cg/unified rw - cgroup2 cgroup2 rw\n";
        let Hierarchy::V1 { cpu, memory } = hierarchy(text) else {
            panic!("not v1")
        };
        assert_eq!(cpu, Some(PathBuf::from("/cg/cpu")));
        assert_eq!(memory, Some(PathBuf::from("/cg/memory")));
    }

    #[test]
    fn a_lone_unified_hierarchy_is_v2() {
        assert!(matches!(
            hierarchy("41 31 0:38 / /cg rw - cgroup2 cgroup2 rw\n"),
            Hierarchy::V2(_)
        ));
    }

    #[test]
    fn shares_convert_to_weight_like_the_kubelet_does() {
        assert_eq!((weight(2), weight(1024), weight(262_144)), (1, 39, 10_000));
    }
}
