//! Compaction beside readers and writers, and interrupted at every stage.

use proptest::prelude::*;

use super::medium::{OnDisk, Place};
use super::model::{Model, Step, steps, upsert, write};
use super::simulated::Disk;
use super::*;

fn open(disk: &Disk) -> Store {
    Store::open_at(Box::new(disk.clone()), Options::default()).unwrap()
}

/// Fills the store and empties it again, so that its file has holes.
fn make_holes(store: &Store) {
    let ballast = "0123456789abcdef".repeat(500);
    for round in 0..6u32 {
        let object = |n| {
            let (name, ballast) = (format!("s{n}"), format!("{round}{n}{ballast}"));
            upsert(Kind::Secret, &name, &name, round, &ballast)
        };
        write(store, Write::Apply((0..150).map(object).collect())).unwrap();
    }
    let gone = |n| {
        change::Change::Remove(skerry_proto::link::Remove {
            kind: Kind::Secret.into(),
            uid: format!("s{n}"),
        })
    };
    write(store, Write::Apply((0..150).map(gone).collect())).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]
    #[test]
    fn what_is_written_during_a_compaction_is_in_its_result(before in steps(15), during in steps(15)) {
        let disk = Disk::empty();
        let store = open(&disk);
        let mut model = Model::default();
        for step in &before {
            write(&store, model.step(step)).unwrap();
        }
        std::thread::scope(|scope| {
            let compaction = scope.spawn(|| store.compact());
            for step in &during {
                write(&store, model.step(step)).unwrap();
                assert_eq!(Model::of(&store).unwrap(), model);
            }
            compaction.join().unwrap().unwrap();
        });
        prop_assert_eq!(Model::of(&store).unwrap(), model.clone());
        prop_assert_eq!(store.contradictions().unwrap(), Vec::<String>::new());
        let id = store.id().to_owned();
        // What comes after goes into the new file.
        write(&store, model.step(&Step::Put(0, 9, 9))).unwrap();
        drop(store);
        let store = open(&disk);
        prop_assert_eq!(store.id(), id);
        prop_assert_eq!(Model::of(&store).unwrap(), model);
    }
}

#[test]
fn a_compaction_gives_the_room_back_and_a_reader_goes_on_with_what_it_sees() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.state_put(model::ROOMS[0], "k", &1).unwrap();
    make_holes(&store);
    let seen = store.file().read(|snapshot| {
        let (before, after) = store.compact()?;
        assert!(after < before, "{before} bytes before, {after} after");
        store.state_put(model::ROOMS[0], "k", &2)?;
        let state = snapshot.open_table(STATE)?;
        let value = state.get((model::ROOMS[0], "k"))?.map(|v| v.value().to_vec());
        Ok(value)
    });
    assert_eq!(seen.unwrap().unwrap(), b"1");
    assert_eq!(store.state_get::<u32>(model::ROOMS[0], "k").unwrap(), Some(2));
    // The new file is locked as the old one was.
    assert!(matches!(Store::open(dir.path()), Err(OpenError::InUse { .. })));
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.state_get::<u32>(model::ROOMS[0], "k").unwrap(), Some(2));
}

#[test]
fn a_draft_that_a_power_cut_left_is_no_store_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    store.state_put(model::ROOMS[0], "k", &1).unwrap();
    drop(store);
    let place = OnDisk::new(dir.path().join("store.redb"));
    let draft = dir.path().join("store.redb.new");
    for left in ["", "half a file", &"x".repeat(100_000)] {
        std::fs::write(&draft, left).unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.state_get::<u32>(model::ROOMS[0], "k").unwrap(), Some(1));
        assert!(!draft.exists());
    }
    // One that is complete but was not renamed is none either.
    drop(place.draft().unwrap());
    let other = tempfile::tempdir().unwrap();
    drop(Store::open(other.path()).unwrap());
    std::fs::copy(other.path().join("store.redb"), &draft).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.state_get::<u32>(model::ROOMS[0], "k").unwrap(), Some(1));
}

#[test]
fn a_compaction_that_finds_no_room_leaves_the_store_as_it_was() {
    let disk = Disk::empty();
    let store = open(&disk);
    make_holes(&store);
    store.state_put(model::ROOMS[0], "k", &1).unwrap();
    disk.refuse_drafts();
    assert!(store.compact().is_err());
    assert_eq!(store.state_get::<u32>(model::ROOMS[0], "k").unwrap(), Some(1));
    store.state_put(model::ROOMS[0], "k", &2).unwrap();
    assert_eq!(store.contradictions().unwrap(), Vec::<String>::new());
}
