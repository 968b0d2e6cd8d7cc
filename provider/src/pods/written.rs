//! What the API server has answered to our own writes, until the watch shows it.
//!
//! A report is written as its difference from the status that the API has. The mirror learns of a write only when its
//! watch brings it back, and a second report may come before that: compared with the mirror, a field that went back to
//! what it was before the first one would seem to need no change, and the API would keep the first one's value.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use skerry_proto::link::Kind;
use skerry_proto::object::{ObjectKey, Uid};

use crate::cluster::Mirror;

/// With more answers than this, those that the watch has shown meanwhile are looked for and dropped.
const MANY: usize = 64;

/// The newest answers by pod.
#[derive(Default)]
pub struct Written(Mutex<HashMap<Uid, Value>>);

impl Written {
    /// The newest known state of a pod, of which the mirror has `mirrored`.
    pub(super) fn newest(&self, uid: &Uid, mirrored: &Value) -> Value {
        let mut answers = self.lock();
        match answers.get(uid) {
            Some(answer) if version(answer) > version(mirrored) => answer.clone(),
            _ => {
                answers.remove(uid);
                mirrored.clone()
            }
        }
    }

    /// Keeps the answer to a write.
    pub(super) fn note(&self, mirror: &Mirror, uid: &Uid, answer: Value) {
        let mut answers = self.lock();
        answers.insert(uid.clone(), answer);
        if answers.len() > MANY {
            answers.retain(|uid, answer| {
                let key = ObjectKey {
                    kind: Kind::Pod,
                    uid: uid.clone(),
                };
                mirror
                    .object(&key)
                    .is_some_and(|mirrored| version(answer) > version(&mirrored.value))
            });
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uid, Value>> {
        // Every entry is whole at any moment.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Since Kubernetes 1.35 a promise of the API: resource versions of one kind are numbers that ascend.
fn version(object: &Value) -> u64 {
    let text = object["metadata"]["resourceVersion"].as_str();
    text.and_then(|text| text.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(version: &str, phase: &str) -> Value {
        json!({"metadata": {"resourceVersion": version}, "status": {"phase": phase}})
    }

    #[test]
    fn our_own_write_counts_until_the_watch_shows_something_newer() {
        let (written, mirror, uid) = (Written::default(), Mirror::new(), Uid::from("u"));
        let phase = |mirrored: &Value| written.newest(&uid, mirrored)["status"]["phase"].clone();
        assert_eq!(phase(&pod("9", "Pending")), "Pending");
        written.note(&mirror, &uid, pod("10", "Running"));
        assert_eq!(phase(&pod("9", "Pending")), "Running");
        assert_eq!(phase(&pod("11", "Failed")), "Failed");
        assert_eq!(phase(&pod("9", "Pending")), "Pending");
    }

    #[test]
    fn answers_of_pods_that_are_gone_are_not_kept_for_ever() {
        let (written, mirror) = (Written::default(), Mirror::new());
        for number in 0..=MANY {
            written.note(&mirror, &Uid::from(format!("u{number}")), pod("1", "Running"));
        }
        assert!(written.lock().is_empty());
    }
}
