//! What the store promises, without a disk: the model that tests compare it with.

use std::collections::BTreeMap;

use proptest::prelude::*;
use redb::ReadableTable;
use serde_json::json;
use skerry_proto::link::{EventReport, Kind, Remove, Report, Upsert, change, report};
use skerry_proto::object::{ContentHash, pack};

use super::writer::{Done, Write};
use super::{Lane, NAMES, NewReport, Store, StoreError};

/// Rooms of records; one is the beginning of another's name.
pub(super) const ROOMS: [&str; 2] = ["room", "roommate"];

#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Several changes at once, as a batch of the link.
    Apply(Vec<Change>),
    Report(Option<u8>, u32),
    /// Settles the n-th waiting report, if there are so many.
    Settle(u8),
    Put(u8, u8, u32),
    Delete(u8, u8),
}

#[derive(Clone, Debug)]
pub(super) enum Change {
    /// Kind, UID, name, value; `size` bytes of ballast.
    Upsert(bool, u8, u8, u32, u16),
    Remove(bool, u8),
}

fn kind(service: bool) -> Kind {
    if service { Kind::Service } else { Kind::Pod }
}

/// Text that does not compress.
fn ballast(value: u32, size: u16) -> String {
    use rand::{Rng, SeedableRng};
    let mut chance = rand::rngs::StdRng::seed_from_u64(u64::from(value));
    (0..size)
        .map(|_| char::from(chance.random_range(b'a'..=b'z')))
        .collect()
}

impl Change {
    fn wire(&self) -> change::Change {
        match self {
            Self::Upsert(service, uid, name, value, size) => upsert(
                kind(*service),
                &format!("u{uid}"),
                &format!("n{name}"),
                *value,
                &ballast(*value, *size),
            ),
            Self::Remove(service, uid) => change::Change::Remove(Remove {
                kind: kind(*service).into(),
                uid: format!("u{uid}"),
            }),
        }
    }
}

pub(super) fn upsert(kind: Kind, uid: &str, name: &str, value: u32, ballast: &str) -> change::Change {
    let object = json!({"metadata": {"name": name, "uid": uid}, "value": value, "ballast": ballast});
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

pub(super) fn event(coalesce: Option<&str>, message: &str) -> NewReport {
    NewReport {
        coalesce: coalesce.map(str::to_owned),
        observed: jiff::Timestamp::UNIX_EPOCH,
        body: report::Report::Event(EventReport {
            message: message.to_owned(),
            ..Default::default()
        }),
    }
}

pub(super) fn message(report: &Report) -> String {
    match &report.report {
        Some(report::Report::Event(event)) => event.message.clone(),
        other => panic!("{other:?}"),
    }
}

/// What a store holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Model {
    /// By kind and UID: name and value.
    objects: BTreeMap<(i32, String), (String, u64)>,
    /// By kind and name: UID.
    names: BTreeMap<(i32, String), String>,
    records: BTreeMap<(String, String), u32>,
    outbox: BTreeMap<u64, String>,
    /// Not part of what is compared with a store.
    book: Book,
}

/// What the model must know besides.
#[derive(Clone, Debug, Default)]
struct Book {
    keys: BTreeMap<u8, u64>,
    last_seq: u64,
}

impl PartialEq for Book {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Model {
    /// Takes a step; answers what the store must be told for it.
    pub(super) fn step(&mut self, step: &Step) -> Write {
        match step {
            Step::Apply(changes) => {
                for change in changes {
                    self.change(change);
                }
                Write::Apply(changes.iter().map(Change::wire).collect())
            }
            Step::Report(key, value) => {
                self.book.last_seq += 1;
                let seq = self.book.last_seq;
                if let Some(key) = key
                    && let Some(older) = self.book.keys.insert(*key, seq)
                {
                    self.outbox.remove(&older);
                }
                self.outbox.insert(seq, value.to_string());
                let key = key.map(|key| key.to_string());
                let report = event(key.as_deref(), &value.to_string());
                Write::Report(Lane::Events, Box::new(report))
            }
            Step::Settle(index) => {
                let seq = self.outbox.keys().nth(usize::from(*index)).copied();
                if let Some(seq) = seq {
                    self.outbox.remove(&seq);
                }
                let seqs = seq.into_iter().collect();
                Write::Settle { seqs, refused: false }
            }
            Step::Put(room, key, value) => {
                let (room, key) = (ROOMS[usize::from(*room)], format!("k{key}"));
                self.records.insert((room.to_owned(), key.clone()), *value);
                Write::Put {
                    room: room.into(),
                    key,
                    json: value.to_string().into_bytes(),
                }
            }
            Step::Delete(room, key) => {
                let (room, key) = (ROOMS[usize::from(*room)], format!("k{key}"));
                self.records.remove(&(room.to_owned(), key.clone()));
                Write::Delete {
                    room: room.into(),
                    key,
                }
            }
        }
    }

