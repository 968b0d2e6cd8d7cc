//! A pod's volumes on the host: made before its containers, kept current while it runs, removed with it.
//!
//! Layout under the pod's directory: `volumes/kubernetes.io~<kind>/<name>`, and `volume-subpaths/` for bind mounts of
//! `subPath`. As root, Secrets, tokens and downward fields live on a tmpfs and `medium: Memory` is one; without root
//! they are plain directories of mode 0700 above (a process of the same user could read them anyway).
//!
//! What must hold: a volume that cannot be made holds its pod back with a reason and leaves what is there untouched;
//! [`remove`] never follows a link or crosses into a mount that it could not unmount.

mod atomic;
mod hostpath;
mod projected;
mod subpath;

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Pod, Volume};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::env::Facts;
use super::quantity;

pub(crate) use subpath::{Subpath, prepare as prepare_subpath};

/// Why a volume is not there: a Warning `FailedMount`, and the pod waits.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume \"{volume}\" : {reason}")]
pub(crate) struct VolumeError {
    /// The volume's name in the pod.
    pub(crate) volume: String,
    /// Why.
    pub(crate) reason: String,
}

/// The daemon runs with the powers to mount.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Makes or refreshes every volume; answers host paths by volume name and what failed.
pub(crate) fn set_up(facts: &Facts<'_>, pod_dir: &Path) -> (BTreeMap<String, PathBuf>, Vec<VolumeError>) {
    let mut paths = BTreeMap::new();
    let mut errors = Vec::new();
    for volume in facts.pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
        match one(facts, volume, pod_dir) {
            Ok(path) => {
                paths.insert(volume.name.clone(), path);
            }
            Err(reason) => errors.push(VolumeError {
                volume: volume.name.clone(),
                reason,
            }),
        }
    }
    (paths, errors)
}

fn one(facts: &Facts<'_>, volume: &Volume, pod_dir: &Path) -> Result<PathBuf, String> {
    if let Some(source) = &volume.host_path {
        return hostpath::check(&source.path, source.type_.as_deref().unwrap_or_default());
    }
    let kind = kind(volume);
    let path = pod_dir
        .join("volumes")
        .join(format!("kubernetes.io~{kind}"))
        .join(&volume.name);
    let words = |e: io::Error| format!("{}: {e}", path.display());
    let fs_group = fs_group(facts.pod);
    if let Some(source) = &volume.empty_dir {
        let medium = source.medium.as_deref().unwrap_or_default();
        if !matches!(medium, "" | "Memory") {
            return Err(format!("emptyDir medium {medium} is not supported by this node"));
        }
        let mut fresh = !path.exists();
        make_dir(&path).map_err(words)?;
        if medium == "Memory" && is_root() {
            fresh |= tmpfs(&path, source.size_limit.as_ref().and_then(quantity::value)).map_err(words)?;
        }
        if fresh {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).map_err(words)?;
            own(&path, fs_group).map_err(words)?;
        }
        return Ok(path);
    }
    match projected::payload(facts, volume) {
        Some(payload) => {
            let mut payload = payload?;
            if fs_group.is_some() {
                for file in payload.values_mut() {
                    file.mode |= 0o040;
                }
            }
            make_dir(&path).map_err(words)?;
            if kind != "configmap" && is_root() {
                tmpfs(&path, None).map_err(words)?;
            }
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).map_err(words)?;
            atomic::write(&path, &payload, |fresh| own(fresh, fs_group)).map_err(words)?;
            Ok(path)
        }
        None => Err(format!("volumes of kind {kind} are not supported by this node")),
    }
}

/// Name of the volume's kind, for its directory and for messages.
fn kind(volume: &Volume) -> String {
    let known = [
        (volume.empty_dir.is_some(), "empty-dir"),
        (volume.config_map.is_some(), "configmap"),
        (volume.secret.is_some(), "secret"),
        (volume.downward_api.is_some(), "downward-api"),
        (volume.projected.is_some(), "projected"),
    ];
    if let Some((_, name)) = known.iter().find(|(is, _)| *is) {
        return (*name).to_owned();
    }
    // Whatever it is, its field name says it.
    let json = serde_json::to_value(volume).unwrap_or_default();
    let field = json
        .as_object()
        .and_then(|o| o.keys().find(|k| *k != "name").cloned());
    field.unwrap_or_else(|| "unknown".to_owned())
}

fn fs_group(pod: &Pod) -> Option<u32> {
    let group = pod.spec.as_ref()?.security_context.as_ref()?.fs_group?;
    u32::try_from(group).ok()
}

fn make_dir(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
}

/// Gives a tree to the pod's `fsGroup`: setgid directories, group may read and write.
fn own(path: &Path, group: Option<u32>) -> io::Result<()> {
    let Some(group) = group.filter(|_| is_root()) else {
        return Ok(());
    };
    let metadata = std::fs::symlink_metadata(path)?;
    if metadata.is_symlink() {
        return Ok(());
    }
    chown(path, None, Some(group))?;
    let mode = metadata.permissions().mode();
    if metadata.is_dir() {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode | 0o2070))?;
        for entry in std::fs::read_dir(path)? {
            own(&entry?.path(), Some(group))?;
        }
    } else {
        // chown clears nothing of a file's mode that the reader needs, group read included.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode | 0o040))?;
    }
    Ok(())
}

