//! What the site knows, on disk: the only module that touches redb.
//!
//! # Design
//!
//! One redb file, `<data-dir>/store.redb`. A write whose call or answer ([`Written`]) has returned is on disk (fsync), so
//! "stored" means "survives a power cut". Writes of one moment share a transaction and are on disk in the order in which
//! they were queued ([`writer`]). Readers see a consistent snapshot and never wait for writers.
//!
//! | Table | Key | Value | Written by |
//! |---|---|---|---|
//! | `meta` | name | bytes | [`Store::open`]: `schema`, `store_id`; outbox: `next_seq` |
//! | `objects` | (kind, UID) | an [`Upsert`] message | the link, through [`Store::apply`] |
//! | `held` | (kind, UID) | hash and expiry, see [`digest`] | the same transaction |
//! | `ended` | UID of a pod | number, see [`ended`] | the transaction that removes it |
//! | `names` | (kind, namespace, name) | UID | the same transaction |
//! | `state` | (room, key) | JSON | each room for itself: pod records, device twins |
//! | `outbox` | sequence number | a [`Report`] message | any room, through [`Store::report`] |
//! | `outbox_keys` | coalescing key | sequence number | the same transaction |
//! | `outbox_events` | sequence number | () | the same transaction |
//!
//! **Write.** The link applies a batch of changes in one transaction and acknowledges after it. Objects are kept as
//! they came, compressed: what the API server said is what the edge stores, unknown fields included.
//!
//! **Read.** By UID, by name, or all of a kind. A name points to the newest UID that took it.
//!
//! **Outbox.** Reports get ascending numbers that are never reused. A report with a coalescing key (a pod's status, a
//! device's twins) replaces an older unsent one of the same key: only the newest state matters. Events do not
//! coalesce; beyond [`MAX_EVENTS`] the oldest goes and [`Store::dropped_reports`] counts it. A report stays until the
//! provider has settled its number; one that was replaced meanwhile has another number, so a late settlement of the
//! old cannot delete the new.
//!
//! **Recovery.** redb recovers by itself after a crash; after an I/O error, such as a full disk, [`file`] opens it
//! again. A file that it cannot read is never overwritten: [`Store::open`] fails and says what to do. `meta.schema` is checked before anything else; a newer schema is
//! refused, older ones are migrated step by step in [`schema`].
//!
//! **Invariants** (tested against a simple model in `tests.rs`): `names` points only to stored objects; every
//! `outbox_keys` entry points to a stored report that carries that key; numbers ascend.

mod digest;
#[cfg(test)]
mod digest_tests;
mod ended;
mod file;
mod outbox;
mod schema;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prost::Message;
use redb::{ReadableTable, TableDefinition, WriteTransaction};
use serde::Serialize;
use serde::de::DeserializeOwned;
use skerry_proto::link::{self, Kind, Upsert, change};
use skerry_proto::object::{ContentHash, ObjectKey, PackError, Uid, unpack};
use tokio::sync::{broadcast, oneshot, watch};

use file::File;
use writer::{Done, Write, Writer};

pub use ended::MAX_ENDED;
pub use outbox::{MAX_EVENTS, NewReport};

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const OBJECTS: TableDefinition<'_, (u8, &str), &[u8]> = TableDefinition::new("objects");
const NAMES: TableDefinition<'_, (u8, &str, &str), &str> = TableDefinition::new("names");
const STATE: TableDefinition<'_, (&str, &str), &[u8]> = TableDefinition::new("state");

/// redb's page cache. The working set of a site is small; the default of 1 GiB is not.
const CACHE_BYTES: usize = 2 * 1024 * 1024;

/// How many change notices a slow reader may fall behind before it has to look at everything again.
const CHANGE_NOTICES: usize = 4096;

