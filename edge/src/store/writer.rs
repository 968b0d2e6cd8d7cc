//! The one thread that writes: group commit.
//!
//! Writes are queued and carried out in order. Whatever is in the queue when a transaction begins goes into it, so
//! that fifty pods which start at once share a few fsyncs instead of paying hundreds. What is on disk is therefore
//! always the state after some write in the order in which they were queued; a crash takes away the newest ones only,
//! and never one whose answer has been given.
//!
//! A write that fails does not take others with it: when a shared transaction fails, each of its writes is tried in
//! one of its own, up to the first that the disk refuses.

use std::borrow::Cow;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use jiff::Timestamp;
use redb::ReadableTable;
use redb::WriteTransaction;
use skerry_proto::link::{change, report};
use skerry_proto::object::ObjectKey;
use tokio::sync::oneshot;

use super::compact::{self, Compacted, Compaction};
use super::{DropReason, Lane, META, NewReport, ObjectChanged, Retention, STATE, Shared, StoreError, outbox};

/// How often the age of what waits is looked at while nothing is written.
const SWEEP: Duration = Duration::from_secs(60);

/// How often a compaction is looked at.
const COPY_LOOK: Duration = Duration::from_millis(50);

/// Most writes in one transaction.
const BATCH: usize = 256;

/// A change of the file.
pub(super) enum Write {
    /// The provider's changes.
    Apply(Vec<change::Change>),
    /// Another daemon on this store.
    BeginLife,
    /// An object that cannot be read.
    Distrust(ObjectKey),
    /// A report for the outbox.
    Report(Lane, Box<NewReport>),
    /// Reports that the provider has settled, or will never take.
    Settle { seqs: Vec<u64>, refused: bool },
    /// Reports may have become too old by now.
    Sweep(Timestamp),
    /// A room's record.
    Put {
        room: Cow<'static, str>,
        key: String,
        json: Vec<u8>,
    },
    /// The end of one.
    Delete { room: Cow<'static, str>, key: String },
}

/// What a write has done, to be told once it is on disk.
#[derive(Default)]
pub(super) struct Done {
    pub(super) changed: Vec<ObjectChanged>,
    /// Number of a new report.
    pub(super) seq: u64,
    /// Number of a new life.
    pub(super) life: u64,
    /// Reports that had to go for it.
    pub(super) dropped: Vec<(Lane, DropReason)>,
}

impl Write {
    pub(super) fn carry_out(
        &self,
        transaction: &WriteTransaction,
        retention: &Retention,
    ) -> Result<Done, StoreError> {
        match self {
            Write::Apply(changes) => Ok(Done {
                changed: super::objects::apply(transaction, changes)?,
                ..Done::default()
            }),
            Write::Distrust(key) => super::digest::distrust(transaction, key).map(|()| Done::default()),
            Write::BeginLife => begin_life(transaction),
            Write::Report(lane, report) => outbox::add(transaction, *lane, report, retention),
            Write::Settle { seqs, refused } => outbox::settle(transaction, seqs, *refused),
            Write::Sweep(now) => outbox::sweep(transaction, retention, *now),
            Write::Put { room, key, json } => {
                let mut table = transaction.open_table(STATE)?;
                table.insert((&**room, key.as_str()), json.as_slice())?;
                Ok(Done::default())
            }
            Write::Delete { room, key } => {
                transaction.open_table(STATE)?.remove((&**room, key.as_str()))?;
                Ok(Done::default())
            }
        }
    }
}

impl Write {
    /// Bytes that it takes in memory, roughly.
    pub(super) fn weight(&self) -> usize {
        let body = match self {
            Self::Apply(changes) => changes.iter().map(change_weight).sum(),
            Self::Report(_, report) => report_weight(&report.body),
            Self::Put { json, .. } => json.len(),
            Self::Settle { seqs, .. } => seqs.len() * 8,
            Self::Distrust(_) | Self::BeginLife | Self::Sweep(_) | Self::Delete { .. } => 0,
        };
        body + 200
    }
}

fn change_weight(change: &change::Change) -> usize {
    match change {
        change::Change::Upsert(upsert) => upsert.json_zstd.len() + 300,
        change::Change::Remove(_) => 100,
    }
}

fn report_weight(report: &report::Report) -> usize {
    report.encoded_len()
}

/// Where the outcome of a write goes.
enum Answer {
    Task(oneshot::Sender<Result<Done, StoreError>>),
    /// A thread that may stand still.
    Thread(mpsc::SyncSender<Result<Done, StoreError>>),
}

impl Answer {
    /// The outcome back when nobody waits for it.
    fn give(self, done: Result<Done, StoreError>) -> Result<(), Result<Done, StoreError>> {
        match self {
            Self::Task(task) => task.send(done),
            Self::Thread(thread) => thread.send(done).map_err(|back| back.0),
        }
    }
}

/// The answer that never comes.
pub(super) fn ended() -> StoreError {
    StoreError::Value {
        what: "transaction".to_owned(),
        reason: "the thread that writes has ended".to_owned(),
    }
}

/// What the thread is told.
enum Message {
    Write(Write, Answer),
    Compact(mpsc::SyncSender<Result<Compacted, StoreError>>),
}

/// The queue's end. Dropping it waits until everything queued is on disk and the file is let go.
pub(super) struct Writer {
    /// `None` only while it is being dropped.
    queue: Option<mpsc::Sender<Message>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(shared: Arc<Shared>) -> std::io::Result<Self> {
        let (queue, messages) = mpsc::channel();
        let writing = Loop {
            shared,
            compaction: None,
            thought_at: None,
        };
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || writing.run(&messages))?;
        Ok(Self {
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// A closed queue drops the answer's sender, which the receiver takes for a failure.
    fn send(&self, message: Message) {
        if let Some(queue) = &self.queue {
            let _ = queue.send(message);
        }
    }

    /// Queues a write. The answer comes when it is on disk or has failed.
    pub(super) fn queue(&self, write: Write) -> oneshot::Receiver<Result<Done, StoreError>> {
        let (answer, answered) = oneshot::channel();
        self.send(Message::Write(write, Answer::Task(answer)));
        answered
    }

    /// Queues a write and waits for it. Blocking.
    pub(super) fn carry_out(&self, write: Write) -> Result<Done, StoreError> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.send(Message::Write(write, Answer::Thread(answer)));
        answered.recv().map_err(|_| ended())?
    }

    /// Compacts the file and waits for it. Blocking.
    pub(super) fn compact(&self) -> Result<Compacted, StoreError> {
        let (answer, answered) = mpsc::sync_channel(1);
        self.send(Message::Compact(answer));
        answered.recv().map_err(|_| ended())?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // It has panicked, which it has said; there is nothing to wait for.
            let _ = thread.join();
        }
    }
}

/// The thread's own.
struct Loop {
    shared: Arc<Shared>,
    compaction: Option<Compaction>,
    /// Bytes written when a compaction was last thought of.
    thought_at: Option<u64>,
}

impl Loop {
    fn run(mut self, messages: &mpsc::Receiver<Message>) {
        loop {
            let pause = match &self.compaction {
                Some(_) => COPY_LOOK,
                None => SWEEP,
            };
            match messages.recv_timeout(pause) {
                Ok(first) => self.take(first, messages),
                Err(mpsc::RecvTimeoutError::Timeout) => self.idle(),
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    if let Some(compaction) = self.compaction.take() {
                        compaction.abandon(&self.shared);
                    }
                    return;
                }
            }
            if self.compaction.as_ref().is_some_and(Compaction::is_copied)
                && let Some(compaction) = self.compaction.take()
            {
                compaction.finish(&self.shared);
            }
        }
    }

