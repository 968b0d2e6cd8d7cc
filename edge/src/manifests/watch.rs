//! Waits for something to happen in a directory.

use std::io;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;

use crate::readable::{Notices, readable};

/// Changes that follow each other this closely are taken together: a file is often written in several steps.
const SETTLE: Duration = Duration::from_millis(100);

/// A watch of one directory, set up when first needed and again when it was lost.
#[derive(Default)]
pub(super) struct Watch {
    inotify: Option<AsyncFd<Notices>>,
}

impl Watch {
    /// Returns when something may have changed, at the latest after `every`. Without a watch, as for a directory that
    /// does not exist yet, only the time counts.
    pub(super) async fn changed(&mut self, directory: &Path, every: Duration) {
        let fresh = self.inotify.is_none();
        if fresh {
            self.inotify = open(directory).ok();
            if self.inotify.is_some() {
                // What changed before the watch began.
                return;
            }
        }
        match tokio::time::timeout(every, self.notice()).await {
            Err(_) => {}
            Ok(Ok(())) => {
                tokio::time::sleep(SETTLE).await;
                self.drain();
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "the watch of the manifests was lost; it is made again");
                self.inotify = None;
                tokio::time::sleep(SETTLE).await;
            }
        }
    }

    async fn notice(&mut self) -> io::Result<()> {
        let Some(inotify) = &self.inotify else {
            return std::future::pending().await;
        };
        let mut ready = inotify.readable().await?;
        match ready.get_inner().0.read_events() {
            Ok(events) => {
                // The directory itself went: the watch ended with it.
                if events.iter().any(|e| e.mask.contains(AddWatchFlags::IN_IGNORED)) {
                    return Err(io::ErrorKind::NotFound.into());
                }
                Ok(())
            }
            Err(Errno::EAGAIN) => {
                ready.clear_ready();
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn drain(&mut self) {
        if let Some(inotify) = &self.inotify {
            while inotify
                .get_ref()
                .0
                .read_events()
                .is_ok_and(|events| !events.is_empty())
            {}
        }
    }
}

fn open(directory: &Path) -> io::Result<AsyncFd<Notices>> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let flags = AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_ONLYDIR;
    inotify.add_watch(directory, flags)?;
    readable(Notices(inotify))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_new_file_is_noticed_long_before_the_interval() {
        let dir = tempfile::tempdir().unwrap();
        let mut watch = Watch::default();
        let hour = Duration::from_secs(3600);
        watch.changed(dir.path(), hour).await;
        std::fs::write(dir.path().join("a"), "").unwrap();
        let noticed = watch.changed(dir.path(), hour);
        tokio::time::timeout(Duration::from_secs(20), noticed)
            .await
            .unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_directory_that_is_not_there_is_looked_for_again() {
        Watch::default()
            .changed(Path::new("/nonexistent"), Duration::from_secs(20))
            .await;
    }
}
