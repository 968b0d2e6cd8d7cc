//! Mirrors of a site's static pods: Pods in the API that show what runs there by file.
//!
//! Source: kubelet, mirror client; NodeRestriction for what a node may create.

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use serde_json::{Map, Value, json};
use skerry_proto::SiteName;
use skerry_proto::link::{EventReport, Kind, MirrorPodReport};
use skerry_proto::static_pod::{self, MIRROR, forbidden_reference};

use crate::cluster::Mirror;
use crate::link::reports::{Outcome, outcome_of};

const NO_NODE: &str = "the site's Node is not registered";

/// Brings the mirror of one static pod to what the site says: makes it, makes it anew, or removes it.
///
/// A Pod of that name that is no mirror of this site is never touched.
pub async fn apply(client: &Client, cluster: &Mirror, site: &SiteName, report: &MirrorPodReport) -> Outcome {
    if !is_own_name(site, &report.name) {
        let reason = "the name of a mirror pod ends with the name of its Node";
        return Outcome::Dropped(reason.to_owned());
    }
    let wanted = match wanted(cluster, site, report) {
        Ok(wanted) => wanted,
        Err(outcome) => return tell(client, site, report, outcome).await,
    };
    let pods: Api<Pod> = Api::namespaced(client.clone(), &report.namespace);
    let existing = match pods.get_opt(&report.name).await {
        Ok(existing) => existing,
        Err(error) => return outcome_of(&error),
    };
    if let Some(existing) = existing {
        match compare(&existing, site, report) {
            Existing::Same => return Outcome::Accepted,
            Existing::Foreign => {
                let outcome = match wanted {
                    None => Outcome::Accepted,
                    Some(_) => Outcome::Dropped(format!(
                        "a Pod {}/{} exists that is not the mirror of this site's static pod; delete one of the two",
                        report.namespace, report.name
                    )),
                };
                return tell(client, site, report, outcome).await;
            }
            Existing::Old(uid) => {
                if let Err(outcome) = delete(&pods, &report.name, uid).await {
                    return outcome;
                }
            }
        }
    }
    let Some(wanted) = wanted else {
        return Outcome::Accepted;
    };
    let outcome = match pods.create(&PostParams::default(), &wanted).await {
        Ok(_) => {
            tracing::info!(%site, namespace = %report.namespace, pod = %report.name, "the mirror of a static pod was made");
            Outcome::Accepted
        }
        Err(kube::Error::Api(status)) if status.code == 409 => {
            Outcome::Retry("a Pod of that name exists already".to_owned())
        }
        // Quota, Pod Security and the like: nothing changes that soon.
        Err(kube::Error::Api(status)) if status.code == 403 => Outcome::Dropped(status.message.clone()),
        Err(error) => outcome_of(&error),
    };
    tell(client, site, report, outcome).await
}

/// Static pods are named after their node: no site takes a name that could be somebody else's.
pub(super) fn is_own_name(site: &SiteName, pod: &str) -> bool {
    pod.strip_suffix(site.as_str())
        .and_then(|stem| stem.strip_suffix('-'))
        .is_some_and(|stem| !stem.is_empty())
}

/// What a Pod under the mirror's name is.
enum Existing {
    /// The mirror as it should be.
    Same,
    /// A mirror of an earlier static pod, or one that is being deleted; with its UID.
    Old(String),
    /// Somebody else's Pod.
    Foreign,
}

fn compare(existing: &Pod, site: &SiteName, report: &MirrorPodReport) -> Existing {
    let node = existing.spec.as_ref().and_then(|s| s.node_name.as_deref());
    let annotations = existing.metadata.annotations.as_ref();
    let hash = annotations
        .and_then(|a| a.get(MIRROR))
        .filter(|_| node == Some(site.as_str()));
    let Some(hash) = hash else {
        return Existing::Foreign;
    };
    let leaving = existing.metadata.deletion_timestamp.is_some();
    if !leaving && !report.pod_json.is_empty() && *hash == report.hash {
        return Existing::Same;
    }
    Existing::Old(existing.metadata.uid.clone().unwrap_or_default())
}

/// The mirror to be made, bound to the site and owned by its Node; `None` when there must be none.
fn wanted(cluster: &Mirror, site: &SiteName, report: &MirrorPodReport) -> Result<Option<Pod>, Outcome> {
    if report.pod_json.is_empty() {
        return Ok(None);
    }
    let Some(node) = cluster.named(Kind::Node, "", site.as_str()) else {
        // It is asked for again once the site knows its Node; meanwhile nothing else of this lane may wait for it.
        return Err(Outcome::Dropped(NO_NODE.to_owned()));
    };
    let pod: Value = serde_json::from_slice(&report.pod_json)
        .map_err(|error| Outcome::Dropped(format!("the static pod is not JSON: {error}")))?;
    build(pod, site, node.key.uid.as_str(), report)
        .map(Some)
        .map_err(Outcome::Dropped)
}