    fn idle(&mut self) {
        if self.compaction.is_some() {
            return;
        }
        sweep(&self.shared);
        if compact::is_due(&self.shared, &mut self.thought_at) {
            self.compaction = Compaction::begin(&self.shared, None);
        }
    }

    /// Takes a message, and with a write all writes that wait behind it.
    fn take(&mut self, first: Message, messages: &mpsc::Receiver<Message>) {
        let mut batch = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next.take() {
            match message {
                Message::Write(write, answer) => {
                    batch.push((write, answer));
                    if batch.len() < BATCH {
                        next = messages.try_recv().ok();
                    }
                }
                Message::Compact(waiter) => {
                    self.write(std::mem::take(&mut batch));
                    match self.compaction {
                        Some(_) => drop(waiter.send(Err(StoreError::Busy))),
                        None => self.compaction = Compaction::begin(&self.shared, Some(waiter)),
                    }
                }
            }
        }
        self.write(batch);
    }

    fn write(&mut self, batch: Vec<(Write, Answer)>) {
        let together = match &batch[..] {
            [] => return,
            [_] => None,
            several => commit(&self.shared, several.iter().map(|(write, _)| write)).ok(),
        };
        match together {
            Some(done) => {
                for ((write, answer), done) in batch.into_iter().zip(done) {
                    self.written(write, answer, Ok(done));
                }
            }
            None => {
                // A disk that is full fails them all, and each failure costs a look at the whole file.
                let mut refused = false;
                for (write, answer) in batch {
                    let done = if refused {
                        Err(StoreError::NotTried)
                    } else {
                        commit(&self.shared, std::iter::once(&write))
                    };
                    refused |= done.as_ref().is_err_and(StoreError::is_io);
                    let done = done.map(|mut done| done.pop().unwrap_or_default());
                    self.written(write, answer, done);
                }
            }
        }
    }

