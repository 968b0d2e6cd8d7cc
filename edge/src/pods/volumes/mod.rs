//! A pod's volumes on the host: made before its containers, kept current while it runs, removed with it.
//!
//! Layout under the pod's directory: `volumes/kubernetes.io~<kind>/<name>`, and `volume-subpaths/` for bind mounts of
//! `subPath`. As root, Secrets, tokens and downward fields live on a tmpfs and `medium: Memory` is one; without root
//! they are plain directories of mode 0700 above (a process of the same user could read them anyway).
//!
//! What must hold: a volume that cannot be made holds its pod back with a reason and leaves what is there untouched;
//! [`remove`] never follows a link or crosses into a mount that it could not unmount.

mod atomic;
mod claim;
mod empty_dir;
mod hostpath;
mod owner;
mod projected;
mod subpath;
mod unsupported;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod, Volume, VolumeMount};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::env::Facts;
use super::plan::{inits, regulars};
use owner::FsGroup;

pub use empty_dir::VolumeUse;
pub(crate) use empty_dir::measure as measure_empty_dirs;
pub(crate) use subpath::{Subpath, prepare as prepare_subpath};
pub(crate) use unsupported::resource_claims;

/// Why a volume is not there: a Warning event, and the pod waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct VolumeError {
    /// The volume's name in the pod.
    pub(crate) volume: String,
    /// Where it failed, and why.
    pub(crate) failure: Failure,
}

/// The step of a kubelet's work at which a volume failed; each with its reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// It could not be made, filled or mounted.
    SetUp(String),
    /// What it names is not there.
    NewMounter(String),
    /// It belongs to another node.
    NodeAffinity(String),
    /// It could not be offered as a block device.
    MapVolume(String),
    /// It is not known yet what it stands for.
    Unprocessed(String),
}

impl VolumeError {
    /// Reason of the event.
    pub(crate) fn event(&self) -> &'static str {
        match self.failure {
            Failure::MapVolume(_) => "FailedMapVolume",
            _ => "FailedMount",
        }
    }
}

impl std::error::Error for VolumeError {}

impl fmt::Display for VolumeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.volume;
        match &self.failure {
            Failure::SetUp(why) => write!(f, "MountVolume.SetUp failed for volume \"{name}\" : {why}"),
            Failure::NewMounter(why) => {
                write!(
                    f,
                    "MountVolume.NewMounter initialization failed for volume \"{name}\" : {why}"
                )
            }
            Failure::NodeAffinity(why) => {
                write!(
                    f,
                    "MountVolume.NodeAffinity check failed for volume \"{name}\" : {why}"
                )
            }
            Failure::MapVolume(why) => {
                write!(f, "MapVolume.MapPodDevice failed for volume \"{name}\" : {why}")
            }
            Failure::Unprocessed(why) => write!(
                f,
                "Unable to attach or mount volumes: unmounted volumes=[{name}], unattached volumes=[], failed to \
                 process volumes=[{name}]: {why}"
            ),
        }
    }
}

/// The daemon runs with the powers to mount.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// The volumes that a pod's containers use. A volume that none uses is not made, and cannot hold the pod back.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Uses {
    /// As files.
    pub(crate) mounts: BTreeSet<String>,
    /// As devices.
    pub(crate) devices: BTreeSet<String>,
}

impl Uses {
    /// Reads them from a pod.
    pub(crate) fn of(pod: &Pod) -> Self {
        let mut uses = Self::default();
        for container in inits(pod).iter().chain(regulars(pod)) {
            uses.container(container);
        }
        let ephemeral = pod
            .spec
            .iter()
            .flat_map(|s| s.ephemeral_containers.iter().flatten());
        for mount in ephemeral.flat_map(|c| c.volume_mounts.iter().flatten()) {
            uses.mounts.insert(mount.name.clone());
        }
        uses
    }

