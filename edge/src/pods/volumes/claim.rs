//! PersistentVolumes that are on the site itself: `local` and `hostPath`, reached through a claim.
//!
//! The claim and the volume that it is bound to come with the pod. What a volume of another kind would need (an
//! attacher, a CSI driver) is not on this node: it is refused by its kind.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{
    NodeSelectorRequirement, NodeSelectorTerm, PersistentVolume, PersistentVolumeClaim, Volume,
};
use nix::mount::MsFlags;

use super::owner::FsGroup;
use super::{Failure, Uses, bind, hostpath, is_root};
use crate::pods::env::Facts;

/// The claim that a volume of a pod names, and whether the pod may only read.
pub(super) fn named(volume: &Volume, pod_name: &str) -> Option<(String, bool)> {
    if let Some(source) = &volume.persistent_volume_claim {
        return Some((source.claim_name.clone(), source.read_only.unwrap_or(false)));
    }
    volume
        .ephemeral
        .as_ref()
        .map(|_| (format!("{pod_name}-{}", volume.name), false))
}

/// Makes the volume behind a claim available; answers its host path, a device where the claim asks for a block volume.
pub(super) fn set_up(
    facts: &Facts<'_>,
    volume: &Volume,
    pod_dir: &Path,
    uses: &Uses,
) -> Result<PathBuf, Failure> {
    let metadata = &facts.pod.metadata;
    let namespace = metadata.namespace.as_deref().unwrap_or_default();
    let (claim_name, readonly) =
        named(volume, metadata.name.as_deref().unwrap_or_default()).unwrap_or_default();
    let refused =
        |why: String| Failure::Unprocessed(format!("error processing PVC {namespace}/{claim_name}: {why}"));
    let claim = facts.objects.claim(namespace, &claim_name).ok_or_else(|| {
        refused(format!(
            "failed to fetch PVC from API server: persistentvolumeclaims \"{claim_name}\" not found"
        ))
    })?;
    if volume.ephemeral.is_some() && !is_owned_by(&claim, metadata.uid.as_deref().unwrap_or_default()) {
        return Err(Failure::Unprocessed(format!(
            "PVC {namespace}/{claim_name} was not created for pod {namespace}/{} (pod is not owner)",
            metadata.name.as_deref().unwrap_or_default()
        )));
    }
    let bound = bound_volume(facts, &claim).map_err(refused)?;
    let spec = bound.spec.clone().unwrap_or_default();
    let mode = spec.volume_mode.as_deref().unwrap_or("Filesystem");
    for (used, wanted, field) in [
        (uses.mounts.contains(&volume.name), "Filesystem", "volumeMounts"),
        (uses.devices.contains(&volume.name), "Block", "volumeDevices"),
    ] {
        if used && mode != wanted {
            return Err(Failure::Unprocessed(format!(
                "volume {} has volumeMode {mode}, but is specified in {field}",
                volume.name
            )));
        }
    }
    check_affinity(facts, &bound)?;
    let pv_name = bound.metadata.name.as_deref().unwrap_or_default();
    if let Some(source) = &spec.host_path {
        let path = hostpath::check(&source.path, source.type_.as_deref().unwrap_or_default())
            .map_err(Failure::SetUp)?;
        return if mode == "Block" { device(path) } else { Ok(path) };
    }
    let Some(local) = &spec.local else {
        return Err(Failure::SetUp(unsupported(&bound)));
    };
    let source = hostpath::plain(&local.path).map_err(Failure::NewMounter)?;
    if !source.exists() {
        return Err(Failure::NewMounter(format!(
            "path \"{}\" does not exist",
            local.path
        )));
    }
    if mode == "Block" {
        return device(source);
    }
    if std::fs::metadata(&source).is_ok_and(|m| m.file_type().is_block_device()) {
        return Err(Failure::SetUp(format!(
            "the local volume {pv_name} is a block device without a mounted file system: mount {} on the node and \
             name the mount point in the PersistentVolume, or use volumeMode Block",
            local.path
        )));
    }
    if !is_root() {
        return Ok(source);
    }
    let target = pod_dir.join("volumes/kubernetes.io~local-volume").join(pv_name);
    let flags =
        mount_flags(spec.mount_options.as_deref().unwrap_or_default(), readonly).map_err(Failure::SetUp)?;
    let fresh =
        bind(&source, &target, flags).map_err(|e| Failure::SetUp(format!("{}: {e}", source.display())))?;
    if fresh
        && !readonly
        && let Some(group) = FsGroup::of(facts.pod)
    {
        group
            .apply(&target, false)
            .map_err(|e| Failure::SetUp(format!("applyFSGroup failed for vol {pv_name}: {e}")))?;
    }
    Ok(target)
}

fn is_owned_by(claim: &PersistentVolumeClaim, pod_uid: &str) -> bool {
    let owners = claim.metadata.owner_references.iter().flatten();
    owners
        .filter(|owner| owner.controller == Some(true))
        .any(|owner| owner.uid == pod_uid)
}

