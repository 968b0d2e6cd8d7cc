//! Connects a process's pipes or terminal to a client, whatever protocol the client speaks.
//!
//! [`spdy`](super::spdy) and [`websocket`](super::websocket) turn the client's bytes into [`FromClient`] and
//! [`ToClient`] into the client's bytes; [`drive`] is in between.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use serde::Deserialize;
use serde_json::json;
use skerry_proto::link::stream_target::Verb;
use skerry_proto::link::{Header, StreamTarget, tunnel_frame::Frame};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{StreamError, Wire, spdy, websocket};
use crate::runtime::{ExecRequest, StreamedProcess};

/// Bytes read from a process at a time.
const CHUNK: usize = 16 * 1024;

/// Events between a process and a client that wait in one direction.
pub(super) const QUEUE: usize = 8;

/// How long pipes may stay silent after the process has ended, when a child of it still holds them.
const SILENCE: Duration = Duration::from_secs(2);

/// How long a client may take to go after the stream has ended.
pub(super) const LINGER: Duration = Duration::from_secs(3);

/// Largest pile of unfinished resize events.
const MAX_RESIZE_BYTES: usize = 4096;

/// What a client wants of a process.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FromClient {
    /// For its stdin.
    Stdin(Bytes),
    /// Its stdin ends.
    StdinEnd,
    /// Columns and rows of its terminal.
    Resize(u16, u16),
}

/// What a process has for its client.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ToClient {
    /// From its stdout or terminal.
    Stdout(Bytes),
    /// From its stderr.
    Stderr(Bytes),
    /// It has ended with this code, or was lost. Always the last event.
    Exit(Option<i32>),
}

/// Chooses the protocol by the client's upgrade request and serves it.
pub(super) async fn serve(
    process: StreamedProcess,
    request: &ExecRequest,
    target: &StreamTarget,
    wire: Wire,
) -> Result<(), StreamError> {
    let attach = target.verb() == Verb::Attach;
    match header(&target.headers, "upgrade")
        .map(str::to_ascii_lowercase)
        .as_deref()
    {
        Some("spdy/3.1") => spdy::serve(process, request, target, attach, wire).await,
        Some("websocket") => websocket::serve(process, request, target, attach, wire).await,
        other => Err(StreamError::bad_request(format!(
            "cannot upgrade to {other:?}: use SPDY/3.1 or websocket"
        ))),
    }
}

/// A header's first value.
pub(super) fn header<'a>(headers: &'a [Header], name: &str) -> Option<&'a str> {
    let found = headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case(name))?;
    std::str::from_utf8(&found.value).ok()
}

/// Every entry of a header that is a comma list, in order.
pub(super) fn list(headers: &[Header], name: &str) -> Vec<String> {
    let named = headers
        .iter()
        .filter(|header| header.name.eq_ignore_ascii_case(name));
    let values = named.filter_map(|header| std::str::from_utf8(&header.value).ok());
    let entries = values
        .flat_map(|value| value.split(','))
        .map(|entry| entry.trim().to_owned());
    entries.filter(|entry| !entry.is_empty()).collect()
}

/// A header of ours.
pub(super) fn our_header(name: &str, value: &str) -> Header {
    Header {
        name: name.to_owned(),
        value: Bytes::copy_from_slice(value.as_bytes()),
    }
}

/// Answers an upgrade that cannot be negotiated.
pub(super) async fn refuse(wire: &Wire, status: StatusCode, headers: Vec<Header>, text: &str) {
    if wire.ready(status.as_u16(), headers).await {
        wire.send(Frame::Data(Bytes::copy_from_slice(text.as_bytes())))
            .await;
    }
}

/// Copies until the process has ended and its output is sent, or the client has gone (`from` is closed).
pub(super) async fn drive(
    mut process: StreamedProcess,
    from: mpsc::Receiver<FromClient>,
    to: mpsc::Sender<ToClient>,
) {
    let exited = CancellationToken::new();
    let stdout = copy(process.stdout.take(), &exited, &to, ToClient::Stdout);
    let stderr = copy(process.stderr.take(), &exited, &to, ToClient::Stderr);
    let input = feed(process.stdin.take(), process.resize.take(), from);
    let exit = async {
        let code = (&mut process.exit).await.ok();
        exited.cancel();
        code
    };
    let ended = async { tokio::join!(exit, stdout, stderr).0 };
    tokio::select! {
        code = ended => { let _ = to.send(ToClient::Exit(code)).await; }
        () = input => {}
    }
}

