//! Protection of a disconnected site's pods from eviction.
//!
//! Admission gives every pod tolerations of `not-ready` and `unreachable` for 300 s; after that the control plane
//! deletes the pods of a node that is not heard, and replaces them elsewhere while they still run at the edge. A pod
//! that is bound to a site is therefore made to tolerate both for ever. The change is kept in the pod, so it protects
//! also while no provider runs. (The API server allows to change `tolerationSeconds` of a bound pod, and to add
//! tolerations.)
//!
//! A change of the spec counts in `metadata.generation`, and who watches the generation of a pod that was just made
//! expects to be the only one who changes it. So a young pod is left as it is while its site is heard: it is protected
//! when the site falls silent, before the Node is said to be away, or when it has been there for a while. Only pods
//! younger than that depend on a provider that comes back within their 300 s.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use skerry_proto::autonomy::{Autonomy, REPLACE, Replace};

use crate::cluster::Object;

const KEYS: [&str; 2] = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"];

/// The age at which a pod is protected also while its site is heard.
const SETTLED: SignedDuration = SignedDuration::from_mins(10);

/// Whether a pod is to be protected now: its site is silent, or it has been there long enough.
pub fn due(pod: &Object, site_is_heard: bool, now: Timestamp) -> bool {
    if !site_is_heard {
        return true;
    }
    let created = pod.value["metadata"]["creationTimestamp"].as_str();
    let created = created.and_then(|time| time.parse::<Timestamp>().ok());
    created.is_none_or(|created| now.duration_since(created) >= SETTLED)
}

/// Makes one pod tolerate an absent site for as long as the policies say; does nothing when it does so already.
pub async fn protect(client: &Client, pod: &Object, policy: &Autonomy) -> Result<(), kube::Error> {
    let annotation = pod.value["metadata"]["annotations"][REPLACE].as_str();
    let Some(tolerations) = wanted(&pod.value, policy.replace_of(annotation)) else {
        return Ok(());
    };
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace);
    let patch = json!({"metadata": {"uid": pod.key.uid.as_str()}, "spec": {"tolerations": tolerations}});
    match pods
        .patch(&pod.name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
    {
        Ok(_) => Ok(()),
        // Gone, or replaced by another pod of that name, which comes by itself.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The tolerations that the pod should have; `None` when it has them.
fn wanted(pod: &Value, replace: Replace) -> Option<Vec<Value>> {
    let seconds = match replace {
        Replace::Never => None,
        Replace::After(after) => Some(after.as_secs()),
    };
    if pod["metadata"].get("deletionTimestamp").is_some() {
        return None;
    }
    let current = pod["spec"]["tolerations"].as_array().cloned().unwrap_or_default();
    let mut wanted = current.clone();
    for key in KEYS {
        let mut covered = false;
        for toleration in &mut wanted {
            if covers(toleration, key) {
                covered = true;
                // One of all taints is its author's word: a DaemonSet's pod is of no use elsewhere.
                let of_all = toleration["key"].as_str().unwrap_or_default().is_empty();
                match (toleration.as_object_mut(), seconds) {
                    (Some(map), None) => drop(map.remove("tolerationSeconds")),
                    (Some(map), Some(seconds)) if !of_all => {
                        map.insert("tolerationSeconds".to_owned(), seconds.into());
                    }
                    _ => {}
                }
            }
        }
        if !covered {
            let mut toleration = json!({"key": key, "operator": "Exists", "effect": "NoExecute"});
            if let Some(seconds) = seconds {
                toleration["tolerationSeconds"] = seconds.into();
            }
            wanted.push(toleration);
        }
    }
    (wanted != current).then_some(wanted)
}

/// Whether a toleration matches the NoExecute taint of that key (which has no value).
fn covers(toleration: &Value, key: &str) -> bool {
    let text = |field: &str| toleration[field].as_str().unwrap_or_default();
    let key_matches = text("key") == key || (text("key").is_empty() && text("operator") == "Exists");
    let effect_matches = matches!(text("effect"), "" | "NoExecute");
    let value_matches = text("operator") == "Exists" || text("value").is_empty();
    key_matches && effect_matches && value_matches
}

#[cfg(test)]
mod tests {
    use skerry_proto::link::Kind;

    use super::*;

    #[test]
    fn a_young_pod_is_left_alone_until_its_site_falls_silent() {
        let metadata =
            json!({"uid": "u", "name": "p", "namespace": "n", "creationTimestamp": "2026-01-01T00:00:00Z"});
        let pod = Object::new(Kind::Pod, json!({"metadata": metadata})).unwrap();
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        assert!(!due(&pod, true, at("2026-01-01T00:09:59Z")));
        assert!(due(&pod, false, at("2026-01-01T00:00:01Z")));
        assert!(due(&pod, true, at("2026-01-01T00:10:00Z")));
    }

    #[test]
    fn the_default_tolerations_lose_their_limit_and_others_stay() {
        let pod = json!({"metadata": {}, "spec": {"tolerations": [
            {"key": "a", "operator": "Exists"},
            {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
            {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}]}});
        assert_eq!(
            wanted(&pod, Replace::Never).unwrap(),
            [
                json!({"key": "a", "operator": "Exists"}),
                json!({"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute"}),
                json!({"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}),
            ]
        );
    }

    #[test]
    fn a_pod_that_may_be_replaced_tolerates_the_absence_for_that_long() {
        let toleration = |key: &str, seconds: u64| json!({"key": format!("node.kubernetes.io/{key}"), "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds});
        let pod = json!({"metadata": {}, "spec": {"tolerations": [toleration("not-ready", 300)]}});
        let after = Replace::After(std::time::Duration::from_secs(60));
        assert_eq!(
            wanted(&pod, after).unwrap(),
            [toleration("not-ready", 60), toleration("unreachable", 60)]
        );
        let everywhere = json!({"metadata": {}, "spec": {"tolerations": [{"operator": "Exists"}]}});
        assert_eq!(wanted(&everywhere, after), None);
    }

    #[test]
    fn a_pod_that_tolerates_everything_is_left_alone_and_one_without_gets_both() {
        assert_eq!(
            wanted(
                &json!({"metadata": {}, "spec": {"tolerations": [{"operator": "Exists"}]}}),
                Replace::Never
            ),
            None
        );
        assert_eq!(
            wanted(&json!({"metadata": {}, "spec": {}}), Replace::Never)
                .unwrap()
                .len(),
            2
        );
        assert_eq!(
            wanted(
                &json!({"metadata": {"deletionTimestamp": "t"}, "spec": {}}),
                Replace::Never
            ),
            None
        );
    }
}
