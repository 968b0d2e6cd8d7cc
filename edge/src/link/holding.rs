//! The edge's half of the bulk stream as a state machine without I/O: what to tell of the store, and what to do about
//! what the provider sends, in which order.
//!
//! The session carries it out; so does the simulation, on the same store without threads and sockets.

use skerry_proto::limits::INVENTORY_PART;
use skerry_proto::link::{
    Applied, CloudBulk, FEATURE_DIGEST, Inventory, InventoryEntry, InventoryRequest, ReportResult, Welcome,
    change, cloud_bulk, edge_bulk,
};

use crate::store::{Store, StoreError};

/// What a message, or several that follow each other, ask for.
#[derive(Debug)]
pub enum Work {
    /// Commit these in one transaction, then send [`Holding::acknowledgement`] of `seq`.
    Commit {
        /// In order.
        changes: Vec<change::Change>,
        /// Number of the last one.
        seq: u64,
    },
    /// The store is complete; send [`Holding::proof`], if there is one.
    Synced {
        /// Number of the last change before it.
        seq: u64,
    },
    /// Send [`Holding::answer`]. Everything that was sent before the request is committed.
    Answer(InventoryRequest),
    /// Forget these reports.
    Settle(Vec<ReportResult>),
}

/// The provider has left out a change, or sent one twice: the session cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("change {found} came after change {last}")]
pub struct OutOfOrder {
    last: u64,
    found: u64,
}

/// One session's state.
#[derive(Clone, Debug)]
pub struct Holding {
    /// The provider understands digests.
    digests: bool,
    /// Number of the last change that came.
    last: u64,
}

impl Holding {
    /// The state at the start of the session that `welcome` has opened.
    pub fn new(welcome: &Welcome) -> Self {
        Self {
            digests: welcome.features.iter().any(|f| f == FEATURE_DIGEST),
            last: 0,
        }
    }

    /// What follows BulkHello.
    pub fn opening(&self, store: &Store) -> Result<Vec<edge_bulk::Message>, StoreError> {
        if self.digests {
            let digest = store.inventory_digest()?;
            return Ok(vec![edge_bulk::Message::InventoryDigest(digest)]);
        }
        Ok(parts(&store.inventory()?))
    }

    /// Sorts what has come into work, to be done in this order.
    pub fn plan(&mut self, messages: impl IntoIterator<Item = CloudBulk>) -> Result<Vec<Work>, OutOfOrder> {
        let mut work = Vec::new();
        let mut results = Vec::new();
        for message in messages {
            match message.message {
                Some(cloud_bulk::Message::Change(change)) => {
                    if change.seq != self.last + 1 {
                        return Err(OutOfOrder {
                            last: self.last,
                            found: change.seq,
                        });
                    }
                    self.last = change.seq;
                    match work.last_mut() {
                        Some(Work::Commit { changes, seq }) => {
                            changes.extend(change.change);
                            *seq = change.seq;
                        }
                        _ => work.push(Work::Commit {
                            changes: change.change.into_iter().collect(),
                            seq: change.seq,
                        }),
                    }
                }
                Some(cloud_bulk::Message::Synced(synced)) => work.push(Work::Synced { seq: synced.seq }),
                Some(cloud_bulk::Message::InventoryRequest(request)) => work.push(Work::Answer(request)),
                Some(cloud_bulk::Message::ReportResult(result)) => results.push(result),
                // Something newer than this build.
                None => {}
            }
        }
        // They concern nothing of the above.
        if !results.is_empty() {
            work.push(Work::Settle(results));
        }
        Ok(work)
    }

    /// That everything up to `seq` is committed, which it must be.
    pub fn acknowledgement(&self, store: &Store, seq: u64) -> Result<edge_bulk::Message, StoreError> {
        let applied = if self.digests {
            store.applied(seq)?
        } else {
            Applied {
                seq,
                ..Applied::default()
            }
        };
        Ok(edge_bulk::Message::Applied(applied))
    }

    /// The answer to Synced; an older provider expects none.
    pub fn proof(&self, store: &Store, seq: u64) -> Result<Option<edge_bulk::Message>, StoreError> {
        self.digests.then(|| self.acknowledgement(store, seq)).transpose()
    }

    /// The answer to a request.
    pub fn answer(
        &self,
        store: &Store,
        request: &InventoryRequest,
    ) -> Result<Vec<edge_bulk::Message>, StoreError> {
        if request.digest {
            let digest = store.inventory_digest()?;
            return Ok(vec![edge_bulk::Message::InventoryDigest(digest)]);
        }
        Ok(parts(&store.inventory_of(request)?))
    }
}

/// Entries in messages of bounded size, the last one marked; none is one message, too.
fn parts(entries: &[InventoryEntry]) -> Vec<edge_bulk::Message> {
    let mut chunks = entries.chunks(INVENTORY_PART).peekable();
    let mut parts = Vec::new();
    loop {
        let entries = chunks.next().unwrap_or_default().to_vec();
        let last = chunks.peek().is_none();
        parts.push(edge_bulk::Message::Inventory(Inventory { entries, last }));
        if last {
            return parts;
        }
    }
}
