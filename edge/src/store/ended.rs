//! Tombstones of pods: UIDs whose removal the provider has ordered.
//!
//! A UID is never used for two pods. One that comes back comes from a cluster that was restored from an older backup; the
//! pod has been stopped here, perhaps because somebody deleted it, and must not start again silently.
//!
//! | Table | Key | Value |
//! |---|---|---|
//! | `ended` | UID | its number |
//! | `ended_order` | number, ascending | UID |
//!
//! **Invariant**: both tables hold the same pairs, at most [`MAX_ENDED`]; the oldest goes first.

use redb::{ReadableTable, ReadableTableMetadata, TableDefinition, WriteTransaction};
use skerry_proto::object::Uid;

use super::{Store, StoreError};

pub(super) const ENDED: TableDefinition<'_, &str, u64> = TableDefinition::new("ended");
pub(super) const ORDER: TableDefinition<'_, u64, &str> = TableDefinition::new("ended_order");

/// Most pods that are remembered; about 100 bytes each.
pub const MAX_ENDED: u64 = 20_000;

/// Remembers that a pod has ended, in the transaction that removes it.
pub(super) fn bury(transaction: &WriteTransaction, uid: &str, most: u64) -> Result<(), StoreError> {
    let mut ended = transaction.open_table(ENDED)?;
    let mut order = transaction.open_table(ORDER)?;
    let number = order.last()?.map_or(0, |(number, _)| number.value()) + 1;
    let older = ended.insert(uid, number)?.map(|number| number.value());
    if let Some(older) = older {
        order.remove(older)?;
    }
    order.insert(number, uid)?;
    while order.len()? > most {
        let Some(oldest) = order.pop_first()?.map(|(_, uid)| uid.value().to_owned()) else {
            break;
        };
        ended.remove(oldest.as_str())?;
    }
    Ok(())
}

impl Store {
    /// Whether the pod's removal was ordered before, so that it must not start again.
    pub fn has_ended(&self, uid: &Uid) -> Result<bool, StoreError> {
        self.file()
            .read(|transaction| Ok(transaction.open_table(ENDED)?.get(uid.as_str())?.is_some()))
    }
}
