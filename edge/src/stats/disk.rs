//! Counts what directories hold, as `du` does. Walking is dear, so an answer is kept for a while.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use crate::runtime::DiskUse;

/// Most entries of one directory tree that are counted: a tree of millions of files must not stop everything else.
const MAX_ENTRIES: u64 = 1_000_000;

/// An answer is kept for so many times what it took at least: no more than a hundredth of the time goes into counting
/// one tree.
const WORTH: u32 = 100;

/// Remembered answers.
#[derive(Default)]
pub(super) struct Disks {
    known: HashMap<PathBuf, Counted>,
}

struct Counted {
    at: Instant,
    took: Duration,
    used: DiskUse,
}

impl Disks {
    /// What `dir` holds, counted at most `max_age` ago, or longer when counting takes long. Blocks.
    pub(super) fn used(&mut self, dir: &Path, max_age: Duration) -> DiskUse {
        if let Some(known) = self.known.get(dir)
            && known.at.elapsed() < max_age.max(known.took * WORTH)
        {
            return known.used;
        }
        let begun = std::time::Instant::now();
        let used = count(dir);
        let counted = Counted {
            at: Instant::now(),
            took: begun.elapsed(),
            used,
        };
        self.known.insert(dir.to_owned(), counted);
        used
    }

    /// Drops answers that nobody has asked for since `age`.
    pub(super) fn forget_older(&mut self, age: Duration) {
        self.known
            .retain(|_, known| known.at.elapsed() < age.max(known.took * WORTH));
    }
}

/// Blocks and inodes below `dir`, on its own file system only; a file with several names counts once.
fn count(dir: &Path) -> DiskUse {
    let Ok(root) = fs::symlink_metadata(dir) else {
        return DiskUse::default();
    };
    let mut used = DiskUse {
        bytes: root.blocks() * 512,
        inodes: 1,
    };
    let mut linked = std::collections::HashSet::new();
    let mut waiting = vec![dir.to_owned()];
    while let Some(next) = waiting.pop() {
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            let Ok(entry_is) = entry.metadata() else { continue };
            let several = entry_is.nlink() > 1 && !entry_is.is_dir();
            if entry_is.dev() != root.dev() || (several && !linked.insert(entry_is.ino())) {
                continue;
            }
            used.bytes += entry_is.blocks() * 512;
            used.inodes += 1;
            if used.inodes >= MAX_ENTRIES {
                tracing::warn!(dir = %dir.display(), "a directory has too many files to count; its use is shown too small");
                return used;
            }
            if entry_is.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_counted_in_blocks_and_hard_links_once() {
        let dir = tempfile::tempdir().unwrap();
        let empty = count(dir.path());
        assert_eq!(empty.inodes, 1);
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/a"), vec![1; 100_000]).unwrap();
        fs::hard_link(dir.path().join("sub/a"), dir.path().join("b")).unwrap();
        let full = count(dir.path());
        assert_eq!(full.inodes, 3);
        assert!(
            (100_000..300_000).contains(&(full.bytes - empty.bytes)),
            "{full:?}"
        );
        assert_eq!(count(Path::new("/no/such/directory")), DiskUse::default());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_kept_for_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let mut disks = Disks::default();
        let age = Duration::from_secs(60);
        assert_eq!(disks.used(dir.path(), age).inodes, 1);
        fs::write(dir.path().join("a"), "x").unwrap();
        assert_eq!(disks.used(dir.path(), age).inodes, 1);
        tokio::time::advance(age).await;
        assert_eq!(disks.used(dir.path(), age).inodes, 2);
    }
}
