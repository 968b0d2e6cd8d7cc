//! The open database, and opening it again after a failure.
//!
//! After the first failed read or write redb refuses everything ([`redb::StorageError::PreviousIo`]), because it no
//! longer knows what the disk holds. A full disk would so end the store for good. Instead the next transaction closes
//! the database and opens it anew, which finds the last committed state; while the disk stays full, that is tried again
//! with every transaction.
//!
//! A page that went bad while the file is open makes redb fail or panic. Both are caught here, the transaction fails,
//! and the next one opens the file again, which checks all of it. A file that then proves to be damaged is not looked
//! at again before the daemon's restart.

use std::ops::Deref;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::{Database, ReadTransaction, ReadableDatabase, StorageError, TransactionError, WriteTransaction};

use super::medium::{Place, Traffic};
use super::{OpenError, StoreError, schema};

/// One database file. Transactions are begun here and nowhere else.
pub(super) struct File {
    place: Box<dyn Place>,
    cache_bytes: usize,
    traffic: Arc<Traffic>,
    /// Never held while a transaction waits.
    state: Mutex<State>,
}

/// How a file's pages are used.
pub(super) struct Used {
    pub(super) allocated_bytes: u64,
    pub(super) stored_bytes: u64,
}

enum State {
    Open(Arc<Open>),
    /// It failed; the next transaction opens it again.
    Failed,
    /// It cannot be used any more.
    Damaged(String),
}

/// A database whose end cannot take the thread with it, whatever state the file is in.
pub(super) struct Open(Option<Database>);

impl Open {
    pub(super) fn new(database: Database) -> Self {
        Self(Some(database))
    }
}

impl Deref for Open {
    type Target = Database;

    #[allow(clippy::expect_used)]
    fn deref(&self) -> &Database {
        // Taken by `drop` only.
        self.0.as_ref().expect("the database is open")
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let database = self.0.take();
        if catch_unwind(AssertUnwindSafe(|| drop(database))).is_err() {
            tracing::error!(
                "the store could not be closed in good order; it is checked when it is opened next"
            );
        }
    }
}

impl File {
    /// Opens or creates the file; answers the store's id with it.
    pub(super) fn open(place: Box<dyn Place>, cache_bytes: usize) -> Result<(Self, String), OpenError> {
        let traffic = Arc::<Traffic>::default();
        let (database, id) = schema::open(&*place, cache_bytes, &traffic)?;
        Ok((
            Self {
                place,
                cache_bytes,
                traffic,
                state: Mutex::new(State::Open(Arc::new(database))),
            },
            id,
        ))
    }

    pub(super) fn len(&self) -> u64 {
        self.place.len()
    }

    pub(super) fn path(&self) -> &Path {
        self.place.path()
    }

    pub(super) fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// A snapshot that outlives this call, and the database that it needs.
    pub(super) fn snapshot(&self) -> Result<(Arc<Open>, ReadTransaction), StoreError> {
        let database = self.database()?;
        let transaction = database.begin_read()?;
        Ok((database, transaction))
    }

    /// A new store beside this one, which [`File::replace`] puts in its place.
    pub(super) fn draft(&self) -> Result<Open, StoreError> {
        schema::draft(&*self.place, self.cache_bytes, &self.traffic)
            .map_err(|error| StoreError::Reopen(Box::new(error)))
    }

    /// Puts a draft, all of which is on disk, in this store's place. Readers of the old one go on with what they see.
    pub(super) fn replace(&self, draft: Open) -> Result<(), StoreError> {
        let mut state = self.lock();
        if !matches!(&*state, State::Open(_)) {
            return Err(StoreError::Busy);
        }
        self.place
            .adopt()
            .map_err(|error| StoreError::Database(redb::Error::Io(error)))?;
        *state = State::Open(Arc::new(draft));
        Ok(())
    }