/// Why the store could not be opened. The daemon cannot run; its exit code is 4.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The file is damaged.
    #[error(
        "the store {path} is damaged ({reason}). Nothing was changed. Move the file aside and start again: the \
         provider sends everything anew and running containers are adopted; restart counts and reports that were not \
         yet sent are lost"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What redb found.
        reason: String,
    },
    /// Another daemon has it open.
    #[error("the store {path} is in use: is another skerry-edge running on this data directory?")]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file was written by a newer release.
    #[error(
        "the store {path} has schema {found}, this release knows up to {known}: install the newer release again"
    )]
    TooNew {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u32,
        /// The newest that this build knows.
        known: u32,
    },
    /// The file system refuses.
    #[error("the store {path} cannot be opened: {reason}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's words.
        reason: String,
    },
}

/// Why a read or a write failed. Nothing was changed. Retry later; a full disk is the usual cause of a failed write.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// redb or the disk.
    #[error("the store failed: {0}")]
    Database(#[from] redb::Error),
    /// It failed before and could not be opened again.
    #[error(transparent)]
    Reopen(Box<OpenError>),
    /// A stored value cannot be read.
    #[error("a stored {what} cannot be read: {reason}")]
    Value {
        /// Which.
        what: String,
        /// Why.
        reason: String,
    },
}

macro_rules! from_redb {
    ($($error:ty),*) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                Self::Database(error.into())
            }
        }
    )*};
}
from_redb!(
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError
);

/// An object as the provider sent it.
#[derive(Clone, Debug, PartialEq)]
pub struct StoredObject {
    /// Kind and UID.
    pub key: ObjectKey,
    /// Empty for cluster-scoped kinds.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// The provider's hash of it.
    pub hash: ContentHash,
    /// For tokens: seconds since the Unix epoch; 0 = never.
    pub expires_unix: i64,
    json_zstd: bytes::Bytes,
}

impl StoredObject {
    /// The object as a typed value.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, PackError> {
        unpack(&self.json_zstd)
    }
}

impl TryFrom<Upsert> for StoredObject {
    type Error = StoreError;

    fn try_from(upsert: Upsert) -> Result<Self, StoreError> {
        let bad = |reason: &str| StoreError::Value {
            what: format!("object {}/{}", upsert.namespace, upsert.name),
            reason: reason.to_owned(),
        };
        let kind = upsert.kind();
        if kind == Kind::Unspecified {
            return Err(bad("unknown kind"));
        }
        let hash = ContentHash::from_slice(&upsert.hash).ok_or_else(|| bad("hash of a wrong length"))?;
        Ok(Self {
            key: ObjectKey {
                kind,
                uid: Uid::from(upsert.uid),
            },
            namespace: upsert.namespace,
            name: upsert.name,
            hash,
            expires_unix: upsert.expires_unix,
            json_zstd: upsert.json_zstd,
        })
    }
}

/// Tells the rooms that an object came, changed or went. The store already holds the new state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectChanged {
    /// Kind and UID.
    pub key: ObjectKey,
    /// Empty for cluster-scoped kinds.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// It is gone, by an explicit order of the provider.
    pub removed: bool,
}

/// The site's store. Clones share one file.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    id: String,
    writer: Writer,
}

/// What readers and the writer share.
struct Shared {
    file: File,
    changes: broadcast::Sender<ObjectChanged>,
    outbox_moved: watch::Sender<u64>,
    dropped: AtomicU64,
}

/// A write under way. Dropping it does not stop the write; a failure is then logged.
#[must_use = "a write that nobody waits for may fail unseen"]
pub struct Written(oneshot::Receiver<Result<Done, StoreError>>);

impl Written {
    /// Waits until it is on disk. Answers a report's number, and 0 for anything else. Cancellation safe.
    pub async fn on_disk(self) -> Result<u64, StoreError> {
        match self.0.await {
            Ok(done) => Ok(done?.seq),
            Err(_) => Err(StoreError::Value {
                what: "transaction".to_owned(),
                reason: "the thread that writes has ended".to_owned(),
            }),
        }
    }
}

