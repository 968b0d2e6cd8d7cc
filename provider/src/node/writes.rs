//! One writer at a time for each Node.
//!
//! Two write a Node's status: the site's reports, and the keeper that says of a silent site that it is not heard. Without
//! an order between them the keeper's "not heard" could arrive after the report of the reconnection and stay until the
//! site's next report. So each takes the Node's turn, and the keeper asks again whether the site is heard while it has it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use skerry_proto::SiteName;
use tokio::sync::OwnedMutexGuard;

use crate::cluster::Object;

/// The turns of all Nodes.
#[derive(Default)]
pub struct NodeWrites(Mutex<HashMap<SiteName, Arc<tokio::sync::Mutex<Newest>>>>);

/// The newest version of a Node that this process has written; held by whoever has the turn.
#[derive(Default)]
pub(super) struct Newest(u64);

impl NodeWrites {
    /// Waits for the turn to write a Node.
    pub(super) async fn turn(&self, site: &SiteName) -> OwnedMutexGuard<Newest> {
        let turn = {
            // Every entry is whole at any moment.
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(turns.entry(site.clone()).or_default())
        };
        turn.lock_owned().await
    }

    /// Drops what was kept for a site that was deleted.
    pub(super) fn forget(&self, site: &SiteName) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(site);
    }
}

impl Newest {
    /// Whether the mirror does not show our own newest write yet: then nothing may be concluded from what it shows.
    pub(super) fn outruns(&self, mirrored: &Object) -> bool {
        self.0 > version(mirrored.value["metadata"]["resourceVersion"].as_str())
    }

    /// Notes the answer to a write.
    pub(super) fn note(&mut self, resource_version: Option<&str>) {
        self.0 = self.0.max(version(resource_version));
    }
}

/// Since Kubernetes 1.35 a promise of the API: resource versions of one kind are numbers that ascend.
pub(super) fn version(text: Option<&str>) -> u64 {
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Whether merging `wanted` into `current` changes nothing. What the API leaves out when it is empty counts as empty.
pub(super) fn holds(current: &Value, wanted: &Value) -> bool {
    match (current, wanted) {
        (Value::Object(current), Value::Object(wanted)) => wanted
            .iter()
            .all(|(key, wanted)| holds(current.get(key).unwrap_or(&Value::Null), wanted)),
        (Value::Array(current), Value::Array(wanted)) => {
            current.len() == wanted.len() && current.iter().zip(wanted).all(|(a, b)| holds(a, b))
        }
        (Value::Null, wanted) => is_empty(wanted),
        (current, wanted) => current == wanted,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(is_empty),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use skerry_proto::link::Kind;

    use super::*;

    #[test]
    fn what_the_api_has_already_need_not_be_written() {
        let current = json!({"a": "1", "list": [{"name": "x", "more": 1}], "other": true});
        for same in [
            json!({"a": "1"}),
            json!({"list": [{"name": "x"}], "empty": [], "none": {"flag": false, "text": ""}}),
        ] {
            assert!(holds(&current, &same), "{same}");
        }
        for different in [
            json!({"a": "2"}),
            json!({"list": []}),
            json!({"new": {"flag": true}}),
        ] {
            assert!(!holds(&current, &different), "{different}");
        }
    }

    #[tokio::test]
    async fn a_mirror_that_lags_behind_our_own_write_proves_nothing() {
        let node = |version: &str| {
            let value = json!({"metadata": {"name": "n", "uid": "u", "resourceVersion": version}});
            Object::new(Kind::Node, value).unwrap()
        };
        let writes = NodeWrites::default();
        let site: SiteName = "harbour".parse().unwrap();
        writes.turn(&site).await.note(Some("10"));
        let newest = writes.turn(&site).await;
        assert!(newest.outruns(&node("9")));
        assert!(!newest.outruns(&node("10")));
    }
}
