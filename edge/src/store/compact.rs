//! Compaction: the store is copied into a new file, which then takes the old one's place.
//!
//! redb gives pages back to itself and rarely to the file system; its own compaction stops all readers and writers. So,
//! when nothing has been written for a while and half of the file is free, a thread copies a snapshot into a draft, a
//! little at a time. Readers go on, and so do writers: what they write to the old file meanwhile is kept in a journal, and
//! since a write is a function of what is stored, carrying the journal out on the draft makes the same store of it. That,
//! a comparison and a rename are all that writers wait for. A power cut leaves the one file or the other; a draft that was
//! left is removed with the next opening.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use redb::{
    Database, Key, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition,
    Value,
};

use super::ended::{ENDED, ORDER};
use super::file::Open;
use super::outbox::{DROPS, KEYS, LANES, OUTBOX, TOTALS};
use super::writer::Write;
use super::{META, NAMES, OBJECTS, STATE, Shared, StoreError, digest};

/// A smaller file is left alone.
const LEAST_BYTES: u64 = 4 * 1024 * 1024;
/// So much must have been written since the last thought of it.
const LEAST_TRAFFIC: u64 = 1024 * 1024;
/// Entries copied in one transaction.
const CHUNK: usize = 500;
/// A journal beyond this says that it is not the time.
const JOURNAL_BYTES: usize = 8 * 1024 * 1024;

/// Bytes of the file before and after.
pub type Compacted = (u64, u64);

/// A compaction under way.
pub(super) struct Compaction {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Open, StoreError>>,
    journal: Vec<Write>,
    journal_bytes: usize,
    before: u64,
    waiter: Option<mpsc::SyncSender<Result<Compacted, StoreError>>>,
}

/// Whether the file has become worth it. Reads all of it, if much was written since the last time.
pub(super) fn is_due(shared: &Shared, thought_at: &mut Option<u64>) -> bool {
    let written = shared.file.traffic().bytes.load(Ordering::Relaxed);
    let bytes = shared.file.len();
    if bytes < LEAST_BYTES || thought_at.is_some_and(|then| written - then < LEAST_TRAFFIC) {
        return false;
    }
    *thought_at = Some(written);
    match shared.file.statistics() {
        Ok(used) => used.allocated_bytes * 2 < bytes,
        Err(error) => {
            tracing::warn!(%error, "the store cannot be measured");
            false
        }
    }
}

impl Compaction {
    /// Takes the snapshot. From here on every write must be noted.
    pub(super) fn begin(
        shared: &Arc<Shared>,
        waiter: Option<mpsc::SyncSender<Result<Compacted, StoreError>>>,
    ) -> Option<Self> {
        let stop = Arc::<AtomicBool>::default();
        let (stopped, copied) = (Arc::clone(&stop), Arc::clone(shared));
        let begun = shared.file.snapshot().and_then(|snapshot| {
            let copy = move || {
                let attempt = catch_unwind(AssertUnwindSafe(|| {
                    copy_into_draft(&copied, &snapshot.1, &stopped)
                }));
                drop(snapshot);
                attempt.unwrap_or_else(|_| Err(StoreError::Broken("a page cannot be copied".to_owned())))
            };
            let thread = std::thread::Builder::new()
                .name("store-copy".to_owned())
                .spawn(copy);
            thread.map_err(|error| StoreError::Value {
                what: "thread".to_owned(),
                reason: error.to_string(),
            })
        });
        match begun {
            Ok(thread) => Some(Self {
                stop,
                thread,
                journal: Vec::new(),
                journal_bytes: 0,
                before: shared.file.len(),
                waiter,
            }),
            Err(error) => {
                give_up(shared, waiter, error);
                None
            }
        }
    }

    /// Notes a write that the old file has got.
    pub(super) fn note(&mut self, write: Write) {
        self.journal_bytes += write.weight();
        if self.journal_bytes > JOURNAL_BYTES {
            self.stop.store(true, Ordering::Relaxed);
            self.journal = Vec::new();
        } else {
            self.journal.push(write);
        }
    }

    pub(super) fn is_copied(&self) -> bool {
        self.thread.is_finished()
    }

