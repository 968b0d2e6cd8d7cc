//! The store against a simple model, and against damage.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde_json::json;
use skerry_proto::link::{EventReport, Remove};
use skerry_proto::object::pack;

use super::*;

fn upsert(kind: Kind, uid: &str, name: &str, value: u32) -> change::Change {
    let object = json!({"metadata": {"name": name, "uid": uid}, "value": value});
    change::Change::Upsert(Upsert {
        kind: kind.into(),
        uid: uid.to_owned(),
        namespace: "ns".to_owned(),
        name: name.to_owned(),
        hash: ContentHash::of(&object).0.to_vec().into(),
        json_zstd: pack(&object).unwrap().into(),
        expires_unix: 0,
    })
}

fn remove(kind: Kind, uid: &str) -> change::Change {
    change::Change::Remove(Remove {
        kind: kind.into(),
        uid: uid.to_owned(),
    })
}

fn event(coalesce: Option<&str>, message: &str) -> NewReport {
    NewReport {
        coalesce: coalesce.map(str::to_owned),
        observed: jiff::Timestamp::UNIX_EPOCH,
        body: link::report::Report::Event(EventReport {
            message: message.to_owned(),
            ..Default::default()
        }),
    }
}

fn messages(store: &Store) -> Vec<String> {
    let waiting = store.waiting_reports(0, usize::MAX).unwrap();
    assert!(waiting.windows(2).all(|w| w[0].seq < w[1].seq));
    waiting
        .into_iter()
        .map(|r| match r.report {
            Some(link::report::Report::Event(e)) => e.message,
            other => panic!("{other:?}"),
        })
        .collect()
}

#[derive(Clone, Debug)]
enum Step {
    Upsert(u8, u8, u32),
    Remove(u8),
    Report(Option<u8>, u32),
    Settle(u8),
    Reopen,
}

/// A write, waited for.
fn write(store: &Store, write: super::Write) -> Result<super::Done, StoreError> {
    let answer = store.inner.writer.queue(write);
    answer.blocking_recv().unwrap()
}

fn apply(store: &Store, changes: Vec<change::Change>) -> Result<(), StoreError> {
    write(store, super::Write::Apply(changes)).map(drop)
}

fn report(store: &Store, report: NewReport) -> Result<u64, StoreError> {
    write(store, super::Write::Report(Box::new(report))).map(|done| done.seq)
}

fn settle(store: &Store, seqs: &[u64]) -> Result<(), StoreError> {
    write(store, super::Write::Settle(seqs.to_vec())).map(drop)
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    proptest::collection::vec(
        prop_oneof![
            4 => (0..4u8, 0..3u8, any::<u32>()).prop_map(|(u, n, v)| Step::Upsert(u, n, v)),
            2 => (0..4u8).prop_map(Step::Remove),
            4 => (proptest::option::of(0..3u8), any::<u32>()).prop_map(|(k, v)| Step::Report(k, v)),
            2 => (0..8u8).prop_map(Step::Settle),
            1 => Just(Step::Reopen),
        ],
        1..40,
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_sequence_of_actions_leaves_what_a_simple_model_holds(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let mut objects: BTreeMap<String, (String, u32)> = BTreeMap::new();
        let mut names: BTreeMap<String, String> = BTreeMap::new();
        let mut outbox: Vec<(u64, Option<u8>, String)> = Vec::new();
        for step in steps {
            match step {
                Step::Upsert(uid, name, value) => {
                    let (uid, name) = (format!("u{uid}"), format!("n{name}"));
                    apply(&store, vec![upsert(Kind::Pod, &uid, &name, value)]).unwrap();
                    objects.insert(uid.clone(), (name.clone(), value));
                    names.insert(name, uid);
                }
                Step::Remove(uid) => {
                    let uid = format!("u{uid}");
                    apply(&store, vec![remove(Kind::Pod, &uid)]).unwrap();
                    if let Some((name, _)) = objects.remove(&uid)
                        && names.get(&name) == Some(&uid) {
                        names.remove(&name);
                    }
                }
                Step::Report(key, value) => {
                    let text = key.map(|k| k.to_string());
                    let seq = report(&store, event(text.as_deref(), &value.to_string())).unwrap();
                    if key.is_some() {
                        outbox.retain(|(_, k, _)| *k != key);
                    }
                    outbox.push((seq, key, value.to_string()));
                }
                Step::Settle(index) => {
                    if let Some((seq, _, _)) = outbox.get(usize::from(index)).cloned() {
                        settle(&store, &[seq]).unwrap();
                        outbox.retain(|(s, _, _)| *s != seq);
                    }
                }
                Step::Reopen => {
                    let id = store.id().to_owned();
                    drop(store);
                    store = Store::open(dir.path()).unwrap();
                    prop_assert_eq!(store.id(), id);
                }
            }
            let held: BTreeMap<String, (String, u32)> = store
                .list(Kind::Pod)
                .unwrap()
                .into_iter()
                .map(|o| {
                    let value: serde_json::Value = o.decode().unwrap();
                    (o.key.uid.to_string(), (o.name, u32::try_from(value["value"].as_u64().unwrap()).unwrap()))
                })
                .collect();
            prop_assert_eq!(&held, &objects);
            for (name, uid) in &names {
                let found = store.find(Kind::Pod, "ns", name).unwrap().map(|o| o.key.uid);
                if objects.contains_key(uid) {
                    prop_assert_eq!(found, Some(Uid::from(uid.as_str())));
                }
            }
            prop_assert_eq!(messages(&store), outbox.iter().map(|(_, _, m)| m.clone()).collect::<Vec<_>>());
            prop_assert_eq!(store.inventory().unwrap().len(), objects.len());
        }
    }
}

#[test]
fn kinds_do_not_mix() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    apply(
        &store,
        vec![upsert(Kind::Pod, "u", "n", 1), upsert(Kind::Secret, "u", "n", 2)],
    )
    .unwrap();
    assert_eq!(store.list(Kind::Pod).unwrap().len(), 1);
    assert_eq!(store.count(Kind::Secret).unwrap(), 1);
    apply(&store, vec![remove(Kind::Pod, "u")]).unwrap();
    assert!(store.find(Kind::Pod, "ns", "n").unwrap().is_none());
    assert!(store.find(Kind::Secret, "ns", "n").unwrap().is_some());
}

