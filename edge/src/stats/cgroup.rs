//! Reads control groups, on version 1, hybrid and version 2 hosts.

use std::fs;
use std::path::{Path, PathBuf};

use super::host::psi;
use crate::runtime::CgroupPaths;
use skerry_proto::stats::Psi;

/// cgroup v1 writes "no limit" as a number near this one; v2 writes `max`.
const NO_LIMIT: u64 = 1 << 60;

/// What one control group, with all below it, has used.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Reading {
    pub(super) cpu_nanos: Option<u64>,
    pub(super) cpu_user_nanos: Option<u64>,
    pub(super) cpu_system_nanos: Option<u64>,
    pub(super) cfs_periods: Option<u64>,
    pub(super) cfs_throttled_periods: Option<u64>,
    pub(super) cfs_throttled_nanos: Option<u64>,
    pub(super) cpu_period_micros: Option<u64>,
    pub(super) cpu_quota_micros: Option<u64>,
    pub(super) cpu_shares: Option<u64>,
    pub(super) cpu_psi: Option<Psi>,
    pub(super) memory_usage: Option<u64>,
    pub(super) memory_working_set: Option<u64>,
    pub(super) memory_rss: Option<u64>,
    pub(super) memory_cache: Option<u64>,
    pub(super) memory_mapped_file: Option<u64>,
    pub(super) memory_max_usage: Option<u64>,
    pub(super) memory_limit: Option<u64>,
    pub(super) memory_failures: Option<u64>,
    pub(super) memory_psi: Option<Psi>,
    pub(super) page_faults: Option<u64>,
    pub(super) major_page_faults: Option<u64>,
    pub(super) oom_kills: Option<u64>,
    pub(super) swap_usage: Option<u64>,
    pub(super) swap_limit: Option<u64>,
    pub(super) processes: Option<u64>,
    pub(super) read_bytes: Option<u64>,
    pub(super) written_bytes: Option<u64>,
    pub(super) io_psi: Option<Psi>,
}

/// The control groups of a process; `None` when there is no such process.
pub(crate) fn paths_of(pid: i32) -> Option<CgroupPaths> {
    if pid <= 0 {
        return None;
    }
    let own = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    Some(paths(&own, &mounts))
}

/// The directories of the group `relative`, in every hierarchy that has it.
pub(super) fn paths_below_roots(relative: &str) -> CgroupPaths {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let everywhere = "0::/\n1:cpuacct:/\n2:cpu:/\n3:memory:/\n4:pids:/\n5:blkio:/\n";
    let roots = paths(everywhere, &mounts);
    let below = |root: Option<PathBuf>| {
        root.map(|root| root.join(relative.trim_start_matches('/')))
            .filter(|dir| dir.is_dir())
    };
    CgroupPaths {
        cpuacct: below(roots.cpuacct),
        cpu: below(roots.cpu),
        memory: below(roots.memory),
        pids: below(roots.pids),
        blkio: below(roots.blkio),
        unified: below(roots.unified),
    }
}

/// The groups one level up, when that level is `pod`'s own: its name ends in the pod's UID.
pub(super) fn of_pod(container: &CgroupPaths, uid: &str) -> Option<CgroupPaths> {
    // The systemd driver writes `-` as `_`.
    let escaped = uid.replace('-', "_");
    let up = |dir: &Option<PathBuf>| {
        let parent = dir.as_ref()?.parent()?;
        let name = parent.file_name()?.to_str()?;
        let name = name.strip_suffix(".slice").unwrap_or(name);
        (name.ends_with(uid) || name.ends_with(&escaped)).then(|| parent.to_owned())
    };
    let pod = CgroupPaths {
        cpuacct: up(&container.cpuacct),
        cpu: up(&container.cpu),
        memory: up(&container.memory),
        pids: up(&container.pids),
        blkio: up(&container.blkio),
        unified: up(&container.unified),
    };
    (pod != CgroupPaths::default()).then_some(pod)
}