/// The volume that a claim is bound to, or why it is not.
fn bound_volume(facts: &Facts<'_>, claim: &PersistentVolumeClaim) -> Result<PersistentVolume, String> {
    let metadata = &claim.metadata;
    let protected = metadata
        .finalizers
        .iter()
        .flatten()
        .any(|f| f == "kubernetes.io/pvc-protection");
    if metadata.deletion_timestamp.is_some() && !protected {
        return Err("PVC is being deleted".to_owned());
    }
    // The claim's phase is not news on the link; this annotation says the same and is.
    let bound = metadata
        .annotations
        .iter()
        .flatten()
        .any(|(key, value)| key == "pv.kubernetes.io/bind-completed" && value == "yes");
    let name = claim.spec.as_ref().and_then(|s| s.volume_name.clone());
    let Some(name) = name.filter(|n| bound && !n.is_empty()) else {
        return Err("PVC is not bound".to_owned());
    };
    let volume = facts.objects.persistent_volume(&name).ok_or_else(|| {
        format!("failed to fetch PV {name} from API server: persistentvolumes \"{name}\" not found")
    })?;
    let reference = volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref()).ok_or_else(|| {
        format!(
            "found PV object {name} but it has a nil pv.Spec.ClaimRef indicating it is not yet bound to the claim"
        )
    })?;
    if reference.uid != metadata.uid {
        return Err(format!(
            "found PV object {name} but its pv.Spec.ClaimRef.UID {} does not point to claim.UID {}",
            reference.uid.as_deref().unwrap_or_default(),
            metadata.uid.as_deref().unwrap_or_default()
        ));
    }
    Ok(volume)
}

fn device(path: PathBuf) -> Result<PathBuf, Failure> {
    let is_block = std::fs::metadata(&path).is_ok_and(|m| m.file_type().is_block_device());
    if is_block {
        Ok(path)
    } else {
        Err(Failure::MapVolume(format!(
            "{} is not a block device",
            path.display()
        )))
    }
}

/// Names the volume's kind and what can be done instead.
fn unsupported(volume: &PersistentVolume) -> String {
    let json = serde_json::to_value(&volume.spec).unwrap_or_default();
    let common = [
        "accessModes",
        "capacity",
        "claimRef",
        "mountOptions",
        "nodeAffinity",
        "persistentVolumeReclaimPolicy",
        "storageClassName",
        "volumeAttributesClassName",
        "volumeMode",
    ];
    let kind = json
        .as_object()
        .and_then(|o| o.keys().find(|k| !common.contains(&k.as_str())).cloned())
        .unwrap_or_else(|| "unknown".to_owned());
    let driver = volume
        .spec
        .as_ref()
        .and_then(|s| s.csi.as_ref())
        .map(|c| c.driver.as_str());
    let driver = driver.map(|d| format!(" (driver {d})")).unwrap_or_default();
    format!(
        "PersistentVolume {} is of type {kind}{driver}, which this node does not support: use a local or hostPath \
         PersistentVolume of this site",
        volume.metadata.name.as_deref().unwrap_or_default()
    )
}

/// Flags of a bind mount from a volume's mount options.
fn mount_flags(options: &[String], readonly: bool) -> Result<MsFlags, String> {
    let mut flags = MsFlags::empty();
    flags.set(MsFlags::MS_RDONLY, readonly);
    for option in options.iter().flat_map(|o| o.split(',')) {
        flags |= match option {
            "ro" => MsFlags::MS_RDONLY,
            "noexec" => MsFlags::MS_NOEXEC,
            "nosuid" => MsFlags::MS_NOSUID,
            "nodev" => MsFlags::MS_NODEV,
            "noatime" => MsFlags::MS_NOATIME,
            "rw" | "bind" | "defaults" | "" => MsFlags::empty(),
            other => {
                return Err(format!(
                    "the mount option {other} is not supported for local volumes: use ro, noexec, nosuid, nodev or \
                     noatime"
                ));
            }
        };
    }
    Ok(flags)
}

/// A volume that belongs to another node must not be taken for one of this.
fn check_affinity(facts: &Facts<'_>, volume: &PersistentVolume) -> Result<(), Failure> {
    let affinity = volume.spec.as_ref().and_then(|s| s.node_affinity.as_ref());
    let Some(required) = affinity.and_then(|a| a.required.as_ref()) else {
        return Ok(());
    };
    let labels = facts
        .objects
        .node()
        .and_then(|n| n.metadata.labels)
        .unwrap_or_default();
    if required
        .node_selector_terms
        .iter()
        .any(|term| term_matches(term, &labels))
    {
        return Ok(());
    }
    Err(Failure::NodeAffinity("no matching NodeSelectorTerms".to_owned()))
}

fn term_matches(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>) -> bool {
    // A term without requirements matches nothing, and the fields of a node are not told to volumes.
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    !expressions.is_empty()
        && term.match_fields.as_deref().unwrap_or_default().is_empty()
        && expressions.iter().all(|r| requirement_matches(r, labels))
}

fn requirement_matches(requirement: &NodeSelectorRequirement, labels: &BTreeMap<String, String>) -> bool {
    let value = labels.get(&requirement.key);
    let values = requirement.values.as_deref().unwrap_or_default();
    let numbers = || {
        let own = value?.parse::<i64>().ok()?;
        let bound = values.first()?.parse::<i64>().ok()?;
        Some((own, bound))
    };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|v| values.contains(v)),
        "NotIn" => value.is_none_or(|v| !values.contains(v)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => numbers().is_some_and(|(own, bound)| own > bound),
        "Lt" => numbers().is_some_and(|(own, bound)| own < bound),
        _ => false,
    }
}

#[cfg(test)]
#[path = "claim_tests.rs"]
mod tests;
