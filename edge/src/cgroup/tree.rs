//! The tree of pods.

use std::collections::BTreeMap;

use super::files::{self, FileError};
use super::hierarchy::Hierarchy;
use super::names::slice_of;
use super::{Driver, PodCgroup, Tier, Values, systemd};

/// Why a cgroup is not as it should be. The pod waits, and it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The kernel refused a directory or a value.
    #[error("cgroup {0}")]
    File(#[from] FileError),
    /// systemd refused.
    #[error("slice {slice}: {message}")]
    Systemd {
        /// The slice.
        slice: String,
        /// What it said.
        message: String,
    },
    /// The runtime uses systemd, and this machine does not.
    #[error("the container runtime makes cgroups through systemd, which does not run here")]
    NoSystemd,
}

/// Sizes of huge pages that the kernel can limit, in bytes, with the names that its files use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugePages(pub BTreeMap<u64, String>);

impl HugePages {
    /// This machine's.
    pub fn detect() -> Self {
        let entries = std::fs::read_dir("/sys/kernel/mm/hugepages")
            .into_iter()
            .flatten()
            .flatten();
        let sizes = entries.filter_map(|e| {
            let name = e.file_name().into_string().ok()?;
            let kib: u64 = name
                .strip_prefix("hugepages-")?
                .strip_suffix("kB")?
                .parse()
                .ok()?;
            Some((kib * 1024, file_name(kib)))
        });
        Self(sizes.collect())
    }
}

/// `64KB`, `2MB`, `1GB`.
fn file_name(kib: u64) -> String {
    match kib {
        k if k >= 1 << 20 => format!("{}GB", k >> 20),
        k if k >= 1 << 10 => format!("{}MB", k >> 10),
        k => format!("{k}KB"),
    }
}

/// What this kernel can limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// The hierarchy is v2.
    pub v2: bool,
    /// Swap is accounted for, so that a container can be kept from it.
    pub swap: bool,
    /// Huge pages.
    pub huge_pages: HugePages,
}

impl Kernel {
    /// This machine's.
    pub fn detect() -> Self {
        let hierarchy = Hierarchy::detect();
        let v2 = matches!(hierarchy, Hierarchy::V2(_));
        // The root of v2 has no such file; any cgroup below it does.
        let swap = match &hierarchy {
            Hierarchy::V2(root) => std::fs::read_dir(root)
                .into_iter()
                .flatten()
                .flatten()
                .any(|entry| entry.path().join("memory.swap.max").exists()),
            other => other
                .of("memory", "memory.memsw.limit_in_bytes")
                .is_some_and(|file| file.exists()),
        };
        Self {
            v2,
            swap,
            huge_pages: HugePages::detect(),
        }
    }
}

/// The machine's tree of pods.
#[derive(Clone, Debug)]
pub struct Cgroups {
    hierarchy: Hierarchy,
    driver: Driver,
}

impl Cgroups {
    /// This machine's, made by `driver`.
    pub fn new(driver: Driver) -> Self {
        Self {
            hierarchy: Hierarchy::detect(),
            driver,
        }
    }

    /// Who makes cgroups.
    pub fn driver(&self) -> Driver {
        self.driver
    }

    /// Makes `kubepods` and the tiers. `all` are the values of `kubepods`, the node's allocatable.
    pub async fn prepare(&self, all: &Values, burstable_shares: u64) -> Result<(), CgroupError> {
        self.apply(&Tier::Guaranteed.path(self.driver), all).await?;
        self.set_burstable_shares(burstable_shares).await?;
        let least = Values {
            cpu_shares: Some(2),
            ..Values::default()
        };
        self.apply(&Tier::BestEffort.path(self.driver), &least).await
    }

    /// Gives the Burstable tier as many shares as its pods request together.
    pub async fn set_burstable_shares(&self, shares: u64) -> Result<(), CgroupError> {
        let values = Values {
            cpu_shares: Some(shares),
            ..Values::default()
        };
        self.apply(&Tier::Burstable.path(self.driver), &values).await
    }

    /// Whether the pod's cgroup is there.
    pub fn exists(&self, pod: &PodCgroup) -> bool {
        let dir = self.hierarchy.of("memory", &pod.path(self.driver));
        dir.is_some_and(|dir| dir.is_dir())
    }

