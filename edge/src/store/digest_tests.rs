//! The index and the tombstones against the objects that they are about.

use proptest::prelude::*;
use redb::ReadableDatabase;
use serde_json::json;
use skerry_proto::digest::{Buckets, Entry, Group, Sum, buckets_for};
use skerry_proto::link::{self, BucketSet, InventoryRequest, Remove};
use skerry_proto::object::pack;

use super::*;

fn upsert(kind: Kind, uid: &str, value: u32) -> change::Change {
    let object = json!({"metadata": {"name": uid, "uid": uid}, "value": value});
    change::Change::Upsert(Upsert {
        kind: kind.into(),
        uid: uid.to_owned(),
        namespace: "ns".to_owned(),
        name: uid.to_owned(),
        hash: ContentHash::of(&object).0.to_vec().into(),
        json_zstd: pack(&object).unwrap().into(),
        expires_unix: i64::from(value),
    })
}

fn remove(kind: Kind, uid: &str) -> change::Change {
    change::Change::Remove(Remove {
        kind: kind.into(),
        uid: uid.to_owned(),
    })
}

fn write(store: &Store, write: Write) {
    store.inner.writer.queue(write).blocking_recv().unwrap().unwrap();
}

/// The digest made the slow way, out of the objects themselves.
fn computed(store: &Store) -> link::InventoryDigest {
    let kinds = [Kind::Pod, Kind::Secret, Kind::ServiceAccountToken];
    let objects: Vec<_> = kinds.iter().flat_map(|kind| store.list(*kind).unwrap()).collect();
    let group = |group: Group| {
        let of_group = || {
            objects
                .iter()
                .filter(move |o| Group::of(o.key.kind.into()) == group)
        };
        let mut buckets = Buckets::new(buckets_for(of_group().count() as u64));
        for object in of_group() {
            let entry = Entry {
                hash: object.hash,
                expires_unix: object.expires_unix,
            };
            buckets.add(object.key.kind.into(), object.key.uid.as_str(), &entry);
        }
        Some(buckets.message())
    };
    link::InventoryDigest {
        objects: group(Group::Objects),
        tokens: group(Group::Tokens),
    }
}

fn is_true(store: &Store) {
    let told = store.inventory_digest().unwrap();
    assert_eq!(told, computed(store));
    let applied = store.applied(7).unwrap();
    assert_eq!(applied.seq, 7);
    assert_eq!(Some(applied.objects_sum), told.objects.map(|g| g.sum));
    assert_eq!(Some(applied.tokens_sum), told.tokens.map(|g| g.sum));
}

#[derive(Clone, Debug)]
enum Step {
    Upsert(u8, u8, u32),
    Remove(u8, u8),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..3u8, 0..90u8, 0..3u32).prop_map(|(k, u, v)| Step::Upsert(k, u, v)),
        2 => (0..3u8, 0..90u8).prop_map(|(k, u)| Step::Remove(k, u)),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn the_digest_is_that_of_the_objects_after_every_batch(steps in steps()) {
        let kinds = [Kind::Pod, Kind::Secret, Kind::ServiceAccountToken];
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let mut batch = Vec::new();
        for step in steps {
            match step {
                Step::Upsert(k, u, v) => batch.push(upsert(kinds[usize::from(k)], &format!("u{u}"), v)),
                Step::Remove(k, u) => batch.push(remove(kinds[usize::from(k)], &format!("u{u}"))),
                Step::Reopen => {
                    write(&store, Write::Apply(std::mem::take(&mut batch)));
                    is_true(&store);
                    drop(store);
                    store = Store::open(dir.path()).unwrap();
                    is_true(&store);
                }
            }
        }
        write(&store, Write::Apply(batch));
        is_true(&store);
    }
}

