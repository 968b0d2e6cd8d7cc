//! The rooms' own records.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::writer::Write;
use super::{STATE, Store, StoreError, Written};

impl Store {
    /// A room's own record.
    pub fn state_get<T: DeserializeOwned>(&self, room: &str, key: &str) -> Result<Option<T>, StoreError> {
        self.file().read(|transaction| {
            let table = transaction.open_table(STATE)?;
            table
                .get((room, key))?
                .map(|value| decode_state(room, key, value.value()))
                .transpose()
        })
    }

    /// All records of a room, by key. One that cannot be read is logged and left out.
    pub fn state_list<T: DeserializeOwned>(&self, room: &str) -> Result<Vec<(String, T)>, StoreError> {
        let mut found = Vec::new();
        self.state_each(room, |key, record| found.push((key.to_owned(), record)))?;
        Ok(found)
    }

    /// Shows every record of a room, by key, one at a time. One that cannot be read is logged and left out. `T` need
    /// not be the whole record: fields that it does not name are passed over.
    pub fn state_each<T: DeserializeOwned>(
        &self,
        room: &str,
        mut show: impl FnMut(&str, T),
    ) -> Result<(), StoreError> {
        self.file().read(|transaction| {
            let table = transaction.open_table(STATE)?;
            for entry in table.range((room, "")..)? {
                let (place, value) = entry?;
                let (owner, key) = place.value();
                if owner != room {
                    break;
                }
                match decode_state(room, key, value.value()) {
                    Ok(record) => show(key, record),
                    Err(error) => tracing::error!(room, key, %error, "a stored record is left out"),
                }
            }
            Ok(())
        })
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
        Ok(self.queue(Write::Put {
            room: room.into(),
            key,
            json,
        }))
    }

    /// Queues the end of a room's record; one that is not there is fine.
    pub fn queue_state_end(&self, room: &'static str, key: &str) -> Written {
        let key = key.to_owned();
        self.queue(Write::Delete {
            room: room.into(),
            key,
        })
    }

    /// Writes a room's record; on disk when this returns. Blocking.
    pub fn state_put<T: Serialize>(&self, room: &str, key: &str, record: &T) -> Result<(), StoreError> {
        let json = state_json(room, key, record)?;
        self.write_and_wait(Write::Put {
            room: room.to_owned().into(),
            key: key.to_owned(),
            json,
        })
    }

    /// Removes a room's record; one that is not there is fine. Blocking.
    pub fn state_delete(&self, room: &str, key: &str) -> Result<(), StoreError> {
        self.write_and_wait(Write::Delete {
            room: room.to_owned().into(),
            key: key.to_owned(),
        })
    }
}

fn state_json<T: Serialize>(room: &str, key: &str, record: &T) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(record).map_err(|e| StoreError::Value {
        what: format!("{room} record {key}"),
        reason: e.to_string(),
    })
}

fn decode_state<T: DeserializeOwned>(room: &str, key: &str, json: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(json).map_err(|e| StoreError::Value {
        what: format!("{room} record {key}"),
        reason: e.to_string(),
    })
}
