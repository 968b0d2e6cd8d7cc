//! What a site is sent, against an edge that holds what it was told.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use serde_json::json;
use skerry_proto::digest::{Buckets, Chosen, Entry, Group, buckets_for};
use skerry_proto::link::{
    Applied, EdgeBulk, Inventory, InventoryDigest, InventoryEntry, InventoryRequest, Kind, change,
    cloud_bulk, edge_bulk,
};
use skerry_proto::object::{ContentHash, ObjectKey, Uid};

use super::sync::*;
use crate::cluster::{Desired, DesiredToken, Object};
use crate::refs::TokenNeed;
use crate::refs::tokens::{Minted, TokenOwner, token_uid};

const NOW: i64 = 1_000_000;

/// The store of an edge, as simple as it can be.
#[derive(Clone, Default)]
struct Edge(BTreeMap<(i32, String), Entry>);

impl Edge {
    fn group(&self, group: Group) -> Buckets {
        let of_group = || self.0.iter().filter(|((kind, _), _)| Group::of(*kind) == group);
        let mut buckets = Buckets::new(buckets_for(of_group().count() as u64));
        for ((kind, uid), entry) in of_group() {
            buckets.add(*kind, uid, entry);
        }
        buckets
    }

    fn digest(&self) -> InventoryDigest {
        InventoryDigest {
            objects: Some(self.group(Group::Objects).message()),
            tokens: Some(self.group(Group::Tokens).message()),
        }
    }

    fn applied(&self, seq: u64) -> Applied {
        Applied {
            seq,
            objects_sum: self.group(Group::Objects).message().sum,
            tokens_sum: self.group(Group::Tokens).message().sum,
        }
    }

    fn inventory(&self, request: &InventoryRequest) -> Inventory {
        let chosen = |set: &Option<_>| set.as_ref().map(Chosen::new).unwrap_or_default();
        let (objects, tokens) = (chosen(&request.objects), chosen(&request.tokens));
        let entries = self.0.iter().filter(|((kind, uid), _)| match Group::of(*kind) {
            Group::Objects => objects.has(*kind, uid),
            Group::Tokens => tokens.has(*kind, uid),
        });
        Inventory {
            entries: entries
                .map(|((kind, uid), entry)| InventoryEntry {
                    kind: *kind,
                    uid: uid.clone(),
                    hash: entry.hash.0.to_vec().into(),
                    expires_unix: entry.expires_unix,
                })
                .collect(),
            last: true,
        }
    }

    /// Applies everything that comes, up to the window; how many changes there were, and whether Synced came.
    fn drain(&mut self, sync: &mut SiteSync) -> (u64, bool) {
        let (mut changes, mut synced) = (0, false);
        while let Some(message) = sync.next_message() {
            match message {
                cloud_bulk::Message::Change(message) => {
                    changes += 1;
                    match message.change.unwrap() {
                        change::Change::Upsert(upsert) => {
                            let entry = Entry {
                                hash: ContentHash::from_slice(&upsert.hash).unwrap(),
                                expires_unix: upsert.expires_unix,
                            };
                            self.0.insert((upsert.kind, upsert.uid), entry);
                        }
                        change::Change::Remove(remove) => {
                            self.0.remove(&(remove.kind, remove.uid));
                        }
                    }
                }
                cloud_bulk::Message::Synced(_) => synced = true,
                other => panic!("{other:?}"),
            }
        }
        (changes, synced)
    }
}

fn object(kind: Kind, uid: &str, version: u32) -> Arc<Object> {
    let value = json!({"metadata": {"name": uid, "uid": uid}, "spec": {"version": version}});
    Arc::new(Object::new(kind, value).unwrap())
}

fn desired(objects: impl IntoIterator<Item = Arc<Object>>) -> Desired {
    Desired {
        objects: objects.into_iter().map(|o| (o.key.clone(), o)).collect(),
        ..Desired::default()
    }
}

