//! `kubectl logs`: reads a container's log file, and follows it while the container runs.

use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use skerry_proto::limits::TUNNEL_CHUNK_BYTES;
use skerry_proto::link::{LogsTarget, tunnel_frame::Frame};
use tokio::sync::watch;

use super::follow::{AtEnd, Reader};
use super::lines::Format;
use super::select::{self, LogFile};
use super::{StreamError, Streams, Wire};
use crate::runtime::{ContainerId, ContainerState, Runtime};

/// How often a followed file is looked at.
const POLL: Duration = Duration::from_millis(200);

/// Serves a log to its end. Nothing is held in memory but the lines that are being printed.
pub(super) async fn serve(streams: &Streams, target: &LogsTarget, wire: Wire) -> Result<(), StreamError> {
    let format = format(target, Timestamp::now())?;
    let pod = streams
        .pods
        .pod(&target.namespace, &target.pod)
        .ok_or_else(|| StreamError::not_found(format!("pod {:?} does not exist", target.pod)))?;
    // Before the list is taken, so that no change after it is missed.
    let changes = streams.runtime.changes();
    let inventory = streams.runtime.list().await?;
    let file = select::log(&pod, target, &inventory, &streams.log_root)?;
    let tail = match target.tail_lines {
        Some(lines) => {
            Some(u64::try_from(lines).map_err(|_| StreamError::bad_request("tailLines is negative"))?)
        }
        None => None,
    };
    let reader = Reader::open(&file.path, tail, format)
        .await
        .map_err(|error| unreadable(&file.path, &error))?;
    if !wire.ready(200, Vec::new()).await {
        return Ok(());
    }
    let writer = file.writer.clone().filter(|_| target.follow);
    let mut writer = writer.map(|id| Writer {
        runtime: &*streams.runtime,
        id,
        changes,
        ended: false,
    });
    print(reader, &file, writer.as_mut(), wire).await
}

fn unreadable(path: &Path, error: &io::Error) -> StreamError {
    StreamError::new(
        http::StatusCode::INTERNAL_SERVER_ERROR,
        format!("the log file {} cannot be read: {error}", path.display()),
    )
}

fn format(target: &LogsTarget, now: Timestamp) -> Result<Format, StreamError> {
    let since = match (&target.since_time, target.since_seconds) {
        (Some(time), _) => Some(time.parse().map_err(|error| {
            StreamError::bad_request(format!("sinceTime {time:?} is not an RFC 3339 time: {error}"))
        })?),
        (None, Some(seconds)) => {
            let before = now.checked_sub(jiff::SignedDuration::from_secs(seconds));
            Some(before.unwrap_or(Timestamp::MIN))
        }
        (None, None) => None,
    };
    Ok(Format {
        timestamps: target.timestamps,
        since,
        limit: target.limit_bytes.map(|limit| u64::try_from(limit).unwrap_or(0)),
    })
}

async fn print(
    mut reader: Reader,
    file: &LogFile,
    mut writer: Option<&mut Writer<'_>>,
    mut wire: Wire,
) -> Result<(), StreamError> {
    let mut text = Vec::new();
    loop {
        // Asked before reading: what was written before the container ended is then read below.
        let ended = match &mut writer {
            Some(writer) => writer.ended().await,
            None => true,
        };
        while reader
            .read(&mut text)
            .await
            .map_err(|error| unreadable(&file.path, &error))?
        {
            if !send(&wire, &mut text).await || reader.full() {
                return Ok(());
            }
        }
        let end = reader
            .at_end()
            .await
            .map_err(|error| unreadable(&file.path, &error))?;
        if end == AtEnd::GoesOn {
            continue;
        }
        if ended && end == AtEnd::Last {
            reader.finish(&mut text);
            send(&wire, &mut text).await;
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            // A reader sends nothing: this is the end of the one who reads.
            more = wire.incoming.recv() => if more.is_none() { return Ok(()) },
        }
    }
}

async fn send(wire: &Wire, text: &mut Vec<u8>) -> bool {
    let mut bytes = Bytes::from(std::mem::take(text));
    while !bytes.is_empty() {
        let chunk = bytes.split_to(bytes.len().min(TUNNEL_CHUNK_BYTES));
        if !wire.send(Frame::Data(chunk)).await {
            return false;
        }
    }
    true
}

/// The container that writes the log.
struct Writer<'a> {
    runtime: &'a dyn Runtime,
    id: ContainerId,
    changes: watch::Receiver<u64>,
    ended: bool,
}

