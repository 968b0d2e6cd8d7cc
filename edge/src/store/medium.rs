//! The storage below redb: where the file lies, what is written to it, and a hand on the brake while it is opened.
//!
//! redb writes to a file as soon as it opens it, before it knows whether it can be used. Until the store has said yes
//! ([`Medium::release`]), every write is kept in memory ([`Op`]) and read back from there; a file that is refused is so
//! left exactly as it was found, whatever made it so. The writes of an accepted file then go down in their order.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io::{self, ErrorKind};
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};

/// Where a store's bytes are.
pub(super) trait Place: Send + Sync {
    /// Opens what is there for reading and writing; `None` when there is nothing.
    fn open(&self) -> io::Result<Option<Box<dyn StorageBackend>>>;
    /// An empty storage beside it, in place of any earlier draft.
    fn draft(&self) -> io::Result<Box<dyn StorageBackend>>;
    /// Puts the draft in place of what is there, at once or not at all.
    fn adopt(&self) -> io::Result<()>;
    /// Removes the draft, if there is one. It never was the store.
    fn discard(&self) -> io::Result<()>;
    /// Bytes that it takes now.
    fn len(&self) -> u64;
    /// For messages.
    fn path(&self) -> &Path;
}

/// A file of the machine.
pub(super) struct OnDisk(PathBuf);

impl OnDisk {
    pub(super) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Where a new file is made before it takes the old one's place.
    fn draft_path(&self) -> PathBuf {
        let mut name = self.0.clone().into_os_string();
        name.push(".new");
        PathBuf::from(name)
    }
}