    pub(super) fn discard_draft(&self) {
        if let Err(error) = self.place.discard() {
            tracing::warn!(path = %self.path().display(), %error, "a draft of the store cannot be removed");
        }
    }

    /// How the pages are used. Reads all of the file.
    pub(super) fn statistics(&self) -> Result<Used, StoreError> {
        self.attempt(
            |database| database.begin_write(),
            |transaction| {
                let stats = transaction.stats()?;
                transaction.abort()?;
                Ok(Used {
                    allocated_bytes: stats.allocated_pages() * stats.page_size() as u64,
                    stored_bytes: stats.stored_bytes(),
                })
            },
        )
    }

    /// Reads from a consistent snapshot.
    pub(super) fn read<T>(
        &self,
        what: impl FnOnce(&ReadTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.attempt(|database| database.begin_read(), |transaction| what(&transaction))
    }

    /// Writes in one transaction; all of it is on disk when this returns, or nothing.
    pub(super) fn write<T>(
        &self,
        what: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        self.attempt(
            |database| database.begin_write(),
            |transaction| {
                let done = what(&transaction)?;
                transaction.commit()?;
                Ok(done)
            },
        )
    }

    fn attempt<X, T>(
        &self,
        begin: impl Fn(&Database) -> Result<X, TransactionError>,
        what: impl FnOnce(X) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        // It must outlive its transactions.
        let mut database = self.database()?;
        let attempt = catch_unwind(AssertUnwindSafe(|| match begin(&database) {
            Err(TransactionError::Storage(StorageError::PreviousIo)) => None,
            Err(error) => Some(Err(StoreError::from(error))),
            Ok(transaction) => Some(Ok(transaction)),
        }));
        let transaction = match attempt {
            Ok(Some(begun)) => begun?,
            Ok(None) => {
                self.close(&database);
                // The file's lock goes with the last user of the old one; until then opening fails and is tried again.
                drop(database);
                database = self.database()?;
                begin(&database)?
            }
            Err(_) => return Err(self.broken(&database, "its structure is broken")),
        };
        match catch_unwind(AssertUnwindSafe(|| what(transaction))) {
            Ok(Err(StoreError::Database(redb::Error::Corrupted(reason)))) => {
                Err(self.broken(&database, &reason))
            }
            Ok(result) => {
                // redb shows the failure again at other calls than the first one of a transaction.
                if result.as_ref().is_err_and(StoreError::is_io) {
                    self.close(&database);
                }
                result
            }
            Err(_) => Err(self.broken(&database, "its structure is broken")),
        }
    }

    fn broken(&self, database: &Arc<Open>, reason: &str) -> StoreError {
        self.close(database);
        StoreError::Broken(reason.to_owned())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The value is replaced as a whole, so a panic elsewhere leaves it valid.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of a database that has failed, unless another has done so.
    fn close(&self, failed: &Arc<Open>) {
        let mut state = self.lock();
        if matches!(&*state, State::Open(current) if Arc::ptr_eq(current, failed)) {
            *state = State::Failed;
        }
    }

    fn database(&self) -> Result<Arc<Open>, StoreError> {
        let mut state = self.lock();
        match &*state {
            State::Open(database) => return Ok(Arc::clone(database)),
            State::Damaged(reason) => return Err(StoreError::Broken(reason.clone())),
            State::Failed => {}
        }
        match schema::open(&*self.place, self.cache_bytes, &self.traffic) {
            Ok((database, _)) => {
                tracing::info!(path = %self.path().display(), "the store was opened again after an error");
                let database = Arc::new(database);
                *state = State::Open(Arc::clone(&database));
                Ok(database)
            }
            Err(error @ OpenError::Damaged { .. }) => {
                tracing::error!(%error, "the store has become unusable; running pods are not touched");
                *state = State::Damaged(error.to_string());
                Err(StoreError::Reopen(Box::new(error)))
            }
            Err(error) => Err(StoreError::Reopen(Box::new(error))),
        }
    }
}
