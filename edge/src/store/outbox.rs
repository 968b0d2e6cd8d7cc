//! The durable outbox: what the site observed and the API server does not have yet.

use jiff::Timestamp;
use prost::Message;
use redb::{ReadTransaction, ReadableTable, ReadableTableMetadata, Table, TableDefinition, WriteTransaction};
use skerry_proto::link::{Report, report};
use tokio::sync::watch;

use super::retention::{DropReason, Lane, LaneUse, Retention};
use super::writer::{Done, Write};
use super::{META, Store, StoreError, Written};

pub(super) const OUTBOX: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("outbox");
pub(super) const KEYS: TableDefinition<'_, &str, u64> = TableDefinition::new("outbox_keys");
/// (lane, number): bytes as stored, seconds since 1970 when it was observed.
pub(super) const LANES: TableDefinition<'_, (u8, u64), (u32, i64)> = TableDefinition::new("outbox_lanes");
/// Lane: reports, bytes.
pub(super) const TOTALS: TableDefinition<'_, u8, (u64, u64)> = TableDefinition::new("outbox_totals");
/// (lane, reason): reports dropped since the store was made.
pub(super) const DROPS: TableDefinition<'_, (u8, u8), u64> = TableDefinition::new("outbox_drops");

/// A report on its way into the outbox.
#[derive(Clone, Debug)]
pub struct NewReport {
    /// Replaces an older unsent report of the same key. `None`: kept for itself.
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

    /// Queues a report, after everything that was queued before, in the lane that its kind has.
    pub fn queue_report(&self, report: NewReport) -> Written {
        let lane = Lane::of(&report.body);
        self.queue_report_in(lane, report)
    }

    /// The same in another lane.
    pub fn queue_report_in(&self, lane: Lane, report: NewReport) -> Written {
        self.queue(Write::Report(lane, Box::new(report)))
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
        let refused = false;
        self.queue(Write::Settle { seqs, refused })
            .on_disk()
            .await
            .map(drop)
    }

    /// Forgets reports that the provider will never take, and counts them as dropped.
    pub async fn refuse_reports(&self, seqs: Vec<u64>) -> Result<(), StoreError> {
        let refused = true;
        self.queue(Write::Settle { seqs, refused })
            .on_disk()
            .await
            .map(drop)
    }

    /// How many reports wait.
    pub fn outbox_len(&self) -> Result<u64, StoreError> {
        self.file()
            .read(|transaction| Ok(transaction.open_table(OUTBOX)?.len()?))
    }

    /// What waits, by lane.
    pub fn outbox_use(&self) -> Result<[LaneUse; 4], StoreError> {
        self.file().read(|transaction| {
            let totals = transaction.open_table(TOTALS)?;
            let mut all = [LaneUse::default(); 4];
            for (lane, used) in Lane::ALL.iter().zip(&mut all) {
                if let Some((reports, bytes)) = totals.get(*lane as u8)?.map(|t| t.value()) {
                    *used = LaneUse { reports, bytes };
                }
            }
            Ok(all)
        })
    }

    /// Reports dropped since the store was made, by lane and reason; only those of which there are any.
    pub fn drops(&self) -> Result<Vec<(Lane, DropReason, u64)>, StoreError> {
        self.file().read(|transaction| {
            let drops = transaction.open_table(DROPS)?;
            let mut all = Vec::new();
            for entry in drops.iter()? {
                let (key, count) = entry?;
                let (lane, reason) = key.value();
                if let (Some(lane), Some(reason)) = (Lane::numbered(lane), DropReason::numbered(reason)) {
                    all.push((lane, reason, count.value()));
                }
            }
            Ok(all)
        })
    }

    /// Moves to the newest number whenever a report is queued.
    pub fn outbox_moved(&self) -> watch::Receiver<u64> {
        self.inner.shared.outbox_moved.subscribe()
    }
}

/// The outbox in a transaction.
struct Outbox<'t> {
    reports: Table<'t, u64, &'static [u8]>,
    keys: Table<'t, &'static str, u64>,
    lanes: Table<'t, (u8, u64), (u32, i64)>,
    totals: Table<'t, u8, (u64, u64)>,
    drops: Table<'t, (u8, u8), u64>,
    dropped: Vec<(Lane, DropReason)>,
}

impl<'t> Outbox<'t> {
    fn open(transaction: &'t WriteTransaction) -> Result<Self, StoreError> {
        Ok(Self {
            reports: transaction.open_table(OUTBOX)?,
            keys: transaction.open_table(KEYS)?,
            lanes: transaction.open_table(LANES)?,
            totals: transaction.open_table(TOTALS)?,
            drops: transaction.open_table(DROPS)?,
            dropped: Vec::new(),
        })
    }