    fn change(&mut self, change: &Change) {
        let (service, uid) = match change {
            Change::Upsert(service, uid, ..) | Change::Remove(service, uid) => (*service, format!("u{uid}")),
        };
        let number = i32::from(kind(service));
        let key = (number, uid.clone());
        let owned =
            |names: &BTreeMap<_, String>, name: &String| names.get(&(number, name.clone())) == Some(&uid);
        if let Some((before, _)) = self.objects.remove(&key)
            && owned(&self.names, &before)
        {
            self.names.remove(&(number, before));
        }
        if let Change::Upsert(_, _, name, value, _) = change {
            let name = format!("n{name}");
            self.names.insert((number, name.clone()), uid);
            self.objects.insert(key, (name, u64::from(*value)));
        }
    }

    /// What a store holds, by every way to ask it.
    pub(super) fn of(store: &Store) -> Result<Self, StoreError> {
        let mut model = Self::default();
        for kind in [Kind::Pod, Kind::Service] {
            let number = i32::from(kind);
            let objects = store.list(kind)?;
            assert_eq!(store.count(kind)?, objects.len());
            assert_eq!(
                store.uids(kind)?,
                objects.iter().map(|o| o.key.uid.clone()).collect::<Vec<_>>()
            );
            for object in objects {
                assert_eq!(store.get(&object.key)?.as_ref(), Some(&object));
                let value: serde_json::Value = object.decode().unwrap();
                assert_eq!(value["metadata"]["uid"], object.key.uid.as_str());
                assert_eq!(ContentHash::of(&value), object.hash);
                let value = value["value"].as_u64().unwrap();
                model
                    .objects
                    .insert((number, object.key.uid.to_string()), (object.name, value));
            }
        }
        model.names = store.file().read(|transaction| {
            let names = transaction.open_table(NAMES)?;
            names
                .iter()?
                .map(|entry| {
                    let (key, uid) = entry?;
                    let (byte, _, name) = key.value();
                    Ok(((i32::from(byte), name.to_owned()), uid.value().to_owned()))
                })
                .collect()
        })?;
        for ((number, name), uid) in &model.names {
            let found = store.find(Kind::try_from(*number).unwrap(), "ns", name)?;
            assert_eq!(
                found.unwrap().key.uid.as_str(),
                uid,
                "a name points to a stored object"
            );
        }
        assert_eq!(store.inventory()?.len(), model.objects.len());
        for room in ROOMS {
            for (key, value) in store.state_list::<u32>(room)? {
                assert_eq!(store.state_get::<u32>(room, &key)?, Some(value));
                model.records.insert((room.to_owned(), key), value);
            }
        }
        let waiting = store.waiting_reports(0, usize::MAX)?;
        assert_eq!(store.outbox_len()?, waiting.len() as u64);
        for report in &waiting {
            model.outbox.insert(report.seq, message(report));
        }
        Ok(model)
    }
}

/// A write, waited for.
pub(super) fn write(store: &Store, write: Write) -> Result<Done, StoreError> {
    store.inner.writer.carry_out(write)
}

pub(super) fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let change = prop_oneof![
        3 => (any::<bool>(), 0..4u8, 0..3u8, any::<u32>(), prop_oneof![0..40u16, 0..9_000u16])
            .prop_map(|(k, u, n, v, s)| Change::Upsert(k, u, n, v, s)),
        1 => (any::<bool>(), 0..4u8).prop_map(|(k, u)| Change::Remove(k, u)),
    ];
    proptest::collection::vec(
        prop_oneof![
            4 => proptest::collection::vec(change, 1..6).prop_map(Step::Apply),
            4 => (proptest::option::of(0..3u8), any::<u32>()).prop_map(|(k, v)| Step::Report(k, v)),
            2 => (0..8u8).prop_map(Step::Settle),
            3 => (0..2u8, 0..3u8, any::<u32>()).prop_map(|(r, k, v)| Step::Put(r, k, v)),
            1 => (0..2u8, 0..3u8).prop_map(|(r, k)| Step::Delete(r, k)),
        ],
        1..most,
    )
}
