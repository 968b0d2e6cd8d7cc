//! User namespaces of pods: each gets 65 536 ids of its own, which stay its own until it is gone.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::object::Uid;

use crate::runtime::{Features, IdRange};
use crate::store::Store;

/// Ids in one range, and the first id that is given out: those below are the host's own users.
const LENGTH: u32 = 65_536;
/// Ranges that fit below the highest id.
const RANGES: u32 = u32::MAX / LENGTH;
/// The room's name for its records in the store.
const ROOM: &str = "userns";

/// Who has which ids. Written down before it is used, so that two pods never share ids, whatever happens.
pub(crate) struct UserRanges {
    store: Store,
    taken: Mutex<BTreeMap<Uid, IdRange>>,
}

impl UserRanges {
    /// Reads what was given out before.
    pub(crate) fn load(store: Store) -> Self {
        let taken = store.state_list::<IdRange>(ROOM).unwrap_or_else(|error| {
            tracing::error!(%error, "the ids of pods with user namespaces cannot be read");
            Vec::new()
        });
        Self {
            store,
            taken: Mutex::new(
                taken
                    .into_iter()
                    .map(|(uid, range)| (Uid::from(uid), range))
                    .collect(),
            ),
        }
    }

    /// The pod's range, a new one at its first call.
    pub(crate) fn claim(&self, uid: &Uid) -> Result<IdRange, String> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(range) = taken.get(uid) {
            return Ok(*range);
        }
        let free = (1..=RANGES - 1)
            .map(|n| n * LENGTH)
            .find(|first| taken.values().all(|range| range.first != *first))
            .ok_or("create user namespace: could not find an empty slot to allocate a user namespace")?;
        let range = IdRange {
            first: free,
            count: LENGTH,
        };
        self.store
            .state_put(ROOM, uid.as_str(), &range)
            .map_err(|e| format!("create user namespace: {e}"))?;
        taken.insert(uid.clone(), range);
        Ok(range)
    }

    /// Gives the range of a pod back that is gone.
    pub(crate) fn release(&self, uid: &Uid) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.remove(uid).is_some()
            && let Err(error) = self.store.state_delete(ROOM, uid.as_str())
        {
            // It is free again only after the next start; that costs a range and harms nobody.
            tracing::warn!(%uid, %error, "the ids of a pod cannot be given back in the store");
        }
    }
}

/// The ids of a pod with `hostUsers: false`; `None` for others. Fails in a kubelet's words.
pub(crate) fn user_namespace(
    pod: &Pod,
    features: &Features,
    handler: &str,
    ranges: &UserRanges,
) -> Result<Option<IdRange>, String> {
    if pod.spec.as_ref().and_then(|s| s.host_users) != Some(false) {
        return Ok(None);
    }
    if !features.handler(handler).user_namespaces {
        return Err(if handler.is_empty() {
            "can't set `spec.hostUsers: false`, runtime does not support user namespaces".to_owned()
        } else {
            format!(
                "can't set `spec.hostUsers: false`, RuntimeClass handler \"{handler}\" does not support user \
                 namespaces"
            )
        });
    }
    let uid = Uid::from(pod.metadata.uid.clone().unwrap_or_default());
    ranges.claim(&uid).map(Some)
}

#[cfg(test)]
mod tests {
    use super::super::super::fixtures::pod;
    use super::*;
    use crate::runtime::Handler;
    use serde_json::json;

    #[test]
    fn two_pods_never_share_ids_and_a_restart_forgets_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let ranges = UserRanges::load(store.clone());
        let (a, b) = (Uid::from("a"), Uid::from("b"));
        let first = ranges.claim(&a).unwrap();
        assert_eq!((first.first, first.count), (65_536, 65_536));
        assert_eq!(ranges.claim(&a).unwrap(), first);
        let ranges = UserRanges::load(store.clone());
        let second = ranges.claim(&b).unwrap();
        assert_eq!(second.first, 131_072);
        ranges.release(&a);
        assert_eq!(UserRanges::load(store).claim(&Uid::from("c")).unwrap(), first);
    }

    #[test]
    fn a_runtime_without_user_namespaces_refuses_them() {
        let dir = tempfile::tempdir().unwrap();
        let ranges = UserRanges::load(Store::open(dir.path()).unwrap());
        let asks = pod(json!({"hostUsers": false, "containers": []}));
        let able = Features {
            handlers: vec![Handler {
                name: "crun".into(),
                user_namespaces: true,
                ..Handler::default()
            }],
            ..Features::default()
        };
        assert_eq!(
            user_namespace(&asks, &able, "", &ranges).unwrap_err(),
            "can't set `spec.hostUsers: false`, runtime does not support user namespaces"
        );
        assert!(user_namespace(&asks, &able, "crun", &ranges).unwrap().is_some());
        let plain = pod(json!({"containers": []}));
        assert_eq!(user_namespace(&plain, &able, "", &ranges), Ok(None));
    }
}