    fn used(&self, lane: Lane) -> Result<(u64, u64), StoreError> {
        Ok(self.totals.get(lane as u8)?.map_or((0, 0), |t| t.value()))
    }

    fn put(&mut self, lane: Lane, seq: u64, observed: Timestamp, encoded: &[u8]) -> Result<(), StoreError> {
        self.reports.insert(seq, encoded)?;
        // A report is a message of the link, far below 4 GiB.
        let bytes = u32::try_from(encoded.len()).unwrap_or(u32::MAX);
        self.lanes
            .insert((lane as u8, seq), (bytes, observed.as_second()))?;
        let (reports, total) = self.used(lane)?;
        self.totals
            .insert(lane as u8, (reports + 1, total + u64::from(bytes)))?;
        Ok(())
    }

    /// Takes a report out, whatever became of it. Answers its lane; `None` when there is no such report.
    fn take(&mut self, seq: u64) -> Result<Option<Lane>, StoreError> {
        let Some(envelope) = self.reports.remove(seq)?.map(|v| Envelope::decode(v.value())) else {
            return Ok(None);
        };
        let (key, stated) = match envelope {
            Ok(envelope) => (envelope.key.clone(), Some(envelope.lane())),
            Err(_) => (String::new(), None),
        };
        let current = self.keys.get(key.as_str())?.map(|v| v.value());
        if current == Some(seq) {
            self.keys.remove(key.as_str())?;
        }
        // One that cannot be read is in some lane.
        for lane in Lane::ALL
            .into_iter()
            .filter(|lane| stated.is_none_or(|s| s == *lane))
        {
            let entry = self.lanes.remove((lane as u8, seq))?.map(|v| v.value());
            if let Some((bytes, _)) = entry {
                let (reports, total) = self.used(lane)?;
                let left = (reports.saturating_sub(1), total.saturating_sub(u64::from(bytes)));
                self.totals.insert(lane as u8, left)?;
                return Ok(Some(lane));
            }
        }
        Ok(stated)
    }

    fn drop_report(&mut self, lane: Lane, seq: u64, reason: DropReason) -> Result<(), StoreError> {
        self.take(seq)?;
        self.count(lane, reason)
    }

    fn count(&mut self, lane: Lane, reason: DropReason) -> Result<(), StoreError> {
        let place = (lane as u8, reason as u8);
        let before = self.drops.get(place)?.map_or(0, |v| v.value());
        self.drops.insert(place, before + 1)?;
        self.dropped.push((lane, reason));
        Ok(())
    }

    /// The oldest report of a lane: its number and when it was observed.
    fn oldest(&self, lane: Lane) -> Result<Option<(u64, i64)>, StoreError> {
        let number = lane as u8;
        let mut lane = self.lanes.range((number, 0)..=(number, u64::MAX))?;
        Ok(match lane.next() {
            Some(entry) => {
                let (key, value) = entry?;
                Some((key.value().1, value.value().1))
            }
            None => None,
        })
    }

    fn drop_aged(&mut self, lane: Lane, retention: &Retention, now: Timestamp) -> Result<(), StoreError> {
        let Some(limit) = age_limit(retention, lane, now) else {
            return Ok(());
        };
        while let Some((seq, observed)) = self.oldest(lane)?
            && observed < limit
        {
            self.drop_report(lane, seq, DropReason::Age)?;
        }
        Ok(())
    }

    /// Makes the outbox keep its limits after something came into `lane`.
    fn enforce(&mut self, lane: Lane, retention: &Retention, now: Timestamp) -> Result<(), StoreError> {
        self.drop_aged(lane, retention, now)?;
        while self.used(lane)?.1 > retention.lane(lane).max_bytes
            && let Some((seq, _)) = self.oldest(lane)?
        {
            self.drop_report(lane, seq, DropReason::LaneBytes)?;
        }
        loop {
            let mut total = 0;
            for lane in Lane::ALL {
                total += self.used(lane)?.1;
            }
            if total <= retention.max_bytes {
                return Ok(());
            }
            let mut oldest = None;
            for lane in Lane::ALL.into_iter().rev() {
                if let Some((seq, _)) = self.oldest(lane)? {
                    oldest = Some((lane, seq));
                    break;
                }
            }
            match oldest {
                Some((lane, seq)) => self.drop_report(lane, seq, DropReason::TotalBytes)?,
                None => return Ok(()),
            }
        }
    }
}