#[test]
fn a_bad_object_does_not_stop_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let bad = change::Change::Upsert(Upsert {
        kind: Kind::Pod.into(),
        uid: "bad".to_owned(),
        ..Default::default()
    });
    apply(&store, vec![bad, upsert(Kind::Pod, "good", "n", 1)]).unwrap();
    assert_eq!(store.list(Kind::Pod).unwrap().len(), 1);
}

#[test]
fn events_beyond_the_limit_push_out_the_oldest_and_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    // Filling the real limit through fsynced transactions would take minutes on a slow disk: fill the tables at once.
    let transaction = store.inner.shared.file.begin_write().unwrap();
    {
        let mut events = transaction.open_table(outbox::EVENTS).unwrap();
        for seq in 1..=MAX_EVENTS {
            events.insert(seq, ()).unwrap();
        }
        let mut meta = transaction.open_table(META).unwrap();
        meta.insert("next_seq", (MAX_EVENTS + 1).to_le_bytes().as_slice())
            .unwrap();
    }
    transaction.commit().unwrap();
    report(&store, event(None, "new")).unwrap();
    assert_eq!(store.dropped_reports(), 1);
    assert_eq!(messages(&store), ["new"]);
}

#[test]
fn a_record_survives_and_others_of_its_room_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.state_put("pods", "a", &1).unwrap();
    store.state_put("pods", "b", &2).unwrap();
    store.state_put("podsx", "c", &3).unwrap();
    assert_eq!(
        store.state_list::<u32>("pods").unwrap(),
        [("a".to_owned(), 1), ("b".to_owned(), 2)]
    );
    store.state_delete("pods", "a").unwrap();
    assert_eq!(store.state_get::<u32>("pods", "a").unwrap(), None);
    assert_eq!(store.state_get::<u32>("pods", "b").unwrap(), Some(2));
}

#[test]
fn a_second_daemon_on_one_file_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Store::open(dir.path()).unwrap();
    assert!(matches!(Store::open(dir.path()), Err(OpenError::InUse { .. })));
}

#[test]
fn a_truncated_or_foreign_file_is_refused_and_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store.redb");
    drop(Store::open(dir.path()).unwrap());
    let whole = std::fs::read(&path).unwrap();
    for length in [0, 1, 100, 4096, whole.len() / 2] {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = Store::open(dir.path())
            .err()
            .unwrap_or_else(|| panic!("{length} bytes were accepted"));
        assert!(matches!(error, OpenError::Damaged { .. }), "{length}: {error}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), length as u64);
    }
    std::fs::write(
        &path,
        b"this is no database, but a text of some length".repeat(1000),
    )
    .unwrap();
    assert!(matches!(Store::open(dir.path()), Err(OpenError::Damaged { .. })));
}

#[test]
fn a_newer_schema_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let transaction = store.inner.shared.file.begin_write().unwrap();
    transaction
        .open_table(META)
        .unwrap()
        .insert("schema", 99u32.to_le_bytes().as_slice())
        .unwrap();
    transaction.commit().unwrap();
    drop(store);
    assert!(matches!(
        Store::open(dir.path()),
        Err(OpenError::TooNew { found: 99, .. })
    ));
}

#[test]
fn what_was_queued_is_on_disk_in_order_when_the_store_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for number in 0..1_000 {
        drop(store.queue_state("pods", "a", &number).unwrap());
    }
    drop(store.queue_state_end("pods", "b"));
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.state_get::<u32>("pods", "a").unwrap(), Some(999));
}
