//! The names of rotated logs, and their order.
//!
//! `<log>.<YYYYMMDD-HHMMSS>`, later compressed to the same name with `.gz`. The part after `<log>.` without `.gz` is a
//! file's *stamp*: it stays the same for the file's whole life, and stamps ascend in the order of writing.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::{Span, Timestamp};

const PACKED: &str = ".gz";
const UNFINISHED: &str = ".tmp";

/// The rotated files of a log by stamp, oldest first. Of a file that is there twice, because its compression was cut
/// short after the last step, the packed one is named.
pub fn rotated(log: &Path) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let Some((directory, prefix)) = split(log) else {
        return Ok(found);
    };
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let Some(stamp) = name.strip_prefix(&prefix).filter(|s| !s.ends_with(UNFINISHED)) else {
            continue;
        };
        match stamp.strip_suffix(PACKED) {
            Some(stamp) => {
                found.insert(stamp.to_owned(), entry.path());
            }
            None => {
                found.entry(stamp.to_owned()).or_insert_with(|| entry.path());
            }
        }
    }
    Ok(found)
}

/// Whether a rotated file is compressed.
pub fn is_packed(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "gz")
}

/// Name for the log at `now`, above all that are there.
pub(super) fn next_name(log: &Path, now: Timestamp) -> io::Result<PathBuf> {
    let newest = rotated(log)?.into_keys().next_back().unwrap_or_default();
    let mut time = now;
    // A clock that was set back must not turn the order round: names then go on from the newest.
    loop {
        let stamp = time.strftime("%Y%m%d-%H%M%S").to_string();
        if stamp > newest {
            let mut name = OsString::from(log);
            name.push(format!(".{stamp}"));
            return Ok(PathBuf::from(name));
        }
        time = after(&newest).unwrap_or(time).max(time) + Span::new().seconds(1);
    }
}

fn after(stamp: &str) -> Option<Timestamp> {
    let time = jiff::civil::DateTime::strptime("%Y%m%d-%H%M%S", stamp).ok()?;
    time.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|z| z.timestamp())
}

/// Keeps the newest `keep` rotated files, compressed; removes the rest and what an interrupted run has left.
pub(super) fn tidy(log: &Path, keep: usize) -> io::Result<()> {
    remove_unfinished(log)?;
    let files: Vec<PathBuf> = rotated(log)?.into_values().collect();
    let excess = files.len().saturating_sub(keep);
    for file in &files[..excess] {
        gone(std::fs::remove_file(file))?;
    }
    for file in files[excess..].iter().filter(|file| !is_packed(file)) {
        pack(file)?;
    }
    Ok(())
}

fn remove_unfinished(log: &Path) -> io::Result<()> {
    let Some((directory, prefix)) = split(log) else {
        return Ok(());
    };
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let packed_too = || {
            let mut packed = OsString::from(&path);
            packed.push(PACKED);
            Path::new(&packed).exists()
        };
        if name.starts_with(&prefix) && (name.ends_with(UNFINISHED) || packed_too()) {
            gone(std::fs::remove_file(&path))?;
        }
    }
    Ok(())
}

/// Compresses a file beside itself, then removes it; at every moment one of the two is complete.
fn pack(file: &Path) -> io::Result<()> {
    let beside = |suffix: &str| {
        let mut name = OsString::from(file);
        name.push(suffix);
        PathBuf::from(name)
    };
    let (unfinished, packed) = (beside(UNFINISHED), beside(PACKED));
    let mut from = File::open(file)?;
    let mut to = GzEncoder::new(File::create(&unfinished)?, Compression::default());
    io::copy(&mut from, &mut to)?;
    to.finish()?.set_permissions(from.metadata()?.permissions())?;
    std::fs::rename(&unfinished, &packed)?;
    gone(std::fs::remove_file(file))
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Directory and `<log>.`.
fn split(log: &Path) -> Option<(&Path, String)> {
    let name = log.file_name()?.to_str()?;
    Some((log.parent()?, format!("{name}.")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn stamps(log: &Path) -> Vec<String> {
        rotated(log).unwrap().into_keys().collect()
    }

    #[test]
    fn names_ascend_even_when_the_clock_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().unwrap();
        let first = next_name(&log, now).unwrap();
        assert!(first.to_str().unwrap().ends_with("/0.log.20260102-030405"));
        std::fs::write(&first, "").unwrap();
        let earlier = now - Span::new().hours(2);
        let second = next_name(&log, earlier).unwrap();
        assert!(
            second.to_str().unwrap().ends_with("/0.log.20260102-030406"),
            "{second:?}"
        );
    }

    #[test]
    fn the_newest_are_kept_compressed_and_the_rest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        for n in 1..=4 {
            std::fs::write(
                dir.path().join(format!("0.log.20260101-00000{n}")),
                format!("text {n}"),
            )
            .unwrap();
        }
        std::fs::write(dir.path().join("0.log.20260101-000004.tmp"), "half").unwrap();
        std::fs::write(dir.path().join("10.log.20260101-000001"), "another's").unwrap();
        std::fs::write(&log, "now").unwrap();
        tidy(&log, 3).unwrap();
        assert_eq!(
            stamps(&log),
            ["20260101-000002", "20260101-000003", "20260101-000004"]
        );
        let last = rotated(&log).unwrap().into_values().next_back().unwrap();
        let mut text = String::new();
        let mut packed = flate2::read::GzDecoder::new(File::open(&last).unwrap());
        packed.read_to_string(&mut text).unwrap();
        assert_eq!(text, "text 4");
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "now");
        assert!(dir.path().join("10.log.20260101-000001").exists());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 5);
    }

    #[test]
    fn a_file_that_is_there_twice_counts_once() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        for name in ["0.log.20260101-000001", "0.log.20260101-000001.gz"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let found = rotated(&log).unwrap();
        assert!(found.len() == 1 && is_packed(&found["20260101-000001"]));
        tidy(&log, 3).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