#[test]
fn a_request_for_all_buckets_tells_everything_and_one_for_none_tells_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let batch = (0..200).map(|n| upsert(Kind::Pod, &format!("u{n}"), 0)).collect();
    write(&store, Write::Apply(batch));
    let of = buckets_for(200);
    let ask = |buckets: Vec<u32>| {
        let request = InventoryRequest {
            objects: Some(BucketSet { of, buckets }),
            ..Default::default()
        };
        store.inventory_of(&request).unwrap()
    };
    assert_eq!(ask((0..of).collect()), store.inventory().unwrap());
    assert!(ask(vec![]).is_empty());
    let (first, rest) = (ask(vec![0]), ask((1..of).collect()));
    assert!(!first.is_empty() && !rest.is_empty());
    assert_eq!(first.len() + rest.len(), 200);
}

#[test]
fn an_object_that_cannot_be_read_moves_the_digest_and_is_told_without_a_hash() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    write(&store, Write::Apply(vec![upsert(Kind::Pod, "u", 1)]));
    let before = store.applied(1).unwrap();
    let broken = store.file().write(|transaction| {
        let mut objects = transaction.open_table(OBJECTS)?;
        objects.insert((1, "u"), b"\xff".as_slice())?;
        Ok(())
    });
    broken.unwrap();
    assert_eq!(store.applied(1).unwrap(), before);
    assert!(store.list(Kind::Pod).unwrap().is_empty());
    // What the reader has queued is on disk before what follows.
    write(
        &store,
        Write::Settle {
            seqs: vec![],
            refused: false,
        },
    );
    assert_ne!(store.applied(1).unwrap(), before);
    assert!(store.inventory().unwrap()[0].hash.is_empty());
    write(&store, Write::Apply(vec![upsert(Kind::Pod, "u", 1)]));
    assert_eq!(store.applied(1).unwrap(), before);
}

#[test]
fn a_store_of_the_first_schema_gets_its_index_when_it_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    write(
        &store,
        Write::Apply(vec![
            upsert(Kind::Pod, "u", 1),
            upsert(Kind::ServiceAccountToken, "t", 9),
        ]),
    );
    let told = store.inventory_digest().unwrap();
    drop(store);
    let database = redb::Database::open(dir.path().join("store.redb")).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut meta = transaction.open_table(META).unwrap();
        meta.insert("schema", 1u32.to_le_bytes().as_slice()).unwrap();
        meta.remove("digest").unwrap();
    }
    transaction.delete_table(digest::HELD).unwrap();
    transaction.commit().unwrap();
    assert!(database.begin_read().unwrap().open_table(digest::HELD).is_err());
    drop(database);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.inventory_digest().unwrap(), told);
    assert_ne!(told.objects.unwrap().sum, Sum::default().to_bytes().as_slice());
}

#[test]
fn a_removed_pod_is_remembered_for_ever_and_other_kinds_are_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let pod = Uid::from("u");
    write(
        &store,
        Write::Apply(vec![upsert(Kind::Pod, "u", 1), upsert(Kind::Secret, "s", 1)]),
    );
    assert!(!store.has_ended(&pod).unwrap());
    write(
        &store,
        Write::Apply(vec![remove(Kind::Pod, "u"), remove(Kind::Secret, "s")]),
    );
    // One that was never here has not ended here.
    write(&store, Write::Apply(vec![remove(Kind::Pod, "other")]));
    write(&store, Write::Apply(vec![upsert(Kind::Pod, "u", 1)]));
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert!(store.has_ended(&pod).unwrap());
    assert!(!store.has_ended(&Uid::from("s")).unwrap());
    assert!(!store.has_ended(&Uid::from("other")).unwrap());
}

#[test]
fn the_oldest_tombstone_goes_first() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let buried = store.file().write(|transaction| {
        for uid in ["a", "b", "a", "c"] {
            ended::bury(transaction, uid, 2)?;
        }
        Ok(())
    });
    buried.unwrap();
    let ended = |uid: &str| store.has_ended(&Uid::from(uid)).unwrap();
    assert_eq!([ended("a"), ended("b"), ended("c")], [true, false, true]);
}

#[test]
fn every_start_on_a_store_has_a_higher_number() {
    let dir = tempfile::tempdir().unwrap();
    let lives: Vec<u64> = (0..3)
        .map(|_| Store::open(dir.path()).unwrap().begin_life().unwrap())
        .collect();
    assert_eq!(lives, [1, 2, 3]);
}
