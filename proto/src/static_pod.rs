//! Static pods and their mirrors: what both sides must agree on.
//!
//! A static pod comes from a file of the site and needs no cloud. Its *mirror* is the Pod in the API that shows it;
//! the two have different UIDs, and the annotation [`MIRROR`] of the mirror carries the static pod's.

use serde_json::Value;

/// Annotation of a mirror: hash of the static pod that it shows, which is also that pod's UID.
pub const MIRROR: &str = "kubernetes.io/config.mirror";
/// Annotation of a static pod and its mirror: hash of the pod.
pub const HASH: &str = "kubernetes.io/config.hash";
/// Annotation of a static pod and its mirror: when the node read the file.
pub const SEEN: &str = "kubernetes.io/config.seen";
/// Annotation of a static pod and its mirror: where it comes from, `file`.
pub const SOURCE: &str = "kubernetes.io/config.source";

/// Volume types that need nothing of the API.
const VOLUMES: [&str; 6] = ["emptyDir", "hostPath", "downwardAPI", "projected", "image", "nfs"];

/// Hash of the static pod that a Pod mirrors; `None` when it is no mirror.
pub fn mirrored(pod: &Value) -> Option<&str> {
    pod["metadata"]["annotations"][MIRROR].as_str()
}

/// What of the API a pod refers to, which a static pod may not: nobody checks at the site whether it may, and without
/// the cloud it is not to be had.
///
/// The edge refuses such a file; the provider refuses such a mirror, or a site could ask for any Secret.
pub fn forbidden_reference(pod: &Value) -> Option<String> {
    let spec = &pod["spec"];
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let named = |value: &Value| value.as_str().is_some_and(|name| !name.is_empty());
    if named(&spec["serviceAccountName"]) || named(&spec["serviceAccount"]) {
        return Some("serviceaccounts".to_owned());
    }
    if !list(&spec["imagePullSecrets"]).is_empty() {
        return Some("secrets (imagePullSecrets)".to_owned());
    }
    if !list(&spec["resourceClaims"]).is_empty() {
        return Some("resourceclaims".to_owned());
    }
    for kind in ["initContainers", "containers", "ephemeralContainers"] {
        for container in list(&spec[kind]) {
            let name = container["name"].as_str().unwrap_or_default();
            for source in list(&container["envFrom"]) {
                if !source["secretRef"].is_null() || !source["configMapRef"].is_null() {
                    return Some(format!("secrets or configmaps (envFrom of container {name})"));
                }
            }
            for variable in list(&container["env"]) {
                let from = &variable["valueFrom"];
                if !from["secretKeyRef"].is_null() || !from["configMapKeyRef"].is_null() {
                    return Some(format!("secrets or configmaps (env of container {name})"));
                }
            }
        }
    }
    list(&spec["volumes"]).iter().find_map(forbidden_volume)
}

fn forbidden_volume(volume: &Value) -> Option<String> {
    let name = volume["name"].as_str().unwrap_or_default();
    let fields = volume.as_object()?;
    let types = fields
        .iter()
        .filter(|(key, value)| *key != "name" && !value.is_null());
    for (kind, source) in types {
        if !VOLUMES.contains(&kind.as_str()) {
            return Some(format!("volumes of type {kind} (volume {name})"));
        }
        if kind == "projected" {
            let sources = source["sources"].as_array().into_iter().flatten();
            let parts = sources.filter_map(Value::as_object).flatten();
            for (part, value) in parts {
                if part != "downwardAPI" && !value.is_null() {
                    return Some(format!("projected sources of type {part} (volume {name})"));
                }
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_that_needs_only_its_host_is_allowed() {
        let pod = json!({"spec": {
        "containers": [{"name": "c", "env": [{"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}]}],
        "volumes": [
            {"name": "a", "hostPath": {"path": "/"}},
            {"name": "b", "projected": {"sources": [{"downwardAPI": {}}]}},
            {"name": "c"}
        ]}});
        assert_eq!(forbidden_reference(&pod), None);
    }

    #[test]
    fn every_way_to_reach_an_api_object_is_found() {
        for spec in [
            json!({"serviceAccountName": "default"}),
            json!({"serviceAccount": "default"}),
            json!({"imagePullSecrets": [{"name": "s"}]}),
            json!({"resourceClaims": [{"name": "r"}]}),
            json!({"initContainers": [{"name": "c", "envFrom": [{"secretRef": {"name": "s"}}]}]}),
            json!({"containers": [{"name": "c", "envFrom": [{"configMapRef": {"name": "s"}}]}]}),
            json!({"containers": [{"name": "c", "env": [{"valueFrom": {"secretKeyRef": {"name": "s"}}}]}]}),
            json!({"containers": [{"name": "c", "env": [{"valueFrom": {"configMapKeyRef": {"name": "s"}}}]}]}),
            json!({"volumes": [{"name": "v", "secret": {"secretName": "s"}}]}),
            json!({"volumes": [{"name": "v", "configMap": {"name": "s"}}]}),
            json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "s"}}]}),
            json!({"volumes": [{"name": "v", "csi": {"driver": "d"}}]}),
            json!({"volumes": [{"name": "v", "projected": {"sources": [{"downwardAPI": {}}, {"secret": {"name": "s"}}]}}]}),
            json!({"volumes": [{"name": "v", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]}),
            json!({"volumes": [{"name": "v", "somethingNew": {"secretRef": {"name": "s"}}}]}),
        ] {
            assert!(forbidden_reference(&json!({"spec": spec})).is_some(), "{spec}");
        }
    }
}
