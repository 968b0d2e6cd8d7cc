//! A store in memory: for the simulation of the link, in which a machine's crash leaves what was committed.

use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use redb::StorageBackend;

use super::medium::Place;
use super::{OpenError, Options, Store};

/// Where a store in memory is. Clones are the same place.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<Shelf>>);

#[derive(Default)]
struct Shelf {
    file: Option<Content>,
    draft: Option<Content>,
}

/// The bytes of one file. Clones are the same file.
#[derive(Clone, Debug, Default)]
struct Content(Arc<Mutex<Vec<u8>>>);

impl Memory {
    /// Another place with the same content, as of the last commit.
    pub fn copy(&self) -> Self {
        let file = self.shelf().file.as_ref().map(Content::copy);
        Self(Arc::new(Mutex::new(Shelf { file, draft: None })))
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        // Each change is whole before the lock goes.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Content {
    fn copy(&self) -> Self {
        Self(Arc::new(Mutex::new(self.bytes().clone())))
    }

    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store {
    /// Opens or creates a store in memory. There must be no other one open in it.
    pub fn open_in(memory: &Memory) -> Result<Self, OpenError> {
        Self::open_at(Box::new(memory.clone()), Options::default())
    }
}

impl Place for Memory {
    fn open(&self) -> io::Result<Option<Box<dyn StorageBackend>>> {
        let file = self.shelf().file.clone();
        Ok(file.map(|file| Box::new(file) as Box<dyn StorageBackend>))
    }

    fn draft(&self) -> io::Result<Box<dyn StorageBackend>> {
        let draft = Content::default();
        self.shelf().draft = Some(draft.clone());
        Ok(Box::new(draft))
    }

    fn adopt(&self) -> io::Result<()> {
        let mut shelf = self.shelf();
        shelf.file = Some(shelf.draft.take().ok_or(ErrorKind::NotFound)?);
        Ok(())
    }

    fn discard(&self) -> io::Result<()> {
        self.shelf().draft = None;
        Ok(())
    }

    fn len(&self) -> u64 {
        let shelf = self.shelf();
        shelf.file.as_ref().map_or(0, |file| file.bytes().len() as u64)
    }

    fn path(&self) -> &Path {
        Path::new("(memory)")
    }
}

fn range(offset: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
    let start = usize::try_from(offset).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
    let end = start.checked_add(len).ok_or(ErrorKind::InvalidInput)?;
    Ok(start..end)
}

impl StorageBackend for Content {
    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let range = range(offset, out.len())?;
        out.copy_from_slice(self.bytes().get(range).ok_or(ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
        self.bytes().resize(len, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = range(offset, data.len())?;
        let mut bytes = self.bytes();
        if bytes.len() < range.end {
            bytes.resize(range.end, 0);
        }
        if let Some(place) = bytes.get_mut(range) {
            place.copy_from_slice(data);
        }
        Ok(())
    }
}