    fn container(&mut self, container: &Container) {
        let mounts = container.volume_mounts.iter().flatten().map(|m| m.name.clone());
        let files = container
            .env
            .iter()
            .flatten()
            .filter_map(|e| e.value_from.as_ref()?.file_key_ref.as_ref())
            .map(|f| f.volume_name.clone());
        self.mounts.extend(mounts.chain(files));
        let devices = container.volume_devices.iter().flatten().map(|d| d.name.clone());
        self.devices.extend(devices);
    }

    /// Some container uses the volume.
    pub(crate) fn contains(&self, volume: &str) -> bool {
        self.mounts.contains(volume) || self.devices.contains(volume)
    }
}

/// The volumes of a pod that its containers use.
pub(crate) fn used<'a>(pod: &'a Pod, uses: &'a Uses) -> impl Iterator<Item = &'a Volume> {
    pod.spec
        .iter()
        .flat_map(|s| s.volumes.iter().flatten())
        .filter(|v| uses.contains(&v.name))
}

/// Makes or refreshes every volume that is used; answers host paths by volume name and what failed. An image has no
/// host path: its path is empty.
pub(crate) fn set_up(facts: &Facts<'_>, pod_dir: &Path) -> (BTreeMap<String, PathBuf>, Vec<VolumeError>) {
    let mut paths = BTreeMap::new();
    let mut errors = Vec::new();
    let uses = Uses::of(facts.pod);
    for volume in used(facts.pod, &uses) {
        match one(facts, volume, pod_dir, &uses) {
            Ok(path) => {
                paths.insert(volume.name.clone(), path);
            }
            Err(failure) => errors.push(VolumeError {
                volume: volume.name.clone(),
                failure,
            }),
        }
    }
    (paths, errors)
}

fn one(facts: &Facts<'_>, volume: &Volume, pod_dir: &Path, uses: &Uses) -> Result<PathBuf, Failure> {
    if let Some(source) = &volume.host_path {
        return hostpath::check(&source.path, source.type_.as_deref().unwrap_or_default())
            .map_err(Failure::SetUp);
    }
    if volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some() {
        return claim::set_up(facts, volume, pod_dir, uses);
    }
    if volume.image.is_some() {
        return Ok(PathBuf::new());
    }
    let Some(kind) = kind(volume) else {
        return Err(Failure::SetUp(unsupported::volume(volume)));
    };
    let path = pod_dir
        .join("volumes")
        .join(format!("kubernetes.io~{kind}"))
        .join(&volume.name);
    if let Some(source) = &volume.empty_dir {
        empty_dir::set_up(facts, source, &path).map_err(Failure::SetUp)?;
    } else if let Some(payload) = projected::payload(facts, volume) {
        project(facts.pod, volume, kind, &path, payload.map_err(Failure::SetUp)?)
            .map_err(|e| Failure::SetUp(format!("{}: {e}", path.display())))?;
    }
    Ok(path)
}

/// Writes the files of a volume whose content comes from API objects.
fn project(
    pod: &Pod,
    volume: &Volume,
    kind: &str,
    path: &Path,
    mut payload: atomic::Payload,
) -> io::Result<()> {
    let group = FsGroup::of(pod);
    if group.is_some() {
        for file in payload.values_mut() {
            file.mode |= 0o440;
        }
    }
    make_dir(path)?;
    if kind != "configmap" && is_root() {
        tmpfs(path, None)?;
    }
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    let nested = nested_mount_points(pod, &volume.name);
    let written = atomic::write(path, &payload, &nested, |fresh| {
        for (file, projected) in &payload {
            if let Some(owner) = projected.owner.filter(|_| is_root()) {
                chown(fresh.join(file), Some(owner), None)?;
            }
        }
        match group {
            Some(group) => group.apply(fresh, true),
            None => Ok(()),
        }
    })?;
    for place in nested {
        let place = path.join(place);
        if std::fs::symlink_metadata(&place).is_err() {
            make_dir(&place)?;
        }
    }
    if written && let Some(group) = group {
        FsGroup {
            on_root_mismatch: false,
            ..group
        }
        .apply(path, true)?;
    }
    Ok(())
}