/// Puts a report into the outbox, and out of it what is too much then.
pub(super) fn add(
    transaction: &WriteTransaction,
    lane: Lane,
    new: &NewReport,
    retention: &Retention,
) -> Result<Done, StoreError> {
    let mut meta = transaction.open_table(META)?;
    let mut outbox = Outbox::open(transaction)?;
    let stored = meta
        .get("next_seq")?
        .and_then(|v| <[u8; 8]>::try_from(v.value()).ok());
    let seq = stored.map_or(1, u64::from_le_bytes);
    meta.insert("next_seq", (seq + 1).to_le_bytes().as_slice())?;
    if let Some(key) = &new.coalesce {
        let older = outbox.keys.get(key.as_str())?.map(|v| v.value());
        if let Some(older) = older {
            outbox.take(older)?;
        }
        outbox.keys.insert(key.as_str(), seq)?;
    }
    let encoded = encoded(lane, new, seq);
    outbox.put(lane, seq, new.observed, &encoded)?;
    outbox.enforce(lane, retention, new.observed)?;
    Ok(Done {
        seq,
        dropped: outbox.dropped,
        ..Done::default()
    })
}

/// A report as it is stored.
pub(super) fn encoded(lane: Lane, new: &NewReport, seq: u64) -> Vec<u8> {
    Envelope {
        key: new.coalesce.clone().unwrap_or_default(),
        report: Some(Report {
            seq,
            observed_unix_nanos: i64::try_from(new.observed.as_nanosecond()).unwrap_or(i64::MAX),
            report: Some(new.body.clone()),
        }),
        lane_number: u32::from(lane as u8) + 1,
    }
    .encode_to_vec()
}

/// Takes settled reports out of the outbox.
pub(super) fn settle(
    transaction: &WriteTransaction,
    seqs: &[u64],
    refused: bool,
) -> Result<Done, StoreError> {
    let mut outbox = Outbox::open(transaction)?;
    for &seq in seqs {
        if let Some(lane) = outbox.take(seq)?
            && refused
        {
            outbox.count(lane, DropReason::Refused)?;
        }
    }
    Ok(Done {
        dropped: outbox.dropped,
        ..Done::default()
    })
}

/// Whether [`sweep`] would drop anything.
pub(super) fn any_aged(
    transaction: &ReadTransaction,
    retention: &Retention,
    now: Timestamp,
) -> Result<bool, StoreError> {
    let lanes = transaction.open_table(LANES)?;
    for lane in Lane::ALL {
        let number = lane as u8;
        if let Some(limit) = age_limit(retention, lane, now)
            && let Some(entry) = lanes.range((number, 0)..=(number, u64::MAX))?.next()
            && entry?.1.value().1 < limit
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What was observed before that second is too old for the lane.
fn age_limit(retention: &Retention, lane: Lane, now: Timestamp) -> Option<i64> {
    let age = retention.lane(lane).max_age?;
    Some(
        now.as_second()
            .saturating_sub(i64::try_from(age.as_secs()).unwrap_or(i64::MAX)),
    )
}

/// Drops what has become too old.
pub(super) fn sweep(
    transaction: &WriteTransaction,
    retention: &Retention,
    now: Timestamp,
) -> Result<Done, StoreError> {
    let mut outbox = Outbox::open(transaction)?;
    for lane in Lane::ALL {
        outbox.drop_aged(lane, retention, now)?;
    }
    Ok(Done {
        dropped: outbox.dropped,
        ..Done::default()
    })
}

/// Schema 2 knew no lanes, but a table of the events.
pub(super) fn migrate_from_2(transaction: &WriteTransaction) -> Result<(), StoreError> {
    const EVENTS: TableDefinition<'_, u64, ()> = TableDefinition::new("outbox_events");
    let mut outbox = Outbox::open(transaction)?;
    let reports: Vec<(u64, Vec<u8>)> = outbox
        .reports
        .iter()?
        .map(|entry| entry.map(|(seq, value)| (seq.value(), value.value().to_vec())))
        .collect::<Result<_, _>>()?;
    for (seq, encoded) in reports {
        // One that cannot be read goes the way of events.
        let (lane, observed) = match Envelope::decode(encoded.as_slice()) {
            Ok(envelope) => (
                envelope.lane(),
                envelope.report.map_or(0, |r| r.observed_unix_nanos),
            ),
            Err(_) => (Lane::Events, 0),
        };
        let observed = Timestamp::from_nanosecond(observed.into()).unwrap_or(Timestamp::UNIX_EPOCH);
        outbox.put(lane, seq, observed, &encoded)?;
    }
    drop(outbox);
    transaction.delete_table(EVENTS)?;
    Ok(())
}

/// A report with the key under which it coalesces, as stored.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Envelope {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    report: Option<Report>,
    /// One more than the lane's number; 0 = the one of its kind.
    #[prost(uint32, tag = "3")]
    lane_number: u32,
}

impl Envelope {
    pub(super) fn lane(&self) -> Lane {
        let stated = self.lane_number.checked_sub(1).and_then(|n| u8::try_from(n).ok());
        let body = self.report.as_ref().and_then(|r| r.report.as_ref());
        stated
            .and_then(Lane::numbered)
            .unwrap_or_else(|| body.map_or(Lane::Events, Lane::of))
    }
}
