//! What can be asked of a store as a whole: how it uses its file, and whether its parts agree.

use prost::Message;
use redb::{ReadableTable, ReadableTableMetadata};
use skerry_proto::link::Upsert;

use super::compact::{Compacted, sizes};
use super::ended::{ENDED, ORDER};
use super::outbox::{KEYS, LANES, OUTBOX, TOTALS};
use super::{NAMES, OBJECTS, Store, StoreError, digest};

/// How a store uses its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Statistics {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Of these, in pages that are in use.
    pub allocated_bytes: u64,
    /// Of these, keys and values.
    pub stored_bytes: u64,
    /// Entries by table.
    pub tables: Vec<(&'static str, u64)>,
}

/// Reads any bytes as a stored object and as a stored report.
pub(crate) fn any_value(bytes: &[u8]) {
    if let Ok(object) = super::objects::decode_object(bytes) {
        let _ = object.decode::<k8s_openapi::api::core::v1::Pod>();
    }
    if let Ok(envelope) = super::outbox::Envelope::decode(bytes) {
        let _ = envelope.lane();
    }
}

impl Store {
    /// Measures the file. Reads all of it. Blocking.
    pub fn statistics(&self) -> Result<Statistics, StoreError> {
        let used = self.file().statistics()?;
        Ok(Statistics {
            file_bytes: self.file().len(),
            allocated_bytes: used.allocated_bytes,
            stored_bytes: used.stored_bytes,
            tables: self.file().read(sizes)?,
        })
    }

    /// Copies the store into a file without holes and puts that in its place. Answers the bytes before and after.
    /// Blocking; others may read and write meanwhile.
    pub fn compact(&self) -> Result<Compacted, StoreError> {
        self.inner.writer.compact()
    }

    /// Every contradiction between the tables, for a person. Opening the store has compared every page with its checksum
    /// already. Blocking.
    pub fn contradictions(&self) -> Result<Vec<String>, StoreError> {
        self.file().read(|transaction| {
            let mut found = Vec::new();
            let objects = transaction.open_table(OBJECTS)?;
            for entry in objects.iter()? {
                let (key, value) = entry?;
                if Upsert::decode(value.value()).is_err() {
                    found.push(format!("object {:?} cannot be read", key.value()));
                }
            }
            for entry in transaction.open_table(NAMES)?.iter()? {
                let (key, uid) = entry?;
                let (kind, namespace, name) = key.value();
                if objects.get((kind, uid.value()))?.is_none() {
                    found.push(format!(
                        "name {namespace}/{name} points to {}, which is not stored",
                        uid.value()
                    ));
                }
            }
            let held = transaction.open_table(digest::HELD)?.len()?;
            if held != objects.len()? {
                found.push(format!(
                    "{} objects are stored, and {held} indexed",
                    objects.len()?
                ));
            }
            let outbox = transaction.open_table(OUTBOX)?;
            for entry in transaction.open_table(KEYS)?.iter()? {
                let (key, seq) = entry?;
                if outbox.get(seq.value())?.is_none() {
                    found.push(format!(
                        "key {} points to report {}, which does not wait",
                        key.value(),
                        seq.value()
                    ));
                }
            }
            let mut sums = std::collections::BTreeMap::<u8, (u64, u64)>::new();
            for entry in transaction.open_table(LANES)?.iter()? {
                let (key, value) = entry?;
                let sum = sums.entry(key.value().0).or_default();
                *sum = (sum.0 + 1, sum.1 + u64::from(value.value().0));
                if outbox.get(key.value().1)?.is_none() {
                    found.push(format!(
                        "lane {} has report {}, which does not wait",
                        key.value().0,
                        key.value().1
                    ));
                }
            }
            let totals = transaction.open_table(TOTALS)?;
            for lane in 0..=u8::MAX {
                let stated = totals.get(lane)?.map_or((0, 0), |v| v.value());
                let counted = sums.get(&lane).copied().unwrap_or_default();
                if stated != counted {
                    found.push(format!(
                        "lane {lane} is said to hold {stated:?}, and holds {counted:?}"
                    ));
                }
            }
            let laned: u64 = sums.values().map(|sum| sum.0).sum();
            if laned != outbox.len()? {
                found.push(format!(
                    "{} reports wait, {laned} of them in lanes",
                    outbox.len()?
                ));
            }
            if transaction.open_table(ENDED)?.len()? != transaction.open_table(ORDER)?.len()? {
                found.push("the tables of ended pods differ in length".to_owned());
            }
            Ok(found)
        })
    }
}
