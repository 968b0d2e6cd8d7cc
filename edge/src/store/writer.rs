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
use skerry_proto::link::change;
use skerry_proto::object::ObjectKey;
use tokio::sync::oneshot;

use super::{DropReason, Lane, META, NewReport, ObjectChanged, Retention, STATE, Shared, StoreError, outbox};

/// How often the age of what waits is looked at while nothing is written.
const SWEEP: Duration = Duration::from_secs(60);

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
    fn carry_out(&self, transaction: &WriteTransaction, retention: &Retention) -> Result<Done, StoreError> {
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

/// The queue's end. Dropping it waits until everything queued is on disk and the file is let go.
pub(super) struct Writer {
    /// `None` only while it is being dropped.
    queue: Option<mpsc::Sender<(Write, Answer)>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn start(shared: Arc<Shared>) -> std::io::Result<Self> {
        let (queue, writes) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || run(&shared, &writes))?;
        Ok(Self {
            queue: Some(queue),
            thread: Some(thread),
        })
    }

    /// Queues a write. The answer comes when it is on disk or has failed.
    pub(super) fn queue(&self, write: Write) -> oneshot::Receiver<Result<Done, StoreError>> {
        let (answer, answered) = oneshot::channel();
        if let Some(queue) = &self.queue {
            // A closed queue drops the answer's sender, which the receiver takes for a failure.
            let _ = queue.send((write, Answer::Task(answer)));
        }
        answered
    }

    /// Queues a write and waits for it. Blocking.
    pub(super) fn carry_out(&self, write: Write) -> Result<Done, StoreError> {
        let (answer, answered) = mpsc::sync_channel(1);
        if let Some(queue) = &self.queue {
            let _ = queue.send((write, Answer::Thread(answer)));
        }
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

fn run(shared: &Shared, writes: &mpsc::Receiver<(Write, Answer)>) {
    loop {
        let first = match writes.recv_timeout(SWEEP) {
            Ok(first) => first,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                sweep(shared);
                continue;
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        };
        let mut batch = vec![first];
        batch.extend(writes.try_iter().take(BATCH - 1));
        let together = match &batch[..] {
            [_] => None,
            several => commit(shared, several.iter().map(|(write, _)| write)).ok(),
        };
        match together {
            Some(done) => {
                for ((_, answer), done) in batch.into_iter().zip(done) {
                    tell(shared, answer, Ok(done));
                }
            }
            None => {
                // A disk that is full fails them all, and each failure costs a look at the whole file.
                let mut refused = false;
                for (write, answer) in batch {
                    let done = if refused {
                        Err(StoreError::NotTried)
                    } else {
                        commit(shared, std::iter::once(&write))
                    };
                    refused |= done.as_ref().is_err_and(StoreError::is_io);
                    tell(
                        shared,
                        answer,
                        done.map(|mut done| done.pop().unwrap_or_default()),
                    );
                }
            }
        }
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