impl Writer<'_> {
    /// Whether it has ended. Asks the runtime only when something changed.
    async fn ended(&mut self) -> bool {
        if self.ended || !self.changes.has_changed().unwrap_or(true) {
            return self.ended;
        }
        self.changes.mark_unchanged();
        match self.runtime.list().await {
            Ok(inventory) => {
                let container = inventory
                    .containers
                    .into_iter()
                    .find(|container| container.id == self.id);
                self.ended = container
                    .is_none_or(|container| matches!(container.state, ContainerState::Exited { .. }));
                if self.ended {
                    // The runtime's own log writer may be a moment behind the exit.
                    tokio::time::sleep(POLL).await;
                }
            }
            // A runtime that restarts says nothing about its containers.
            Err(error) => {
                self.changes.mark_changed();
                tracing::debug!(%error, container = self.id.0, "cannot see whether a followed container runs");
            }
        }
        self.ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streams::testing::{FakeRuntime, logs_target, pods, run};
    use skerry_proto::link::open_tunnel::Target;
    use skerry_proto::link::{TunnelFrame, TunnelReady};
    use std::io::Write;

    const LINE: &str = "2026-01-01T00:00:01Z stdout F";

    async fn next(frames: &mut tokio::sync::mpsc::Receiver<TunnelFrame>) -> Option<Frame> {
        let wait = tokio::time::timeout(Duration::from_secs(20), frames.recv());
        wait.await.expect("a frame within 20 s")?.frame
    }

    async fn text(frames: &mut tokio::sync::mpsc::Receiver<TunnelFrame>, until: &str) -> String {
        let mut text = String::new();
        while text != until {
            match next(frames).await {
                Some(Frame::Data(bytes)) => text.push_str(std::str::from_utf8(&bytes).unwrap()),
                other => panic!("got {text:?}, then {other:?}"),
            }
        }
        text
    }

    #[tokio::test]
    async fn a_finished_log_is_sent_and_the_stream_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        std::fs::write(&path, format!("{LINE} a\n{LINE} b\n")).unwrap();
        let runtime = FakeRuntime::with_container(&path, false);
        let target = LogsTarget {
            tail_lines: Some(1),
            ..logs_target()
        };
        let (_to_edge, mut frames, task) = run(runtime, pods(), Target::Logs(target));
        let ready = TunnelReady {
            status: 200,
            headers: vec![],
        };
        assert_eq!(next(&mut frames).await, Some(Frame::Ready(ready)));
        assert_eq!(text(&mut frames, "b\n").await, "b\n");
        assert_eq!(next(&mut frames).await, None);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn following_goes_on_across_a_rotation_until_the_container_has_ended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("0.log");
        let mut file = std::fs::File::create(&path).unwrap();
        writeln!(file, "{LINE} a").unwrap();
        let runtime = FakeRuntime::with_container(&path, true);
        let target = LogsTarget {
            follow: true,
            ..logs_target()
        };
        let (_to_edge, mut frames, task) = run(runtime.clone(), pods(), Target::Logs(target));
        assert!(matches!(next(&mut frames).await, Some(Frame::Ready(_))));
        text(&mut frames, "a\n").await;
        writeln!(file, "{LINE} b").unwrap();
        text(&mut frames, "b\n").await;
        std::fs::rename(&path, directory.path().join("0.log.1")).unwrap();
        writeln!(file, "{LINE} c").unwrap();
        let mut rotated = std::fs::File::create(&path).unwrap();
        writeln!(rotated, "{LINE} d").unwrap();
        text(&mut frames, "c\nd\n").await;
        writeln!(rotated, "{LINE} last").unwrap();
        runtime.exit();
        text(&mut frames, "last\n").await;
        assert_eq!(next(&mut frames).await, None);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn following_ends_when_the_reader_goes() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = FakeRuntime::with_container(&directory.path().join("0.log"), true);
        let target = LogsTarget {
            follow: true,
            ..logs_target()
        };
        let (to_edge, mut frames, task) = run(runtime, pods(), Target::Logs(target));
        assert!(matches!(next(&mut frames).await, Some(Frame::Ready(_))));
        drop(to_edge);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn an_unknown_pod_is_an_error_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let runtime = FakeRuntime::with_container(&directory.path().join("0.log"), true);
        let target = LogsTarget {
            pod: "nope".into(),
            ..logs_target()
        };
        let (_to_edge, mut frames, _task) = run(runtime, pods(), Target::Logs(target));
        match next(&mut frames).await {
            Some(Frame::Error(error)) => {
                assert_eq!(
                    (error.status, error.message.as_str()),
                    (404, "pod \"nope\" does not exist")
                );
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn since_is_counted_back_from_now_or_given_as_a_time() {
        let now: Timestamp = "2026-01-01T00:01:00Z".parse().unwrap();
        let seconds = LogsTarget {
            since_seconds: Some(60),
            ..LogsTarget::default()
        };
        assert_eq!(
            format(&seconds, now).unwrap().since.unwrap().to_string(),
            "2026-01-01T00:00:00Z"
        );
        let ages = LogsTarget {
            since_seconds: Some(i64::MAX),
            ..LogsTarget::default()
        };
        assert_eq!(format(&ages, now).unwrap().since, Some(Timestamp::MIN));
        let bad = LogsTarget {
            since_time: Some("soon".into()),
            ..LogsTarget::default()
        };
        assert!(format(&bad, now).unwrap_err().message.contains("\"soon\""));
    }
}
