//! The outbox's limits against a plain list.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use redb::TableDefinition;
use skerry_proto::link::report;

use super::medium::OnDisk;
use super::model::{event, write};
use super::writer::Write;
use super::*;

#[derive(Clone, Debug)]
struct Waiting {
    seq: u64,
    lane: Lane,
    key: Option<u8>,
    observed: i64,
    bytes: u64,
}

fn small() -> Retention {
    let lane = |age: Option<u64>, max_bytes| LaneLimits {
        max_age: age.map(Duration::from_secs),
        max_bytes,
    };
    Retention {
        lanes: [
            lane(None, 900),
            lane(None, 900),
            lane(Some(50), 400),
            lane(Some(20), 600),
        ],
        max_bytes: 1_500,
    }
}

fn open(dir: &tempfile::TempDir, retention: Retention) -> Store {
    let place = Box::new(OnDisk::new(dir.path().join("store.redb")));
    let options = Options {
        retention,
        ..Options::default()
    };
    Store::open_at(place, options).unwrap()
}

fn new(key: Option<u8>, size: u16, observed: i64) -> NewReport {
    let key = key.map(|key| key.to_string());
    NewReport {
        observed: jiff::Timestamp::from_second(observed).unwrap(),
        ..event(key.as_deref(), &"x".repeat(size.into()))
    }
}

/// What the promises of `retention.rs` leave of a list.
fn keep_limits(list: &mut Vec<Waiting>, came: Lane, now: i64, drops: &mut BTreeMap<(Lane, DropReason), u64>) {
    let retention = small();
    let sum = |list: &[Waiting], lane: Option<Lane>| -> u64 {
        let of = |w: &&Waiting| lane.is_none_or(|lane| w.lane == lane);
        list.iter().filter(of).map(|w| w.bytes).sum()
    };
    loop {
        let first = |lane: Lane| list.iter().position(|w| w.lane == lane);
        let old = |at: usize| {
            let age = retention.lane(came).max_age;
            age.is_some_and(|age| list[at].observed < now - i64::try_from(age.as_secs()).unwrap())
        };
        let (at, reason) = if first(came).is_some_and(old) {
            (first(came), DropReason::Age)
        } else if sum(list, Some(came)) > retention.lane(came).max_bytes {
            (first(came), DropReason::LaneBytes)
        } else if sum(list, None) > retention.max_bytes {
            (
                Lane::ALL.into_iter().rev().find_map(first),
                DropReason::TotalBytes,
            )
        } else {
            return;
        };
        let gone = list.remove(at.unwrap());
        *drops.entry((gone.lane, reason)).or_default() += 1;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn the_oldest_of_the_least_important_goes_first_and_every_drop_is_counted(
        steps in proptest::collection::vec(
            (0..4u8, proptest::option::weighted(0.4, 0..3u8), 0..250u16, 0..15i64),
            1..40,
        ),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(&dir, small());
        let (mut list, mut drops, mut now) = (Vec::<Waiting>::new(), BTreeMap::new(), 1_000);
        for (index, (lane, key, size, later)) in steps.into_iter().enumerate() {
            let lane = Lane::numbered(lane).unwrap();
            // One object has one lane.
            let key = key.map(|key| key + 10 * lane as u8);
            now += later;
            let before: u64 = store.outbox_use().unwrap().iter().map(|u| u.bytes).sum();
            let replaced: u64 = list.iter().filter(|w| key.is_some() && w.key == key).map(|w| w.bytes).sum();
            let dropped_before = list.len();
            let seq = write(&store, Write::Report(lane, Box::new(new(key, size, now)))).unwrap().seq;
            list.retain(|w| key.is_none() || w.key != key);
            // The model weighs a report as the store does.
            let bytes = store.weight(lane, key, size, now, seq);
            list.push(Waiting { seq, lane, key, observed: now, bytes });
            keep_limits(&mut list, lane, now, &mut drops);
            prop_assert!(before >= replaced && dropped_before + 1 >= list.len());
            let waiting: Vec<u64> = store.waiting_reports(0, 1_000).unwrap().iter().map(|r| r.seq).collect();
            prop_assert_eq!(waiting, list.iter().map(|w| w.seq).collect::<Vec<_>>());
            for (lane, used) in Lane::ALL.into_iter().zip(store.outbox_use().unwrap()) {
                let mine: Vec<&Waiting> = list.iter().filter(|w| w.lane == lane).collect();
                prop_assert_eq!(used.reports, mine.len() as u64);
                prop_assert_eq!(used.bytes, mine.iter().map(|w| w.bytes).sum::<u64>());
            }
            let counted: BTreeMap<_, _> =
                store.drops().unwrap().into_iter().map(|(lane, reason, count)| ((lane, reason), count)).collect();
            prop_assert_eq!(&counted, &drops);
            if index % 11 == 10 {
                drop(store);
                store = open(&dir, small());
            }
        }
    }
}

impl Store {
    /// Bytes that such a report takes in the outbox.
    fn weight(&self, lane: Lane, key: Option<u8>, size: u16, observed: i64, seq: u64) -> u64 {
        outbox::encoded(lane, &new(key, size, observed), seq).len() as u64
    }
}

#[test]
fn what_has_become_too_old_goes_without_anything_new_coming() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, small());
    write(
        &store,
        Write::Report(Lane::Telemetry, Box::new(new(None, 1, 100))),
    )
    .unwrap();
    write(&store, Write::Report(Lane::Status, Box::new(new(None, 1, 100)))).unwrap();
    let sweep = |second| {
        let now = jiff::Timestamp::from_second(second).unwrap();
        write(&store, Write::Sweep(now)).unwrap();
        store.outbox_len().unwrap()
    };
    assert_eq!(sweep(120), 2);
    assert_eq!(sweep(121), 1);
    assert_eq!(store.drops().unwrap(), [(Lane::Telemetry, DropReason::Age, 1)]);
}