    /// Makes the pod's cgroup if it is not there, and sets the values.
    pub async fn set(&self, pod: &PodCgroup, values: &Values) -> Result<(), CgroupError> {
        self.apply(&pod.path(self.driver), values).await
    }

    /// What is set for the pod.
    pub fn get(&self, pod: &PodCgroup) -> Values {
        files::get(&self.hierarchy, &pod.path(self.driver))
    }

    /// Memory that the pod uses, in bytes.
    pub fn memory_usage(&self, pod: &PodCgroup) -> Option<u64> {
        files::memory_usage(&self.hierarchy, &pod.path(self.driver))
    }

    /// Memory that a container of the pod uses, in bytes.
    pub fn container_memory_usage(&self, pod: &PodCgroup, id: &str) -> Option<u64> {
        let path = files::child_of(&self.hierarchy, &pod.path(self.driver), id)?;
        files::memory_usage(&self.hierarchy, &path)
    }

    /// Removes the pod's cgroup, whatever its tier, with every process that is left in it; answers whether nothing is
    /// left.
    pub async fn remove(&self, uid: &skerry_proto::object::Uid) -> bool {
        let mut gone = true;
        for tier in [Tier::Guaranteed, Tier::Burstable, Tier::BestEffort] {
            let pod = PodCgroup {
                uid: uid.clone(),
                tier,
            };
            let path = pod.path(self.driver);
            let there = self.hierarchy.places(&path).iter().any(|dir| dir.is_dir());
            if !there {
                continue;
            }
            if self.driver == Driver::Systemd
                && let Err(message) = systemd::stop(slice_of(&path)).await
            {
                tracing::warn!(%uid, message, "a pod's slice could not be stopped");
            }
            gone &= files::destroy(&self.hierarchy, &path);
        }
        gone
    }

    async fn apply(&self, path: &str, values: &Values) -> Result<(), CgroupError> {
        let v2 = matches!(self.hierarchy, Hierarchy::V2(_));
        match self.driver {
            Driver::Cgroupfs => {
                files::make(&self.hierarchy, path)?;
                match files::set(&self.hierarchy, path, values).into_iter().next() {
                    Some(error) => Err(error.into()),
                    None => Ok(()),
                }
            }
            Driver::Systemd if !systemd::is_there() => Err(CgroupError::NoSystemd),
            Driver::Systemd => {
                let slice = slice_of(path);
                systemd::apply(slice, v2, values)
                    .await
                    .map_err(|message| CgroupError::Systemd {
                        slice: slice.to_owned(),
                        message,
                    })?;
                // systemd has no property for huge pages.
                let pages = Values {
                    huge_pages: values.huge_pages.clone(),
                    ..Values::default()
                };
                match files::set(&self.hierarchy, path, &pages).into_iter().next() {
                    Some(error) => Err(error.into()),
                    None => Ok(()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_proto::object::Uid;

    fn pod() -> PodCgroup {
        PodCgroup {
            uid: Uid::from("1-2"),
            tier: Tier::Burstable,
        }
    }

    #[tokio::test]
    async fn a_pod_s_cgroup_is_made_set_read_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let tree = Cgroups {
            hierarchy: Hierarchy::V2(dir.path().to_owned()),
            driver: Driver::Cgroupfs,
        };
        assert!(!tree.exists(&pod()));
        let values = Values {
            memory_bytes: Some(4096),
            ..Values::default()
        };
        tree.set(&pod(), &values).await.unwrap();
        assert!(tree.exists(&pod()));
        assert_eq!(tree.get(&pod()).memory_bytes, Some(4096));
        // What a kernel's file system does by itself.
        for entry in std::fs::read_dir(dir.path().join("kubepods/burstable/pod1-2"))
            .unwrap()
            .flatten()
        {
            std::fs::remove_file(entry.path()).unwrap();
        }
        assert!(tree.remove(&Uid::from("1-2")).await);
        assert!(!tree.exists(&pod()));
    }

    #[test]
    fn huge_pages_are_named_as_the_kernel_names_them() {
        assert_eq!(
            (file_name(64), file_name(2048), file_name(1 << 20)),
            ("64KB".into(), "2MB".into(), "1GB".into())
        );
    }
}