impl Place for OnDisk {
    fn open(&self) -> io::Result<Option<Box<dyn StorageBackend>>> {
        match std::fs::File::options().read(true).write(true).open(&self.0) {
            Ok(file) => Ok(Some(backend(file)?)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn draft(&self) -> io::Result<Box<dyn StorageBackend>> {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.draft_path())?;
        backend(file)
    }

    fn adopt(&self) -> io::Result<()> {
        let draft = self.draft_path();
        std::fs::File::open(&draft)?.sync_all()?;
        std::fs::rename(&draft, &self.0)?;
        match self.0.parent() {
            Some(dir) => std::fs::File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }

    fn discard(&self) -> io::Result<()> {
        match std::fs::remove_file(self.draft_path()) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn len(&self) -> u64 {
        std::fs::metadata(&self.0).map_or(0, |m| m.len())
    }

    fn path(&self) -> &Path {
        &self.0
    }
}

fn backend(file: std::fs::File) -> io::Result<Box<dyn StorageBackend>> {
    Ok(Box::new(FileBackend::new(file).map_err(io::Error::other)?))
}

/// What went to the disk since the daemon started.
#[derive(Debug, Default)]
pub(super) struct Traffic {
    pub(super) bytes: AtomicU64,
    pub(super) syncs: AtomicU64,
}

/// A change of the storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Op {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Sync,
}

/// A storage whose changes are held back until it is released.
pub(super) struct Medium {
    inner: Box<dyn StorageBackend>,
    traffic: Arc<Traffic>,
    holding: AtomicBool,
    held: Mutex<VecDeque<Op>>,
}

/// What redb owns of a medium.
#[derive(Debug)]
pub(super) struct Handle(Arc<Medium>);

impl Debug for Medium {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Medium").finish_non_exhaustive()
    }
}

impl Medium {
    /// Holds everything back from now on.
    pub(super) fn hold(inner: Box<dyn StorageBackend>, traffic: Arc<Traffic>) -> Arc<Self> {
        Arc::new(Self {
            inner,
            traffic,
            holding: AtomicBool::new(true),
            held: Mutex::default(),
        })
    }

    pub(super) fn handle(self: &Arc<Self>) -> Handle {
        Handle(Arc::clone(self))
    }

    /// Writes down what was held back, in order, and holds nothing any more. After an error the storage is as after a
    /// power cut at that place; what was not written is still held.
    pub(super) fn release(&self) -> io::Result<()> {
        let mut held = self.lock();
        while let Some(op) = held.front() {
            self.carry_out(op)?;
            held.pop_front();
        }
        self.holding.store(false, Ordering::Release);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Op>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The held changes, while they are held.
    fn held(&self) -> Option<MutexGuard<'_, VecDeque<Op>>> {
        if !self.holding.load(Ordering::Acquire) {
            return None;
        }
        let held = self.lock();
        self.holding.load(Ordering::Acquire).then_some(held)
    }

    fn carry_out(&self, op: &Op) -> io::Result<()> {
        match op {
            Op::Write(offset, data) => self.write_down(*offset, data),
            Op::SetLen(len) => self.inner.set_len(*len),
            Op::Sync => self.sync_down(),
        }
    }

    fn write_down(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.traffic.bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        self.inner.write(offset, data)
    }

    fn sync_down(&self) -> io::Result<()> {
        self.traffic.syncs.fetch_add(1, Ordering::Relaxed);
        self.inner.sync_data()
    }

    fn len_with(&self, held: &VecDeque<Op>) -> io::Result<u64> {
        let mut len = self.inner.len()?;
        for op in held {
            match op {
                Op::Write(offset, data) => len = len.max(offset + data.len() as u64),
                Op::SetLen(to) => len = *to,
                Op::Sync => {}
            }
        }
        Ok(len)
    }

    fn read_with(&self, held: &VecDeque<Op>, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(out.len() as u64);
        if end.is_none_or(|end| self.len_with(held).is_ok_and(|len| end > len)) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        out.fill(0);
        let out_len = out.len();
        let below = self.inner.len()?.saturating_sub(offset);
        let below = usize::try_from(below).unwrap_or(usize::MAX).min(out.len());
        self.inner.read(offset, &mut out[..below])?;
        for op in held {
            match op {
                Op::Write(at, data) => overlay(out, offset, *at, data),
                Op::SetLen(len) => {
                    let keep = usize::try_from(len.saturating_sub(offset)).unwrap_or(usize::MAX);
                    out[keep.min(out_len)..].fill(0);
                }
                Op::Sync => {}
            }
        }
        Ok(())
    }
}

/// Copies the part of `data`, which lies at `at`, that falls into `out`, which lies at `offset`.
fn overlay(out: &mut [u8], offset: u64, at: u64, data: &[u8]) {
    let (from, to) = (
        at.max(offset),
        (at + data.len() as u64).min(offset + out.len() as u64),
    );
    if from >= to {
        return;
    }
    // Both ends lie within slices, so they fit.
    #[allow(clippy::cast_possible_truncation)]
    let (out_range, data_range) = (
        (from - offset) as usize..(to - offset) as usize,
        (from - at) as usize..(to - at) as usize,
    );
    out[out_range].copy_from_slice(&data[data_range]);
}

impl StorageBackend for Handle {
    fn len(&self) -> io::Result<u64> {
        match self.0.held() {
            Some(held) => self.0.len_with(&held),
            None => self.0.inner.len(),
        }
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        match self.0.held() {
            Some(held) => self.0.read_with(&held, offset, out),
            None => self.0.inner.read(offset, out),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match self.0.held() {
            Some(mut held) => {
                held.push_back(Op::SetLen(len));
                Ok(())
            }
            None => self.0.inner.set_len(len),
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        match self.0.held() {
            Some(mut held) => {
                held.push_back(Op::Sync);
                Ok(())
            }
            None => self.0.sync_down(),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match self.0.held() {
            Some(mut held) => {
                held.push_back(Op::Write(offset, data.to_vec()));
                Ok(())
            }
            None => self.0.write_down(offset, data),
        }
    }

    fn close(&self) -> io::Result<()> {
        self.0.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.0.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.0.inner.query_lock_range(start, end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::simulated::Disk;
    use super::*;

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..200u64, proptest::collection::vec(any::<u8>(), 1..60)).prop_map(|(o, d)| Op::Write(o, d)),
            (0..250u64).prop_map(Op::SetLen),
            Just(Op::Sync),
        ]
    }

    proptest! {
        #[test]
        fn what_is_held_back_reads_as_if_it_were_written_and_is_written_at_release(
            base in proptest::collection::vec(any::<u8>(), 0..150),
            ops in proptest::collection::vec(op(), 0..12),
        ) {
            let (disk, plain) = (Disk::holding(base.clone()), Disk::holding(base.clone()));
            let medium = Medium::hold(disk.open().unwrap().unwrap(), Arc::default());
            let (handle, direct) = (medium.handle(), plain.open().unwrap().unwrap());
            for op in &ops {
                match op {
                    Op::Write(offset, data) => {
                        handle.write(*offset, data).unwrap();
                        direct.write(*offset, data).unwrap();
                    }
                    Op::SetLen(len) => {
                        handle.set_len(*len).unwrap();
                        direct.set_len(*len).unwrap();
                    }
                    Op::Sync => handle.sync_data().unwrap(),
                }
                prop_assert_eq!(handle.len().unwrap(), direct.len().unwrap());
                let mut held = vec![7; usize::try_from(direct.len().unwrap()).unwrap()];
                handle.read(0, &mut held).unwrap();
                prop_assert_eq!(held, plain.content());
            }
            prop_assert_eq!(disk.content(), base);
            medium.release().unwrap();
            prop_assert_eq!(disk.content(), plain.content());
        }
    }
}
