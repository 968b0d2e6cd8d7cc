//! The server side of SPDY/3.1 as Kubernetes uses it for exec and attach (`v1` to `v4.channel.k8s.io`), and in
//! [`forward`] for port-forward.
//!
//! The client opens one stream for each of `error`, `stdin`, `stdout`, `stderr` and `resize` that its request asked
//! for, named by the header `streamtype`; bytes and FIN pass on them until the process ends and its outcome goes out
//! on the error stream. Go's spdystream has no flow control: windows are neither sent nor obeyed; the tunnel's
//! bounded channels hold a fast side back.

mod dictionary;
pub(super) mod forward;
mod frame;
mod headers;

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use skerry_proto::link::{StreamTarget, TunnelFrame, tunnel_frame};
use tokio::sync::{mpsc, oneshot};

use super::process::{self, FromClient, LINGER, QUEUE, Resizes, ToClient};
use super::{StreamError, Wire, send};
use crate::runtime::{ExecRequest, StreamedProcess};
use frame::{Decoder, Frame};

const PROTOCOL_HEADER: &str = "X-Stream-Protocol-Version";
const VERSIONS: [&str; 4] = [
    "v4.channel.k8s.io",
    "v3.channel.k8s.io",
    "v2.channel.k8s.io",
    "channel.k8s.io",
];

/// How long a client may take to open its streams.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// Why a connection cannot go on. It is then closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SpdyError {
    /// Bytes that are no SPDY.
    #[error("malformed SPDY {0}")]
    Malformed(&'static str),
    /// Beyond a limit.
    #[error("a SPDY frame or header block is too large")]
    TooLarge,
    /// The header compression failed.
    #[error("SPDY header compression failed")]
    Compression,
}

/// What a stream carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Error,
    Stdin,
    Stdout,
    Stderr,
    Resize,
}

/// Takes any bytes as a client's, in two pieces.
pub(super) fn decode_any(bytes: &[u8]) {
    let mut decoder = Decoder::new();
    let (first, second) = bytes.split_at(bytes.len() / 3);
    for piece in [first, second] {
        decoder.push(piece);
        while let Ok(Some(frame)) = decoder.next() {
            if let Frame::SynStream { headers, .. } = frame {
                let kind = headers.iter().find_map(|(_, value)| Kind::parse(value));
                debug_assert!(kind.is_none() || !headers.is_empty());
            }
        }
    }
}

/// Frames to begin with.
pub(super) fn seeds() -> Vec<Vec<u8>> {
    let block = headers::Encoder::new().and_then(|mut encoder| encoder.encode(&[("streamtype", "stdin")]));
    let block = block.unwrap_or_default();
    vec![
        frame::syn_reply(1, &block).to_vec(),
        [frame::ping(2), frame::data(1, true, b"text"), frame::goaway(1)].concat(),
    ]
}

impl Kind {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "error" => Self::Error,
            "stdin" => Self::Stdin,
            "stdout" => Self::Stdout,
            "stderr" => Self::Stderr,
            "resize" => Self::Resize,
            _ => return None,
        })
    }
}

type Ids = HashMap<Kind, u32>;

/// Serves a process to a SPDY client.
pub(super) async fn serve(
    process: StreamedProcess,
    request: &ExecRequest,
    target: &StreamTarget,
    attach: bool,
    wire: Wire,
) -> Result<(), StreamError> {
    let offered = process::list(&target.headers, PROTOCOL_HEADER);
    if offered.is_empty() {
        return Err(StreamError::bad_request(format!(
            "the upgrade request has no {PROTOCOL_HEADER} header"
        )));
    }
    let Some(version) = offered.iter().find(|&offer| VERSIONS.contains(&offer.as_str())) else {
        let ours =
            VERSIONS.map(|version| process::our_header("X-Accepted-Stream-Protocol-Versions", version));
        let text = format!("unable to upgrade: unable to negotiate protocol: client supports {offered:?}");
        process::refuse(&wire, StatusCode::FORBIDDEN, ours.to_vec(), &text).await;
        return Ok(());
    };
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        (PROTOCOL_HEADER, version.as_str()),
    ];
    let headers = headers.map(|(name, value)| process::our_header(name, value));
    if !wire
        .ready(StatusCode::SWITCHING_PROTOCOLS.as_u16(), headers.to_vec())
        .await
    {
        return Ok(());
    }
    let json = version == VERSIONS[0];
    let resizes = json || version == VERSIONS[1];
    let Wire { incoming, out } = wire;
    let (to_process, from_client) = mpsc::channel(QUEUE);
    let (opened, ids) = oneshot::channel();
    let reader = Reader {
        wanted: wanted(request, resizes),
        ids: Ids::new(),
        opened: Some(opened),
        kinds: HashMap::new(),
        resizes: Resizes::default(),
        encoder: headers::Encoder::new().map_err(|error| StreamError::bad_request(error.to_string()))?,
        out: out.clone(),
        to_process,
    };
    let read = reader.run(incoming);
    let write = write(process, from_client, ids, out, attach, json);
    tokio::pin!(read, write);
    tokio::select! {
        ended = &mut read => if let Err(error) = ended {
            tracing::info!(%error, "a streaming client was cut off");
        },
        // The client goes once it has seen the outcome; what it still sends is read so that nothing is reset.
        () = &mut write => { let _ = tokio::time::timeout(LINGER, read).await; }
    }
    Ok(())
}

