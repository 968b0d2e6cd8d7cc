//! Reads the machine: `/proc`, `/sys` and file systems.

use std::fs;
use std::path::Path;

use jiff::Timestamp;
use skerry_proto::stats::{
    CpuStats, FsStats, InterfaceDetail, InterfaceStats, IoStats, Machine, MemoryStats, NetworkStats, Psi,
    PsiData, RlimitStats, SwapStats,
};

/// Clock ticks per second in `/proc`; the same on every Linux.
const TICKS: u64 = 100;
/// Interfaces that are no part of the machine: what the runtime made for pods.
const POD_INTERFACES: [&str; 4] = ["veth", "docker", "nerdctl", "cali"];

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn line(path: &str) -> String {
    text(path).lines().next().unwrap_or_default().trim().to_owned()
}

/// Processor time of all processes.
pub(super) fn cpu(now: Timestamp) -> Option<CpuStats> {
    Some(CpuStats {
        time: Some(now),
        usage_core_nano_seconds: Some(busy_nanos(&text("/proc/stat"))?),
        usage_nano_cores: None,
        psi: psi(&text("/proc/pressure/cpu")),
    })
}

/// All columns of the first line but idle and iowait; the two guest columns are in the others already.
fn busy_nanos(stat: &str) -> Option<u64> {
    let columns: Vec<u64> = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    let busy: u64 = columns
        .iter()
        .take(8)
        .enumerate()
        .filter(|(i, _)| !matches!(i, 3 | 4))
        .map(|(_, n)| n)
        .sum();
    Some(busy * (1_000_000_000 / TICKS))
}

/// Memory and swap of the machine.
pub(super) fn memory(now: Timestamp) -> Option<(MemoryStats, SwapStats)> {
    memory_of(&text("/proc/meminfo"), &text("/proc/vmstat"), now)
}

fn memory_of(meminfo: &str, vmstat: &str, now: Timestamp) -> Option<(MemoryStats, SwapStats)> {
    let size = |field: &str| kib(meminfo, field);
    let total = size("MemTotal:")?;
    let used = total.saturating_sub(size("MemFree:")?);
    let working_set = used.saturating_sub(size("Inactive(file):").unwrap_or(0));
    let event = |name: &str| {
        let mut lines = vmstat.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(key, _)| *key == name)?.1.trim().parse().ok()
    };
    let memory = MemoryStats {
        time: Some(now),
        available_bytes: Some(total.saturating_sub(working_set)),
        usage_bytes: Some(used),
        working_set_bytes: Some(working_set),
        rss_bytes: size("AnonPages:"),
        page_faults: event("pgfault"),
        major_page_faults: event("pgmajfault"),
        psi: psi(&text("/proc/pressure/memory")),
    };
    let (swap_total, swap_free) = (size("SwapTotal:").unwrap_or(0), size("SwapFree:").unwrap_or(0));
    let swap = SwapStats {
        time: Some(now),
        available_bytes: Some(swap_free),
        usage_bytes: Some(swap_total.saturating_sub(swap_free)),
    };
    Some((memory, swap))
}

fn kib(meminfo: &str, field: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
    rest.split_whitespace()
        .next()?
        .parse::<u64>()
        .ok()
        .map(|n| n * 1024)
}

/// Waiting for block devices.
pub(super) fn io(now: Timestamp) -> Option<IoStats> {
    let psi = psi(&text("/proc/pressure/io"))?;
    Some(IoStats {
        time: Some(now),
        psi: Some(psi),
    })
}

/// Process ids in use and their limit.
pub(super) fn rlimit(now: Timestamp) -> RlimitStats {
    let limit = |path: &str| line(path).parse::<u64>().ok();
    let max_pid = [
        limit("/proc/sys/kernel/pid_max"),
        limit("/proc/sys/kernel/threads-max"),
    ]
    .into_iter()
    .flatten()
    .min();
    RlimitStats {
        time: Some(now),
        max_pid: max_pid.unwrap_or(0),
        current: tasks(&line("/proc/loadavg")),
    }
}

/// `/proc/loadavg` names runnable and existing scheduling entities: `0.1 0.2 0.3 2/345 6789`.
fn tasks(loadavg: &str) -> u64 {
    let field = loadavg.split_whitespace().nth(3);
    field
        .and_then(|field| field.split('/').nth(1)?.parse().ok())
        .unwrap_or(0)
}

/// When the machine booted.
pub(super) fn boot_time() -> Option<Timestamp> {
    let stat = text("/proc/stat");
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    Timestamp::from_second(seconds.trim().parse().ok()?).ok()
}

/// The machine for cAdvisor's `machine_` metrics.
pub(super) fn machine(machine_id: &str) -> Machine {
    let meminfo = text("/proc/meminfo");
    let release = text("/etc/os-release");
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let own_id = line("/etc/machine-id");
    Machine {
        cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u64),
        memory_bytes: kib(&meminfo, "MemTotal:").unwrap_or(0),
        swap_bytes: kib(&meminfo, "SwapTotal:").unwrap_or(0),
        machine_id: if own_id.is_empty() {
            machine_id.to_owned()
        } else {
            own_id
        },
        boot_id: line("/proc/sys/kernel/random/boot_id"),
        system_uuid: line("/sys/class/dmi/id/product_uuid"),
        kernel_version: line("/proc/sys/kernel/osrelease"),
        os_version: name.unwrap_or("Linux").trim_matches('"').to_owned(),
    }
}

