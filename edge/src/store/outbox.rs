//! The durable outbox: what the site observed and the API server does not have yet.

use jiff::Timestamp;
use prost::Message;
use redb::{ReadableTable, ReadableTableMetadata, TableDefinition, WriteTransaction};
use skerry_proto::link::{Report, report};
use tokio::sync::watch;

use super::writer::{Done, Write};
use super::{META, Store, StoreError, Written};

pub(super) const OUTBOX: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox");
pub(super) const KEYS: TableDefinition<'_, &str, u64> = TableDefinition::new("outbox_keys");
pub(super) const EVENTS: TableDefinition<'_, u64, ()> = TableDefinition::new("outbox_events");

/// Most reports without a coalescing key that wait at one time.
pub const MAX_EVENTS: u64 = 2_000;

/// A report on its way into the outbox.
#[derive(Clone, Debug)]
pub struct NewReport {
    /// Replaces an older unsent report of the same key. `None`: kept for itself, bounded by [`MAX_EVENTS`].
    pub coalesce: Option<String>,
    /// When it was observed.
    pub observed: Timestamp,
    /// What was observed.
    pub body: report::Report,
}

impl Store {
    /// Queues a report; on disk when this returns. Answers its number.
    pub async fn report(&self, report: NewReport) -> Result<u64, StoreError> {
        self.queue_report(report).on_disk().await
    }

    /// Queues a report, after everything that was queued before.
    pub fn queue_report(&self, report: NewReport) -> Written {
        self.queue(Write::Report(Box::new(report)))
    }

    /// Up to `limit` waiting reports with numbers above `after`, oldest first.
    pub fn waiting_reports(&self, after: u64, limit: usize) -> Result<Vec<Report>, StoreError> {
        self.file().read(|transaction| {
            let outbox = transaction.open_table(OUTBOX)?;
            let mut found = Vec::new();
            for entry in outbox.range(after + 1..)?.take(limit) {
                let (seq, value) = entry?;
                match Envelope::decode(value.value()).map(|e| e.report) {
                    Ok(Some(report)) => found.push(report),
                    _ => tracing::error!(
                        seq = seq.value(),
                        "a stored report cannot be read and is left out"
                    ),
                }
            }
            Ok(found)
        })
    }

    /// Forgets reports that the provider has settled. Numbers that are gone are fine.
    pub async fn settle_reports(&self, seqs: Vec<u64>) -> Result<(), StoreError> {
        self.queue(Write::Settle(seqs)).on_disk().await.map(drop)
    }

    /// How many reports wait.
    pub fn outbox_len(&self) -> Result<u64, StoreError> {
        self.file()
            .read(|transaction| Ok(transaction.open_table(OUTBOX)?.len()?))
    }

    /// Moves to the newest number whenever a report is queued.
    pub fn outbox_moved(&self) -> watch::Receiver<u64> {
        self.inner.shared.outbox_moved.subscribe()
    }
}

/// Puts a report into the outbox.
pub(super) fn add(transaction: &WriteTransaction, new: &NewReport) -> Result<Done, StoreError> {
    let mut meta = transaction.open_table(META)?;
    let mut outbox = transaction.open_table(OUTBOX)?;
    let mut keys = transaction.open_table(KEYS)?;
    let mut events = transaction.open_table(EVENTS)?;
    let mut done = Done::default();
    let stored = meta
        .get("next_seq")?
        .and_then(|v| <[u8; 8]>::try_from(v.value()).ok());
    done.seq = stored.map_or(1, u64::from_le_bytes);
    meta.insert("next_seq", (done.seq + 1).to_le_bytes().as_slice())?;
    match &new.coalesce {
        Some(key) => {
            let older = keys.insert(key.as_str(), done.seq)?.map(|v| v.value());
            if let Some(older) = older {
                outbox.remove(older)?;
            }
        }
        None => {
            events.insert(done.seq, ())?;
            while events.len()? > MAX_EVENTS {
                let Some(oldest) = events.pop_first()?.map(|(k, _)| k.value()) else {
                    break;
                };
                outbox.remove(oldest)?;
                done.dropped += 1;
            }
        }
    }
    let encoded = Envelope {
        key: new.coalesce.clone().unwrap_or_default(),
        report: Some(Report {
            seq: done.seq,
            observed_unix_nanos: i64::try_from(new.observed.as_nanosecond()).unwrap_or(i64::MAX),
            report: Some(new.body.clone()),
        }),
    }
    .encode_to_vec();
    outbox.insert(done.seq, encoded.as_slice())?;
    Ok(done)
}

/// Takes settled reports out of the outbox.
pub(super) fn settle(transaction: &WriteTransaction, seqs: &[u64]) -> Result<(), StoreError> {
    let mut outbox = transaction.open_table(OUTBOX)?;
    let mut keys = transaction.open_table(KEYS)?;
    let mut events = transaction.open_table(EVENTS)?;
    for &seq in seqs {
        let key = outbox
            .remove(seq)?
            .and_then(|v| Envelope::decode(v.value()).ok())
            .map(|e| e.key);
        events.remove(seq)?;
        let Some(key) = key.filter(|key| !key.is_empty()) else {
            continue;
        };
        let current = keys.get(key.as_str())?.map(|v| v.value());
        if current == Some(seq) {
            keys.remove(key.as_str())?;
        }
    }
    Ok(())
}

/// A report with the key under which it coalesces, as stored.
#[derive(Clone, PartialEq, Message)]
struct Envelope {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    report: Option<Report>,
}
