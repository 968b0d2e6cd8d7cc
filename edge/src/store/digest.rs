//! The index of what is held, and its digest: what the provider is told at the start of a session, and after each commit.
//!
//! | Table | Key | Value |
//! |---|---|---|
//! | `held` | (kind, UID) | content hash (16 bytes), expiry (8 bytes, little-endian) |
//! | `meta` | `digest` | sum and count of both groups |
//!
//! Both are written in the transactions that write the objects, so they are true at every commit, and 30,000 objects are
//! told without decoding one of them. **Invariant** (tested in `digest_tests.rs`): the index has one entry for each
//! object, and the sums are those of the index.

use redb::{ReadTransaction, ReadableTable, Table, TableDefinition, WriteTransaction};
use skerry_proto::digest::{Buckets, Chosen, Entry, Group, Sum, buckets_for};
use skerry_proto::link::{Applied, InventoryDigest, InventoryEntry, InventoryRequest};
use skerry_proto::object::{ContentHash, ObjectKey};

use super::objects::{decode_object, kind_byte};
use super::writer::Write;
use super::{META, OBJECTS, Store, StoreError, Written};

/// See the module's documentation.
pub(super) const HELD: TableDefinition<'_, (u8, &str), &[u8]> = TableDefinition::new("held");
const DIGEST: &str = "digest";
const ENTRY_BYTES: usize = 24;

/// Hash of an object that cannot be read: no object has it.
const UNREADABLE: ContentHash = ContentHash([0; 16]);

/// What both groups come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    objects: (Sum, u64),
    tokens: (Sum, u64),
}

impl Totals {
    fn of(&mut self, group: Group) -> &mut (Sum, u64) {
        match group {
            Group::Objects => &mut self.objects,
            Group::Tokens => &mut self.tokens,
        }
    }

    fn add(&mut self, kind: u8, uid: &str, entry: &Entry) {
        let kind = i32::from(kind);
        let (sum, count) = self.of(Group::of(kind));
        sum.add(Sum::of(kind, uid, entry));
        *count += 1;
    }

    fn remove(&mut self, kind: u8, uid: &str, entry: &Entry) {
        let kind = i32::from(kind);
        let (sum, count) = self.of(Group::of(kind));
        sum.remove(Sum::of(kind, uid, entry));
        *count = count.saturating_sub(1);
    }

    fn to_bytes(self) -> Vec<u8> {
        [self.objects, self.tokens]
            .iter()
            .flat_map(|(sum, count)| sum.to_bytes().into_iter().chain(count.to_le_bytes()))
            .collect()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let half = |at: usize| {
            let sum = Sum::from_slice(bytes.get(at..at + 16)?)?;
            let count = <[u8; 8]>::try_from(bytes.get(at + 16..at + 24)?).ok()?;
            Some((sum, u64::from_le_bytes(count)))
        };
        Some(Self {
            objects: half(0)?,
            tokens: half(24)?,
        })
    }
}

/// The index within one transaction that changes objects. [`Held::save`] ends it.
pub(super) struct Held<'t> {
    table: Table<'t, (u8, &'static str), &'static [u8]>,
    totals: Totals,
}

impl<'t> Held<'t> {
    pub(super) fn open(transaction: &'t WriteTransaction) -> Result<Self, StoreError> {
        let meta = transaction.open_table(META)?;
        let totals = meta.get(DIGEST)?.and_then(|v| Totals::from_bytes(v.value()));
        Ok(Self {
            table: transaction.open_table(HELD)?,
            totals: totals.unwrap_or_default(),
        })
    }

    pub(super) fn put(&mut self, kind: u8, uid: &str, entry: Entry) -> Result<(), StoreError> {
        let older = self.table.insert((kind, uid), encode(&entry).as_slice())?;
        if let Some(older) = older {
            self.totals.remove(kind, uid, &decode(older.value()));
        }
        self.totals.add(kind, uid, &entry);
        Ok(())
    }

    pub(super) fn remove(&mut self, kind: u8, uid: &str) -> Result<(), StoreError> {
        if let Some(older) = self.table.remove((kind, uid))? {
            self.totals.remove(kind, uid, &decode(older.value()));
        }
        Ok(())
    }

    pub(super) fn save(self, transaction: &WriteTransaction) -> Result<(), StoreError> {
        let mut meta = transaction.open_table(META)?;
        meta.insert(DIGEST, self.totals.to_bytes().as_slice())?;
        Ok(())
    }
}

/// Makes the index anew from the objects: for a store that was written by a release without it.
pub(super) fn rebuild(
    transaction: &WriteTransaction,
    meta: &mut Table<'_, &'static str, &'static [u8]>,
) -> Result<(), StoreError> {
    transaction.delete_table(HELD)?;
    let mut held = Held {
        table: transaction.open_table(HELD)?,
        totals: Totals::default(),
    };
    for object in transaction.open_table(OBJECTS)?.iter()? {
        let (key, value) = object?;
        let (kind, uid) = key.value();
        let entry = match decode_object(value.value()) {
            Ok(object) => Entry {
                hash: object.hash,
                expires_unix: object.expires_unix,
            },
            // Told without a hash, so that the provider sends it again.
            Err(_) => Entry {
                hash: UNREADABLE,
                expires_unix: 0,
            },
        };
        held.put(kind, uid, entry)?;
    }
    meta.insert(DIGEST, held.totals.to_bytes().as_slice())?;
    Ok(())
}

