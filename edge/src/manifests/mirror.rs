//! Keeps a mirror in the API for each static pod.
//!
//! Level-based: what is stored of the API's pods is compared with the static pods; what differs is asked of the
//! provider, which makes the mirrors. Without a cloud the wish waits in the outbox. A mirror that somebody deletes is
//! asked for again; the static pod does not notice.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::link::{Kind, MirrorPodReport, report};
use skerry_proto::object::{ObjectKey, Uid};
use skerry_proto::static_pod::MIRROR;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::full_name;
use crate::clock::Clock;
use crate::link::LinkStatus;
use crate::pods::StaticPods;
use crate::store::{NewReport, Store, StoreError, StoredObject};

/// A wish that was not fulfilled is uttered again after this long: the provider may have refused it for a reason that
/// has gone, such as a quota.
const AGAIN: Duration = Duration::from_secs(60);

/// Hash of the static pod that a Pod mirrors; `None` when it is no mirror.
pub(crate) fn mirrored(pod: &Pod) -> Option<&str> {
    pod.metadata.annotations.as_ref()?.get(MIRROR).map(String::as_str)
}

/// Keeps mirrors until `stop`.
pub(crate) async fn run(
    store: Store,
    mut statics: watch::Receiver<StaticPods>,
    clock: Arc<dyn Clock>,
    link: watch::Receiver<LinkStatus>,
    stop: CancellationToken,
) {
    let mut objects = store.changes();
    let mut asked = HashMap::<String, (String, Instant)>::new();
    let mut mirrors = Mirrors::default();
    let mut changed = Changed::Any;
    loop {
        if let Err(error) = mirrors.look(&store, &changed) {
            tracing::warn!(%error, "the mirrors of static pods cannot be read; it is tried again");
            changed = Changed::Any;
        }
        let set = statics.borrow_and_update().clone();
        let online = link.borrow().synced;
        if let Err(error) = compare(&store, &mirrors, &set, clock.as_ref(), online, &mut asked).await {
            tracing::warn!(%error, "the mirrors of static pods are not brought up to date; it is tried again");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            moved = statics.changed() => if moved.is_err() { return },
            seen = pod_changed(&mut objects, &mirrors, &store) => match seen {
                Some(seen) => changed = seen,
                None => return,
            },
            () = tokio::time::sleep(AGAIN) => {}
        }
    }
}

/// Which stored pods may be other than before.
enum Changed {
    Any,
    These(Vec<Uid>),
}

/// The mirrors among the stored pods.
#[derive(Default)]
struct Mirrors(BTreeMap<Uid, Pod>);

/// As much of a pod as tells whether it is a mirror.
#[derive(serde::Deserialize)]
struct InShort {
    metadata: MetadataInShort,
}

