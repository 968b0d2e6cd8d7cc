//! The edge's view of a pod, merged into the API's.
//!
//! Source: kubelet status manager (strategic merge patch of `pods/status` that carries the UID; the final delete with
//! grace 0 and a UID precondition).

use k8s_openapi::api::core::v1::Pod;
use kube::Client;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use serde_json::{Map, Value, json};
use skerry_proto::SiteName;
use skerry_proto::link::{Kind, PodStatusReport};
use skerry_proto::object::{ObjectKey, Uid};

use super::written::Written;
use crate::cluster::Mirror;
use crate::link::reports::{Outcome, outcome_of};

/// Fields of PodStatus that the edge owns. One that its report leaves out is removed from the API's status.
const OWNED: [&str; 15] = [
    "phase",
    "message",
    "reason",
    "hostIP",
    "podIP",
    "startTime",
    "containerStatuses",
    "initContainerStatuses",
    "ephemeralContainerStatuses",
    "observedGeneration",
    "resize",
    "resources",
    "allocatedResources",
    "hostIPs",
    "podIPs",
];

/// Lists whose patch strategy is merge: they are replaced as a whole, or old addresses would stay for ever.
const REPLACED: [&str; 2] = ["hostIPs", "podIPs"];

/// Maps whose keys would merge: they are replaced as a whole, or a key that is gone would stay for ever.
const WHOLE: [&str; 2] = ["resources", "allocatedResources"];

/// Conditions that the edge takes back by leaving them out.
const PASSING: [&str; 2] = ["PodResizePending", "PodResizeInProgress"];

/// Writes a report to the API and, when the pod has ended and is under deletion, deletes the object.
pub async fn apply(
    client: &Client,
    mirror: &Mirror,
    written: &Written,
    site: &SiteName,
    report: &PodStatusReport,
) -> Outcome {
    let Ok(Value::Object(reported)) = serde_json::from_slice(&report.status_json) else {
        return Outcome::Dropped("the status is not a JSON object".to_owned());
    };
    let key = ObjectKey {
        kind: Kind::Pod,
        uid: Uid::from(report.uid.as_str()),
    };
    let Some(known) = mirror.object(&key) else {
        return Outcome::Dropped("the pod is gone".to_owned());
    };
    if known.value["spec"]["nodeName"].as_str() != Some(site.as_str()) {
        return Outcome::Dropped(format!("the pod is not bound to site {site}"));
    }
    let newest = written.newest(&key.uid, &known.value);
    // Where the pod is, the cluster says and not the site. Untyped: the answer's status must read as the watch's does.
    let kind = ApiResource::erase::<Pod>(&());
    let pods: Api<DynamicObject> = Api::namespaced_with(client.clone(), &known.namespace, &kind);
    let mut deleting = newest["metadata"].get("deletionTimestamp").is_some();
    if let Some(patch) = status_patch(&reported, &newest["status"], &report.uid) {
        match pods
            .patch_status(&known.name, &PatchParams::default(), &Patch::Strategic(&patch))
            .await
        {
            Ok(pod) => {
                deleting = pod.metadata.deletion_timestamp.is_some();
                written.note(mirror, &key.uid, serde_json::to_value(pod).unwrap_or_default());
            }
            Err(error) => return outcome_of(&error),
        }
    }
    if report.finished && deleting {
        return delete(&pods, &known.name, &report.uid).await;
    }
    Outcome::Accepted
}

async fn delete(pods: &Api<DynamicObject>, name: &str, uid: &str) -> Outcome {
    let params = DeleteParams {
        grace_period_seconds: Some(0),
        preconditions: Some(Preconditions {
            uid: Some(uid.to_owned()),
            resource_version: None,
        }),
        ..Default::default()
    };
    match pods.delete(name, &params).await {
        Ok(_) => Outcome::Accepted,
        // Gone, or already another pod of that name: what was wanted.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Outcome::Accepted,
        Err(error) => outcome_of(&error),
    }
}

/// The patch that brings `current` to what the edge reports; `None` when nothing differs.
fn status_patch(reported: &Map<String, Value>, current: &Value, uid: &str) -> Option<Value> {
    let mut status = Map::new();
    for field in OWNED {
        let (new, old) = (reported.get(field), current.get(field));
        if new == old {
            continue;
        }
        let value = match new {
            None => Value::Null,
            Some(Value::Array(items)) if REPLACED.contains(&field) => {
                let mut list = vec![json!({"$patch": "replace"})];
                list.extend(items.iter().cloned());
                Value::Array(list)
            }
            // Where there is nothing to replace, the API server would drop a map with a directive.
            Some(Value::Object(map)) if WHOLE.contains(&field) && old.is_some() => {
                let mut map = map.clone();
                map.insert("$patch".to_owned(), Value::from("replace"));
                Value::Object(map)
            }
            Some(value) => value.clone(),
        };
        status.insert(field.to_owned(), value);
    }
    let mut conditions = changed_conditions(reported, current);
    conditions.extend(ended_conditions(reported, current));
    if !conditions.is_empty() {
        status.insert("conditions".to_owned(), Value::Array(conditions));
    }
    (!status.is_empty()).then(|| json!({"metadata": {"uid": uid}, "status": status}))
}

/// The edge's conditions that the API does not have yet. They merge by type, so all others stay.
fn changed_conditions(reported: &Map<String, Value>, current: &Value) -> Vec<Value> {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let existing = list(current.get("conditions"));
    list(reported.get("conditions"))
        .into_iter()
        .filter_map(|mut condition| {
            let same_type = existing.iter().find(|other| other["type"] == condition["type"]);
            let changed = match same_type {
                // The scheduler said it first; its transition time stays.
                Some(other)
                    if condition["type"] == "PodScheduled" && other["status"] == condition["status"] =>
                {
                    condition["lastTransitionTime"] = other["lastTransitionTime"].clone();
                    other.get("observedGeneration") != condition.get("observedGeneration")
                }
                Some(other) => differs(&condition, other),
                None => true,
            };
            changed.then(|| complete_condition(condition))
        })
        .collect()
}

