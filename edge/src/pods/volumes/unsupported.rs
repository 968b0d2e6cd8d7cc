//! What this node does not mount, in words that name it and the remedy.

use k8s_openapi::api::core::v1::{Pod, Volume, VolumeProjection};

/// Why a volume's kind is refused.
pub(super) fn volume(volume: &Volume) -> String {
    // Whatever it is, its field name says it.
    let json = serde_json::to_value(volume).unwrap_or_default();
    let kind = json
        .as_object()
        .and_then(|o| o.keys().find(|k| *k != "name").cloned())
        .unwrap_or_else(|| "unknown".to_owned());
    let driver = volume.csi.as_ref().map(|c| c.driver.as_str());
    let driver = driver.map(|d| format!(" (driver {d})")).unwrap_or_default();
    format!(
        "volumes of type {kind}{driver} are not supported by this node: use a hostPath, an emptyDir, or a claim of a \
         local PersistentVolume"
    )
}

/// Why a source of a projected volume is refused.
pub(super) fn projection(source: &VolumeProjection) -> String {
    if let Some(bundle) = &source.cluster_trust_bundle {
        return format!(
            "the projection of ClusterTrustBundle {} is not supported by this node: put the certificates into a \
             ConfigMap",
            bundle
                .name
                .as_deref()
                .or(bundle.signer_name.as_deref())
                .unwrap_or_default()
        );
    }
    "the projection of a podCertificate is not supported by this node: put the certificate into a Secret"
        .to_owned()
}

/// Why a pod with claims of devices is refused; `None` when it has none.
pub(crate) fn resource_claims(pod: &Pod) -> Option<String> {
    let claims = pod.spec.as_ref()?.resource_claims.as_deref()?;
    let names: Vec<&str> = claims.iter().map(|c| c.name.as_str()).collect();
    (!names.is_empty()).then(|| {
        format!(
            "Failed to prepare dynamic resources: resource claims [{}] need a driver, and this node runs none: remove \
             spec.resourceClaims, or reach the device through a hostPath",
            names.join(" ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::super::fixtures::pod;
    use super::*;
    use serde_json::json;

    #[test]
    fn claims_of_devices_are_refused_by_name() {
        let asks = pod(json!({"containers": [], "resourceClaims": [{"name": "gpu"}]}));
        assert!(resource_claims(&asks).unwrap().contains("[gpu]"));
        assert_eq!(resource_claims(&pod(json!({"containers": []}))), None);
    }

    #[test]
    fn a_trust_bundle_is_refused_by_name() {
        let source: VolumeProjection =
            serde_json::from_value(json!({"clusterTrustBundle": {"name": "roots", "path": "ca.pem"}}))
                .unwrap();
        assert!(projection(&source).contains("ClusterTrustBundle roots"));
    }
}
