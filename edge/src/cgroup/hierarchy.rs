//! Which hierarchies this machine mounts, and where.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The controllers that Skerry sets.
pub(super) const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "hugetlb"];

/// Where cgroups are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Hierarchy {
    /// One hierarchy per controller or group of controllers; those of [`CONTROLLERS`] by name, and every v1 mount.
    V1 {
        controllers: BTreeMap<&'static str, PathBuf>,
        mounts: Vec<PathBuf>,
    },
    /// The one hierarchy.
    V2(PathBuf),
    /// None that limits anything.
    None,
}

impl Hierarchy {
    /// This machine's.
    pub(super) fn detect() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    /// From the text of `/proc/self/mountinfo`. A controller that is mounted more than once counts where its path is
    /// shortest.
    pub(super) fn parse(mountinfo: &str) -> Self {
        let mut controllers = BTreeMap::<&'static str, PathBuf>::new();
        let mut mounts = Vec::new();
        let mut unified = None;
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
                    for name in CONTROLLERS {
                        if options.split(',').any(|o| o == name)
                            && controllers.get(name).is_none_or(|old| longer(old, &point))
                        {
                            controllers.insert(name, point.clone());
                        }
                    }
                    mounts.push(point);
                }
                "cgroup2" => {
                    unified.get_or_insert(point);
                }
                _ => {}
            }
        }
        match (controllers.is_empty(), unified) {
            (true, None) => Self::None,
            (true, Some(root)) => Self::V2(root),
            (false, unified) => {
                // On a hybrid machine the runtime may make an empty cgroup of each pod in the other one as well.
                mounts.extend(unified);
                Self::V1 { controllers, mounts }
            }
        }
    }

    /// Every place where a cgroup of that path may exist.
    pub(super) fn places(&self, relative: &str) -> Vec<PathBuf> {
        match self {
            Self::V1 { mounts, .. } => mounts.iter().map(|root| root.join(relative)).collect(),
            Self::V2(root) => vec![root.join(relative)],
            Self::None => Vec::new(),
        }
    }

    /// Where that controller's files of a cgroup are.
    pub(super) fn of(&self, controller: &str, relative: &str) -> Option<PathBuf> {
        match self {
            Self::V1 { controllers, .. } => Some(controllers.get(controller)?.join(relative)),
            Self::V2(root) => Some(root.join(relative)),
            Self::None => None,
        }
    }
}

fn longer(old: &Path, new: &Path) -> bool {
    old.as_os_str().len() > new.as_os_str().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "32 31 0:29 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n\
                          35 31 0:32 / /cg/memory rw - cgroup cgroup rw,memory\n\
                          36 31 0:33 / /cg/freezer rw - cgroup cgroup rw,freezer\n\
                          41 31 0:38 / /cg/unified rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn controllers_are_found_on_hybrid_hosts() {
        let found = Hierarchy::parse(HYBRID);
        assert_eq!(found.of("cpu", "a/b"), Some(PathBuf::from("/cg/cpu/a/b")));
        assert_eq!(found.of("memory", "a"), Some(PathBuf::from("/cg/memory/a")));
        assert_eq!(found.of("pids", "a"), None);
        assert_eq!(found.places("a").len(), 4);
    }

    #[test]
    fn a_lone_unified_hierarchy_is_v2() {
        let found = Hierarchy::parse("41 31 0:38 / /cg rw - cgroup2 cgroup2 rw\n");
        assert_eq!(found, Hierarchy::V2(PathBuf::from("/cg")));
        assert_eq!(found.of("pids", "a"), Some(PathBuf::from("/cg/a")));
    }

    #[test]
    fn a_machine_without_cgroups_has_none() {
        assert_eq!(
            Hierarchy::parse("1 0 0:1 / / rw - ext4 /dev/sda rw\n"),
            Hierarchy::None
        );
    }
}
