//! Pods that have ended here and come back: with a cluster that was restored from an older backup.
//!
//! A UID is one pod for ever, so one whose removal was ordered has been stopped here and cleared away; perhaps somebody
//! has deleted it. It does not start again: it is said to have failed, so that its controller makes a new one and a
//! person sees why.

use skerry_proto::object::Uid;

use super::ROOM;
use super::record::{End, PodRecord};
use crate::store::{Store, StoreError};

/// `status.reason` of such a pod.
const REASON: &str = "AlreadyEnded";
const MESSAGE: &str = "this pod was removed from this node before and has come back with the same UID, as after a restore of the \
                       cluster from an older backup; it is not started again: delete it, or let its controller replace it";

/// Whether the pod may have a worker: not before it is known, and on disk, whether it has ended here before.
pub(super) fn may_start(store: &Store, uid: &Uid) -> bool {
    match note_end(store, uid) {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(%uid, %error, "it is not known whether a pod has ended here before; it is not started yet");
            false
        }
    }
}

/// Notes in the record of a pod that has no worker yet that it has ended, if it has.
fn note_end(store: &Store, uid: &Uid) -> Result<(), StoreError> {
    if !store.has_ended(uid)? {
        return Ok(());
    }
    let mut record: PodRecord = store.state_get(ROOM, uid.as_str())?.unwrap_or_default();
    if record.end.is_none() {
        tracing::warn!(%uid, "a pod that was removed here has come back with its old UID; it is not started again");
        record.end = Some(End {
            succeeded: false,
            reason: REASON.to_owned(),
            message: MESSAGE.to_owned(),
            disruption: None,
        });
        store.state_put(ROOM, uid.as_str(), &record)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use skerry_proto::link::{Kind, Remove, Upsert, change};

    use super::*;

    fn upsert(uid: &str) -> change::Change {
        change::Change::Upsert(Upsert {
            kind: Kind::Pod.into(),
            uid: uid.to_owned(),
            name: uid.to_owned(),
            hash: vec![1; 16].into(),
            ..Default::default()
        })
    }

    #[tokio::test]
    async fn a_pod_that_was_removed_has_ended_when_it_comes_back_and_a_new_one_has_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let remove = change::Change::Remove(Remove {
            kind: Kind::Pod.into(),
            uid: "old".to_owned(),
        });
        store.apply(vec![upsert("old")]).await.unwrap();
        store.apply(vec![remove]).await.unwrap();
        store.apply(vec![upsert("old"), upsert("new")]).await.unwrap();
        let end = |uid: &str| {
            note_end(&store, &Uid::from(uid)).unwrap();
            let record = store.state_get::<PodRecord>(ROOM, uid).unwrap();
            record.and_then(|record| record.end).map(|end| end.reason)
        };
        assert_eq!(end("old").as_deref(), Some(REASON));
        assert_eq!(end("new"), None);
    }

    #[tokio::test]
    async fn a_pod_that_ended_by_itself_keeps_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let remove = change::Change::Remove(Remove {
            kind: Kind::Pod.into(),
            uid: "u".to_owned(),
        });
        store.apply(vec![upsert("u"), remove, upsert("u")]).await.unwrap();
        let record = PodRecord {
            end: Some(End {
                succeeded: true,
                ..End::default()
            }),
            ..PodRecord::default()
        };
        store.state_put(ROOM, "u", &record).unwrap();
        note_end(&store, &Uid::from("u")).unwrap();
        assert_eq!(store.state_get::<PodRecord>(ROOM, "u").unwrap(), Some(record));
    }
}