impl Store {
    /// Opens or creates `<dir>/store.redb`.
    ///
    /// Blocking. Never overwrites a file that it cannot read.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        let path = dir.join("store.redb");
        let (file, id) = File::open(path.clone(), CACHE_BYTES)?;
        let shared = Arc::new(Shared {
            file,
            changes: broadcast::Sender::new(CHANGE_NOTICES),
            outbox_moved: watch::Sender::new(0),
            dropped: AtomicU64::new(0),
        });
        let writer = Writer::start(Arc::clone(&shared)).map_err(|error| OpenError::Io {
            path,
            reason: error.to_string(),
        })?;
        Ok(Self {
            inner: Arc::new(Inner { shared, id, writer }),
        })
    }

    /// Begins another life: answers how many daemons have been started on this store, this one included. Blocking.
    pub fn begin_life(&self) -> Result<u64, StoreError> {
        let transaction = self.inner.shared.file.begin_write()?;
        let life;
        {
            let mut meta = transaction.open_table(META)?;
            let stored = meta
                .get("incarnation")?
                .and_then(|v| <[u8; 8]>::try_from(v.value()).ok());
            life = stored.map_or(0, u64::from_le_bytes) + 1;
            meta.insert("incarnation", life.to_le_bytes().as_slice())?;
        }
        transaction.commit()?;
        Ok(life)
    }

    fn begin_read(&self) -> Result<redb::ReadTransaction, StoreError> {
        self.inner.shared.file.begin_read()
    }

    /// Made once with the file: tells two stores with one identity apart.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// Bytes of the file on disk.
    pub fn size_bytes(&self) -> u64 {
        std::fs::metadata(self.inner.shared.file.path()).map_or(0, |m| m.len())
    }

    /// Notices of object changes from now on. A receiver that lags must read everything again.
    pub fn changes(&self) -> broadcast::Receiver<ObjectChanged> {
        self.inner.shared.changes.subscribe()
    }

    /// Commits a batch of the provider's changes in one transaction, then notifies.
    ///
    /// An object that cannot be stored (unknown kind, bad hash) is skipped and logged: one bad object never stops the
    /// rest. Not cancelled by dropping the future: the transaction completes.
    pub async fn apply(&self, changes: Vec<change::Change>) -> Result<(), StoreError> {
        self.queue(Write::Apply(changes)).on_disk().await.map(drop)
    }

    fn queue(&self, write: Write) -> Written {
        Written(self.inner.writer.queue(write))
    }

    /// The object with that kind and UID.
    pub fn get(&self, key: &ObjectKey) -> Result<Option<StoredObject>, StoreError> {
        let transaction = self.inner.shared.file.begin_read()?;
        let objects = transaction.open_table(OBJECTS)?;
        objects
            .get((kind_byte(key.kind), key.uid.as_str()))?
            .map(|value| decode_object(value.value()))
            .transpose()
    }

    /// The object with that name; `namespace` is empty for cluster-scoped kinds.
    pub fn find(&self, kind: Kind, namespace: &str, name: &str) -> Result<Option<StoredObject>, StoreError> {
        let transaction = self.inner.shared.file.begin_read()?;
        let names = transaction.open_table(NAMES)?;
        let Some(uid) = names.get((kind_byte(kind), namespace, name))? else {
            return Ok(None);
        };
        let objects = transaction.open_table(OBJECTS)?;
        objects
            .get((kind_byte(kind), uid.value()))?
            .map(|value| decode_object(value.value()))
            .transpose()
    }

    /// All objects of a kind, ordered by UID. One that cannot be read is logged and left out.
    pub fn list(&self, kind: Kind) -> Result<Vec<StoredObject>, StoreError> {
        let transaction = self.inner.shared.file.begin_read()?;
        let objects = transaction.open_table(OBJECTS)?;
        let byte = kind_byte(kind);
        let mut found = Vec::new();
        for entry in objects.range((byte, "")..(byte + 1, ""))? {
            let (key, value) = entry?;
            match decode_object(value.value()) {
                Ok(object) => found.push(object),
                Err(error) => {
                    let uid = Uid::from(key.value().1);
                    tracing::error!(%uid, %error, "a stored object is left out; the provider is asked for it again");
                    drop(self.distrust(&ObjectKey { kind, uid }));
                }
            }
        }
        Ok(found)
    }

    /// How many objects of a kind are stored.
    pub fn count(&self, kind: Kind) -> Result<usize, StoreError> {
        let transaction = self.inner.shared.file.begin_read()?;
        let objects = transaction.open_table(OBJECTS)?;
        let byte = kind_byte(kind);
        let mut count = 0;
        for entry in objects.range((byte, "")..(byte + 1, ""))? {
            entry?;
            count += 1;
        }
        Ok(count)
    }

    /// A room's own record.
    pub fn state_get<T: DeserializeOwned>(&self, room: &str, key: &str) -> Result<Option<T>, StoreError> {
        let transaction = self.inner.shared.file.begin_read()?;
        let table = transaction.open_table(STATE)?;
        table
            .get((room, key))?
            .map(|value| decode_state(room, key, value.value()))
            .transpose()
    }

    /// All records of a room, by key. One that cannot be read is logged and left out.
    pub fn state_list<T: DeserializeOwned>(&self, room: &str) -> Result<Vec<(String, T)>, StoreError> {
        let transaction = self.inner.shared.file.begin_read()?;
        let table = transaction.open_table(STATE)?;
        let mut found = Vec::new();
        for entry in table.range((room, "")..)? {
            let (place, value) = entry?;
            let (owner, key) = place.value();
            if owner != room {
                break;
            }
            match decode_state(room, key, value.value()) {
                Ok(record) => found.push((key.to_owned(), record)),
                Err(error) => tracing::error!(room, key, %error, "a stored record is left out"),
            }
        }
        Ok(found)
    }

    /// Queues a room's record, after everything that was queued before; for many small writes in a row. Fails when the
    /// record cannot be put into words. A room uses either this for a record, or [`Store::state_put`].
    pub fn queue_state<T: Serialize>(
        &self,
        room: &'static str,
        key: &str,
        record: &T,
    ) -> Result<Written, StoreError> {
        let json = state_json(room, key, record)?;
        let key = key.to_owned();
        Ok(self.queue(Write::Put { room, key, json }))
    }

    /// Queues the end of a room's record; one that is not there is fine.
    pub fn queue_state_end(&self, room: &'static str, key: &str) -> Written {
        let key = key.to_owned();
        self.queue(Write::Delete { room, key })
    }

    /// Writes a room's record; on disk when this returns. Blocking.
    pub fn state_put<T: Serialize>(&self, room: &str, key: &str, record: &T) -> Result<(), StoreError> {
        let json = state_json(room, key, record)?;
        let transaction = self.inner.shared.file.begin_write()?;
        transaction
            .open_table(STATE)?
            .insert((room, key), json.as_slice())?;
        Ok(transaction.commit()?)
    }

    /// Removes a room's record; one that is not there is fine. Blocking.
    pub fn state_delete(&self, room: &str, key: &str) -> Result<(), StoreError> {
        let transaction = self.inner.shared.file.begin_write()?;
        transaction.open_table(STATE)?.remove((room, key))?;
        Ok(transaction.commit()?)
    }

    /// Reports that were dropped for want of room since the daemon started.
    pub fn dropped_reports(&self) -> u64 {
        self.inner.shared.dropped.load(Ordering::Relaxed)
    }
}