/// Conditions of the edge that hold no more.
fn ended_conditions(reported: &Map<String, Value>, current: &Value) -> Vec<Value> {
    let has = |conditions: Option<&Value>, kind: &str| {
        let list = conditions.and_then(Value::as_array);
        list.is_some_and(|list| list.iter().any(|c| c["type"] == kind))
    };
    PASSING
        .iter()
        .filter(|kind| has(current.get("conditions"), kind) && !has(reported.get("conditions"), kind))
        .map(|kind| json!({"$patch": "delete", "type": kind}))
        .collect()
}

fn differs(new: &Value, old: &Value) -> bool {
    [
        "status",
        "reason",
        "message",
        "lastTransitionTime",
        "observedGeneration",
    ]
    .iter()
    .any(|field| new.get(*field).filter(|v| !v.is_null()) != old.get(*field).filter(|v| !v.is_null()))
}

/// A merge keeps fields that the patch leaves out: an old reason must be removed by name.
fn complete_condition(mut condition: Value) -> Value {
    if let Some(map) = condition.as_object_mut() {
        for field in ["reason", "message"] {
            map.entry(field).or_insert(Value::Null);
        }
    }
    condition
}

/// Hostile bytes as the status that a site reports for a pod.
pub(crate) fn any_reported(bytes: &[u8]) {
    if let Ok(Value::Object(reported)) = serde_json::from_slice(bytes) {
        let _ = status_patch(&reported, &Value::Null, "u");
        let current = json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}], "resources": {}, "conditions": [
            {"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"},
            {"type": "DisruptionTarget", "status": "True"}]});
        let _ = status_patch(&reported, &current, "u");
        let _ = status_patch(&reported, &Value::Object(reported.clone()), "u");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    #[test]
    fn an_equal_status_makes_no_patch() {
        let status = json!({"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        let mut current = status.clone();
        current["qosClass"] = json!("BestEffort");
        current["conditions"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "example.com/gate", "status": "True"}));
        assert_eq!(status_patch(&map(status), &current, "u"), None);
    }

    #[test]
    fn addresses_are_replaced_and_missing_fields_removed() {
        let current =
            json!({"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}], "message": "m"});
        let patch = status_patch(
            &map(json!({"phase": "Running", "podIP": "10.0.0.2", "podIPs": [{"ip": "10.0.0.2"}]})),
            &current,
            "u",
        )
        .unwrap();
        assert_eq!(patch["metadata"]["uid"], "u");
        assert_eq!(
            patch["status"]["podIPs"],
            json!([{"$patch": "replace"}, {"ip": "10.0.0.2"}])
        );
        assert_eq!(patch["status"]["message"], Value::Null);
        assert!(patch["status"].get("phase").is_none());
    }

    #[test]
    fn only_changed_conditions_travel_and_lose_their_old_reason() {
        let current = json!({"conditions": [
            {"type": "Ready", "status": "False", "reason": "ContainersNotReady", "lastTransitionTime": "a"},
            {"type": "Initialized", "status": "True", "lastTransitionTime": "a"},
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": "a"}]});
        let reported = map(json!({"conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "b"},
            {"type": "Initialized", "status": "True", "lastTransitionTime": "a"},
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": "b"}]}));
        let patch = status_patch(&reported, &current, "u").unwrap();
        assert_eq!(
            patch["status"]["conditions"],
            json!([{"type": "Ready", "status": "True", "reason": null, "message": null, "lastTransitionTime": "b"}])
        );
    }

    #[test]
    fn the_scheduler_s_condition_keeps_its_time_and_gets_the_generation() {
        let current =
            json!({"conditions": [{"type": "PodScheduled", "status": "True", "lastTransitionTime": "a"}]});
        let reported = map(json!({"conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": "b", "observedGeneration": 1}]}));
        let patch = status_patch(&reported, &current, "u").unwrap();
        assert_eq!(
            patch["status"]["conditions"],
            json!([{"type": "PodScheduled", "status": "True", "reason": null, "message": null,
                "lastTransitionTime": "a", "observedGeneration": 1}])
        );
        let current = json!({"conditions": [
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": "a", "observedGeneration": 1}]});
        assert_eq!(status_patch(&reported, &current, "u"), None);
    }

    #[test]
    fn a_resize_that_is_over_takes_its_condition_with_it() {
        let resize = json!({"type": "PodResizePending", "status": "True"});
        let foreign = json!({"type": "example.com/gate", "status": "True"});
        let current = json!({"conditions": [resize, foreign]});
        let patch = status_patch(&map(json!({"conditions": []})), &current, "u").unwrap();
        assert_eq!(
            patch["status"]["conditions"],
            json!([{"$patch": "delete", "type": "PodResizePending"}])
        );
        let again = json!({"conditions": [foreign]});
        assert_eq!(status_patch(&map(json!({"conditions": []})), &again, "u"), None);
    }

    #[test]
    fn resources_are_replaced_as_a_whole() {
        let current = json!({"resources": {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}}});
        let reported = map(json!({"resources": {"requests": {"cpu": "2"}}}));
        let patch = status_patch(&reported, &current, "u").unwrap();
        assert_eq!(
            patch["status"]["resources"],
            json!({"$patch": "replace", "requests": {"cpu": "2"}})
        );
        let patch = status_patch(&reported, &json!({}), "u").unwrap();
        assert_eq!(patch["status"]["resources"], json!({"requests": {"cpu": "2"}}));
    }
}