/// The path below the hierarchies' roots, as cAdvisor's `id` label has it.
pub(super) fn name(paths: &CgroupPaths) -> Option<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let dir = [&paths.memory, &paths.cpuacct, &paths.cpu, &paths.unified]
        .into_iter()
        .find_map(Option::as_ref)?;
    let points = hierarchies(&mounts);
    let relative = points.iter().find_map(|point| dir.strip_prefix(&point.at).ok())?;
    Some(format!("/{}", relative.display()))
}

struct Hierarchy {
    at: PathBuf,
    /// What part of the hierarchy is mounted there.
    root: String,
    unified: bool,
    controllers: Vec<String>,
}

fn hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ').skip(3);
            let (root, at) = (left.next()?.to_owned(), PathBuf::from(left.next()?));
            let mut right = right.split(' ');
            let kind = right.next()?;
            let options = right.nth(1).unwrap_or_default();
            matches!(kind, "cgroup" | "cgroup2").then(|| Hierarchy {
                at,
                root,
                unified: kind == "cgroup2",
                controllers: options.split(',').map(str::to_owned).collect(),
            })
        })
        .collect()
}

fn paths(own: &str, mountinfo: &str) -> CgroupPaths {
    let points = hierarchies(mountinfo);
    let mut found = CgroupPaths::default();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        for controller in controllers.split(',') {
            let point = points.iter().find(|point| match controller {
                "" => point.unified,
                _ => !point.unified && point.controllers.iter().any(|c| c == controller),
            });
            let Some(point) = point else { continue };
            let inside = path
                .strip_prefix(point.root.trim_end_matches('/'))
                .unwrap_or(path);
            let dir = point.at.join(inside.trim_start_matches('/'));
            match controller {
                "" => found.unified = Some(dir),
                "cpuacct" => found.cpuacct = Some(dir),
                "cpu" => found.cpu = Some(dir),
                "memory" => found.memory = Some(dir),
                "pids" => found.pids = Some(dir),
                "blkio" => found.blkio = Some(dir),
                _ => {}
            }
        }
    }
    found
}

/// Reads everything that the groups tell. What a host does not have stays `None`.
pub(super) fn read(paths: &CgroupPaths) -> Reading {
    let mut reading = Reading::default();
    // On a hybrid host the unified hierarchy has no controllers: version 1 is asked first and wins.
    if let Some(dir) = &paths.unified {
        read_unified(dir, &mut reading);
    }
    if let Some(dir) = &paths.cpuacct {
        read_cpuacct(dir, &mut reading);
    }
    if let Some(dir) = &paths.cpu {
        read_cpu(dir, &mut reading);
    }
    if let Some(dir) = &paths.memory {
        read_memory(dir, &mut reading);
    }
    if let Some(dir) = &paths.pids {
        reading.processes = number(dir, "pids.current");
    }
    if let Some(dir) = &paths.blkio {
        let text = text(dir, "blkio.throttle.io_service_bytes");
        let sum = |word: &str| {
            let lines = text
                .lines()
                .filter_map(|line| line.split_once(' ')?.1.split_once(' '));
            lines
                .filter(|(kind, _)| *kind == word)
                .filter_map(|(_, n)| n.trim().parse::<u64>().ok())
                .sum()
        };
        if !text.is_empty() {
            reading.read_bytes = Some(sum("Read"));
            reading.written_bytes = Some(sum("Write"));
        }
    }
    reading
}

fn read_cpuacct(dir: &Path, reading: &mut Reading) {
    reading.cpu_nanos = number(dir, "cpuacct.usage");
    reading.cpu_user_nanos = number(dir, "cpuacct.usage_user");
    reading.cpu_system_nanos = number(dir, "cpuacct.usage_sys");
}

fn read_cpu(dir: &Path, reading: &mut Reading) {
    let stat = text(dir, "cpu.stat");
    reading.cfs_periods = field(&stat, "nr_periods");
    reading.cfs_throttled_periods = field(&stat, "nr_throttled");
    reading.cfs_throttled_nanos = field(&stat, "throttled_time");
    reading.cpu_shares = number(dir, "cpu.shares");
    // -1 is no quota, and no unsigned number.
    reading.cpu_quota_micros = number(dir, "cpu.cfs_quota_us");
    reading.cpu_period_micros = reading
        .cpu_quota_micros
        .and_then(|_| number(dir, "cpu.cfs_period_us"));
}

