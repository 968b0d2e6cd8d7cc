//! What the machine has, and what of it pods may have.
//!
//! Allocatable is capacity less what is reserved for the system, less what must stay free before pods are evicted; huge
//! pages count as memory that is gone. The rules are a kubelet's (`reference: Node Allocatable`).

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Map, Value};

use super::measure::Machine;
use crate::cgroup::{HugePages, Values};
use crate::eviction::{Amount, Signal, Threshold};

/// What is kept back from pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Thousandths of a processor.
    pub cpu_milli: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of the node's file system.
    pub ephemeral_bytes: u64,
}

/// Amounts of a node: processors in thousandths, everything else in whole units.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amounts {
    /// Thousandths of a processor.
    pub(crate) cpu_milli: u64,
    /// Bytes.
    pub(crate) memory_bytes: u64,
    /// Bytes.
    pub(crate) ephemeral_bytes: u64,
    /// Pods.
    pub(crate) pods: u64,
    /// Bytes by size of the page.
    pub(crate) huge_pages: BTreeMap<u64, u64>,
}

impl Amounts {
    /// As the API has them.
    pub(super) fn to_json(&self) -> Value {
        let mut list = Map::new();
        let mut put = |name: String, value: String| list.insert(name, Value::String(value));
        put("cpu".to_owned(), cpu_text(self.cpu_milli));
        put("memory".to_owned(), format!("{}Ki", self.memory_bytes / 1024));
        put(
            "ephemeral-storage".to_owned(),
            format!("{}Ki", self.ephemeral_bytes / 1024),
        );
        put("pods".to_owned(), self.pods.to_string());
        for (size, bytes) in &self.huge_pages {
            put(format!("hugepages-{}", binary(*size)), binary(*bytes));
        }
        Value::Object(list)
    }

    /// By the API's resource name, in thousandths.
    pub(crate) fn milli(&self) -> BTreeMap<String, i128> {
        let whole = |value: u64| i128::from(value) * 1000;
        let mut list = BTreeMap::from([
            ("cpu".to_owned(), i128::from(self.cpu_milli)),
            ("memory".to_owned(), whole(self.memory_bytes)),
            ("ephemeral-storage".to_owned(), whole(self.ephemeral_bytes)),
            ("pods".to_owned(), whole(self.pods)),
        ]);
        for (size, bytes) in &self.huge_pages {
            list.insert(format!("hugepages-{}", binary(*size)), whole(*bytes));
        }
        list
    }
}

fn cpu_text(milli: u64) -> String {
    if milli.is_multiple_of(1000) {
        (milli / 1000).to_string()
    } else {
        format!("{milli}m")
    }
}

/// With the largest binary suffix that leaves a whole number.
fn binary(mut value: u64) -> String {
    let mut suffixes = ["", "Ki", "Mi", "Gi", "Ti"].into_iter().peekable();
    loop {
        let suffix = suffixes.next().unwrap_or_default();
        if value == 0 || !value.is_multiple_of(1024) || suffixes.peek().is_none() {
            return format!("{value}{suffix}");
        }
        value /= 1024;
    }
}

/// How much of a machine is for pods.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shares {
    /// Most pods.
    pub max_pods: u32,
    /// For the system.
    pub reserved: Reserved,
    /// Free memory below which pods are evicted.
    pub eviction_memory: Amount,
    /// Free part of the file system below which pods are evicted.
    pub eviction_disk: Amount,
}

impl Default for Shares {
    fn default() -> Self {
        Self {
            max_pods: 110,
            reserved: Reserved::default(),
            eviction_memory: Amount::Absolute(100 << 20),
            eviction_disk: Amount::Share(0.1),
        }
    }
}

impl Shares {
    /// The same with what hard thresholds keep free.
    #[must_use]
    pub fn with_eviction(mut self, thresholds: &[Threshold]) -> Self {
        let hard = |signal: Signal| {
            let mut all = thresholds.iter().filter(|t| t.is_hard());
            all.find(|t| t.signal == signal)
                .map_or(Amount::Absolute(0), |t| t.below)
        };
        self.eviction_memory = hard(Signal::MemoryAvailable);
        self.eviction_disk = hard(Signal::NodeFsAvailable);
        self
    }

    /// What the machine has.
    pub(super) fn capacity(&self, machine: &Machine) -> Amounts {
        Amounts {
            cpu_milli: u64::try_from(machine.cpus).unwrap_or(0) * 1000,
            memory_bytes: machine.memory_bytes,
            ephemeral_bytes: machine.disk_bytes,
            pods: self.max_pods.into(),
            huge_pages: machine.huge_pages.clone(),
        }
    }