fn wanted(request: &ExecRequest, resizes: bool) -> Vec<Kind> {
    let all = [
        (Kind::Error, true),
        (Kind::Stdin, request.stdin),
        (Kind::Stdout, request.stdout),
        (Kind::Stderr, request.stderr),
        (Kind::Resize, request.tty && resizes),
    ];
    all.into_iter()
        .filter(|(_, wanted)| *wanted)
        .map(|(kind, _)| kind)
        .collect()
}

/// Reads what the client sends.
struct Reader {
    wanted: Vec<Kind>,
    ids: Ids,
    opened: Option<oneshot::Sender<Ids>>,
    kinds: HashMap<u32, Kind>,
    resizes: Resizes,
    encoder: headers::Encoder,
    out: mpsc::Sender<TunnelFrame>,
    to_process: mpsc::Sender<FromClient>,
}

impl Reader {
    /// Until the client closes the connection or breaks the protocol.
    async fn run(mut self, mut incoming: mpsc::Receiver<Bytes>) -> Result<(), SpdyError> {
        let mut decoder = Decoder::new();
        while let Some(bytes) = incoming.recv().await {
            decoder.push(&bytes);
            while let Some(frame) = decoder.next()? {
                self.frame(frame).await?;
            }
        }
        Ok(())
    }

    async fn frame(&mut self, frame: Frame) -> Result<(), SpdyError> {
        match frame {
            Frame::SynStream { id, fin, headers } => self.open(id, fin, &headers).await?,
            Frame::Data { id, fin, bytes } => self.data(id, fin, bytes).await,
            Frame::Ping(id) => self.send(frame::ping(id)).await,
            Frame::Reset(id) => self.finished(id).await,
            Frame::GoAway | Frame::Other => {}
        }
        Ok(())
    }

    async fn open(&mut self, id: u32, fin: bool, headers: &headers::Headers) -> Result<(), SpdyError> {
        let named = headers
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case("streamtype"));
        let kind = named.and_then(|(_, value)| Kind::parse(value));
        let wanted = kind.filter(|kind| self.wanted.contains(kind) && !self.ids.contains_key(kind));
        let Some(kind) = wanted else {
            self.send(frame::refuse(id)).await;
            return Ok(());
        };
        let block = self.encoder.encode(&[])?;
        self.send(frame::syn_reply(id, &block)).await;
        self.kinds.insert(id, kind);
        self.ids.insert(kind, id);
        if self.ids.len() == self.wanted.len()
            && let Some(opened) = self.opened.take()
        {
            // The writer may have given up already.
            let _ = opened.send(self.ids.clone());
        }
        if fin {
            self.finished(id).await;
        }
        Ok(())
    }

    async fn data(&mut self, id: u32, fin: bool, bytes: Bytes) {
        match self.kinds.get(&id) {
            Some(Kind::Stdin) if !bytes.is_empty() => self.tell(FromClient::Stdin(bytes)).await,
            Some(Kind::Resize) => {
                for event in self.resizes.push(&bytes) {
                    self.tell(event).await;
                }
            }
            _ => {}
        }
        if fin {
            self.finished(id).await;
        }
    }

    /// Nothing more comes on a stream.
    async fn finished(&mut self, id: u32) {
        if self.kinds.remove(&id) == Some(Kind::Stdin) {
            self.tell(FromClient::StdinEnd).await;
        }
    }

    async fn tell(&self, event: FromClient) {
        // A process that has ended needs no input.
        let _ = self.to_process.send(event).await;
    }

    async fn send(&self, bytes: Bytes) {
        send(&self.out, tunnel_frame::Frame::Data(bytes)).await;
    }
}

/// Runs the process once all streams are open, and sends what it has for the client.
async fn write(
    process: StreamedProcess,
    from_client: mpsc::Receiver<FromClient>,
    ids: oneshot::Receiver<Ids>,
    out: mpsc::Sender<TunnelFrame>,
    attach: bool,
    json: bool,
) {
    let Ok(Ok(ids)) = tokio::time::timeout(OPEN_LIMIT, ids).await else {
        tracing::info!("a streaming client did not open its streams in time");
        return;
    };
    let (to_client, mut events) = mpsc::channel(QUEUE);
    let events = async {
        while let Some(event) = events.recv().await {
            let sent = match event {
                ToClient::Stdout(bytes) => piece(&out, &ids, Kind::Stdout, &bytes).await,
                ToClient::Stderr(bytes) => piece(&out, &ids, Kind::Stderr, &bytes).await,
                ToClient::Exit(code) => finish(&out, &ids, process::outcome(code, attach, json)).await,
            };
            if !sent {
                return;
            }
        }
    };
    tokio::join!(process::drive(process, from_client, to_client), events);
}

async fn piece(out: &mpsc::Sender<TunnelFrame>, ids: &Ids, kind: Kind, bytes: &[u8]) -> bool {
    match ids.get(&kind) {
        Some(&id) => send(out, tunnel_frame::Frame::Data(frame::data(id, false, bytes))).await,
        None => true,
    }
}

async fn finish(out: &mpsc::Sender<TunnelFrame>, ids: &Ids, outcome: Option<String>) -> bool {
    let mut last = Vec::new();
    if let (Some(outcome), Some(&id)) = (outcome, ids.get(&Kind::Error)) {
        last.extend_from_slice(&frame::data(id, false, outcome.as_bytes()));
    }
    for kind in [Kind::Stdout, Kind::Stderr, Kind::Error] {
        if let Some(&id) = ids.get(&kind) {
            last.extend_from_slice(&frame::data(id, true, b""));
        }
    }
    last.extend_from_slice(&frame::goaway(ids.values().copied().max().unwrap_or(0)));
    send(out, tunnel_frame::Frame::Data(last.into())).await
}

#[cfg(test)]
#[path = "spdy_tests.rs"]
mod spdy_tests;
