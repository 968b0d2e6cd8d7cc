//! Rotation of container logs, as a kubelet does it.
//!
//! **In:** the runtime's running containers and the sizes of their logs. **Out:** `0.log.20260102-030405`: the old file,
//! renamed; the runtime opens the path anew. The newest of them stays as it is, older ones are compressed
//! (`….gz`), and the oldest go. A reader that follows finds its way by the names alone: see [`files`].
//!
//! What must always hold:
//! * Names ascend in the order of writing, whatever the clock does.
//! * A log is renamed only together with a reopening; when that fails the name is given back.
//!
//! Source: kubelet, container log manager.

pub mod files;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::runtime::{Container, ContainerId, ContainerState, Runtime, RuntimeError};

/// When and how logs are rotated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// A larger log is rotated.
    pub max_bytes: u64,
    /// Most files per container, the current one included; 2 at least.
    pub max_files: usize,
    /// How often the sizes are looked at.
    pub every: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_bytes: 10 * 1024 * 1024,
            max_files: 5,
            every: Duration::from_secs(10),
        }
    }
}

/// Why a log was not rotated; the next look tries again.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// The file system refuses.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The runtime does not open the log anew.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

/// Rotates logs until `stop`.
pub async fn run(policy: Policy, runtime: Arc<dyn Runtime>, clock: Arc<dyn Clock>, stop: CancellationToken) {
    let mut look = tokio::time::interval(policy.every);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut failing = HashMap::<ContainerId, String>::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = look.tick() => {}
        }
        // A runtime that does not answer is said elsewhere; its logs do not grow unseen for long.
        let Ok(inventory) = runtime.list().await else {
            continue;
        };
        let running: Vec<Container> = inventory
            .containers
            .into_iter()
            .filter(|c| matches!(c.state, ContainerState::Running { .. }))
            .collect();
        failing.retain(|id, _| running.iter().any(|c| c.id == *id));
        for container in running {
            let rotated = look_at(policy, runtime.as_ref(), clock.as_ref(), &container).await;
            note(&mut failing, &container, rotated);
        }
    }
}

/// Logs a failure once, until it changes.
fn note(
    failing: &mut HashMap<ContainerId, String>,
    container: &Container,
    outcome: Result<bool, RotationError>,
) {
    let log = container.log_path.display();
    match outcome {
        Ok(true) => tracing::debug!(%log, "a container's log was rotated"),
        Ok(false) => {}
        Err(error) => {
            let message = error.to_string();
            if failing.get(&container.id) != Some(&message) {
                tracing::warn!(%log, %error, "a container's log cannot be rotated and grows; it is tried again");
                failing.insert(container.id.clone(), message);
            }
            return;
        }
    }
    failing.remove(&container.id);
}

/// Rotates one container's log if it is due; answers whether it was.
async fn look_at(
    policy: Policy,
    runtime: &dyn Runtime,
    clock: &dyn Clock,
    container: &Container,
) -> Result<bool, RotationError> {
    let path = container.log_path.as_path();
    match std::fs::metadata(path) {
        Ok(found) if found.len() <= policy.max_bytes => return Ok(false),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // Somebody removed it, or the daemon ended between the two steps of a rotation.
            if path.parent().is_some_and(Path::is_dir) {
                runtime.reopen_log(&container.id).await?;
            }
            return Ok(false);
        }
        Err(error) => return Err(error.into()),
    }
    let (owned, keep) = (path.to_owned(), policy.max_files.saturating_sub(2));
    // Compression takes a moment.
    let tidied = tokio::task::spawn_blocking(move || files::tidy(&owned, keep)).await;
    tidied.map_err(io::Error::other)??;
    let aside = files::next_name(path, clock.now())?;
    std::fs::rename(path, &aside)?;
    if let Err(error) = runtime.reopen_log(&container.id).await {
        // The writer still has the old file; its name must lead to it.
        if !path.exists() {
            std::fs::rename(&aside, path)?;
        }
        return Err(error.into());
    }
    Ok(true)
}
