//! The store against a simple model, and against damage.

use proptest::prelude::*;
use skerry_proto::link::Remove;

use super::model::{Model, Step, steps, write};
use super::*;

fn upsert(kind: Kind, uid: &str, name: &str, value: u32) -> change::Change {
    model::upsert(kind, uid, name, value, "")
}

fn remove(kind: Kind, uid: &str) -> change::Change {
    change::Change::Remove(Remove {
        kind: kind.into(),
        uid: uid.to_owned(),
    })
}

fn apply(store: &Store, changes: Vec<change::Change>) -> Result<(), StoreError> {
    write(store, super::Write::Apply(changes)).map(drop)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_sequence_of_actions_leaves_what_a_simple_model_holds(
        steps in steps(30),
        reopen in proptest::collection::vec(0..30usize, 0..3),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let mut model = Model::default();
        for (index, step) in steps.iter().enumerate() {
            let done = write(&store, model.step(step)).unwrap();
            if matches!(step, Step::Report(..)) {
                prop_assert!(done.seq > 0);
            }
            if reopen.contains(&index) {
                let id = store.id().to_owned();
                drop(store);
                store = Store::open(dir.path()).unwrap();
                prop_assert_eq!(store.id(), id);
            }
            prop_assert_eq!(&Model::of(&store).unwrap(), &model, "after step {}", index);
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
    let newer = store.file().write(|transaction| {
        let mut meta = transaction.open_table(META)?;
        meta.insert("schema", 99u32.to_le_bytes().as_slice())?;
        Ok(())
    });
    newer.unwrap();
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