fn with_token(mut desired: Desired, pod: &str) -> (Desired, ObjectKey) {
    let need = TokenNeed {
        volume: "v".to_owned(),
        path: "p".to_owned(),
        audience: String::new(),
        expiration_seconds: 3600,
    };
    let key = ObjectKey {
        kind: Kind::ServiceAccountToken,
        uid: token_uid(&Uid::from(pod), &need),
    };
    let owner = TokenOwner {
        namespace: "ns".to_owned(),
        pod: pod.to_owned(),
        uid: Uid::from(pod),
        service_account: "default".to_owned(),
    };
    let token = DesiredToken {
        owner,
        need,
        leaving: false,
    };
    desired.tokens.insert(key.clone(), token);
    (desired, key)
}

fn minted() -> Minted {
    Minted {
        object: json!({"token": "t"}),
        expires_unix: NOW + 3600,
    }
}

/// A session with digests, up to where changes may be sent; how many entries were asked for.
fn begin(edge: &Edge, desired: &Desired, remembered: Tokens) -> (SiteSync, usize) {
    let mut sync = SiteSync::new(remembered);
    let mut asked = 0;
    if let Some(request) = sync.take_digest(&edge.digest(), desired).unwrap() {
        let cloud_bulk::Message::InventoryRequest(request) = request else {
            panic!("{request:?}");
        };
        let inventory = edge.inventory(&request);
        asked = inventory.entries.len();
        sync.take_inventory(inventory).unwrap();
    }
    sync.compare(desired, NOW);
    (sync, asked)
}

fn fleet(count: u32) -> Vec<Arc<Object>> {
    (0..count)
        .map(|n| object(Kind::Pod, &format!("pod-{n}"), 0))
        .collect()
}

fn settled(edge: &mut Edge, sync: &mut SiteSync) -> Proof {
    let mut seq = 0;
    loop {
        let (changes, synced) = edge.drain(sync);
        seq += changes;
        assert_eq!(sync.take_applied(&edge.applied(seq), Duration::ZERO), Ok(None));
        if changes == 0 && !synced {
            return sync.proof();
        }
    }
}

#[test]
fn a_reconnection_with_nothing_new_asks_for_nothing_sends_nothing_and_is_proven() {
    let mut edge = Edge::default();
    let (desired, key) = with_token(desired(fleet(1_000)), "pod-1");
    let (mut sync, _) = begin(&edge, &desired, Tokens::new());
    assert_eq!(sync.next_mint().unwrap().0, key);
    sync.take_minted(&key, Some(&minted())).unwrap();
    assert_eq!(settled(&mut edge, &mut sync), Proof::Equal);

    let told = edge.digest().encoded_len();
    let (mut again, asked) = begin(&edge, &desired, sync.tokens());
    assert_eq!(asked, 0);
    assert!(told < 1_024, "{told} bytes");
    assert!(again.next_mint().is_none());
    assert_eq!(edge.drain(&mut again), (0, true));
    assert_eq!(again.take_applied(&edge.applied(0), Duration::ZERO), Ok(None));
    assert_eq!(again.proof(), Proof::Equal);
}

#[test]
fn a_few_changes_among_many_objects_are_found_by_few_entries() {
    let mut edge = Edge::default();
    let before = desired(fleet(10_000));
    let (mut sync, _) = begin(&edge, &before, Tokens::new());
    assert_eq!(settled(&mut edge, &mut sync), Proof::Equal);
    let mut objects = fleet(10_000);
    objects[17] = object(Kind::Pod, "pod-17", 1);
    objects.pop();
    objects.push(object(Kind::Secret, "new", 0));
    let after = desired(objects);
    let (mut sync, asked) = begin(&edge, &after, Tokens::new());
    assert!(asked < 300, "{asked} of 10,000 entries were asked for");
    assert_eq!(edge.drain(&mut sync), (3, true));
    assert_eq!(sync.take_applied(&edge.applied(3), Duration::ZERO), Ok(None));
    assert_eq!(sync.proof(), Proof::Equal);
}

#[test]
fn a_provider_without_memory_asks_for_the_tokens_alone_and_mints_none_anew() {
    let mut edge = Edge::default();
    let (desired, key) = with_token(desired(fleet(100)), "pod-1");
    let (mut sync, _) = begin(&edge, &desired, Tokens::new());
    sync.next_mint().unwrap();
    sync.take_minted(&key, Some(&minted())).unwrap();
    settled(&mut edge, &mut sync);
    let (mut sync, asked) = begin(&edge, &desired, Tokens::new());
    assert_eq!(asked, 1);
    assert!(sync.next_mint().is_none());
    assert_eq!(edge.drain(&mut sync), (0, true));
}