/// Something is mounted at a path.
fn is_mount_point(path: &Path) -> bool {
    let device = |p: &Path| std::fs::symlink_metadata(p).map(|m| m.dev()).ok();
    path.parent()
        .is_some_and(|parent| device(path).is_some() && device(path) != device(parent))
}

/// Mounts a tmpfs unless something is mounted there; answers whether it did.
fn tmpfs(path: &Path, size: Option<i64>) -> io::Result<bool> {
    if is_mount_point(path) {
        return Ok(false);
    }
    let options = match size {
        Some(bytes) if bytes > 0 => format!("size={bytes}"),
        _ => "mode=0755".to_owned(),
    };
    mount(
        Some("tmpfs"),
        path,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(options.as_str()),
    )?;
    Ok(true)
}

/// Unmounts everything below a pod's directory, then removes the directory.
pub(crate) fn remove(pod_dir: &Path) -> io::Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut below: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|text| PathBuf::from(unescape(text)))
        .filter(|path| path.starts_with(pod_dir))
        .collect();
    below.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    for path in below {
        umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    match std::fs::remove_dir_all(pod_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Reads the octal escapes of mountinfo.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{UID, pod};
    use super::super::objects::Objects;
    use super::*;
    use k8s_openapi::api::core::v1::{ConfigMap, Node, Secret, Service};
    use serde_json::{Value, json};

    struct Fixed(Option<&'static str>);

    impl Objects for Fixed {
        fn config_map(&self, _: &str, name: &str) -> Option<ConfigMap> {
            (name == "m").then(|| serde_json::from_value(json!({"data": {"k": "v", "l": "w"}})).unwrap())
        }
        fn secret(&self, _: &str, _: &str) -> Option<Secret> {
            None
        }
        fn services(&self) -> Vec<Service> {
            Vec::new()
        }
        fn node(&self) -> Option<Node> {
            None
        }
        fn token(&self, key: &str) -> Option<String> {
            assert_eq!(key, format!("{UID}/api/token"));
            self.0.map(str::to_owned)
        }
    }

    fn mounted(
        volumes: Value,
        objects: &Fixed,
    ) -> (tempfile::TempDir, BTreeMap<String, PathBuf>, Vec<VolumeError>) {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(json!({"containers": [], "volumes": volumes}));
        let facts = Facts {
            pod: &pod,
            host_ip: None,
            pod_ips: &[],
            objects,
        };
        let pod_dir = dir.path().join("pod");
        let (paths, errors) = set_up(&facts, &pod_dir);
        (dir, paths, errors)
    }

    #[test]
    fn a_config_map_becomes_files_and_leaves_with_the_pod() {
        let (dir, paths, errors) = mounted(
            json!([{"name": "v", "configMap": {"name": "m", "items": [{"key": "k", "path": "a/b"}]}},
                   {"name": "e", "emptyDir": {}}]),
            &Fixed(None),
        );
        assert_eq!(errors, []);
        assert_eq!(std::fs::read_to_string(paths["v"].join("a/b")).unwrap(), "v");
        assert_eq!(
            std::fs::metadata(&paths["e"]).unwrap().permissions().mode() & 0o777,
            0o777
        );
        remove(&dir.path().join("pod")).unwrap();
        assert!(!dir.path().join("pod").exists());
    }

    #[test]
    fn a_missing_object_or_key_is_named() {
        let (_dir, _, errors) = mounted(
            json!([{"name": "v", "configMap": {"name": "x"}},
                {"name": "w", "configMap": {"name": "m", "items": [{"key": "z", "path": "z"}]}},
                {"name": "o", "configMap": {"name": "x", "optional": true}}]),
            &Fixed(None),
        );
        let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "MountVolume.SetUp failed for volume \"v\" : configmap \"x\" not found",
                "MountVolume.SetUp failed for volume \"w\" : configmap references non-existent configmap key: z",
            ]
        );
    }

    #[test]
    fn a_token_is_projected_beside_the_namespace_and_waited_for_when_missing() {
        let volumes = json!([{"name": "api", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token"}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}}]}}]);
        let (dir, paths, errors) = mounted(volumes.clone(), &Fixed(Some("jwt")));
        assert_eq!(errors, []);
        assert_eq!(
            std::fs::read_to_string(paths["api"].join("token")).unwrap(),
            "jwt"
        );
        assert_eq!(
            std::fs::read_to_string(paths["api"].join("namespace")).unwrap(),
            "default"
        );
        remove(&dir.path().join("pod")).unwrap();
        let (_dir, _, errors) = mounted(volumes, &Fixed(None));
        assert!(errors[0].reason.contains("failed to fetch token"), "{errors:?}");
    }

    #[test]
    fn a_kind_that_this_node_cannot_serve_is_named() {
        let (_dir, _, errors) = mounted(
            json!([{"name": "d", "persistentVolumeClaim": {"claimName": "x"}}]),
            &Fixed(None),
        );
        assert_eq!(
            errors[0].reason,
            "volumes of kind persistentVolumeClaim are not supported by this node"
        );
    }
}
