use std::sync::OnceLock;

use bytes::Bytes;
use serde_json::{Value, json};
use skerry_proto::link::{Kind, Upsert};
use skerry_proto::object::{ContentHash, ObjectKey, PackError, Uid, pack};

/// Conditions of a pod that its node itself reports.
const OWN_CONDITIONS: [&str; 7] = [
    "PodReadyToStartContainers",
    "Initialized",
    "Ready",
    "ContainersReady",
    "PodScheduled",
    "PodResizePending",
    "PodResizeInProgress",
];

/// What others than the edge have said in a status that the edge acts on: conditions for a pod's readiness gates, the
/// binding of a claim, the resources of the node. `Null` when there is nothing of that kind. What the edge reported
/// itself is left out, or every report would come back as a change.
fn said_by_others(kind: Kind, status: &Value) -> Value {
    match kind {
        Kind::Pod => {
            let foreign = |c: &&Value| c["type"].as_str().is_none_or(|t| !OWN_CONDITIONS.contains(&t));
            let conditions = status["conditions"].as_array().into_iter().flatten();
            let said: Vec<_> = conditions
                .filter(foreign)
                .map(|c| json!([c["type"], c["status"]]))
                .collect();
            if said.is_empty() { Value::Null } else { said.into() }
        }
        Kind::Node => json!([status["capacity"], status["allocatable"]]),
        Kind::PersistentVolume | Kind::PersistentVolumeClaim => status["phase"].clone(),
        _ => Value::Null,
    }
}

/// Hash of what an object means to the edge.
fn meaning(kind: Kind, value: &Value) -> ContentHash {
    match said_by_others(kind, &value["status"]) {
        Value::Null => ContentHash::of(value),
        said => ContentHash::of(&json!({"object": ContentHash::of(value).0, "said": said})),
    }
}

/// One API object, as watched, ready to travel.
pub struct Object {
    /// Kind and UID.
    pub key: ObjectKey,
    /// Empty for cluster-scoped kinds.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Hash of what it means to the edge.
    pub hash: ContentHash,
    /// The object without `metadata.managedFields`.
    pub value: Value,
    packed: OnceLock<Bytes>,
}

impl Object {
    /// Takes an object from the API; `None` when it has no UID or name.
    pub fn new(kind: Kind, mut value: Value) -> Option<Self> {
        let metadata = value.get_mut("metadata")?.as_object_mut()?;
        metadata.remove("managedFields");
        let text = |key: &str| {
            metadata
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let (uid, name, namespace) = (text("uid"), text("name"), text("namespace"));
        if uid.is_empty() || name.is_empty() {
            return None;
        }
        let hash = meaning(kind, &value);
        Some(Self {
            key: ObjectKey {
                kind,
                uid: Uid::from(uid),
            },
            namespace,
            name,
            hash,
            value,
            packed: OnceLock::new(),
        })
    }

    /// The object as a message of the link. Compressed once, then shared.
    pub fn upsert(&self) -> Result<Upsert, PackError> {
        let json_zstd = match self.packed.get() {
            Some(bytes) => bytes.clone(),
            None => {
                let bytes = Bytes::from(pack(&self.value)?);
                self.packed.get_or_init(|| bytes).clone()
            }
        };
        Ok(Upsert {
            kind: self.key.kind.into(),
            uid: self.key.uid.to_string(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            hash: Bytes::copy_from_slice(&self.hash.0),
            json_zstd,
            expires_unix: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(kind: Kind, value: Value) -> ContentHash {
        Object::new(kind, value).unwrap().hash
    }

    fn pod(version: &str, node: &str, conditions: Value) -> Value {
        json!({"metadata": {"uid": "u", "name": "n", "resourceVersion": version}, "spec": {"nodeName": node},
            "status": {"phase": "Running", "conditions": conditions}})
    }

    #[test]
    fn what_the_edge_reported_of_a_pod_is_no_change_to_it() {
        let before = hash(
            Kind::Pod,
            pod("1", "a", json!([{"type": "Ready", "status": "False"}])),
        );
        let after = hash(
            Kind::Pod,
            pod("2", "a", json!([{"type": "Ready", "status": "True"}])),
        );
        assert!(before == after);
    }

    #[test]
    fn a_new_spec_or_a_condition_that_another_controller_set_is_a_change() {
        let before = hash(Kind::Pod, pod("1", "a", json!([])));
        assert!(before != hash(Kind::Pod, pod("1", "b", json!([]))));
        let gate = json!([{"type": "example.com/gate", "status": "True"}]);
        assert!(before != hash(Kind::Pod, pod("1", "a", gate)));
    }

    #[test]
    fn a_deletion_is_a_change() {
        let before = pod("1", "a", json!([]));
        let mut after = before.clone();
        after["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        assert!(hash(Kind::Pod, before) != hash(Kind::Pod, after));
    }
}