#[test]
fn a_store_that_lost_an_object_is_found_out_by_the_next_acknowledgement_and_repaired() {
    let mut edge = Edge::default();
    let wanted = desired(fleet(200));
    let (mut sync, _) = begin(&edge, &wanted, Tokens::new());
    assert_eq!(settled(&mut edge, &mut sync), Proof::Equal);
    edge.0.remove(&(Kind::Pod.into(), "pod-5".to_owned()));
    edge.0.insert(
        (99, "foreign".to_owned()),
        Entry {
            hash: ContentHash([9; 16]),
            expires_unix: 0,
        },
    );

    let mut objects = fleet(200);
    objects.push(object(Kind::Secret, "new", 0));
    let wanted = desired(objects);
    sync.compare(&wanted, NOW);
    assert_eq!(edge.drain(&mut sync), (1, false));
    let request = sync.take_applied(&edge.applied(201), Duration::ZERO).unwrap();
    assert_eq!(sync.proof(), Proof::Different);
    assert!(matches!(request, Some(cloud_bulk::Message::InventoryRequest(r)) if r.digest));
    assert!(
        sync.next_message().is_none(),
        "a change was sent while entries were asked for"
    );
    let Some(cloud_bulk::Message::InventoryRequest(request)) =
        sync.take_digest(&edge.digest(), &wanted).unwrap()
    else {
        panic!("nothing was asked for");
    };
    let entries = edge.inventory(&request);
    assert!(entries.entries.len() < 150, "{}", entries.entries.len());
    sync.take_inventory(entries).unwrap();
    sync.compare(&wanted, NOW);
    assert_eq!(edge.drain(&mut sync), (1, true));
    assert_eq!(sync.take_applied(&edge.applied(202), Duration::ZERO), Ok(None));
    assert_eq!(sync.proof(), Proof::Equal);
}

#[test]
fn a_divergence_that_stays_is_repaired_ever_more_rarely() {
    let mut edge = Edge::default();
    let wanted = desired(fleet(3));
    let (mut sync, _) = begin(&edge, &wanted, Tokens::new());
    settled(&mut edge, &mut sync);
    // The edge tells a digest that no entries explain.
    let wrong = Applied {
        objects_sum: vec![1; 16].into(),
        ..edge.applied(3)
    };
    let mut repairs = Vec::new();
    for second in 0..1_000 {
        let now = Duration::from_secs(second);
        let asked = match sync.proof() {
            Proof::Different => sync.repair(now),
            _ => sync.take_applied(&wrong, now).unwrap(),
        };
        if asked.is_some() {
            repairs.push(second);
            assert_eq!(sync.take_digest(&edge.digest(), &wanted), Ok(None));
            sync.compare(&wanted, NOW);
            assert_eq!(edge.drain(&mut sync), (0, true));
            assert_eq!(sync.take_applied(&wrong, now), Ok(None));
        }
    }
    assert_eq!(repairs, [0, 60, 180, 420, 900]);
}

#[test]
fn a_pod_waits_for_its_token_and_goes_without_one_that_cannot_be_had() {
    for result in [Some(minted()), None] {
        let mut edge = Edge::default();
        let (desired, key) = with_token(desired(fleet(2)), "pod-1");
        let (mut sync, _) = begin(&edge, &desired, Tokens::new());
        assert_eq!(edge.drain(&mut sync), (1, false));
        sync.next_mint().unwrap();
        sync.take_minted(&key, result.as_ref()).unwrap();
        let (changes, synced) = edge.drain(&mut sync);
        assert_eq!((changes, synced), (1 + u64::from(result.is_some()), true));
        // Not again at once.
        sync.compare(&desired, NOW);
        assert!(sync.next_mint().is_none());
        sync.forgive();
        sync.compare(&desired, NOW);
        assert_eq!(sync.next_mint().is_some(), result.is_none());
    }
}

