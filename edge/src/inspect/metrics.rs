//! `/metrics` of the node under the kubelet's names.

use std::collections::BTreeMap;
use std::fs;
use std::sync::PoisonError;

use skerry_telemetry::exposition::{Exposition, from_openmetrics};

use super::Inspect;
use crate::runtime::{ContainerState, Inventory, SandboxState};

/// Clock ticks per second in `/proc`; the same on every Linux.
const TICKS: f64 = 100.0;

pub(super) fn render(inspect: &Inspect, inventory: &Inventory) -> String {
    let mut out = Exposition::default();
    let labels = [("git_version", crate::node::KUBELET_VERSION)];
    out.family(
        "kubernetes_build_info",
        "gauge",
        "The release whose kubelet this node behaves like",
    )
    .sample(&labels, Some(1.0), None);
    let help = "The node's name. The count is always 1.";
    out.family("kubelet_node_name", "gauge", help)
        .sample(&[("node", &inspect.node_name)], Some(1.0), None);
    let ready = inventory
        .sandboxes
        .iter()
        .filter(|s| s.state == SandboxState::Ready);
    let help = "Number of pods that have a running pod sandbox";
    out.family("kubelet_running_pods", "gauge", help)
        .sample(&[], number(ready.count()), None);
    let mut states: BTreeMap<&str, usize> = BTreeMap::new();
    for container in &inventory.containers {
        *states.entry(state(&container.state)).or_default() += 1;
    }
    out.family(
        "kubelet_running_containers",
        "gauge",
        "Number of containers by state",
    );
    for (state, count) in states {
        out.sample(&[("container_state", state)], number(count), None);
    }
    let phases: usize = inspect.pods.borrow().by_phase.values().sum();
    let help = "The number of pods the node works on";
    out.family("kubelet_working_pods", "gauge", help)
        .sample(&[], number(phases), None);
    let help = "Restarts of containers since the daemon started";
    #[allow(clippy::cast_precision_loss)]
    let restarts = inspect.pods.borrow().restarts as f64;
    out.family("skerry_container_restarts_total", "counter", help)
        .sample(&[], Some(restarts), None);
    process(&mut out);
    let mut text = out.finish();
    let mut counted = String::new();
    let registry = inspect.registry.lock().unwrap_or_else(PoisonError::into_inner);
    // Writing to a String cannot fail.
    let _ = prometheus_client::encoding::text::encode(&mut counted, &registry);
    text.push_str(&from_openmetrics(&counted));
    text
}

#[allow(clippy::cast_precision_loss)]
fn number(count: usize) -> Option<f64> {
    Some(count as f64)
}

fn state(state: &ContainerState) -> &'static str {
    match state {
        ContainerState::Created => "created",
        ContainerState::Running { .. } => "running",
        ContainerState::Exited { .. } => "exited",
        ContainerState::Unknown => "unknown",
    }
}

/// The daemon as a process.
fn process(out: &mut Exposition) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // The command name may hold blanks and parentheses: everything after the last `)` is regular.
    let fields: Vec<f64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| {
            rest.split_whitespace()
                .map(|w| w.parse().unwrap_or(0.0))
                .collect()
        })
        .unwrap_or_default();
    let cpu = fields
        .get(11)
        .zip(fields.get(12))
        .map(|(user, system)| (user + system) / TICKS);
    let help = "Total user and system CPU time spent in seconds";
    out.family("process_cpu_seconds_total", "counter", help)
        .sample(&[], cpu, None);
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = |field: &str| {
        let rest = status.lines().find_map(|line| line.strip_prefix(field))?;
        Some(rest.split_whitespace().next()?.parse::<f64>().ok()? * 1024.0)
    };
    out.family(
        "process_resident_memory_bytes",
        "gauge",
        "Resident memory size in bytes",
    )
    .sample(&[], kib("VmRSS:"), None);
    out.family(
        "process_virtual_memory_bytes",
        "gauge",
        "Virtual memory size in bytes",
    )
    .sample(&[], kib("VmSize:"), None);
    let open = fs::read_dir("/proc/self/fd").map(Iterator::count).ok();
    out.family("process_open_fds", "gauge", "Number of open file descriptors")
        .sample(&[], open.and_then(number), None);
    out.append(&process_start());
}

/// When the daemon started, for whoever turns counters into rates.
pub(super) fn process_start() -> String {
    let mut out = Exposition::default();
    let help = "Start time of the process since unix epoch in seconds";
    out.family("process_start_time_seconds", "gauge", help)
        .sample(&[], started(), None);
    out.finish()
}

fn started() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let ticks: f64 = stat
        .rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(19)?
        .parse()
        .ok()?;
    let boot = fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = boot
        .lines()
        .find_map(|line| line.strip_prefix("btime "))?
        .trim()
        .parse()
        .ok()?;
    Some(boot + ticks / TICKS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_daemon_describes_itself() {
        let mut out = Exposition::default();
        process(&mut out);
        let text = out.finish();
        for name in [
            "process_cpu_seconds_total ",
            "process_resident_memory_bytes ",
            "process_open_fds ",
            "process_start_time_seconds ",
        ] {
            let line = text.lines().find(|line| line.starts_with(name));
            let value: f64 = line.unwrap_or_else(|| panic!("{name} in {text}"))[name.len()..]
                .parse()
                .unwrap();
            assert!(value >= 0.0, "{text}");
        }
    }
}