fn build(mut pod: Value, site: &SiteName, node_uid: &str, report: &MirrorPodReport) -> Result<Pod, String> {
    // The provider may read Secrets, a site may not: what a mirror referred to would be sent to it.
    if let Some(what) = forbidden_reference(&pod) {
        return Err(format!("static pods may not refer to {what}"));
    }
    // A site may send anything: what is no object counts as an empty one.
    let object = |value: Option<&mut Value>| match value.map(Value::take) {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    };
    let mut metadata = object(pod.get_mut("metadata"));
    let (labels, mut annotations) = (
        object(metadata.get_mut("labels")),
        object(metadata.get_mut("annotations")),
    );
    annotations.insert(MIRROR.to_owned(), json!(report.hash));
    annotations.insert(static_pod::HASH.to_owned(), json!(report.hash));
    let mut spec = object(pod.get_mut("spec"));
    spec.insert("nodeName".to_owned(), json!(site.as_str()));
    let mirror = json!({
        "metadata": {
            "name": report.name,
            "namespace": report.namespace,
            "labels": labels,
            "annotations": annotations,
            "ownerReferences": [{
                "apiVersion": "v1", "kind": "Node", "name": site.as_str(), "uid": node_uid, "controller": true,
            }],
        },
        "spec": spec,
    });
    serde_json::from_value(mirror).map_err(|error| format!("the static pod is no Pod: {error}"))
}

/// A hostile site's static pod.
pub(crate) fn any_mirror(pod_json: &[u8], report: &MirrorPodReport, site: &SiteName) {
    if let Ok(pod) = serde_json::from_slice(pod_json) {
        let _ = build(pod, site, "u", report);
    }
}

async fn delete(pods: &Api<Pod>, name: &str, uid: String) -> Result<(), Outcome> {
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions {
            uid: Some(uid),
            resource_version: None,
        }),
        ..Default::default()
    };
    match pods.delete(name, &params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(kube::Error::Api(status)) if status.code == 409 => {
            Err(Outcome::Retry("the Pod was replaced meanwhile".to_owned()))
        }
        Err(error) => Err(outcome_of(&error)),
    }
}

/// A mirror that cannot be had is said on the Node: there is no Pod to say it on.
async fn tell(client: &Client, site: &SiteName, report: &MirrorPodReport, outcome: Outcome) -> Outcome {
    if let Outcome::Dropped(reason) = &outcome
        && reason != NO_NODE
    {
        let now = i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or_default();
        let event = EventReport {
            kind: "Node".to_owned(),
            api_version: "v1".to_owned(),
            name: site.to_string(),
            uid: site.to_string(),
            r#type: "Warning".to_owned(),
            reason: "FailedMirrorPod".to_owned(),
            message: format!(
                "The static pod {}/{} runs, but cannot be shown in the API: {reason}",
                report.namespace, report.name
            ),
            count: 1,
            first_unix_nanos: now,
            last_unix_nanos: now,
            ..Default::default()
        };
        if super::events::write(client, site, &event).await != Outcome::Accepted {
            tracing::warn!(%site, pod = %report.name, %reason, "a mirror pod cannot be made, nor can that be told");
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> MirrorPodReport {
        MirrorPodReport {
            namespace: "ns".to_owned(),
            name: "p-harbour".to_owned(),
            hash: "abc".to_owned(),
            pod_json: "x".into(),
        }
    }

    fn site() -> SiteName {
        "harbour".parse().unwrap()
    }

    #[test]
    fn a_mirror_is_bound_to_its_site_and_owned_by_its_node_whatever_the_site_says() {
        let said = json!({
            "metadata": {"name": "other", "namespace": "kube-system", "uid": "u", "labels": {"a": "b"},
                "ownerReferences": [{"kind": "Site", "name": "s", "uid": "v", "apiVersion": "x"}]},
            "spec": {"nodeName": "control-plane", "containers": [{"name": "c"}]},
            "status": {"phase": "Running"}});
        let pod = build(said, &site(), "node-uid", &report()).unwrap();
        assert_eq!(pod.metadata.name.as_deref(), Some("p-harbour"));
        assert_eq!(pod.metadata.namespace.as_deref(), Some("ns"));
        assert_eq!(pod.metadata.uid, None);
        assert_eq!(pod.metadata.annotations.unwrap()[MIRROR], "abc");
        let owners = pod.metadata.owner_references.unwrap();
        assert_eq!(
            (owners.len(), owners[0].uid.as_str(), owners[0].controller),
            (1, "node-uid", Some(true))
        );
        assert_eq!(pod.spec.unwrap().node_name.as_deref(), Some("harbour"));
        assert!(pod.status.is_none());
    }

    #[test]
    fn a_mirror_that_would_draw_a_secret_is_refused() {
        let said =
            json!({"spec": {"containers": [], "volumes": [{"name": "v", "secret": {"secretName": "s"}}]}});
        assert!(
            build(said, &site(), "u", &report())
                .unwrap_err()
                .contains("secret")
        );
    }

    #[test]
    fn only_a_mirror_of_this_site_is_replaced() {
        let pod = |node: &str, hash: Option<&str>| -> Pod {
            serde_json::from_value(json!({
                "metadata": {"uid": "u", "annotations": {MIRROR: hash}},
                "spec": {"nodeName": node, "containers": []}}))
            .unwrap_or_else(|_| {
                serde_json::from_value(
                    json!({"metadata": {"uid": "u"}, "spec": {"nodeName": node, "containers": []}}),
                )
                .unwrap()
            })
        };
        let at = |pod: &Pod| compare(pod, &site(), &report());
        assert!(matches!(at(&pod("harbour", Some("abc"))), Existing::Same));
        assert!(matches!(at(&pod("harbour", Some("old"))), Existing::Old(_)));
        assert!(matches!(at(&pod("elsewhere", Some("old"))), Existing::Foreign));
        assert!(matches!(at(&pod("harbour", None)), Existing::Foreign));
        let removal = MirrorPodReport {
            pod_json: Default::default(),
            ..report()
        };
        assert!(matches!(
            compare(&pod("harbour", Some("abc")), &site(), &removal),
            Existing::Old(_)
        ));
    }
}