fn read_memory(dir: &Path, reading: &mut Reading) {
    let stat = text(dir, "memory.stat");
    let limited = |n: Option<u64>| n.filter(|n| *n < NO_LIMIT);
    reading.memory_usage = number(dir, "memory.usage_in_bytes");
    reading.memory_working_set = reading
        .memory_usage
        .map(|used| used.saturating_sub(field(&stat, "total_inactive_file").unwrap_or(0)));
    reading.memory_rss = field(&stat, "total_rss");
    reading.memory_cache = field(&stat, "total_cache");
    reading.memory_mapped_file = field(&stat, "total_mapped_file");
    reading.page_faults = field(&stat, "total_pgfault");
    reading.major_page_faults = field(&stat, "total_pgmajfault");
    reading.swap_usage = field(&stat, "total_swap");
    reading.memory_max_usage = number(dir, "memory.max_usage_in_bytes");
    reading.memory_failures = number(dir, "memory.failcnt");
    reading.memory_limit = limited(number(dir, "memory.limit_in_bytes"));
    reading.swap_limit = limited(number(dir, "memory.memsw.limit_in_bytes"))
        .map(|both| both.saturating_sub(reading.memory_limit.unwrap_or(0)));
    reading.oom_kills = field(&text(dir, "memory.oom_control"), "oom_kill");
}

fn read_unified(dir: &Path, reading: &mut Reading) {
    let micros = |n: Option<u64>| n.map(|n| n * 1000);
    let cpu = text(dir, "cpu.stat");
    reading.cpu_nanos = micros(field(&cpu, "usage_usec"));
    reading.cpu_user_nanos = micros(field(&cpu, "user_usec"));
    reading.cpu_system_nanos = micros(field(&cpu, "system_usec"));
    reading.cfs_periods = field(&cpu, "nr_periods");
    reading.cfs_throttled_periods = field(&cpu, "nr_throttled");
    reading.cfs_throttled_nanos = micros(field(&cpu, "throttled_usec"));
    let quota = text(dir, "cpu.max");
    if let Some((quota, period)) = quota.trim().split_once(' ') {
        reading.cpu_quota_micros = quota.parse().ok();
        reading.cpu_period_micros = reading.cpu_quota_micros.and_then(|_| period.parse().ok());
    }
    // The inverse of the kubelet's conversion of shares to weight.
    reading.cpu_shares =
        number(dir, "cpu.weight").map(|weight| 2 + weight.saturating_sub(1) * 262_142 / 9_999);
    let stat = text(dir, "memory.stat");
    let anonymous = field(&stat, "anon");
    reading.memory_usage = number(dir, "memory.current");
    reading.memory_working_set = reading
        .memory_usage
        .map(|used| used.saturating_sub(field(&stat, "inactive_file").unwrap_or(0)));
    reading.memory_rss = anonymous;
    reading.memory_cache = field(&stat, "file");
    reading.memory_mapped_file = field(&stat, "file_mapped");
    reading.page_faults = field(&stat, "pgfault");
    reading.major_page_faults = field(&stat, "pgmajfault");
    reading.memory_max_usage = number(dir, "memory.peak");
    // `max` is no limit, and no number.
    reading.memory_limit = number(dir, "memory.max");
    let events = text(dir, "memory.events");
    reading.memory_failures = field(&events, "max");
    reading.oom_kills = field(&events, "oom_kill");
    reading.swap_usage = number(dir, "memory.swap.current");
    reading.swap_limit = number(dir, "memory.swap.max");
    reading.processes = number(dir, "pids.current");
    reading.cpu_psi = psi(&text(dir, "cpu.pressure"));
    reading.memory_psi = psi(&text(dir, "memory.pressure"));
    reading.io_psi = psi(&text(dir, "io.pressure"));
    let io = text(dir, "io.stat");
    if !io.is_empty() {
        let sum = |key: &str| {
            io.split_whitespace()
                .filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok())
                .sum()
        };
        reading.read_bytes = Some(sum("rbytes="));
        reading.written_bytes = Some(sum("wbytes="));
    }
}

