//! Reads a container's log from one rotated file into the next, so that one who follows misses nothing.
//!
//! Each file of a log gets a stamp when it is rotated ([`crate::rotation::files`]), and stamps ascend. So the file that
//! is being read needs no other mark than the stamp of the one before it: once a later stamp exists, ours is the
//! first of those, and the one after it is next, compressed or not; after the last comes the log's own path.

use std::io::{self, Read, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use skerry_proto::limits::TUNNEL_CHUNK_BYTES;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::lines::{Format, Printer, tail_start};
use crate::rotation::files::{is_packed, rotated};

/// What the end of a file means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AtEnd {
    /// There is more to read now.
    GoesOn,
    /// The log was rotated: its writer may still add to this file for a moment.
    Leaving,
    /// It is the newest file.
    Last,
}

/// A log that is read, and what it prints.
pub(super) struct Reader {
    path: PathBuf,
    source: Source,
    /// Stamp of the file before the one that is read.
    after: Option<String>,
    /// The rotation was seen, and all was read since.
    leaving: bool,
    printer: Printer,
    buffer: Vec<u8>,
}

/// Where bytes come from.
enum Source {
    /// The runtime has not made the file yet.
    Absent,
    /// A file as it was written.
    Plain(File),
    /// A rotated file that was compressed meanwhile; `None` only while a piece of it is being read.
    Packed(Option<Box<GzDecoder<std::fs::File>>>),
}

impl Reader {
    /// Opens the newest file at its start, or before its last `tail` messages.
    pub(super) async fn open(path: &Path, tail: Option<u64>, format: Format) -> io::Result<Self> {
        let mut reader = Self {
            path: path.to_owned(),
            source: Source::Absent,
            after: None,
            leaving: false,
            printer: Printer::new(format),
            buffer: vec![0; TUNNEL_CHUNK_BYTES],
        };
        reader.after = newest(path)?;
        reader.open_next().await?;
        if let (Source::Plain(file), Some(count)) = (&mut reader.source, tail) {
            let start = tail_start(file, count).await?;
            file.seek(SeekFrom::Start(start)).await?;
        }
        Ok(reader)
    }

    /// The limit of what is to be printed is reached.
    pub(super) fn full(&self) -> bool {
        self.printer.full()
    }

    /// Prints a last line that has no line end.
    pub(super) fn finish(&mut self, text: &mut Vec<u8>) {
        self.printer.finish(text);
    }

    /// Reads a piece; false at the end of the file.
    pub(super) async fn read(&mut self, text: &mut Vec<u8>) -> io::Result<bool> {
        let count = match &mut self.source {
            Source::Absent => 0,
            Source::Plain(file) => file.read(&mut self.buffer).await?,
            Source::Packed(slot) => {
                let Some(mut packed) = slot.take() else {
                    return Ok(false);
                };
                let mut buffer = std::mem::take(&mut self.buffer);
                let read = move || {
                    let count = packed.read(&mut buffer);
                    (packed, buffer, count)
                };
                let (packed, buffer, count) = tokio::task::spawn_blocking(read)
                    .await
                    .map_err(io::Error::other)?;
                *slot = Some(packed);
                self.buffer = buffer;
                count?
            }
        };
        if count > 0 {
            self.leaving = false;
        }
        self.printer.push(&self.buffer[..count], text);
        Ok(count > 0)
    }

    /// At the end of the file: looks whether another follows it, and goes over to that.
    pub(super) async fn at_end(&mut self) -> io::Result<AtEnd> {
        let later = later(&self.path, self.after.as_deref())?;
        let Some((ours, _)) = later.first() else {
            return self.replaced().await;
        };
        // The writer goes on with the old file until it has opened the new one.
        let complete = later.len() > 1 || self.leaving && self.path.exists();
        if !complete {
            self.leaving = self.path.exists();
            return Ok(AtEnd::Leaving);
        }
        self.after = Some(ours.clone());
        self.open_next().await?;
        Ok(AtEnd::GoesOn)
    }

    /// A log that was removed, cut or replaced without a trace of the old file.
    async fn replaced(&mut self) -> io::Result<AtEnd> {
        let Ok(now) = tokio::fs::metadata(&self.path).await else {
            return Ok(AtEnd::Last);
        };
        if let Source::Plain(file) = &mut self.source {
            let ours = file.metadata().await?;
            if (ours.dev(), ours.ino()) == (now.dev(), now.ino()) {
                if now.len() >= file.stream_position().await? {
                    return Ok(AtEnd::Last);
                }
                file.seek(SeekFrom::Start(0)).await?;
                return Ok(AtEnd::GoesOn);
            }
            // A rotation since the look at the names: ours has its stamp by now, and is left in good order.
            if first_later(&self.path, self.after.as_deref())?.is_some() {
                return Ok(AtEnd::Leaving);
            }
        }
        self.open_next().await?;
        Ok(match self.source {
            Source::Absent => AtEnd::Last,
            _ => AtEnd::GoesOn,
        })
    }

