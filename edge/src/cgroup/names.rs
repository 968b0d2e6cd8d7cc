//! Where a pod's cgroup is, in the words of either driver.

use skerry_proto::object::Uid;

/// Who makes cgroups: the runtime says which, and both sides must agree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Driver {
    /// Whoever needs one, as a directory.
    #[default]
    Cgroupfs,
    /// systemd, as a slice or scope.
    Systemd,
}

/// The level of the tree that a pod is on, by its quality of service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// Directly below `kubepods`.
    Guaranteed,
    /// Below `burstable`.
    Burstable,
    /// Below `besteffort`.
    BestEffort,
}

impl Tier {
    /// Names from the root down.
    fn parts(self) -> &'static [&'static str] {
        match self {
            Self::Guaranteed => &["kubepods"],
            Self::Burstable => &["kubepods", "burstable"],
            Self::BestEffort => &["kubepods", "besteffort"],
        }
    }

    /// The tier's own cgroup.
    pub(super) fn path(self, driver: Driver) -> String {
        path(driver, self.parts().iter().map(|p| (*p).to_owned()).collect())
    }
}

/// One pod's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodCgroup {
    /// The pod.
    pub uid: Uid,
    /// Its level.
    pub tier: Tier,
}

impl PodCgroup {
    /// The directory relative to a hierarchy's root, without a leading slash.
    pub(super) fn path(&self, driver: Driver) -> String {
        let mut parts: Vec<String> = self.tier.parts().iter().map(|p| (*p).to_owned()).collect();
        parts.push(format!("pod{}", self.uid));
        path(driver, parts)
    }

    /// The parent of the containers' cgroups as a CRI runtime wants it: a path, or a slice's name.
    pub fn parent(&self, driver: Driver) -> String {
        let path = self.path(driver);
        match driver {
            Driver::Cgroupfs => format!("/{path}"),
            Driver::Systemd => slice_of(&path).to_owned(),
        }
    }
}

/// The last part of a path: what systemd calls the slice.
pub(super) fn slice_of(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

/// With systemd every level repeats the names above it, joined by dashes; a dash within a name becomes `_`.
fn path(driver: Driver, parts: Vec<String>) -> String {
    match driver {
        Driver::Cgroupfs => parts.join("/"),
        Driver::Systemd => {
            let escaped: Vec<String> = parts.iter().map(|p| p.replace('-', "_")).collect();
            let levels = (1..=escaped.len()).map(|end| format!("{}.slice", escaped[..end].join("-")));
            levels.collect::<Vec<_>>().join("/")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(tier: Tier) -> PodCgroup {
        PodCgroup {
            uid: Uid::from("1-2"),
            tier,
        }
    }

    #[test]
    fn cgroupfs_names_are_directories() {
        assert_eq!(pod(Tier::Guaranteed).parent(Driver::Cgroupfs), "/kubepods/pod1-2");
        assert_eq!(
            pod(Tier::Burstable).parent(Driver::Cgroupfs),
            "/kubepods/burstable/pod1-2"
        );
    }

    #[test]
    fn systemd_names_are_slices_that_repeat_their_parents() {
        let best = pod(Tier::BestEffort);
        assert_eq!(best.parent(Driver::Systemd), "kubepods-besteffort-pod1_2.slice");
        assert_eq!(
            best.path(Driver::Systemd),
            "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice"
        );
        assert_eq!(Tier::Guaranteed.path(Driver::Systemd), "kubepods.slice");
    }
}
