//! Opening a container's log anew: the daemon signals the shim with SIGHUP, the shim opens the path again.

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::record::{self, ContainerRecord, RunRecord};
use super::{STOP_POLL, files, signal};
use crate::runtime::RuntimeError;

/// A shim that has not opened the file by then is stuck.
const LIMIT: Duration = Duration::from_secs(10);

/// Makes the shim of a running container open its log file anew; the new file exists afterwards.
pub(super) async fn reopen(dir: &Path, container: &ContainerRecord, id: &str) -> Result<(), RuntimeError> {
    let run = record::read::<RunRecord>(dir, files::RUN)
        .ok()
        .flatten()
        .filter(|run| run.boot_id == record::boot_id() && run.process.is_alive())
        .ok_or_else(|| RuntimeError::Failed(format!("container {id} is not running")))?;
    if !run.reopens_log {
        // To that shim the signal is deadly, and with it to its container.
        return Err(RuntimeError::Unsupported {
            runtime: super::NAME,
            what: format!(
                "log rotation of container {id}: an older release started it; restart the container"
            ),
        });
    }
    signal(&run.shim, Signal::SIGHUP);
    let opened = async {
        while !container.log_path.exists() {
            tokio::time::sleep(STOP_POLL).await;
        }
    };
    tokio::time::timeout(LIMIT, opened)
        .await
        .map_err(|_| RuntimeError::Timeout(format!("reopening the log of container {id}")))
}