    /// Puts the copy in place. Waits for it when it is not complete.
    pub(super) fn finish(self, shared: &Shared) {
        let Self {
            stop,
            thread,
            journal,
            before,
            waiter,
            ..
        } = self;
        // It panics nowhere that is not caught.
        let copied = thread
            .join()
            .unwrap_or_else(|_| Err(StoreError::Broken("the copying thread has ended".to_owned())));
        let done = copied.and_then(|draft| {
            if stop.load(Ordering::Relaxed) {
                return Err(StoreError::Busy);
            }
            let attempt = catch_unwind(AssertUnwindSafe(|| catch_up(shared, &draft, &journal)));
            attempt.unwrap_or_else(|_| Err(StoreError::Broken("its structure is broken".to_owned())))?;
            shared.file.replace(draft)
        });
        match done {
            Ok(()) => {
                let after = shared.file.len();
                tracing::info!(before, after, "the store was compacted");
                if let Some(waiter) = waiter {
                    let _ = waiter.send(Ok((before, after)));
                }
            }
            Err(error) => give_up(shared, waiter, error),
        }
    }

    /// Ends it without a result.
    pub(super) fn abandon(self, shared: &Shared) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.join();
        give_up(shared, self.waiter, StoreError::Busy);
    }
}

fn give_up(
    shared: &Shared,
    waiter: Option<mpsc::SyncSender<Result<Compacted, StoreError>>>,
    error: StoreError,
) {
    shared.file.discard_draft();
    match waiter {
        Some(waiter) => {
            let _ = waiter.send(Err(error));
        }
        None => tracing::info!(%error, "the store was not compacted; it is tried again"),
    }
}

fn copy_into_draft(shared: &Shared, from: &ReadTransaction, stop: &AtomicBool) -> Result<Open, StoreError> {
    let draft = shared.file.draft()?;
    copy(from, &draft, META, stop)?;
    copy(from, &draft, OBJECTS, stop)?;
    copy(from, &draft, digest::HELD, stop)?;
    copy(from, &draft, NAMES, stop)?;
    copy(from, &draft, STATE, stop)?;
    copy(from, &draft, OUTBOX, stop)?;
    copy(from, &draft, KEYS, stop)?;
    copy(from, &draft, LANES, stop)?;
    copy(from, &draft, TOTALS, stop)?;
    copy(from, &draft, DROPS, stop)?;
    copy(from, &draft, ENDED, stop)?;
    copy(from, &draft, ORDER, stop)?;
    Ok(draft)
}

fn copy<K: Key + 'static, V: Value + 'static>(
    from: &ReadTransaction,
    to: &Database,
    table: TableDefinition<'_, K, V>,
    stop: &AtomicBool,
) -> Result<(), StoreError> {
    let source = from.open_table(table)?;
    let mut entries = source.iter()?;
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(StoreError::Busy);
        }
        let transaction = to.begin_write()?;
        let mut copied = 0;
        {
            let mut target = transaction.open_table(table)?;
            for entry in entries.by_ref().take(CHUNK) {
                let (key, value) = entry?;
                target.insert(key.value(), value.value())?;
                copied += 1;
            }
        }
        transaction.commit()?;
        if copied < CHUNK {
            return Ok(());
        }
    }
}

/// Carries out what was written meanwhile, and makes sure that nothing is missing.
fn catch_up(shared: &Shared, draft: &Database, journal: &[Write]) -> Result<(), StoreError> {
    let transaction = draft.begin_write()?;
    for write in journal {
        write.carry_out(&transaction, &shared.options.retention)?;
    }
    transaction.commit()?;
    let (old, new) = (shared.file.read(sizes)?, sizes(&draft.begin_read()?)?);
    if old != new {
        return Err(StoreError::Value {
            what: "copy".to_owned(),
            reason: format!("it holds {new:?}, not {old:?}"),
        });
    }
    Ok(())
}

/// Entries of each table.
pub(super) fn sizes(transaction: &ReadTransaction) -> Result<Vec<(&'static str, u64)>, StoreError> {
    Ok(vec![
        ("meta", transaction.open_table(META)?.len()?),
        ("objects", transaction.open_table(OBJECTS)?.len()?),
        ("held", transaction.open_table(digest::HELD)?.len()?),
        ("names", transaction.open_table(NAMES)?.len()?),
        ("state", transaction.open_table(STATE)?.len()?),
        ("outbox", transaction.open_table(OUTBOX)?.len()?),
        ("outbox_keys", transaction.open_table(KEYS)?.len()?),
        ("outbox_lanes", transaction.open_table(LANES)?.len()?),
        ("outbox_totals", transaction.open_table(TOTALS)?.len()?),
        ("outbox_drops", transaction.open_table(DROPS)?.len()?),
        ("ended", transaction.open_table(ENDED)?.len()?),
        ("ended_order", transaction.open_table(ORDER)?.len()?),
    ])
}
