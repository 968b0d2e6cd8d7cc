//! What the machine is and has.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

/// The Kubernetes release whose kubelet this one behaves like.
pub(crate) const KUBELET_VERSION: &str = concat!("v1.36.3-skerry.", env!("CARGO_PKG_VERSION"));

/// One look at the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Machine {
    pub(super) cpus: usize,
    pub(super) memory_bytes: u64,
    pub(super) memory_available_bytes: u64,
    pub(super) disk_bytes: u64,
    pub(super) disk_available_bytes: u64,
    pub(super) pids: u64,
    pub(super) pids_max: u64,
    /// Bytes by size of the page.
    pub(super) huge_pages: BTreeMap<u64, u64>,
}

impl Machine {
    /// Reads everything anew. What cannot be read counts as nothing, and never as pressure.
    pub(super) fn measure(data_dir: &Path) -> Self {
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let disk = nix::sys::statvfs::statvfs(data_dir).ok();
        let (disk_bytes, disk_available_bytes) = disk.map_or((0, 0), |d| {
            (
                d.blocks() * d.fragment_size(),
                d.blocks_available() * d.fragment_size(),
            )
        });
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: meminfo(&memory, "MemTotal:"),
            memory_available_bytes: meminfo(&memory, "MemAvailable:"),
            disk_bytes,
            disk_available_bytes,
            pids: pids_in_use(),
            pids_max: first_number("/proc/sys/kernel/pid_max"),
            huge_pages: super::capacity::huge_pages(),
        }
    }

    #[allow(clippy::unused_self)]
    pub(super) fn info(&self, runtime: &str, fallback_machine_id: &str) -> Value {
        let machine_id = first_line("/etc/machine-id");
        let machine_id = if machine_id.is_empty() {
            fallback_machine_id.to_owned()
        } else {
            machine_id
        };
        let system_uuid = first_line("/sys/class/dmi/id/product_uuid");
        json!({
            "machineID": machine_id,
            "systemUUID": if system_uuid.is_empty() { machine_id.clone() } else { system_uuid },
            "bootID": first_line("/proc/sys/kernel/random/boot_id"),
            "kernelVersion": first_line("/proc/sys/kernel/osrelease"),
            "osImage": os_image(&fs::read_to_string("/etc/os-release").unwrap_or_default()),
            "containerRuntimeVersion": runtime,
            "kubeletVersion": KUBELET_VERSION,
            "kubeProxyVersion": "",
            "operatingSystem": "linux",
            "architecture": architecture(),
        })
    }
}

/// The architecture in Go's words, which Kubernetes uses.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

fn meminfo(text: &str, field: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn os_image(os_release: &str) -> String {
    let name = os_release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.unwrap_or("Linux").trim_matches('"').to_owned()
}

/// `/proc/loadavg` names runnable and existing scheduling entities: `0.1 0.2 0.3 2/345 6789`.
fn pids_in_use() -> u64 {
    let text = first_line("/proc/loadavg");
    let tasks = text
        .split_whitespace()
        .nth(3)
        .and_then(|field| field.split('/').nth(1)?.parse().ok());
    tasks.unwrap_or(0)
}

fn first_number(path: &str) -> u64 {
    first_line(path).parse().unwrap_or(0)
}

fn first_line(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_processor_memory_and_a_disk() {
        let machine = Machine::measure(Path::new("/"));
        assert!(
            machine.cpus > 0 && machine.memory_bytes > 0 && machine.disk_bytes > 0,
            "{machine:?}"
        );
        assert!(machine.memory_available_bytes <= machine.memory_bytes);
    }

    #[test]
    fn meminfo_and_os_release_are_read() {
        assert_eq!(
            meminfo("MemTotal:       16 kB\nMemFree: 2 kB\n", "MemTotal:"),
            16 * 1024
        );
        assert_eq!(os_image("ID=x\nPRETTY_NAME=\"Some Linux 1\"\n"), "Some Linux 1");
    }
}
