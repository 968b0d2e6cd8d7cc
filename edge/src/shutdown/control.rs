//! The socket by which `skerry-edge drain` reaches the running daemon. Only the daemon's own user may connect.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use super::{Going, Policy, SOCKET, drain};
use crate::pods::Pods;

const REQUEST: &str = "drain";
/// Longest request that is read.
const REQUEST_BYTES: u64 = 64;
/// How long a client may take for its request.
const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// Why `skerry-edge drain` failed. Exit code 1.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// No daemon runs on that data directory.
    #[error("the daemon cannot be reached at {path}: {error}; is it running, with this data directory?")]
    Unreachable {
        /// The socket.
        path: String,
        /// The system's words.
        error: io::Error,
    },
    /// It ended before it was done.
    #[error("the daemon went away before all pods were stopped")]
    Lost,
    /// Some pods did not stop.
    #[error("{0} pods have not ended in time")]
    Late(usize),
}

/// Serves the control socket until `stop`. A socket that cannot be made is an operator's matter and stops nothing.
pub async fn serve(policy: Policy, pods: Pods, going: Going, stop: CancellationToken) {
    let path = policy.data_dir.join(SOCKET);
    let listener = match listen(&path) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "there is no control socket: skerry-edge drain will not work");
            return;
        }
    };
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, _)) = accepted else { continue };
        // One at a time: there is nothing to be done twice.
        if let Err(error) = answer(stream, &policy, &pods, &going).await {
            tracing::debug!(%error, "a control connection failed");
        }
    }
    let _ = std::fs::remove_file(&path);
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    // Left by a daemon that was killed; the store's lock says that no other runs.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn answer(stream: UnixStream, policy: &Policy, pods: &Pods, going: &Going) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut read = BufReader::new(read.take(REQUEST_BYTES));
    tokio::time::timeout(REQUEST_LIMIT, read.read_line(&mut line)).await??;
    if line.trim() != REQUEST {
        return write.write_all(b"unknown request\n").await;
    }
    let late = drain(policy, pods, going).await;
    write.write_all(format!("late {late}\n").as_bytes()).await
}

/// Asks the daemon on that data directory to stop all pods, and waits until it is done.
pub async fn ask(data_dir: &Path) -> Result<(), DrainError> {
    let path = data_dir.join(SOCKET);
    let unreachable = |error| DrainError::Unreachable {
        path: path.display().to_string(),
        error,
    };
    let mut stream = UnixStream::connect(&path).await.map_err(unreachable)?;
    stream
        .write_all(format!("{REQUEST}\n").as_bytes())
        .await
        .map_err(|_| DrainError::Lost)?;
    let mut text = String::new();
    stream
        .take(REQUEST_BYTES)
        .read_to_string(&mut text)
        .await
        .map_err(|_| DrainError::Lost)?;
    match text.trim().strip_prefix("late ").and_then(|n| n.parse().ok()) {
        Some(0) => Ok(()),
        Some(late) => Err(DrainError::Late(late)),
        None => Err(DrainError::Lost),
    }
}