fn state_json<T: Serialize>(room: &str, key: &str, record: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|e| StoreError::Value {
        what: format!("{room} record {key}"),
        reason: e.to_string(),
    })
}

/// Carries out the provider's changes; answers what to tell the rooms once they are on disk.
fn apply(
    transaction: &WriteTransaction,
    changes: &[change::Change],
) -> Result<Vec<ObjectChanged>, StoreError> {
    let mut notices = Vec::with_capacity(changes.len());
    let mut objects = transaction.open_table(OBJECTS)?;
    let mut names = transaction.open_table(NAMES)?;
    let mut held = digest::Held::open(transaction)?;
    for change in changes {
        let notice = match change {
            change::Change::Upsert(upsert) => {
                upsert_object(&mut objects, &mut names, &mut held, upsert.clone())?
            }
            change::Change::Remove(remove) => {
                let notice = remove_object(&mut objects, &mut names, &mut held, remove)?;
                if notice.is_some() && remove.kind() == Kind::Pod {
                    ended::bury(transaction, &remove.uid, MAX_ENDED)?;
                }
                notice
            }
        };
        notices.extend(notice);
    }
    held.save(transaction)?;
    Ok(notices)
}

type ObjectTable<'t> = redb::Table<'t, (u8, &'static str), &'static [u8]>;
type NameTable<'t> = redb::Table<'t, (u8, &'static str, &'static str), &'static str>;

fn upsert_object(
    objects: &mut ObjectTable<'_>,
    names: &mut NameTable<'_>,
    held: &mut digest::Held<'_>,
    upsert: Upsert,
) -> Result<Option<ObjectChanged>, StoreError> {
    let encoded = upsert.encode_to_vec();
    let object = match StoredObject::try_from(upsert) {
        Ok(object) => object,
        Err(error) => {
            tracing::error!(%error, "an object from the provider is not stored");
            return Ok(None);
        }
    };
    let byte = kind_byte(object.key.kind);
    objects.insert((byte, object.key.uid.as_str()), encoded.as_slice())?;
    let entry = skerry_proto::digest::Entry {
        hash: object.hash,
        expires_unix: object.expires_unix,
    };
    held.put(byte, object.key.uid.as_str(), entry)?;
    names.insert(
        (byte, object.namespace.as_str(), object.name.as_str()),
        object.key.uid.as_str(),
    )?;
    Ok(Some(ObjectChanged {
        key: object.key,
        namespace: object.namespace,
        name: object.name,
        removed: false,
    }))
}

fn remove_object(
    objects: &mut ObjectTable<'_>,
    names: &mut NameTable<'_>,
    held: &mut digest::Held<'_>,
    remove: &link::Remove,
) -> Result<Option<ObjectChanged>, StoreError> {
    let kind = remove.kind();
    let byte = kind_byte(kind);
    held.remove(byte, &remove.uid)?;
    let Some(encoded) = objects
        .remove((byte, remove.uid.as_str()))?
        .map(|value| value.value().to_vec())
    else {
        return Ok(None);
    };
    let (namespace, name) = match Upsert::decode(encoded.as_slice()) {
        Ok(object) => (object.namespace, object.name),
        Err(_) => (String::new(), String::new()),
    };
    // The name may already belong to a successor with another UID.
    let place = (byte, namespace.as_str(), name.as_str());
    let owned = names.get(place)?.is_some_and(|uid| uid.value() == remove.uid);
    if owned {
        names.remove(place)?;
    }
    Ok(Some(ObjectChanged {
        key: ObjectKey {
            kind,
            uid: Uid::from(remove.uid.as_str()),
        },
        namespace,
        name,
        removed: true,
    }))
}

fn decode_object(encoded: &[u8]) -> Result<StoredObject, StoreError> {
    Upsert::decode(encoded)
        .map_err(|e| StoreError::Value {
            what: "object".to_owned(),
            reason: e.to_string(),
        })?
        .try_into()
}

fn decode_state<T: DeserializeOwned>(room: &str, key: &str, json: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(json).map_err(|e| StoreError::Value {
        what: format!("{room} record {key}"),
        reason: e.to_string(),
    })
}

/// The kind's number in keys; the proto file promises that numbers are never reused.
fn kind_byte(kind: Kind) -> u8 {
    // Kinds are few and numbered from 0; the enum has no value beyond 255.
    u8::try_from(i32::from(kind)).unwrap_or(0)
}
