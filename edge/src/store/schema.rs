//! Opening the file: version check, migrations, damage.

use std::path::Path;

use redb::{Builder, Database, DatabaseError, ReadableTable, StorageError};

use super::ended::{ENDED, ORDER};
use super::outbox::{EVENTS, KEYS, OUTBOX};
use super::{META, NAMES, OBJECTS, OpenError, STATE, StoreError, digest};

/// The schema that this build writes.
const SCHEMA: u32 = 2;

pub(super) fn open(path: &Path, cache_bytes: usize) -> Result<(Database, String), OpenError> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(|e| io(path, &e))?;
    }
    // redb takes an empty file for a new one; ours is never empty, so an empty one was truncated.
    if std::fs::metadata(path).is_ok_and(|m| m.len() == 0) {
        return Err(OpenError::Damaged {
            path: path.to_owned(),
            reason: "the file is empty".to_owned(),
        });
    }
    let database = create(path, cache_bytes)?;
    let id = prepare(&database, path)?;
    Ok((database, id))
}

/// redb asserts some properties of the file by panicking; a panic here means damage as much as an error does.
fn create(path: &Path, cache_bytes: usize) -> Result<Database, OpenError> {
    let attempt = std::panic::catch_unwind(|| Builder::new().set_cache_size(cache_bytes).create(path));
    match attempt {
        Ok(Ok(database)) => Ok(database),
        Ok(Err(DatabaseError::DatabaseAlreadyOpen)) => Err(OpenError::InUse {
            path: path.to_owned(),
        }),
        Ok(Err(DatabaseError::Storage(StorageError::Io(error))))
            if !matches!(
                error.kind(),
                std::io::ErrorKind::InvalidData
                    | std::io::ErrorKind::UnexpectedEof
                    | std::io::ErrorKind::InvalidInput
            ) =>
        {
            Err(io(path, &error))
        }
        Ok(Err(error)) => Err(OpenError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        }),
        Err(_) => Err(OpenError::Damaged {
            path: path.to_owned(),
            reason: "its structure is broken".to_owned(),
        }),
    }
}

/// Checks the schema, makes the tables of a new file and answers the store's id.
fn prepare(database: &Database, path: &Path) -> Result<String, OpenError> {
    let attempt = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| tables(database)));
    match attempt {
        Ok(Ok((SCHEMA, id))) => Ok(id),
        Ok(Ok((found, _))) => Err(OpenError::TooNew {
            path: path.to_owned(),
            found,
            known: SCHEMA,
        }),
        Ok(Err(StoreError::Database(redb::Error::Io(error)))) => Err(io(path, &error)),
        Ok(Err(error)) => Err(OpenError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        }),
        Err(_) => Err(OpenError::Damaged {
            path: path.to_owned(),
            reason: "its structure is broken".to_owned(),
        }),
    }
}

fn tables(database: &Database) -> Result<(u32, String), StoreError> {
    let transaction = database.begin_write()?;
    let found;
    let id;
    let mut old = false;
    {
        let mut meta = transaction.open_table(META)?;
        let stored = meta.get("schema")?.map(|v| v.value().to_vec());
        match stored {
            Some(bytes) => {
                let number = <[u8; 4]>::try_from(bytes.as_slice()).map_err(|_| StoreError::Value {
                    what: "schema number".to_owned(),
                    reason: format!("{} bytes", bytes.len()),
                })?;
                let number = u32::from_le_bytes(number);
                // 1 had no index of what is held.
                old = number == 1;
                found = if old { SCHEMA } else { number };
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
        if old {
            meta.insert("schema", SCHEMA.to_le_bytes().as_slice())?;
        }
        if found == SCHEMA {
            transaction.open_table(OBJECTS)?;
            transaction.open_table(NAMES)?;
            transaction.open_table(STATE)?;
            transaction.open_table(OUTBOX)?;
            transaction.open_table(KEYS)?;
            transaction.open_table(EVENTS)?;
            transaction.open_table(digest::HELD)?;
            transaction.open_table(ENDED)?;
            transaction.open_table(ORDER)?;
        }
    }
    if old {
        digest::rebuild(&transaction)?;
    }
    transaction.commit()?;
    let id = id.ok_or_else(|| StoreError::Value {
        what: "store id".to_owned(),
        reason: "missing".to_owned(),
    })?;
    Ok((found, id))
}

fn io(path: &Path, error: &std::io::Error) -> OpenError {
    OpenError::Io {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}
