//! Pods that use more local storage than they may, whatever room there is. Source: kubelet, local storage eviction.

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::stats::{FsStats, PodStats};

use super::rank::Layout;
use crate::pods::{limits, quantity};

const RESOURCE: &str = "ephemeral-storage";

/// What a pod exceeds, as its status will say; `None` when it keeps to its limits.
pub(super) fn exceeded(pod: &Pod, stats: &PodStats, layout: Layout) -> Option<String> {
    empty_dir(pod, stats)
        .or_else(|| whole_pod(pod, stats))
        .or_else(|| container(pod, stats, layout))
}

fn empty_dir(pod: &Pod, stats: &PodStats) -> Option<String> {
    let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
    volumes.into_iter().find_map(|volume| {
        let limit = volume.empty_dir.as_ref()?.size_limit.as_ref()?;
        let most = quantity::value(limit).filter(|most| *most > 0)?;
        let used = stats
            .volumes
            .iter()
            .find(|v| v.name == volume.name)?
            .fs
            .used_bytes?;
        (i128::from(used) > i128::from(most)).then(|| {
            format!(
                "Usage of EmptyDir volume \"{}\" exceeds the limit \"{}\". ",
                volume.name, limit.0
            )
        })
    })
}

fn whole_pod(pod: &Pod, stats: &PodStats) -> Option<String> {
    let limits = limits(pod);
    let limit = limits.get(RESOURCE)?;
    let used = stats.ephemeral_storage.as_ref()?.used_bytes?;
    let text = crate::pods::to_quantities(&limits).remove(RESOURCE)?;
    (i128::from(used) > limit.value()).then(|| {
        format!(
            "Pod ephemeral local storage usage exceeds the total limit of containers {}. ",
            text.0
        )
    })
}

fn container(pod: &Pod, stats: &PodStats, layout: Layout) -> Option<String> {
    let bytes = |fs: Option<&FsStats>| fs.and_then(|fs| fs.used_bytes).unwrap_or(0);
    pod.spec.as_ref()?.containers.iter().find_map(|container| {
        let limit = container.resources.as_ref()?.limits.as_ref()?.get(RESOURCE)?;
        let most = quantity::value(limit).filter(|most| *most > 0)?;
        let found = stats.containers.iter().find(|c| c.name == container.name)?;
        let layer = match layout {
            Layout::Shared => bytes(found.rootfs.as_ref()),
            Layout::Dedicated => 0,
        };
        let used = bytes(found.logs.as_ref()) + layer;
        (i128::from(used) > i128::from(most)).then(|| {
            format!(
                "Container {} exceeded its local ephemeral storage limit \"{}\". ",
                container.name, limit.0
            )
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use skerry_proto::stats::{ContainerStats, VolumeStats};

    fn fs(bytes: u64) -> FsStats {
        FsStats {
            used_bytes: Some(bytes),
            ..FsStats::default()
        }
    }

    #[test]
    fn each_kind_of_limit_is_seen_and_named() {
        let pod: Pod = serde_json::from_value(json!({"spec": {
            "containers": [{"name": "c", "resources": {"limits": {"ephemeral-storage": "1Mi"}}}],
            "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Ki"}}, {"name": "w", "emptyDir": {}}]}}))
        .unwrap();
        let stats = |volume, container, all| PodStats {
            volumes: vec![
                VolumeStats {
                    name: "v".into(),
                    fs: fs(volume),
                },
                VolumeStats {
                    name: "w".into(),
                    fs: fs(1 << 40),
                },
            ],
            containers: vec![ContainerStats {
                name: "c".into(),
                logs: Some(fs(10)),
                rootfs: Some(fs(container)),
                ..ContainerStats::default()
            }],
            ephemeral_storage: Some(fs(all)),
            ..PodStats::default()
        };
        let said = |volume, container, all, layout| exceeded(&pod, &stats(volume, container, all), layout);
        assert_eq!(said(1024, 0, 0, Layout::Shared), None);
        assert_eq!(
            said(1025, 0, 0, Layout::Shared).unwrap(),
            "Usage of EmptyDir volume \"v\" exceeds the limit \"1Ki\". "
        );
        assert_eq!(
            said(0, 0, (1 << 20) + 1, Layout::Shared).unwrap(),
            "Pod ephemeral local storage usage exceeds the total limit of containers 1Mi. "
        );
        assert_eq!(
            said(0, 1 << 20, 0, Layout::Shared).unwrap(),
            "Container c exceeded its local ephemeral storage limit \"1Mi\". "
        );
        assert_eq!(said(0, 1 << 20, 0, Layout::Dedicated), None);
    }
}
