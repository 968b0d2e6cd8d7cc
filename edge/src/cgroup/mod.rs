//! The kernel's control groups: the tree that pods live in, and what a pod as a whole may use.
//!
//! **In:** a cgroup's place in the tree ([`PodCgroup`]) and its values ([`Values`]). **Out:** directories and files
//! below the hierarchies that this machine mounts: v1, hybrid (v1 with an unused v2 beside it) or v2.
//!
//! ```text
//! kubepods                      what all pods may use: the node's allocatable
//! ├── pod<UID>                  Guaranteed
//! ├── burstable                 as many shares as its pods request
//! │   └── pod<UID>
//! └── besteffort                the least shares
//!     └── pod<UID>
//! ```
//!
//! The daemon makes a pod's cgroup before its sandbox and removes it with the pod; the runtime makes those of the
//! containers below it. With the systemd driver the same tree is made of slices (`kubepods-burstable-pod<uid>.slice`),
//! which systemd makes, limits and removes: a file written behind its back is undone by its next reload. The names and
//! the values are those of a kubelet, so that tools find what they look for.

mod files;
mod hierarchy;
mod names;
mod systemd;
mod tree;

pub(crate) use files::{create, join, oom_killed, remove};
pub use names::{Driver, PodCgroup, Tier};
pub use tree::{CgroupError, Cgroups, HugePages, Kernel};

use std::collections::BTreeMap;

/// What a cgroup may use. `None` leaves what is set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Values {
    /// CPU weight in v1 shares (2 to 262144); converted for v2.
    pub cpu_shares: Option<u64>,
    /// CPU time in microseconds per [`PERIOD`]; negative for no limit.
    pub cpu_quota: Option<i64>,
    /// Memory in bytes; negative for no limit.
    pub memory_bytes: Option<i64>,
    /// Processes and threads.
    pub pids: Option<u64>,
    /// Bytes by size of the page, as the kernel names it (`2MB`).
    pub huge_pages: BTreeMap<String, u64>,
    /// When memory runs out, everything in the cgroup dies together. v2 only.
    pub die_together: bool,
}

/// CFS period in microseconds.
pub const PERIOD: i64 = 100_000;

/// v1 shares as v2 weight, by the kubelet's formula.
pub(crate) fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_convert_to_weight_like_the_kubelet_does() {
        assert_eq!((weight(2), weight(1024), weight(262_144)), (1, 39, 10_000));
    }
}