#[test]
fn references_come_before_pods_and_go_after_them() {
    let wanted = desired([object(Kind::Secret, "s2", 0), object(Kind::Pod, "p2", 0)]);
    let mut sync = SiteSync::new(Tokens::new());
    let entries = [(Kind::Pod, "p1"), (Kind::Secret, "s1")].map(|(kind, uid)| InventoryEntry {
        kind: kind.into(),
        uid: uid.to_owned(),
        hash: vec![1; 16].into(),
        expires_unix: 0,
    });
    sync.take_inventory(Inventory {
        entries: entries.to_vec(),
        last: true,
    })
    .unwrap();
    sync.compare(&wanted, NOW);
    let mut order = Vec::new();
    while let Some(message) = sync.next_message() {
        if let cloud_bulk::Message::Change(message) = message {
            order.push(match message.change.unwrap() {
                change::Change::Upsert(upsert) => format!("+{}", upsert.uid),
                change::Change::Remove(remove) => format!("-{}", remove.uid),
            });
        }
    }
    assert_eq!(order, ["+s2", "-p1", "+p2", "-s1"]);
}

#[test]
fn nothing_goes_out_beyond_the_window() {
    let mut edge = Edge::default();
    let wanted = desired(fleet(300));
    let (mut sync, _) = begin(&edge, &wanted, Tokens::new());
    assert_eq!(edge.drain(&mut sync), (256, false));
    assert_eq!(sync.take_applied(&edge.applied(256), Duration::ZERO), Ok(None));
    assert_eq!(sync.proof(), Proof::Open);
    assert_eq!(edge.drain(&mut sync), (44, true));
    assert_eq!(
        sync.take_applied(&edge.applied(301), Duration::ZERO),
        Err(Violation::Unsent)
    );
}

#[test]
fn an_edge_that_breaks_the_protocol_is_told_so() {
    let mut sync = SiteSync::new(Tokens::new());
    let malformed = InventoryDigest {
        objects: Some(skerry_proto::link::GroupDigest {
            sum: vec![0; 3].into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert_eq!(
        sync.take_digest(&malformed, &Desired::default()),
        Err(Violation::Digest)
    );
    let mut sync = SiteSync::new(Tokens::new());
    assert_eq!(
        sync.take_digest(&Edge::default().digest(), &Desired::default()),
        Ok(None)
    );
    assert_eq!(sync.take_inventory(Inventory::default()), Err(Violation::Unasked));
}

#[test]
fn an_older_edges_session_is_served() {
    let mut sent = include_bytes!("testdata/edge-0.1.bulk").as_slice();
    let mut same = object(Kind::Pod, "pod-same", 0);
    Arc::get_mut(&mut same).unwrap().hash = ContentHash([1; 16]);
    let (wanted, _) = with_token(desired([same, object(Kind::Pod, "pod-new", 0)]), "pod-same");
    let mut sync = SiteSync::new(Tokens::new());
    let (mut changes, mut reports) = (Vec::new(), 0);
    while !sent.is_empty() {
        let message = EdgeBulk::decode_length_delimited(&mut sent).unwrap();
        match message.message.unwrap() {
            edge_bulk::Message::Hello(hello) => assert_eq!(hello.session, "5e55"),
            edge_bulk::Message::Inventory(inventory) => sync.take_inventory(inventory).unwrap(),
            edge_bulk::Message::Applied(applied) => {
                assert_eq!(sync.take_applied(&applied, Duration::ZERO), Ok(None));
            }
            edge_bulk::Message::Report(_) => reports += 1,
            other => panic!("{other:?}"),
        }
        if sync.is_sending() && changes.is_empty() {
            sync.compare(&wanted, NOW);
            assert!(sync.next_mint().is_none(), "its token is good until 2100");
            while let Some(message) = sync.next_message() {
                changes.push(message);
            }
        }
    }
    // pod-old goes, pod-new comes, and so goes the Secret that the edge could not read and nothing needs.
    assert_eq!(changes.len(), 4, "{changes:?}");
    assert!(matches!(changes[3], cloud_bulk::Message::Synced(_)));
    assert_eq!((sync.proof(), reports), (Proof::Unsupported, 1));
}