/// Notes that a stored object cannot be read: the digest differs from then on, and the provider sends it again.
pub(super) fn distrust(transaction: &WriteTransaction, key: &ObjectKey) -> Result<(), StoreError> {
    let mut held = Held::open(transaction)?;
    let (kind, uid) = (kind_byte(key.kind), key.uid.as_str());
    if held.table.get((kind, uid))?.is_some() {
        let unreadable = Entry {
            hash: UNREADABLE,
            expires_unix: 0,
        };
        held.put(kind, uid, unreadable)?;
    }
    held.save(transaction)
}

impl Store {
    /// What the store holds, in short.
    pub fn inventory_digest(&self) -> Result<InventoryDigest, StoreError> {
        self.file().read(|transaction| {
            let totals = totals(transaction)?;
            let mut objects = Buckets::new(buckets_for(totals.objects.1));
            let mut tokens = Buckets::new(buckets_for(totals.tokens.1));
            for entry in transaction.open_table(HELD)?.iter()? {
                let (key, value) = entry?;
                let (kind, uid) = key.value();
                let (kind, entry) = (i32::from(kind), decode(value.value()));
                match Group::of(kind) {
                    Group::Objects => objects.add(kind, uid, &entry),
                    Group::Tokens => tokens.add(kind, uid, &entry),
                }
            }
            Ok(InventoryDigest {
                objects: Some(objects.message()),
                tokens: Some(tokens.message()),
            })
        })
    }

    /// Everything that the store holds, for a provider that does not know digests.
    pub fn inventory(&self) -> Result<Vec<InventoryEntry>, StoreError> {
        self.inventory_where(|_, _| true)
    }

    /// What the store holds in the buckets that the provider asks for.
    pub fn inventory_of(&self, request: &InventoryRequest) -> Result<Vec<InventoryEntry>, StoreError> {
        let chosen = |set: &Option<_>| set.as_ref().map(Chosen::new).unwrap_or_default();
        let (objects, tokens) = (chosen(&request.objects), chosen(&request.tokens));
        self.inventory_where(|kind, uid| match Group::of(kind) {
            Group::Objects => objects.has(kind, uid),
            Group::Tokens => tokens.has(kind, uid),
        })
    }

    fn inventory_where(&self, wanted: impl Fn(i32, &str) -> bool) -> Result<Vec<InventoryEntry>, StoreError> {
        self.file().read(|transaction| {
            let mut entries = Vec::new();
            for entry in transaction.open_table(HELD)?.iter()? {
                let (key, value) = entry?;
                let (kind, uid) = key.value();
                let kind = i32::from(kind);
                if !wanted(kind, uid) {
                    continue;
                }
                let Entry { hash, expires_unix } = decode(value.value());
                let hash = match hash {
                    UNREADABLE => bytes::Bytes::new(),
                    hash => bytes::Bytes::copy_from_slice(&hash.0),
                };
                entries.push(InventoryEntry {
                    kind,
                    uid: uid.to_owned(),
                    hash,
                    expires_unix,
                });
            }
            Ok(entries)
        })
    }

    /// The acknowledgement of all changes up to `seq`, which must be committed, with the digest of the store.
    pub fn applied(&self, seq: u64) -> Result<Applied, StoreError> {
        let totals = self.file().read(totals)?;
        let bytes = |sum: Sum| bytes::Bytes::copy_from_slice(&sum.to_bytes());
        Ok(Applied {
            seq,
            objects_sum: bytes(totals.objects.0),
            tokens_sum: bytes(totals.tokens.0),
        })
    }

    /// Notes that an object cannot be read, so that the provider sends it again.
    pub fn distrust(&self, key: &ObjectKey) -> Written {
        self.queue(Write::Distrust(key.clone()))
    }
}

fn totals(transaction: &ReadTransaction) -> Result<Totals, StoreError> {
    let meta = transaction.open_table(META)?;
    let stored = meta.get(DIGEST)?.and_then(|v| Totals::from_bytes(v.value()));
    Ok(stored.unwrap_or_default())
}

fn encode(entry: &Entry) -> [u8; ENTRY_BYTES] {
    let mut bytes = [0; ENTRY_BYTES];
    bytes[..16].copy_from_slice(&entry.hash.0);
    bytes[16..].copy_from_slice(&entry.expires_unix.to_le_bytes());
    bytes
}

/// Bytes of a wrong length are told as an object that cannot be read.
fn decode(bytes: &[u8]) -> Entry {
    let read = || {
        let hash = ContentHash::from_slice(bytes.get(..16)?)?;
        let expires = <[u8; 8]>::try_from(bytes.get(16..ENTRY_BYTES)?).ok()?;
        Some(Entry {
            hash,
            expires_unix: i64::from_le_bytes(expires),
        })
    };
    read().unwrap_or(Entry {
        hash: UNREADABLE,
        expires_unix: 0,
    })
}
