//! Ownership of a volume's files by the pod's `fsGroup`.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::Path;

use k8s_openapi::api::core::v1::Pod;

use super::is_root;

/// What the pod's `fsGroup` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FsGroup {
    /// The group.
    pub(super) id: u32,
    /// `fsGroupChangePolicy: OnRootMismatch`: a root that fits is taken for the whole.
    pub(super) on_root_mismatch: bool,
}

impl FsGroup {
    /// Reads it from a pod; `None` when it asks for none, or when the daemon may not change owners.
    pub(super) fn of(pod: &Pod) -> Option<Self> {
        let context = pod.spec.as_ref()?.security_context.as_ref()?;
        let id = u32::try_from(context.fs_group?).ok()?;
        is_root().then_some(Self {
            id,
            on_root_mismatch: context.fs_group_change_policy.as_deref() == Some("OnRootMismatch"),
        })
    }

    /// Gives the tree at `path` to the group, unless its root fits and that is enough.
    pub(super) fn apply(self, path: &Path, readonly: bool) -> io::Result<()> {
        if self.on_root_mismatch && self.fits(path, readonly)? {
            return Ok(());
        }
        self.walk(path, readonly)
    }

    fn fits(self, root: &Path, readonly: bool) -> io::Result<bool> {
        let metadata = std::fs::metadata(root)?;
        let wanted = bits(true, readonly);
        Ok(metadata.is_dir() && metadata.gid() == self.id && metadata.mode() & wanted == wanted)
    }

    /// The root last, so that an interrupted walk is seen as one.
    fn walk(self, path: &Path, readonly: bool) -> io::Result<()> {
        let metadata = std::fs::symlink_metadata(path)?;
        if metadata.is_dir() {
            for entry in std::fs::read_dir(path)? {
                self.walk(&entry?.path(), readonly)?;
            }
        }
        lchown(path, None, Some(self.id))?;
        if metadata.is_symlink() {
            return Ok(());
        }
        let mode = metadata.mode() & 0o7777 | bits(metadata.is_dir(), readonly);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
    }
}

/// Mode bits that a group needs: it reads, writes unless it may not, enters directories, and new files are its own.
fn bits(directory: bool, readonly: bool) -> u32 {
    let file = if readonly { 0o440 } else { 0o660 };
    if directory { file | 0o2110 } else { file }
}

/// The user of all of the pod's containers, when they are known to have one and the same.
pub(super) fn single_user(pod: &Pod) -> Option<u32> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref().and_then(|c| c.run_as_user);
    let mut users = spec
        .init_containers
        .iter()
        .flatten()
        .chain(&spec.containers)
        .map(|c| c.security_context.as_ref().and_then(|c| c.run_as_user).or(of_pod));
    let first = users.next()??;
    users
        .all(|user| user == Some(first))
        .then(|| u32::try_from(first).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::super::super::fixtures::pod;
    use super::*;
    use serde_json::json;

    #[test]
    fn one_user_is_known_only_when_every_container_has_it() {
        let with = |a: i64, b: Option<i64>| {
            single_user(&pod(json!({"containers": [
                {"name": "a", "securityContext": {"runAsUser": a}},
                {"name": "b", "securityContext": {"runAsUser": b}}]})))
        };
        assert_eq!(with(7, Some(7)), Some(7));
        assert_eq!(with(7, Some(8)), None);
        assert_eq!(with(7, None), None);
        assert_eq!(
            single_user(&pod(
                json!({"securityContext": {"runAsUser": 5}, "containers": [{"name": "a"}]})
            )),
            Some(5)
        );
    }

    #[test]
    fn a_root_that_fits_spares_the_walk() {
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let mut group = FsGroup {
            id: 4321,
            on_root_mismatch: true,
        };
        group.apply(dir.path(), false).unwrap();
        let metadata = std::fs::metadata(&file).unwrap();
        assert_eq!((metadata.gid(), metadata.mode() & 0o660), (4321, 0o660));
        assert_eq!(std::fs::metadata(dir.path()).unwrap().mode() & 0o2770, 0o2770);
        lchown(&file, None, Some(1)).unwrap();
        group.apply(dir.path(), false).unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().gid(), 1);
        group.on_root_mismatch = false;
        group.apply(dir.path(), false).unwrap();
        assert_eq!(std::fs::metadata(&file).unwrap().gid(), 4321);
    }
}