#[test]
fn what_the_provider_refuses_counts_as_dropped_and_what_it_takes_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Retention::default());
    let report = || Write::Report(Lane::Events, Box::new(new(None, 1, 100)));
    let (taken, refused) = (
        write(&store, report()).unwrap().seq,
        write(&store, report()).unwrap().seq,
    );
    let settle = |seq, refused| Write::Settle {
        seqs: vec![seq],
        refused,
    };
    write(&store, settle(taken, false)).unwrap();
    write(&store, settle(refused, true)).unwrap();
    // A result that comes twice counts once.
    write(&store, settle(refused, true)).unwrap();
    assert_eq!(store.outbox_len().unwrap(), 0);
    assert_eq!(store.drops().unwrap(), [(Lane::Events, DropReason::Refused, 1)]);
}

#[test]
fn an_outbox_of_schema_2_keeps_its_reports_and_gets_lanes() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, Retention::default());
    let status = NewReport {
        body: report::Report::NodeStatus(Default::default()),
        ..new(Some(7), 0, 100)
    };
    write(&store, Write::Report(Lane::CriticalStatus, Box::new(status))).unwrap();
    write(&store, Write::Report(Lane::Events, Box::new(new(None, 5, 100)))).unwrap();
    let used = store.outbox_use().unwrap();
    let old = store.file().write(|transaction| {
        for table in ["outbox_lanes", "outbox_totals", "outbox_drops"] {
            match table {
                "outbox_lanes" => transaction.delete_table(outbox::LANES)?,
                "outbox_totals" => transaction.delete_table(outbox::TOTALS)?,
                _ => transaction.delete_table(outbox::DROPS)?,
            };
        }
        let events: TableDefinition<'_, u64, ()> = TableDefinition::new("outbox_events");
        transaction.open_table(events)?.insert(2, ())?;
        transaction
            .open_table(META)?
            .insert("schema", 2u32.to_le_bytes().as_slice())?;
        Ok(())
    });
    old.unwrap();
    drop(store);
    let store = open(&dir, Retention::default());
    assert_eq!(store.outbox_use().unwrap(), used);
    assert_eq!(store.waiting_reports(0, 10).unwrap().len(), 2);
    assert_eq!(store.drops().unwrap(), []);
}
