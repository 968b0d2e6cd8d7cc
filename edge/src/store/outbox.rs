//! The durable outbox: what the site observed and the API server does not have yet.

use std::sync::atomic::Ordering;

use jiff::Timestamp;
use prost::Message;
use redb::{ReadableTable, ReadableTableMetadata, TableDefinition};
use skerry_proto::link::{Report, report};
use tokio::sync::watch;

use super::{META, Store, StoreError, run_blocking};

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
        let store = self.clone();
        run_blocking(move || store.report_blocking(report)).await
    }

    pub(super) fn report_blocking(&self, new: NewReport) -> Result<u64, StoreError> {
        let transaction = self.inner.file.begin_write()?;
        let seq;
        let mut dropped = 0;
        {
            let mut meta = transaction.open_table(META)?;
            let mut outbox = transaction.open_table(OUTBOX)?;
            let mut keys = transaction.open_table(KEYS)?;
            let mut events = transaction.open_table(EVENTS)?;
            let stored = meta
                .get("next_seq")?
                .and_then(|v| <[u8; 8]>::try_from(v.value()).ok());
            seq = stored.map_or(1, u64::from_le_bytes);
            meta.insert("next_seq", (seq + 1).to_le_bytes().as_slice())?;
            match &new.coalesce {
                Some(key) => {
                    let older = keys.insert(key.as_str(), seq)?.map(|v| v.value());
                    if let Some(older) = older {
                        outbox.remove(older)?;
                    }
                }
                None => {
                    events.insert(seq, ())?;
                    while events.len()? > MAX_EVENTS {
                        let Some(oldest) = events.pop_first()?.map(|(k, _)| k.value()) else {
                            break;
                        };
                        outbox.remove(oldest)?;
                        dropped += 1;
                    }
                }
            }
            let encoded = Envelope {
                key: new.coalesce.unwrap_or_default(),
                report: Some(Report {
                    seq,
                    observed_unix_nanos: i64::try_from(new.observed.as_nanosecond()).unwrap_or(i64::MAX),
                    report: Some(new.body),
                }),
            }
            .encode_to_vec();
            outbox.insert(seq, encoded.as_slice())?;
        }
        transaction.commit()?;
        self.inner.dropped.fetch_add(dropped, Ordering::Relaxed);
        self.inner.outbox_moved.send_replace(seq);
        Ok(seq)
    }

    /// Up to `limit` waiting reports with numbers above `after`, oldest first.
    pub fn waiting_reports(&self, after: u64, limit: usize) -> Result<Vec<Report>, StoreError> {
        let transaction = self.inner.file.begin_read()?;
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
    }

    /// Forgets reports that the provider has settled. Numbers that are gone are fine.
    pub async fn settle_reports(&self, seqs: Vec<u64>) -> Result<(), StoreError> {
        let store = self.clone();
        run_blocking(move || store.settle_blocking(&seqs)).await
    }

    pub(super) fn settle_blocking(&self, seqs: &[u64]) -> Result<(), StoreError> {
        let transaction = self.inner.file.begin_write()?;
        {
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
        }
        Ok(transaction.commit()?)
    }

    /// How many reports wait.
    pub fn outbox_len(&self) -> Result<u64, StoreError> {
        let transaction = self.inner.file.begin_read()?;
        Ok(transaction.open_table(OUTBOX)?.len()?)
    }

    /// Moves to the newest number whenever a report is queued.
    pub fn outbox_moved(&self) -> watch::Receiver<u64> {
        self.inner.outbox_moved.subscribe()
    }
}

/// A report with the key under which it coalesces, as stored.
#[derive(Clone, PartialEq, Message)]
struct Envelope {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    report: Option<Report>,
}