/// Where other volumes are mounted inside this one: a container cannot make these places in a read-only mount.
fn nested_mount_points(pod: &Pod, volume: &str) -> BTreeSet<PathBuf> {
    let plain = |m: &VolumeMount| m.sub_path.is_none() && m.sub_path_expr.is_none();
    let mut found = BTreeSet::new();
    for container in inits(pod).iter().chain(regulars(pod)) {
        let mounts = container.volume_mounts.as_deref().unwrap_or_default();
        for outer in mounts.iter().filter(|m| m.name == volume && plain(m)) {
            for inner in mounts {
                let below = Path::new(&inner.mount_path).strip_prefix(&outer.mount_path);
                let Ok(below) = below else { continue };
                let inside = below
                    .components()
                    .all(|c| matches!(c, std::path::Component::Normal(_)));
                if inside && !below.as_os_str().is_empty() {
                    found.insert(below.to_owned());
                }
            }
        }
    }
    found
}

/// How a volume appears in a container, whatever the mount says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Attributes {
    /// Never writable.
    pub(crate) readonly: bool,
    /// Its files are this node's, to be given the container's SELinux label.
    pub(crate) managed: bool,
}

/// The attributes of a pod's volume by name.
pub(crate) fn attributes(pod: &Pod, name: &str) -> Attributes {
    let volume = pod
        .spec
        .iter()
        .flat_map(|s| s.volumes.iter().flatten())
        .find(|v| v.name == name);
    let Some(volume) = volume else {
        return Attributes::default();
    };
    let files = volume.config_map.is_some()
        || volume.secret.is_some()
        || volume.downward_api.is_some()
        || volume.projected.is_some();
    let claim = volume.persistent_volume_claim.as_ref();
    Attributes {
        readonly: files || volume.image.is_some() || claim.is_some_and(|c| c.read_only == Some(true)),
        managed: files || volume.empty_dir.is_some(),
    }
}

/// Name of the kind of a volume that this node makes, for its directory.
fn kind(volume: &Volume) -> Option<&'static str> {
    let known = [
        (volume.empty_dir.is_some(), "empty-dir"),
        (volume.config_map.is_some(), "configmap"),
        (volume.secret.is_some(), "secret"),
        (volume.downward_api.is_some(), "downward-api"),
        (volume.projected.is_some(), "projected"),
    ];
    known.iter().find(|(is, _)| *is).map(|(_, name)| *name)
}

fn make_dir(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
}