async fn copy(
    from: Option<Box<dyn AsyncRead + Send + Unpin>>,
    exited: &CancellationToken,
    to: &mpsc::Sender<ToClient>,
    event: fn(Bytes) -> ToClient,
) {
    let Some(mut from) = from else { return };
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        let silence = async {
            exited.cancelled().await;
            tokio::time::sleep(SILENCE).await;
        };
        // A terminal answers EIO when its process has gone: the end, too.
        let read = tokio::select! {
            read = from.read_buf(&mut buffer) => read.unwrap_or(0),
            () = silence => 0,
        };
        if read == 0 || to.send(event(buffer.split().freeze())).await.is_err() {
            return;
        }
    }
}

/// Ends when the client has gone.
async fn feed(
    mut stdin: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    resize: Option<mpsc::Sender<(u16, u16)>>,
    mut from: mpsc::Receiver<FromClient>,
) {
    while let Some(event) = from.recv().await {
        match event {
            FromClient::Stdin(bytes) => {
                if let Some(pipe) = &mut stdin
                    && (pipe.write_all(&bytes).await.is_err() || pipe.flush().await.is_err())
                {
                    // The process has closed it; the rest of the input has no reader.
                    stdin = None;
                }
            }
            FromClient::StdinEnd => stdin = None,
            FromClient::Resize(columns, rows) => {
                if let Some(resize) = &resize {
                    // A process that has ended needs no size.
                    let _ = resize.send((columns, rows)).await;
                }
            }
        }
    }
}

/// How the outcome is told on the error stream; `None` for nothing at all. `json`: protocol version 4 and later.
pub(super) fn outcome(code: Option<i32>, attach: bool, json: bool) -> Option<String> {
    let (text, status) = match code {
        Some(code) if code == 0 || attach => {
            return json.then(|| r#"{"metadata":{},"status":"Success"}"#.to_owned());
        }
        Some(code) => {
            let text = format!("command terminated with non-zero exit code: exit status {code}");
            let causes = json!([{"reason": "ExitCode", "message": code.to_string()}]);
            let status = json!({
                "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode", "message": text,
                "details": {"causes": causes},
            });
            (text, status)
        }
        None => {
            let text = "Internal error occurred: the process was lost".to_owned();
            let status = json!({
                "metadata": {}, "status": "Failure", "reason": "InternalError", "message": text, "code": 500,
            });
            (text, status)
        }
    };
    Some(if json { status.to_string() } else { text })
}

/// Finds resize events in the bytes of a resize stream: JSON objects, one after the other.
#[derive(Default)]
pub(super) struct Resizes {
    pending: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    width: u16,
    height: u16,
}

impl Resizes {
    pub(super) fn push(&mut self, bytes: &[u8]) -> Vec<FromClient> {
        self.pending.extend_from_slice(bytes);
        let mut sizes = serde_json::Deserializer::from_slice(&self.pending).into_iter::<Size>();
        let mut events = Vec::new();
        let mut used = 0;
        let mut broken = false;
        while let Some(size) = sizes.next() {
            match size {
                Ok(size) => {
                    events.push(FromClient::Resize(size.width, size.height));
                    used = sizes.byte_offset();
                }
                Err(error) => broken = !error.is_eof(),
            }
        }
        let rest = self.pending.split_off(used.min(self.pending.len()));
        self.pending = if broken || rest.len() > MAX_RESIZE_BYTES {
            Vec::new()
        } else {
            rest
        };
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_found_across_pieces_and_nonsense_is_dropped() {
        let mut resizes = Resizes::default();
        assert_eq!(resizes.push(br#"{"Width":80,"Hei"#), []);
        let sizes = [FromClient::Resize(80, 24), FromClient::Resize(100, 30)];
        assert_eq!(resizes.push(b"ght\":24}\n{\"Width\":100,\"Height\":30}"), sizes);
        assert_eq!(resizes.push(b"nonsense"), []);
        assert_eq!(
            resizes.push(br#"{"Width":1,"Height":2}"#),
            [FromClient::Resize(1, 2)]
        );
    }

    #[test]
    fn an_exit_code_is_told_as_kubectl_reads_it() {
        let status: serde_json::Value =
            serde_json::from_str(&outcome(Some(3), false, true).unwrap()).unwrap();
        assert_eq!(status["reason"], "NonZeroExitCode");
        assert_eq!(status["details"]["causes"][0]["message"], "3");
        assert_eq!(
            outcome(Some(0), false, true).unwrap(),
            r#"{"metadata":{},"status":"Success"}"#
        );
        assert_eq!(outcome(Some(0), false, false), None);
        assert!(outcome(Some(3), true, true).unwrap().contains("Success"));
        assert!(outcome(None, false, false).unwrap().contains("lost"));
    }
}