#[derive(serde::Deserialize)]
struct MetadataInShort {
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

fn is_mirror(object: &StoredObject) -> bool {
    let short = object.decode::<InShort>();
    short.is_ok_and(|pod| pod.metadata.annotations.is_some_and(|a| a.contains_key(MIRROR)))
}

impl Mirrors {
    fn look(&mut self, store: &Store, changed: &Changed) -> Result<(), StoreError> {
        match changed {
            Changed::Any => {
                let mut all = BTreeMap::new();
                store.each(Kind::Pod, |object| {
                    if is_mirror(&object)
                        && let Ok(pod) = object.decode()
                    {
                        all.insert(object.key.uid.clone(), pod);
                    }
                })?;
                self.0 = all;
            }
            Changed::These(uids) => {
                for uid in uids {
                    let key = ObjectKey {
                        kind: Kind::Pod,
                        uid: uid.clone(),
                    };
                    let object = store.get(&key)?.filter(is_mirror);
                    match object.and_then(|object| object.decode().ok()) {
                        Some(pod) => self.0.insert(uid.clone(), pod),
                        None => self.0.remove(uid),
                    };
                }
            }
        }
        Ok(())
    }
}

/// Waits for a change of a mirror, or of the Node; `None` when the store is gone.
async fn pod_changed(
    objects: &mut broadcast::Receiver<crate::store::ObjectChanged>,
    mirrors: &Mirrors,
    store: &Store,
) -> Option<Changed> {
    loop {
        match objects.recv().await {
            // What is wished waits for the Node.
            Ok(notice) if notice.key.kind == Kind::Node => return Some(Changed::These(Vec::new())),
            Ok(notice) if notice.key.kind == Kind::Pod => {
                let known = mirrors.0.contains_key(&notice.key.uid);
                if known
                    || store
                        .get(&notice.key)
                        .is_ok_and(|found| found.is_some_and(|o| is_mirror(&o)))
                {
                    return Some(Changed::These(vec![notice.key.uid]));
                }
            }
            Ok(_) => {}
            Err(broadcast::error::RecvError::Lagged(_)) => return Some(Changed::Any),
            Err(broadcast::error::RecvError::Closed) => return None,
        }
    }
}

/// Utters what differs, each wish once in a while; offline once, since it waits in the outbox. An empty hash is the wish that there be no mirror.
async fn compare(
    store: &Store,
    mirrors: &Mirrors,
    statics: &StaticPods,
    clock: &dyn Clock,
    online: bool,
    asked: &mut HashMap<String, (String, Instant)>,
) -> Result<(), StoreError> {
    let StaticPods::Known(statics) = statics else {
        return Ok(());
    };
    // A mirror is owned by the Node; until there is one, the provider could only refuse.
    if store.count(Kind::Node)? == 0 {
        return Ok(());
    }
    let mirrors: BTreeMap<String, &Pod> = mirrors.0.values().map(|pod| (full_name(pod), pod)).collect();
    let wanted: BTreeMap<String, &Pod> = statics.values().map(|pod| (full_name(pod), &**pod)).collect();
    let mut wishes = BTreeMap::<String, (String, &Pod, bool)>::new();
    for (name, pod) in &wanted {
        let hash = pod.metadata.uid.clone().unwrap_or_default();
        let good = mirrors.get(name).is_some_and(|mirror| {
            mirrored(mirror) == Some(hash.as_str()) && mirror.metadata.deletion_timestamp.is_none()
        });
        if !good {
            // The mirror's UID is part of the wish: one that is deleted again is a new one.
            let there = mirrors
                .get(name)
                .and_then(|m| m.metadata.uid.clone())
                .unwrap_or_default();
            wishes.insert(name.clone(), (format!("{hash}/{there}"), *pod, true));
        }
    }
    for (name, mirror) in &mirrors {
        if !wanted.contains_key(name) {
            wishes.insert(name.clone(), (String::new(), *mirror, false));
        }
    }
    asked.retain(|name, _| wishes.contains_key(name));
    for (name, (wish, pod, make)) in wishes {
        let recently = asked
            .get(&name)
            .is_some_and(|(before, at)| *before == wish && (!online || at.elapsed() < AGAIN));
        if recently {
            continue;
        }
        store.report(new_report(pod, make, clock)).await?;
        asked.insert(name, (wish, Instant::now()));
    }
    Ok(())
}

fn new_report(pod: &Pod, make: bool, clock: &dyn Clock) -> NewReport {
    let pod_json = match make {
        true => serde_json::to_vec(pod).unwrap_or_default(),
        false => Vec::new(),
    };
    NewReport {
        coalesce: Some(format!("mirror/{}", full_name(pod))),
        observed: clock.now(),
        body: report::Report::MirrorPod(MirrorPodReport {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            hash: pod.metadata.uid.clone().filter(|_| make).unwrap_or_default(),
            pod_json: pod_json.into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;
    use serde_json::json;
    use skerry_proto::link::{Upsert, change};
    use skerry_proto::object::{ContentHash, pack};

    fn pod(uid: &str, annotations: serde_json::Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p-n", "namespace": "default", "uid": uid, "annotations": annotations},
            "spec": {"containers": []}}))
        .unwrap()
    }

    async fn store_pod(store: &Store, pod: &Pod) {
        let value = serde_json::to_value(pod).unwrap();
        put(store, Kind::Pod, pod.metadata.uid.as_deref().unwrap(), &value).await;
    }

    async fn store_node(store: &Store) {
        put(
            store,
            Kind::Node,
            "node",
            &json!({"metadata": {"name": "n", "uid": "node"}}),
        )
        .await;
    }

    async fn put(store: &Store, kind: Kind, uid: &str, value: &serde_json::Value) {
        let upsert = Upsert {
            kind: kind.into(),
            uid: uid.to_owned(),
            namespace: "default".into(),
            name: "p-n".into(),
            hash: ContentHash::of(value).0.to_vec().into(),
            json_zstd: pack(value).unwrap().into(),
            expires_unix: 0,
        };
        store.apply(vec![change::Change::Upsert(upsert)]).await.unwrap();
    }

    async fn looked_and_compared(
        store: &Store,
        statics: &StaticPods,
        clock: &dyn Clock,
        online: bool,
        asked: &mut HashMap<String, (String, Instant)>,
    ) -> Result<(), StoreError> {
        let mut mirrors = Mirrors::default();
        mirrors.look(store, &Changed::Any)?;
        compare(store, &mirrors, statics, clock, online, asked).await
    }

    fn wishes(store: &Store) -> Vec<MirrorPodReport> {
        let queued = store.waiting_reports(0, 100).unwrap();
        queued
            .into_iter()
            .filter_map(|r| match r.report {
                Some(report::Report::MirrorPod(wish)) => Some(wish),
                _ => None,
            })
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_wish_is_uttered_once_the_node_is_there_and_again_when_the_mirror_is_deleted_or_late() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let statics = StaticPods::Known([(Uid::from("h"), Arc::new(pod("h", json!({}))))].into());
        let mut asked = HashMap::new();
        looked_and_compared(&store, &statics, &SystemClock, true, &mut asked)
            .await
            .unwrap();
        assert!(wishes(&store).is_empty(), "there is no Node yet");
        store_node(&store).await;
        looked_and_compared(&store, &statics, &SystemClock, true, &mut asked)
            .await
            .unwrap();
        looked_and_compared(&store, &statics, &SystemClock, true, &mut asked)
            .await
            .unwrap();
        let first = wishes(&store);
        assert_eq!((first.len(), first[0].hash.as_str()), (1, "h"));
        let seq = |store: &Store| store.waiting_reports(0, 100).unwrap().last().unwrap().seq;
        let before = seq(&store);
        tokio::time::advance(AGAIN).await;
        looked_and_compared(&store, &statics, &SystemClock, true, &mut asked)
            .await
            .unwrap();
        assert!(seq(&store) > before, "it was late");
        // It came, and nothing is wished; then somebody deletes it.
        store_pod(&store, &pod("m", json!({MIRROR: "h"}))).await;
        let before = seq(&store);
        looked_and_compared(&store, &statics, &SystemClock, true, &mut asked)
            .await
            .unwrap();
        assert_eq!(seq(&store), before);
        let mut leaving = pod("m", json!({MIRROR: "h"}));
        leaving.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(
            jiff::Timestamp::now(),
        ));
        store_pod(&store, &leaving).await;
        looked_and_compared(&store, &statics, &SystemClock, true, &mut asked)
            .await
            .unwrap();
        assert!(seq(&store) > before);
    }

    #[tokio::test]
    async fn a_mirror_without_its_static_pod_is_to_go_but_not_while_the_files_are_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store_node(&store).await;
        store_pod(&store, &pod("m", json!({MIRROR: "h"}))).await;
        let mut asked = HashMap::new();
        looked_and_compared(&store, &StaticPods::Unknown, &SystemClock, true, &mut asked)
            .await
            .unwrap();
        assert!(wishes(&store).is_empty());
        let none = StaticPods::Known(BTreeMap::new());
        looked_and_compared(&store, &none, &SystemClock, true, &mut asked)
            .await
            .unwrap();
        let wish = &wishes(&store)[0];
        assert!(wish.pod_json.is_empty() && wish.name == "p-n");
    }
}
