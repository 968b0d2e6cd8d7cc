//! The one thread that writes: group commit.
//!
//! Writes are queued and carried out in order. Whatever is in the queue when a transaction begins goes into it, so
//! that fifty pods which start at once share a few fsyncs instead of paying hundreds. What is on disk is therefore
//! always the state after some write in the order in which they were queued; a crash takes away the newest ones only,
//! and never one whose answer has been given.
//!
//! A write that fails does not take others with it: when a shared transaction fails, each of its writes is tried in
//! one of its own.

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use redb::WriteTransaction;
use skerry_proto::link::change;
use skerry_proto::object::ObjectKey;
use tokio::sync::oneshot;

use super::{NewReport, ObjectChanged, STATE, Shared, StoreError, outbox};

/// Most writes in one transaction.
const BATCH: usize = 256;

/// A change of the file.
pub(super) enum Write {
    /// The provider's changes.
    Apply(Vec<change::Change>),
    /// An object that cannot be read.
    Distrust(ObjectKey),
    /// A report for the outbox.
    Report(Box<NewReport>),
    /// Reports that the provider has settled.
    Settle(Vec<u64>),
    /// A room's record.
    Put {
        room: &'static str,
        key: String,
        json: Vec<u8>,
    },
    /// The end of one.
    Delete { room: &'static str, key: String },
}

/// What a write has done, to be told once it is on disk.
#[derive(Default)]
pub(super) struct Done {
    pub(super) changed: Vec<ObjectChanged>,
    /// Number of a new report.
    pub(super) seq: u64,
    /// Reports that had to go for it.
    pub(super) dropped: u64,
}

impl Write {
    fn carry_out(&self, transaction: &WriteTransaction) -> Result<Done, StoreError> {
        match self {
            Write::Apply(changes) => Ok(Done {
                changed: super::apply(transaction, changes)?,
                ..Done::default()
            }),
            Write::Distrust(key) => super::digest::distrust(transaction, key).map(|()| Done::default()),
            Write::Report(report) => outbox::add(transaction, report),
            Write::Settle(seqs) => outbox::settle(transaction, seqs).map(|()| Done::default()),
            Write::Put { room, key, json } => {
                let mut table = transaction.open_table(STATE)?;
                table.insert((*room, key.as_str()), json.as_slice())?;
                Ok(Done::default())
            }
            Write::Delete { room, key } => {
                transaction.open_table(STATE)?.remove((*room, key.as_str()))?;
                Ok(Done::default())
            }
        }
    }
}

type Answer = oneshot::Sender<Result<Done, StoreError>>;

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
            let _ = queue.send((write, answer));
        }
        answered
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
    while let Ok(first) = writes.recv() {
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
                for (write, answer) in batch {
                    let done = commit(shared, std::iter::once(&write));
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

/// One transaction with these writes; what each has done.
fn commit<'a>(shared: &Shared, writes: impl Iterator<Item = &'a Write>) -> Result<Vec<Done>, StoreError> {
    let transaction = shared.file.begin_write()?;
    let done = writes
        .map(|write| write.carry_out(&transaction))
        .collect::<Result<_, _>>()?;
    transaction.commit()?;
    Ok(done)
}

/// Tells the rooms, then who asked.
fn tell(shared: &Shared, answer: Answer, done: Result<Done, StoreError>) {
    if let Ok(done) = &done {
        for notice in &done.changed {
            // Nobody listening is fine: rooms read the store when they start.
            let _ = shared.changes.send(notice.clone());
        }
        shared.dropped.fetch_add(done.dropped, Ordering::Relaxed);
        if done.seq > 0 {
            shared.outbox_moved.send_replace(done.seq);
        }
    }
    if let Err(Err(error)) = answer.send(done) {
        tracing::error!(%error, "a write failed for which nobody waits");
    }
}