/// The file system that holds `dir`.
pub(super) fn fs(dir: &Path, now: Timestamp) -> Option<FsStats> {
    let fs = nix::sys::statvfs::statvfs(dir).ok()?;
    let block = fs.fragment_size();
    Some(FsStats {
        time: Some(now),
        available_bytes: Some(fs.blocks_available() * block),
        capacity_bytes: Some(fs.blocks() * block),
        used_bytes: Some(fs.blocks().saturating_sub(fs.blocks_free()) * block),
        inodes_free: Some(fs.files_free()),
        inodes: Some(fs.files()),
        inodes_used: Some(fs.files().saturating_sub(fs.files_free())),
    })
}

/// The interfaces in the network namespace of `pid`, or of this process.
pub(super) fn network(pid: Option<i32>, now: Timestamp) -> Option<(NetworkStats, Vec<InterfaceDetail>)> {
    let of = pid.map_or_else(|| "self".to_owned(), |pid| pid.to_string());
    let table = fs::read_to_string(format!("/proc/{of}/net/dev")).ok()?;
    let mut found = interfaces(&table);
    if pid.is_none() {
        found.retain(|(stats, _)| !POD_INTERFACES.iter().any(|p| stats.name.starts_with(p)));
    }
    let preferred = default_interface(&text(&format!("/proc/{of}/net/route")));
    let main = found
        .iter()
        .find(|(stats, _)| Some(&stats.name) == preferred.as_ref())
        .or_else(|| found.first());
    let stats = NetworkStats {
        time: Some(now),
        main: main.map(|(stats, _)| stats.clone()).unwrap_or_default(),
        interfaces: found.iter().map(|(stats, _)| stats.clone()).collect(),
    };
    Some((stats, found.into_iter().map(|(_, detail)| detail).collect()))
}

fn interfaces(table: &str) -> Vec<(InterfaceStats, InterfaceDetail)> {
    let rows = table.lines().filter_map(|line| line.split_once(':'));
    rows.filter_map(|(name, rest)| {
        let n: Vec<u64> = rest.split_whitespace().map_while(|w| w.parse().ok()).collect();
        let name = name.trim().to_owned();
        if name == "lo" || n.len() < 12 {
            return None;
        }
        let stats = InterfaceStats {
            name: name.clone(),
            rx_bytes: Some(n[0]),
            rx_errors: Some(n[2]),
            tx_bytes: Some(n[8]),
            tx_errors: Some(n[10]),
        };
        let detail = InterfaceDetail {
            name,
            rx_packets: n[1],
            rx_dropped: n[3],
            tx_packets: n[9],
            tx_dropped: n[11],
            ..InterfaceDetail::default()
        };
        Some((stats, detail))
    })
    .collect()
}

/// `Iface Destination ...`, the destination in hexadecimal: the default route's is all zero.
fn default_interface(routes: &str) -> Option<String> {
    let mut rows = routes.lines().skip(1).map(|line| line.split_whitespace());
    rows.find_map(|mut row| {
        let (name, destination) = (row.next()?, row.next()?);
        (destination == "00000000").then(|| name.to_owned())
    })
}

/// A pressure file; `None` where the kernel keeps none.
pub(super) fn psi(text: &str) -> Option<Psi> {
    let data = |word: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(word))?;
        let value = |key: &str| line.split_whitespace().find_map(|w| w.strip_prefix(key));
        let share = |key: &str| value(key).and_then(|v| v.parse().ok()).unwrap_or(0.0);
        Some(PsiData {
            total: value("total=")?.parse::<u64>().ok()? * 1000,
            avg10: share("avg10="),
            avg60: share("avg60="),
            avg300: share("avg300="),
        })
    };
    Some(Psi {
        some: data("some ")?,
        // Some kernels have no such line for processors.
        full: data("full ").unwrap_or_default(),
    })
}

/// Processor time (nanoseconds), resident memory (bytes) and number of the descendants of `ancestor`, itself left out.
///
/// The time of those that have ended counts on, as far as somebody has waited for them, so that the sum never shrinks.
pub(super) fn tree(ancestor: i32) -> (u64, u64, u64) {
    let page = page_bytes();
    let pids = fs::read_dir("/proc").into_iter().flatten();
    let pids = pids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    let all: std::collections::HashMap<i32, Process> = pids
        .filter_map(|pid| Some((pid, process(&text(&format!("/proc/{pid}/stat")))?)))
        .collect();
    let descends = |mut pid: i32| {
        // A chain of parents is never longer than the table.
        for _ in 0..all.len() {
            match all.get(&pid) {
                Some(process) if process.parent == ancestor => return true,
                Some(process) if process.parent > 1 => pid = process.parent,
                _ => return false,
            }
        }
        false
    };
    let reaped = all.get(&ancestor).map_or(0, |process| process.reaped_ticks);
    let mut sum = (reaped * (1_000_000_000 / TICKS), 0, 0);
    for (_, process) in all.iter().filter(|(pid, _)| descends(**pid)) {
        sum.0 += process.ticks * (1_000_000_000 / TICKS);
        sum.1 += process.resident_pages * page;
        sum.2 += 1;
    }
    sum
}