/// Binds a directory or file to a place of the pod's, with further mount flags, unless something is mounted there;
/// answers whether it did.
fn bind(source: &Path, target: &Path, flags: MsFlags) -> io::Result<bool> {
    if source.is_dir() {
        make_dir(target)?;
    } else {
        if let Some(parent) = target.parent() {
            make_dir(parent)?;
        }
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(target)?;
    }
    if mounts_below(target)?.iter().any(|place| place == target) {
        return Ok(false);
    }
    let none = None::<&str>;
    mount(
        Some(source),
        target,
        none,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        none,
    )?;
    if !flags.is_empty() {
        let remount = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | flags;
        if let Err(error) = mount(none, target, none, remount, none) {
            // Half a mount would be taken for a whole one at the next look.
            umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
            return Err(error.into());
        }
    }
    Ok(true)
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
    let mut below = mounts_below(pod_dir)?;
    below.sort_by_key(|path| std::cmp::Reverse(path.components().count()));
    for path in below {
        umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)?;
    }
    match std::fs::remove_dir_all(pod_dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let places = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|text| PathBuf::from(unescape(text)));
    Ok(places.filter(|path| path.starts_with(directory)).collect())
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
        let mounts: Vec<Value> = volumes
            .as_array()
            .unwrap()
            .iter()
            .map(|v| json!({"name": v["name"], "mountPath": format!("/{}", v["name"].as_str().unwrap())}))
            .collect();
        let pod = pod(json!({"containers": [{"name": "c", "volumeMounts": mounts}], "volumes": volumes}));
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
                "MountVolume.SetUp failed for volume \"w\" : configmap references non-existent config key: z",
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
        assert!(
            errors[0].to_string().contains("failed to fetch token"),
            "{errors:?}"
        );
    }

    #[test]
    fn a_kind_that_this_node_cannot_serve_is_named_with_a_remedy() {
        let (_dir, _, errors) = mounted(
            json!([{"name": "d", "nfs": {"server": "a", "path": "/b"}},
                {"name": "e", "csi": {"driver": "secrets.example"}}]),
            &Fixed(None),
        );
        let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
        assert!(
            texts[0].starts_with(
                "MountVolume.SetUp failed for volume \"d\" : volumes of type nfs are not supported"
            ),
            "{texts:?}"
        );
        assert!(
            texts[1].contains("type csi (driver secrets.example)"),
            "{texts:?}"
        );
    }

    #[test]
    fn a_volume_that_no_container_uses_holds_nothing_back() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(
            json!({"containers": [{"name": "c"}], "volumes": [{"name": "v", "configMap": {"name": "x"}}]}),
        );
        let facts = Facts {
            pod: &pod,
            host_ip: None,
            pod_ips: &[],
            objects: &Fixed(None),
        };
        let (paths, errors) = set_up(&facts, dir.path());
        assert!(paths.is_empty() && errors.is_empty());
    }

    #[test]
    fn a_place_for_a_mount_inside_a_projected_volume_is_made_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(json!({"containers": [{"name": "c", "volumeMounts": [
                {"name": "v", "mountPath": "/etc/app"}, {"name": "e", "mountPath": "/etc/app/cache/x"}]}],
            "volumes": [{"name": "v", "configMap": {"name": "m"}}, {"name": "e", "emptyDir": {}}]}));
        let facts = Facts {
            pod: &pod,
            host_ip: None,
            pod_ips: &[],
            objects: &Fixed(None),
        };
        for _ in 0..2 {
            let (paths, errors) = set_up(&facts, dir.path());
            assert_eq!(errors, []);
            assert!(paths["v"].join("cache/x").is_dir());
            assert!(paths["v"].join("k").exists());
            // What the object holds changes: the place stays.
            std::fs::remove_file(paths["v"].join("..data")).unwrap();
        }
        assert_eq!(
            attributes(&pod, "v"),
            Attributes {
                readonly: true,
                managed: true
            }
        );
        assert!(!attributes(&pod, "e").readonly);
        remove(dir.path()).unwrap();
    }

    #[test]
    fn a_token_is_for_its_user_alone_where_that_user_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let with = |context: Value| {
            let pod = pod(json!({"securityContext": context,
                "containers": [{"name": "c", "volumeMounts": [{"name": "api", "mountPath": "/a"}]}],
                "volumes": [{"name": "api", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}]}));
            let facts = Facts {
                pod: &pod,
                host_ip: None,
                pod_ips: &[],
                objects: &Fixed(Some("jwt")),
            };
            let place = dir.path().join(context.to_string().len().to_string());
            let (paths, errors) = set_up(&facts, &place);
            assert_eq!(errors, []);
            let metadata = std::fs::metadata(paths["api"].join("token")).unwrap();
            let found = (metadata.mode() & 0o777, metadata.uid(), metadata.gid());
            remove(&place).unwrap();
            found
        };
        if !is_root() {
            return;
        }
        assert_eq!(with(json!({})), (0o644, 0, 0));
        assert_eq!(with(json!({"runAsUser": 1000})), (0o600, 1000, 0));
        assert_eq!(with(json!({"fsGroup": 10_000})), (0o640, 0, 10_000));
        assert_eq!(
            with(json!({"runAsUser": 1000, "fsGroup": 10_000})),
            (0o640, 1000, 10_000)
        );
    }
}