    /// Opens the file after `self.after`: the first rotated one with a later stamp, else the log's own path.
    async fn open_next(&mut self) -> io::Result<()> {
        self.leaving = false;
        loop {
            let rotated = first_later(&self.path, self.after.as_deref())?;
            let file = rotated.as_deref().unwrap_or(&self.path);
            let source = match open(file).await {
                Ok(source) => source,
                // Compressed between the look and the opening.
                Err(error) if error.kind() == io::ErrorKind::NotFound && rotated.is_some() => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => Source::Absent,
                Err(error) => return Err(error),
            };
            // A rotation between the look and the opening: the path led to the file after the next.
            if rotated.is_none() && first_later(&self.path, self.after.as_deref())?.is_some() {
                continue;
            }
            self.source = source;
            return Ok(());
        }
    }
}

async fn open(file: &Path) -> io::Result<Source> {
    if is_packed(file) {
        let file = std::fs::File::open(file)?;
        return Ok(Source::Packed(Some(Box::new(GzDecoder::new(file)))));
    }
    File::open(file).await.map(Source::Plain)
}

fn later(path: &Path, after: Option<&str>) -> io::Result<Vec<(String, PathBuf)>> {
    match rotated(path) {
        Ok(files) => Ok(files
            .into_iter()
            .filter(|(stamp, _)| after.is_none_or(|after| stamp.as_str() > after))
            .collect()),
        // The directory comes with the first container.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn first_later(path: &Path, after: Option<&str>) -> io::Result<Option<PathBuf>> {
    Ok(later(path, after)?.into_iter().next().map(|(_, file)| file))
}

fn newest(path: &Path) -> io::Result<Option<String>> {
    Ok(later(path, None)?.pop().map(|(stamp, _)| stamp))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LINE: &str = "2026-01-01T00:00:01Z stdout F";

    async fn all(reader: &mut Reader) -> String {
        let mut text = Vec::new();
        loop {
            while reader.read(&mut text).await.unwrap() {}
            if reader.at_end().await.unwrap() == AtEnd::Last {
                return String::from_utf8(text).unwrap();
            }
        }
    }

    #[tokio::test]
    async fn a_reader_that_was_slow_gets_every_file_in_order_compressed_or_not() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        let write = |path: &Path, text: &str| std::fs::write(path, format!("{LINE} {text}\n")).unwrap();
        write(&dir.path().join("0.log.20260101-000000"), "long ago");
        write(&log, "a");
        let mut reader = Reader::open(&log, None, Format::default()).await.unwrap();
        assert_eq!(all(&mut reader).await, "a\n");
        // Three rotations while it looked away; the second file was compressed.
        std::fs::rename(&log, dir.path().join("0.log.20260101-000001")).unwrap();
        let packed = std::fs::File::create(dir.path().join("0.log.20260101-000002.gz")).unwrap();
        let mut packed = flate2::write::GzEncoder::new(packed, flate2::Compression::fast());
        packed.write_all(format!("{LINE} b\n").as_bytes()).unwrap();
        packed.finish().unwrap();
        write(&dir.path().join("0.log.20260101-000003"), "c");
        write(&log, "d");
        assert_eq!(all(&mut reader).await, "b\nc\nd\n");
    }

    #[tokio::test]
    async fn a_file_is_left_only_when_the_new_one_is_there_and_the_old_one_was_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        let mut old = std::fs::File::create(&log).unwrap();
        let mut reader = Reader::open(&log, None, Format::default()).await.unwrap();
        std::fs::rename(&log, dir.path().join("0.log.20260101-000001")).unwrap();
        let mut text = Vec::new();
        assert!(!reader.read(&mut text).await.unwrap());
        assert_eq!(reader.at_end().await.unwrap(), AtEnd::Leaving);
        std::fs::write(&log, format!("{LINE} new\n")).unwrap();
        assert_eq!(reader.at_end().await.unwrap(), AtEnd::Leaving);
        writeln!(old, "{LINE} late").unwrap();
        assert_eq!(all(&mut reader).await, "late\nnew\n");
    }
}
