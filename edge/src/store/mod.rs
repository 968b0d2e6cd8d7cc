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
//! | `outbox_lanes` | (lane, sequence number) | bytes, seconds | the same transaction |
//! | `outbox_totals` | lane | reports, bytes | the same transaction |
//! | `outbox_drops` | (lane, reason) | count | the same transaction |
//!
//! **Write.** The link applies a batch of changes in one transaction and acknowledges after it. Objects are kept as
//! they came, compressed: what the API server said is what the edge stores, unknown fields included.
//!
//! **Read.** By UID, by name, or all of a kind. A name points to the newest UID that took it.
//!
//! **Outbox.** Reports get ascending numbers that are never reused. A report with a coalescing key (a pod's status, a
//! device's twins) replaces an older unsent one of the same key: only the newest state matters. What is too much or too
//! old for [`Retention`] goes, the oldest of the least important [`Lane`] first, and [`Store::drops`] counts it. A report
//! otherwise stays until the provider has settled its number; one that was replaced meanwhile has another number, so a late settlement of the
//! old cannot delete the new.
//!
//! **Recovery.** redb recovers by itself after a crash; after an I/O error, such as a full disk, [`file`] opens it
//! again. Every opening checks every page. A file that is damaged is never overwritten, not in one byte ([`medium`]):
//! [`Store::open`] fails and says what to do. A new file is complete before it gets its name. `meta.schema` is checked
//! before anything else; a newer schema is refused, older ones are migrated step by step in [`schema`].
//!
//! **Compaction.** See [`compact`]: by copying at idle, beside readers and writers.
//!
//! **Invariants** (tested against a simple model, `model.rs`, also after a power cut at every single operation of the
//! disk, in `powercut_tests.rs`): `names` points only to stored objects; every `outbox_keys` entry points to a stored
//! report that carries that key; numbers ascend.

mod check;
mod compact;
#[cfg(test)]
mod compact_tests;
mod digest;
#[cfg(test)]
mod digest_tests;
mod ended;
mod file;
mod medium;
mod memory;
#[cfg(test)]
mod model;
mod objects;
mod outbox;
#[cfg(test)]
mod powercut_tests;
mod retention;
#[cfg(test)]
mod retention_tests;
mod schema;
#[cfg(test)]
mod simulated;
mod state;
#[cfg(test)]
mod tests;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use redb::TableDefinition;
use serde::de::DeserializeOwned;
use skerry_proto::link::{Kind, Upsert, change};
use skerry_proto::object::{ContentHash, ObjectKey, PackError, Uid, unpack};
use tokio::sync::{broadcast, oneshot, watch};

use crate::clock::{Clock, SystemClock};
use file::File;
use medium::{OnDisk, Place};
use writer::{Done, Write, Writer};

pub use check::Statistics;
pub(crate) use check::any_value;
pub use compact::Compacted;
pub use ended::MAX_ENDED;
pub use memory::Memory;
pub use outbox::NewReport;
pub use retention::{DropReason, Lane, LaneLimits, LaneUse, Retention};

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
    /// A page of the file has gone bad. Restarting the daemon checks all of it.
    #[error("the store is damaged: {0}")]
    Broken(String),
    /// Not tried, because the disk has just refused another write. Nothing was changed.
    #[error("the store did not try a write, since the disk refused the one before it")]
    NotTried,
    /// It could not be compacted now, since too much was written, or it was closed.
    #[error("the store is busy")]
    Busy,
    /// A stored value cannot be read.
    #[error("a stored {what} cannot be read: {reason}")]
    Value {
        /// Which.
        what: String,
        /// Why.
        reason: String,
    },
}

impl StoreError {
    /// The disk refused.
    fn is_io(&self) -> bool {
        matches!(
            self,
            Self::Database(redb::Error::Io(_) | redb::Error::PreviousIo) | Self::Reopen(_)
        )
    }
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
    options: Options,
}

/// How a store is kept.
#[derive(Clone)]
pub struct Options {
    /// What the outbox keeps.
    pub retention: Retention,
    /// Tells how old reports are.
    pub clock: Arc<dyn Clock>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            retention: Retention::default(),
            clock: Arc::new(SystemClock),
        }
    }
}

/// A write under way. Dropping it does not stop the write; a failure is then logged.
#[must_use = "a write that nobody waits for may fail unseen"]
pub struct Written(oneshot::Receiver<Result<Done, StoreError>>);

impl Written {
    /// Waits until it is on disk. Answers a report's number, and 0 for anything else. Cancellation safe.
    pub async fn on_disk(self) -> Result<u64, StoreError> {
        match self.0.await {
            Ok(done) => Ok(done?.seq),
            Err(_) => Err(writer::ended()),
        }
    }
}

impl Store {
    /// Opens or creates `<dir>/store.redb`.
    ///
    /// Blocking. Never overwrites a file that it cannot read.
    pub fn open(dir: &Path) -> Result<Self, OpenError> {
        Self::open_with(dir, Options::default())
    }

    /// The same with other options.
    pub fn open_with(dir: &Path, options: Options) -> Result<Self, OpenError> {
        Self::open_at(Box::new(OnDisk::new(dir.join("store.redb"))), options)
    }

    fn open_at(place: Box<dyn Place>, options: Options) -> Result<Self, OpenError> {
        let path = place.path().to_owned();
        let (file, id) = File::open(place, CACHE_BYTES)?;
        let shared = Arc::new(Shared {
            file,
            changes: broadcast::Sender::new(CHANGE_NOTICES),
            outbox_moved: watch::Sender::new(0),
            options,
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
        self.inner
            .writer
            .carry_out(Write::BeginLife)
            .map(|done| done.life)
    }

    /// Made once with the file: tells two stores with one identity apart.
    pub fn id(&self) -> &str {
        &self.inner.id
    }

    /// Bytes of the file on disk.
    pub fn size_bytes(&self) -> u64 {
        self.file().len()
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

    fn file(&self) -> &File {
        &self.inner.shared.file
    }

    fn queue(&self, write: Write) -> Written {
        Written(self.inner.writer.queue(write))
    }

    /// Blocking.
    fn write_and_wait(&self, write: Write) -> Result<(), StoreError> {
        self.inner.writer.carry_out(write).map(drop)
    }

    /// Bytes written to the disk and syncs asked of it since the daemon started.
    pub fn traffic(&self) -> (u64, u64) {
        let traffic = self.file().traffic();
        (
            traffic.bytes.load(Ordering::Relaxed),
            traffic.syncs.load(Ordering::Relaxed),
        )
    }
}
