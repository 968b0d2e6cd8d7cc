//! The open database, and opening it again after an I/O error.
//!
//! After the first failed read or write redb refuses everything ([`redb::StorageError::PreviousIo`]), because it no
//! longer knows what the disk holds. A full disk would so end the store for good. Instead the next write closes the
//! database and opens it anew, which finds the last committed state; while the disk stays full, that is tried again
//! with every transaction.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadTransaction, ReadableDatabase, StorageError, TransactionError, WriteTransaction};

use super::{OpenError, StoreError, schema};

/// One database file. Transactions are begun here and nowhere else.
pub(super) struct File {
    path: PathBuf,
    cache_bytes: usize,
    /// `None` after a failed attempt to open it again. Never held while a transaction waits.
    database: Mutex<Option<Arc<Database>>>,
}

impl File {
    /// Opens or creates the file; answers the store's id with it.
    pub(super) fn open(path: PathBuf, cache_bytes: usize) -> Result<(Self, String), OpenError> {
        let (database, id) = schema::open(&path, cache_bytes)?;
        let database = Mutex::new(Some(Arc::new(database)));
        Ok((
            Self {
                path,
                cache_bytes,
                database,
            },
            id,
        ))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn begin_read(&self) -> Result<ReadTransaction, StoreError> {
        let database = self.database()?;
        match database.begin_read() {
            Err(TransactionError::Storage(StorageError::PreviousIo)) => {
                Ok(self.again(database)?.begin_read()?)
            }
            other => Ok(other?),
        }
    }

    pub(super) fn begin_write(&self) -> Result<WriteTransaction, StoreError> {
        let database = self.database()?;
        match database.begin_write() {
            Err(TransactionError::Storage(StorageError::PreviousIo)) => {
                Ok(self.again(database)?.begin_write()?)
            }
            other => Ok(other?),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Database>>> {
        // The value is replaced as a whole, so a panic elsewhere leaves it valid.
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn database(&self) -> Result<Arc<Database>, StoreError> {
        let mut current = self.lock();
        match &*current {
            Some(database) => Ok(Arc::clone(database)),
            None => self.reopen(&mut current),
        }
    }

    /// The database in place of one that has failed.
    fn again(&self, failed: Arc<Database>) -> Result<Arc<Database>, StoreError> {
        let mut current = self.lock();
        if let Some(database) = &*current
            && !Arc::ptr_eq(database, &failed)
        {
            return Ok(Arc::clone(database));
        }
        // The file's lock goes with the last user of the old one; until then opening fails and is tried again.
        *current = None;
        drop(failed);
        self.reopen(&mut current)
    }

    fn reopen(&self, current: &mut Option<Arc<Database>>) -> Result<Arc<Database>, StoreError> {
        let (database, _) = schema::open(&self.path, self.cache_bytes)
            .map_err(|error| StoreError::Reopen(Box::new(error)))?;
        tracing::info!(path = %self.path.display(), "the store was opened again after an I/O error");
        Ok(Arc::clone(current.insert(Arc::new(database))))
    }
}