/// Processor time and resident memory of one process.
pub(super) fn own() -> Option<(u64, u64)> {
    let process = process(&text("/proc/self/stat"))?;
    Some((
        process.ticks * (1_000_000_000 / TICKS),
        process.resident_pages * page_bytes(),
    ))
}

fn page_bytes() -> u64 {
    let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten();
    size.and_then(|n| u64::try_from(n).ok()).unwrap_or(4096)
}

struct Process {
    parent: i32,
    /// Its own time and that of its dead children.
    ticks: u64,
    /// Of its dead children alone.
    reaped_ticks: u64,
    resident_pages: u64,
}

fn process(stat: &str) -> Option<Process> {
    // The command name may hold blanks and parentheses: everything after the last `)` is regular.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let number = |i: usize| fields.get(i)?.parse::<u64>().ok();
    Some(Process {
        parent: fields.get(1)?.parse().ok()?,
        ticks: number(11)? + number(12)? + number(13)? + number(14)?,
        reaped_ticks: number(13)? + number(14)?,
        resident_pages: number(21)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_waiting_processors_are_not_busy() {
        let stat = "cpu  100 10 50 9999 777 1 2 3 40 50\ncpu0 1 1 1 1\n";
        assert_eq!(busy_nanos(stat), Some((100 + 10 + 50 + 1 + 2 + 3) * 10_000_000));
    }

    #[test]
    fn the_working_set_leaves_out_inactive_files() {
        let meminfo = "MemTotal: 100 kB\nMemFree: 30 kB\nInactive(file): 20 kB\nAnonPages: 5 kB\nSwapTotal: 8 kB\nSwapFree: 6 kB\n";
        let (memory, swap) = memory_of(meminfo, "pgfault 7\npgmajfault 2\n", Timestamp::UNIX_EPOCH).unwrap();
        assert_eq!(memory.usage_bytes, Some(70 * 1024));
        assert_eq!(memory.working_set_bytes, Some(50 * 1024));
        assert_eq!(memory.available_bytes, Some(50 * 1024));
        assert_eq!((memory.page_faults, memory.major_page_faults), (Some(7), Some(2)));
        assert_eq!(swap.usage_bytes, Some(2 * 1024));
    }

    #[test]
    fn interfaces_are_read_without_the_loopback() {
        let table = "Inter-| Receive | Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes\n\
            lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 10 2 3 4 0 0 0 0 20 5 6 7 0 0 0 0\n";
        let found = interfaces(table);
        assert_eq!(found.len(), 1);
        let (stats, detail) = &found[0];
        assert_eq!((stats.rx_bytes, stats.tx_bytes), (Some(10), Some(20)));
        assert_eq!((stats.rx_errors, stats.tx_errors), (Some(3), Some(6)));
        assert_eq!((detail.rx_packets, detail.tx_dropped), (2, 7));
        assert_eq!(
            default_interface("Iface Destination\nbr0 0A000000 x\neth0 00000000 y\n").as_deref(),
            Some("eth0")
        );
    }

    #[test]
    fn pressure_totals_are_nanoseconds() {
        let read = psi(
            "some avg10=1.50 avg60=0.00 avg300=0.25 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n",
        );
        let read = read.unwrap();
        assert_eq!((read.some.total, read.full.total), (12_000, 3_000));
        assert!((read.some.avg10 - 1.5).abs() < f64::EPSILON);
        assert_eq!(psi(""), None);
    }

    #[test]
    fn this_machine_can_be_read() {
        let now = Timestamp::UNIX_EPOCH;
        assert!(cpu(now).unwrap().usage_core_nano_seconds > Some(0));
        let (memory, _) = memory(now).unwrap();
        assert!(memory.working_set_bytes.unwrap() > 0);
        assert!(rlimit(now).max_pid > rlimit(now).current);
        assert!(fs(Path::new("/"), now).unwrap().capacity_bytes > Some(0));
        assert!(own().unwrap().1 > 0);
        assert!(boot_time().unwrap() > Timestamp::UNIX_EPOCH);
    }

    #[test]
    fn the_descendants_of_a_process_are_counted_without_itself() {
        use std::io::BufRead;
        let mut shell = std::process::Command::new("sh")
            // It speaks once it is itself: between fork and exec a process may have no memory to count.
            .args(["-c", "sh -c 'echo $$; kill -STOP $$' & wait"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = std::io::BufReader::new(shell.stdout.take().unwrap());
        out.read_line(&mut line).unwrap();
        let (_, resident, count) = tree(shell.id().cast_signed());
        let child = nix::unistd::Pid::from_raw(line.trim().parse().unwrap());
        nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
        shell.wait().unwrap();
        assert_eq!(count, 1);
        assert!(resident > 0);
    }
}
