//! A disk for tests that remembers every write and every sync, can lose power, fill up and rot.

use std::fmt;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redb::StorageBackend;

use super::medium::{Op, Place};

/// What a disk writes at once, if anything.
const SECTOR: usize = 512;

/// A place for one file and its draft. Clones are the same.
#[derive(Clone)]
pub(super) struct Disk(Arc<Mutex<Shelf>>);

struct Shelf {
    file: SimFile,
    draft: Option<SimFile>,
    no_drafts: bool,
}

/// A file; clones are the same one.
#[derive(Clone, Default)]
struct SimFile(Arc<Mutex<State>>);

impl SimFile {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct State {
    content: Option<Vec<u8>>,
    log: Vec<Op>,
    /// Writes beyond this length fail.
    capacity: Option<usize>,
}

impl Disk {
    /// A disk with nothing on it.
    pub(super) fn empty() -> Self {
        let file = SimFile::default();
        Self(Arc::new(Mutex::new(Shelf {
            file,
            draft: None,
            no_drafts: false,
        })))
    }

    pub(super) fn holding(content: Vec<u8>) -> Self {
        let disk = Self::empty();
        disk.file().state().content = Some(content);
        disk
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self) -> SimFile {
        self.shelf().file.clone()
    }

    pub(super) fn content(&self) -> Vec<u8> {
        self.file().state().content.clone().unwrap_or_default()
    }

    /// Changes it behind the store's back.
    pub(super) fn damage(&self, how: impl FnOnce(&mut Vec<u8>)) {
        how(self.file().state().content.get_or_insert_default());
    }

    /// How many operations it has carried out.
    pub(super) fn operations(&self) -> usize {
        self.file().state().log.len()
    }

    pub(super) fn log(&self) -> Vec<Op> {
        self.file().state().log.clone()
    }

    /// Drafts find no room from now on.
    pub(super) fn refuse_drafts(&self) {
        self.shelf().no_drafts = true;
    }

    /// Room for so many bytes, or without end.
    pub(super) fn set_capacity(&self, bytes: Option<usize>) {
        self.file().state().capacity = bytes;
    }
}

impl Place for Disk {
    fn open(&self) -> io::Result<Option<Box<dyn StorageBackend>>> {
        let file = self.file();
        let there = file.state().content.is_some();
        Ok(there.then(|| Box::new(file) as Box<dyn StorageBackend>))
    }

    fn draft(&self) -> io::Result<Box<dyn StorageBackend>> {
        let draft = SimFile::default();
        draft.state().content = Some(Vec::new());
        if self.shelf().no_drafts {
            draft.state().capacity = Some(64 * 1024);
        }
        self.shelf().draft = Some(draft.clone());
        Ok(Box::new(draft))
    }

    /// # Panics
    /// When something of the draft is not on the disk yet: a power cut after the rename would lose it.
    fn adopt(&self) -> io::Result<()> {
        let mut shelf = self.shelf();
        let draft = shelf.draft.take().ok_or(ErrorKind::NotFound)?;
        assert_eq!(draft.state().log.last(), Some(&Op::Sync));
        shelf.file = draft;
        Ok(())
    }

    fn discard(&self) -> io::Result<()> {
        self.shelf().draft = None;
        Ok(())
    }

    fn len(&self) -> u64 {
        self.file().state().content.as_ref().map_or(0, Vec::len) as u64
    }

    fn path(&self) -> &Path {
        Path::new("simulated.redb")
    }
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimFile")
    }
}

impl State {
    fn perform(&mut self, op: Op) -> io::Result<()> {
        let end = match &op {
            Op::Write(offset, data) => position(*offset) + data.len(),
            Op::SetLen(len) => position(*len),
            Op::Sync => 0,
        };
        if self.capacity.is_some_and(|capacity| end > capacity) {
            return Err(ErrorKind::StorageFull.into());
        }
        carry_out(self.content.get_or_insert_default(), &op);
        self.log.push(op);
        Ok(())
    }
}

#[allow(clippy::cast_possible_truncation)]
fn position(offset: u64) -> usize {
    offset as usize
}

fn carry_out(content: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Write(offset, data) => {
            let (from, to) = (position(*offset), position(*offset) + data.len());
            if content.len() < to {
                content.resize(to, 0);
            }
            content[from..to].copy_from_slice(data);
        }
        Op::SetLen(len) => content.resize(position(*len), 0),
        Op::Sync => {}
    }
}

impl StorageBackend for SimFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state().content.as_ref().map_or(0, Vec::len) as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state();
        let content = state.content.as_deref().unwrap_or_default();
        let from = usize::try_from(offset).map_err(|_| ErrorKind::UnexpectedEof)?;
        let to = from.checked_add(out.len()).ok_or(ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(content.get(from..to).ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.state().perform(Op::SetLen(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.state().perform(Op::Sync)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.state().perform(Op::Write(offset, data.to_vec()))
    }
}

/// What may be left of the writes since the last sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// None.
    Nothing,
    /// All.
    Everything,
    /// Each one wholly, not at all, or some of its sectors.
    Some(u64),
}

/// The disks that a power cut after each operation of a log may leave.
pub(super) struct PowerCuts {
    durable: Vec<u8>,
    log: Vec<Op>,
    synced: usize,
}

impl PowerCuts {
    pub(super) fn new(before: Vec<u8>, log: Vec<Op>) -> Self {
        Self {
            durable: before,
            log,
            synced: 0,
        }
    }

    /// The disk after a cut when `done` operations had been carried out; `done` must not go down.
    pub(super) fn after(&mut self, done: usize, left: Left) -> Vec<u8> {
        let last = self.log[self.synced..done].iter().rposition(|op| *op == Op::Sync);
        if let Some(last) = last {
            let upto = self.synced + last + 1;
            for op in &self.log[self.synced..upto] {
                carry_out(&mut self.durable, op);
            }
            self.synced = upto;
        }
        let mut content = self.durable.clone();
        let pending = &self.log[self.synced..done];
        match left {
            Left::Nothing => {}
            Left::Everything => pending.iter().for_each(|op| carry_out(&mut content, op)),
            Left::Some(seed) => {
                let mut chance = StdRng::seed_from_u64(seed);
                for op in pending {
                    match (op, chance.random_range(0..3)) {
                        (_, 0) => {}
                        (Op::Write(offset, data), 1) => {
                            for (index, sector) in data.chunks(SECTOR).enumerate() {
                                if chance.random() {
                                    let at = offset + (index * SECTOR) as u64;
                                    carry_out(&mut content, &Op::Write(at, sector.to_vec()));
                                }
                            }
                        }
                        (op, _) => carry_out(&mut content, op),
                    }
                }
            }
        }
        content
    }
}