    fn written(&mut self, write: Write, answer: Answer, done: Result<Done, StoreError>) {
        if done.is_ok()
            && let Some(compaction) = &mut self.compaction
        {
            compaction.note(write);
        }
        tell(&self.shared, answer, done);
    }
}

fn begin_life(transaction: &WriteTransaction) -> Result<Done, StoreError> {
    let mut meta = transaction.open_table(META)?;
    let stored = meta
        .get("incarnation")?
        .and_then(|v| <[u8; 8]>::try_from(v.value()).ok());
    let life = stored.map_or(0, u64::from_le_bytes) + 1;
    meta.insert("incarnation", life.to_le_bytes().as_slice())?;
    Ok(Done {
        life,
        ..Done::default()
    })
}

/// Drops what has become too old while nothing was written.
fn sweep(shared: &Shared) {
    // What is not there needs no fsync.
    let (retention, now) = (&shared.options.retention, shared.options.clock.now());
    match shared
        .file
        .read(|transaction| outbox::any_aged(transaction, retention, now))
    {
        Ok(true) => {
            if let Err(error) = commit(shared, std::iter::once(&Write::Sweep(now))) {
                tracing::warn!(%error, "old reports cannot be dropped");
            }
        }
        Ok(false) => {}
        Err(error) => tracing::warn!(%error, "the outbox cannot be looked at"),
    }
}

/// One transaction with these writes; what each has done.
fn commit<'a>(shared: &Shared, writes: impl Iterator<Item = &'a Write>) -> Result<Vec<Done>, StoreError> {
    shared.file.write(|transaction| {
        writes
            .map(|write| write.carry_out(transaction, &shared.options.retention))
            .collect::<Result<_, _>>()
    })
}

/// Tells the rooms, then who asked.
fn tell(shared: &Shared, answer: Answer, done: Result<Done, StoreError>) {
    if let Ok(done) = &done {
        for notice in &done.changed {
            // Nobody listening is fine: rooms read the store when they start.
            let _ = shared.changes.send(notice.clone());
        }
        for (lane, reason) in &done.dropped {
            let (lane, reason) = (lane.name(), reason.name());
            tracing::debug!(lane, reason, "a report to the cloud is dropped");
        }
        if done.seq > 0 {
            shared.outbox_moved.send_replace(done.seq);
        }
    }
    if let Err(Err(error)) = answer.give(done) {
        tracing::error!(%error, "a write failed for which nobody waits");
    }
}