    /// What pods may request.
    pub(super) fn allocatable(&self, machine: &Machine) -> Amounts {
        let all = self.capacity(machine);
        let huge: u64 = all.huge_pages.values().sum();
        let kept = self.reserved.memory_bytes + self.eviction_memory.of(all.memory_bytes) + huge;
        let kept_disk = self.reserved.ephemeral_bytes + self.eviction_disk.of(all.ephemeral_bytes);
        Amounts {
            cpu_milli: all.cpu_milli.saturating_sub(self.reserved.cpu_milli),
            memory_bytes: all.memory_bytes.saturating_sub(kept),
            ephemeral_bytes: all.ephemeral_bytes.saturating_sub(kept_disk),
            ..all
        }
    }

    /// Values of the cgroup of all pods: the eviction threshold is not kept back there, or evictions would come too
    /// late to help.
    fn limits(&self, machine: &Machine) -> Values {
        let all = self.capacity(machine);
        let cpu = all.cpu_milli.saturating_sub(self.reserved.cpu_milli);
        let memory = all.memory_bytes.saturating_sub(self.reserved.memory_bytes);
        Values {
            cpu_shares: Some((cpu * 1024 / 1000).clamp(2, 262_144)),
            memory_bytes: i64::try_from(memory).ok().filter(|bytes| *bytes > 0),
            ..Values::default()
        }
    }
}

/// What pods may request of this machine now.
pub(crate) fn allocatable(shares: &Shares, data_dir: &std::path::Path) -> Amounts {
    shares.allocatable(&Machine::measure(data_dir))
}

/// Values of the cgroup of all pods on this machine.
pub(crate) fn limits(shares: &Shares, data_dir: &std::path::Path) -> Values {
    shares.limits(&Machine::measure(data_dir))
}

/// Bytes of huge pages that the kernel has set aside, by size.
pub(super) fn huge_pages() -> BTreeMap<u64, u64> {
    let HugePages(sizes) = HugePages::detect();
    sizes
        .into_keys()
        .map(|size| {
            let file = format!(
                "/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages",
                size / 1024
            );
            let pages: u64 = fs::read_to_string(file)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(0);
            (size, size * pages)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            cpus: 4,
            memory_bytes: 1 << 30,
            disk_bytes: 1000 << 20,
            huge_pages: BTreeMap::from([(2 << 20, 4 << 20), (1 << 30, 0)]),
            ..Machine::default()
        }
    }

    #[test]
    fn allocatable_is_capacity_less_reserved_less_the_eviction_threshold_less_huge_pages() {
        let shares = Shares {
            reserved: Reserved {
                cpu_milli: 500,
                memory_bytes: 20 << 20,
                ephemeral_bytes: 100 << 20,
            },
            ..Shares::default()
        };
        let json = shares.allocatable(&machine()).to_json();
        assert_eq!(json["cpu"], "3500m");
        assert_eq!(json["memory"], format!("{}Ki", (1024 - 100 - 20 - 4) * 1024));
        assert_eq!(json["ephemeral-storage"], format!("{}Ki", 800 * 1024));
        assert_eq!(
            (&json["pods"], &json["hugepages-2Mi"], &json["hugepages-1Gi"]),
            (&"110".into(), &"4Mi".into(), &"0".into())
        );
        assert_eq!(shares.capacity(&machine()).to_json()["cpu"], "4");
        assert_eq!(shares.limits(&machine()).memory_bytes, Some((1024 - 20) << 20));
        assert_eq!(shares.limits(&machine()).cpu_shares, Some(3584));
    }

    #[test]
    fn a_policy_without_thresholds_keeps_nothing_free() {
        let left = Shares::default().with_eviction(&[]).allocatable(&machine());
        assert_eq!(
            (left.memory_bytes, left.ephemeral_bytes),
            ((1024 - 4) << 20, 1000 << 20)
        );
    }

    #[test]
    fn a_machine_smaller_than_what_is_reserved_has_nothing_to_give() {
        let shares = Shares {
            reserved: Reserved {
                cpu_milli: 9000,
                memory_bytes: 1 << 40,
                ephemeral_bytes: 1 << 40,
            },
            ..Shares::default()
        };
        let left = shares.allocatable(&machine());
        assert_eq!(
            (left.cpu_milli, left.memory_bytes, left.ephemeral_bytes),
            (0, 0, 0)
        );
    }
}