fn text(dir: &Path, file: &str) -> String {
    fs::read_to_string(dir.join(file)).unwrap_or_default()
}

fn number(dir: &Path, file: &str) -> Option<u64> {
    text(dir, file).trim().parse().ok()
}

fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(key, _)| *key == name)?.1.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "32 31 0:29 / /cg/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                          35 31 0:32 / /cg/memory rw - cgroup cgroup rw,memory\n\
                          41 31 0:38 / /cg/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_groups_of_a_process_are_found_in_every_hierarchy() {
        let own = "4:memory:/kubepods/podx/c\n2:cpu,cpuacct:/kubepods/podx/c\n0::/other\n";
        let found = paths(own, HYBRID);
        assert_eq!(found.memory, Some("/cg/memory/kubepods/podx/c".into()));
        assert_eq!(found.cpuacct, Some("/cg/cpu,cpuacct/kubepods/podx/c".into()));
        assert_eq!(found.cpu, found.cpuacct);
        assert_eq!(found.unified, Some("/cg/unified/other".into()));
        assert_eq!(found.pids, None);
    }

    #[test]
    fn a_hierarchy_that_is_mounted_in_part_is_read_below_its_root() {
        let mounts = "41 31 0:38 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let found = paths("0::/docker/abc/kubepods/c\n", mounts);
        assert_eq!(found.unified, Some("/sys/fs/cgroup/kubepods/c".into()));
    }

    #[test]
    fn the_level_above_a_container_is_the_pods_only_if_it_is_named_so() {
        let at = |dir: &str| CgroupPaths {
            memory: Some(dir.into()),
            ..CgroupPaths::default()
        };
        let pod = of_pod(&at("/cg/memory/kubepods/pod1-2/c"), "1-2").unwrap();
        assert_eq!(pod.memory, Some("/cg/memory/kubepods/pod1-2".into()));
        assert!(of_pod(&at("/cg/memory/kubepods-pod1_2.slice/cri-c.scope"), "1-2").is_some());
        assert!(of_pod(&at("/cg/memory/system.slice/c"), "1-2").is_none());
    }

    #[test]
    fn version_1_and_version_2_files_tell_the_same_things() {
        let dir = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(dir.path().join(file), text).unwrap();
        write("cpuacct.usage", "2000\n");
        write("cpu.cfs_quota_us", "-1\n");
        write("cpu.cfs_period_us", "100000\n");
        write("memory.usage_in_bytes", "100\n");
        write(
            "memory.stat",
            "cache 1\ntotal_inactive_file 40\ntotal_rss 30\ninactive_file 40\nanon 30\n",
        );
        write("memory.limit_in_bytes", "9223372036854771712\n");
        let at = Some(dir.path().to_owned());
        let v1 = read(&CgroupPaths {
            cpuacct: at.clone(),
            cpu: at.clone(),
            memory: at.clone(),
            ..CgroupPaths::default()
        });
        write("cpu.stat", "usage_usec 2\nuser_usec 1\nsystem_usec 1\n");
        write("cpu.max", "max 100000\n");
        write("cpu.weight", "39\n");
        write("memory.current", "100\n");
        write("memory.max", "max\n");
        write(
            "io.stat",
            "8:0 rbytes=5 wbytes=6 rios=1\n8:16 rbytes=1 wbytes=0\n",
        );
        let v2 = read(&CgroupPaths {
            unified: at,
            ..CgroupPaths::default()
        });
        for reading in [&v1, &v2] {
            assert_eq!(reading.cpu_nanos, Some(2000));
            assert_eq!(
                (reading.cpu_quota_micros, reading.cpu_period_micros),
                (None, None)
            );
            assert_eq!(reading.memory_working_set, Some(60));
            assert_eq!(reading.memory_rss, Some(30));
            assert_eq!(reading.memory_limit, None);
        }
        assert_eq!((v2.read_bytes, v2.written_bytes), (Some(6), Some(6)));
        assert_eq!(v2.cpu_shares, Some(998));
    }
}
