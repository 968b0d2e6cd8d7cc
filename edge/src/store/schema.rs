//! Opening the file: integrity, version check, migrations.
//!
//! Every page is checked against its checksum each time (redb does the same after a crash anyway): a store on a cheap
//! flash card is told to be damaged before anything is done by what it says, not when a pod happens to need a page.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use redb::{Builder, Database, DatabaseError, ReadableTable, StorageBackend, StorageError};

use super::ended::{ENDED, ORDER};
use super::file::Open;
use super::medium::{Medium, Place, Traffic};
use super::outbox::{DROPS, KEYS, LANES, OUTBOX, TOTALS, migrate_from_2};
use super::{META, NAMES, OBJECTS, OpenError, STATE, StoreError, digest};

/// The schema that this build writes.
const SCHEMA: u32 = 3;

/// Opens what is in that place, or a new store if there is nothing. One that is refused is not changed in any byte.
pub(super) fn open(
    place: &dyn Place,
    cache_bytes: usize,
    traffic: &Arc<Traffic>,
) -> Result<(Open, String), OpenError> {
    let path = place.path();
    let failed = |error: io::Error| io_error(path, &error);
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(failed)?;
    }
    let backend = match place.open().map_err(failed)? {
        Some(backend) => backend,
        None => {
            create(place, cache_bytes, traffic)?;
            let gone = || io::Error::new(io::ErrorKind::NotFound, "the new file has vanished");
            place
                .open()
                .and_then(|made| made.ok_or_else(gone))
                .map_err(failed)?
        }
    };
    // redb takes an empty file for a new one; ours is never empty, so an empty one was truncated.
    if backend.len().map_err(failed)? == 0 {
        return Err(damaged(path, "the file is empty"));
    }
    let opened = open_backend(backend, path, cache_bytes, traffic)?;
    // What a power cut left. Only now: before, it may have been another daemon's.
    if let Err(error) = place.discard() {
        tracing::warn!(path = %path.display(), %error, "a draft of the store cannot be removed");
    }
    Ok(opened)
}

/// Makes a new store, complete before it gets its name: a power cut leaves a whole one or none.
fn create(place: &dyn Place, cache_bytes: usize, traffic: &Arc<Traffic>) -> Result<(), OpenError> {
    drop(draft(place, cache_bytes, traffic)?);
    place.adopt().map_err(|error| io_error(place.path(), &error))
}

/// A new store that does not have its name yet.
pub(super) fn draft(
    place: &dyn Place,
    cache_bytes: usize,
    traffic: &Arc<Traffic>,
) -> Result<Open, OpenError> {
    let path = place.path();
    let backend = place.draft().map_err(|error| io_error(path, &error))?;
    open_backend(backend, path, cache_bytes, traffic).map(|(database, _)| database)
}

fn open_backend(
    backend: Box<dyn StorageBackend>,
    path: &Path,
    cache_bytes: usize,
    traffic: &Arc<Traffic>,
) -> Result<(Open, String), OpenError> {
    let medium = Medium::hold(backend, Arc::clone(traffic));
    // redb asserts some properties of the file by panicking; a panic here means damage as much as an error does.
    let attempt = catch_unwind(AssertUnwindSafe(|| {
        let database = Builder::new()
            .set_cache_size(cache_bytes)
            .set_check_integrity_on_open(true)
            .create_with_backend(medium.handle())
            .map_err(|error| refusal(path, error))?;
        let database = Open::new(database);
        match tables(&database) {
            Ok((SCHEMA, id)) => Ok((database, id)),
            Ok((found, _)) => Err(OpenError::TooNew {
                path: path.to_owned(),
                found,
                known: SCHEMA,
            }),
            Err(StoreError::Database(redb::Error::Io(error))) => Err(io_error(path, &error)),
            Err(error) => Err(damaged(path, &error.to_string())),
        }
    }));
    let (database, id) = attempt.unwrap_or_else(|_| Err(damaged(path, "its structure is broken")))?;
    medium.release().map_err(|error| io_error(path, &error))?;
    Ok((database, id))
}

fn refusal(path: &Path, error: DatabaseError) -> OpenError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => OpenError::InUse {
            path: path.to_owned(),
        },
        DatabaseError::Storage(StorageError::Io(error))
            if !matches!(
                error.kind(),
                io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput
            ) =>
        {
            io_error(path, &error)
        }
        error => damaged(path, &error.to_string()),
    }
}

/// Checks the schema, makes the tables of a new file and answers the store's id.
fn tables(database: &Database) -> Result<(u32, String), StoreError> {
    let transaction = database.begin_write()?;
    let mut found;
    let id;
    {
        let mut meta = transaction.open_table(META)?;
        let stored = meta.get("schema")?.map(|v| v.value().to_vec());
        match stored {
            Some(bytes) => {
                let number = <[u8; 4]>::try_from(bytes.as_slice()).map_err(|_| StoreError::Value {
                    what: "schema number".to_owned(),
                    reason: format!("{} bytes", bytes.len()),
                })?;
                found = u32::from_le_bytes(number);
                id = meta
                    .get("store_id")?
                    .map(|v| String::from_utf8_lossy(v.value()).into_owned());
            }
            None => {
                found = SCHEMA;
                let fresh = uuid::Uuid::new_v4().to_string();
                meta.insert("schema", SCHEMA.to_le_bytes().as_slice())?;
                meta.insert("store_id", fresh.as_bytes())?;
                id = Some(fresh);
            }
        }
        if found == 1 {
            digest::rebuild(&transaction, &mut meta)?;
            found = 2;
            meta.insert("schema", found.to_le_bytes().as_slice())?;
        }
        if found == 2 {
            migrate_from_2(&transaction)?;
            found = 3;
            meta.insert("schema", found.to_le_bytes().as_slice())?;
        }
        if found == SCHEMA {
            transaction.open_table(OBJECTS)?;
            transaction.open_table(NAMES)?;
            transaction.open_table(STATE)?;
            transaction.open_table(OUTBOX)?;
            transaction.open_table(KEYS)?;
            transaction.open_table(LANES)?;
            transaction.open_table(TOTALS)?;
            transaction.open_table(DROPS)?;
            transaction.open_table(digest::HELD)?;
            transaction.open_table(ENDED)?;
            transaction.open_table(ORDER)?;
        }
    }
    transaction.commit()?;
    let id = id.ok_or_else(|| StoreError::Value {
        what: "store id".to_owned(),
        reason: "missing".to_owned(),
    })?;
    Ok((found, id))
}

fn io_error(path: &Path, error: &io::Error) -> OpenError {
    OpenError::Io {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

fn damaged(path: &Path, reason: &str) -> OpenError {
    OpenError::Damaged {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}
