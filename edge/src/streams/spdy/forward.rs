//! The server side of `portforward.k8s.io`: pairs of streams, each a connection to a port.
//!
//! A client opens a stream of type `error` and one of type `data`, both with the headers `port` and `requestid`. The
//! connection is made once both are there. What goes wrong is written to the error stream; both streams then end, and
//! the client may open the next pair. Source: Kubernetes, `k8s.io/cri-streaming/pkg/streaming/portforward`.

use std::collections::HashMap;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use skerry_proto::limits::TUNNEL_CHUNK_BYTES;
use skerry_proto::link::{StreamTarget, TunnelFrame, tunnel_frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::frame::{self, Decoder, Frame};
use super::headers::{self, Headers};
use super::{PROTOCOL_HEADER, SpdyError};
use crate::streams::forward::{MAX_CONNECTIONS, connect};
use crate::streams::process::{self, QUEUE};
use crate::streams::{StreamError, Wire, send};

const PROTOCOL: &str = "portforward.k8s.io";

/// Serves connections to ports of the host.
pub(in super::super) async fn serve(target: &StreamTarget, wire: Wire) -> Result<(), StreamError> {
    let offered = process::list(&target.headers, PROTOCOL_HEADER);
    if offered.is_empty() {
        return Err(StreamError::bad_request(format!(
            "the upgrade request has no {PROTOCOL_HEADER} header"
        )));
    }
    if !offered.iter().any(|offer| offer == PROTOCOL) {
        let ours = process::our_header("X-Accepted-Stream-Protocol-Versions", PROTOCOL);
        let text = format!("unable to upgrade: unable to negotiate protocol: client supports {offered:?}");
        process::refuse(&wire, StatusCode::FORBIDDEN, vec![ours], &text).await;
        return Ok(());
    }
    let headers = [
        ("Connection", "Upgrade"),
        ("Upgrade", "SPDY/3.1"),
        (PROTOCOL_HEADER, PROTOCOL),
    ];
    let headers = headers.map(|(name, value)| process::our_header(name, value));
    if !wire
        .ready(StatusCode::SWITCHING_PROTOCOLS.as_u16(), headers.to_vec())
        .await
    {
        return Ok(());
    }
    let Wire { incoming, out } = wire;
    let session = Session {
        pod: target.pod.clone(),
        encoder: headers::Encoder::new().map_err(|error| StreamError::bad_request(error.to_string()))?,
        out,
        pairs: HashMap::new(),
        data: HashMap::new(),
        connections: JoinSet::new(),
    };
    if let Err(error) = session.run(incoming).await {
        tracing::info!(%error, "a port-forward client was cut off");
    }
    Ok(())
}

/// A connection that is asked for, as far as its streams are there.
struct Pair {
    port: u16,
    error: Option<u32>,
    data: Option<u32>,
}

struct Session {
    pod: String,
    encoder: headers::Encoder,
    out: mpsc::Sender<TunnelFrame>,
    /// Waiting for the second stream, by request.
    pairs: HashMap<String, Pair>,
    /// Where the bytes of a data stream go; dropping the sender is the end of the client's direction.
    data: HashMap<u32, mpsc::Sender<Bytes>>,
    /// Aborted with the session. Each answers its data stream.
    connections: JoinSet<u32>,
}

impl Session {
    /// Until the client closes the connection or breaks the protocol.
    async fn run(mut self, mut incoming: mpsc::Receiver<Bytes>) -> Result<(), SpdyError> {
        let mut decoder = Decoder::new();
        loop {
            let bytes = tokio::select! {
                bytes = incoming.recv() => bytes,
                Some(ended) = self.connections.join_next() => {
                    if let Ok(id) = ended {
                        self.data.remove(&id);
                    }
                    continue;
                }
            };
            let Some(bytes) = bytes else { return Ok(()) };
            decoder.push(&bytes);
            while let Some(frame) = decoder.next()? {
                match frame {
                    Frame::SynStream { id, fin, headers } => self.open(id, fin, &headers).await?,
                    Frame::Data { id, fin, bytes } => self.pass(id, fin, bytes).await,
                    Frame::Ping(id) => self.send(frame::ping(id)).await,
                    Frame::Reset(id) => drop(self.data.remove(&id)),
                    Frame::GoAway | Frame::Other => {}
                }
            }
        }
    }

    async fn open(&mut self, id: u32, fin: bool, headers: &Headers) -> Result<(), SpdyError> {
        let get = |name: &str| {
            let found = headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.as_str())
        };
        let port = get("port")
            .and_then(|port| port.parse::<u16>().ok())
            .filter(|port| *port > 0);
        let kind = get("streamtype").filter(|kind| matches!(*kind, "error" | "data"));
        let room = self.connections.len() + self.pairs.len() < MAX_CONNECTIONS;
        let (Some(port), Some(kind), true) = (port, kind, room) else {
            self.send(frame::refuse(id)).await;
            return Ok(());
        };
        // Old clients give no request id: the data stream is the one after the error stream.
        let request = get("requestid").map_or_else(
            || (if kind == "error" { id } else { id.wrapping_sub(2) }).to_string(),
            str::to_owned,
        );
        let block = self.encoder.encode(&[])?;
        self.send(frame::syn_reply(id, &block)).await;
        let pair = self.pairs.entry(request.clone()).or_insert(Pair {
            port,
            error: None,
            data: None,
        });
        match kind {
            "error" => pair.error = Some(id),
            _ => pair.data = Some(id),
        }
        if let Pair {
            port,
            error: Some(error),
            data: Some(data),
        } = *pair
        {
            self.pairs.remove(&request);
            let (sender, from_client) = mpsc::channel(QUEUE);
            if !(fin && data == id) {
                self.data.insert(data, sender);
            }
            let (pod, out) = (self.pod.clone(), self.out.clone());
            self.connections.spawn(async move {
                let trouble = carry(&pod, port, data, from_client, &out).await.err();
                end(data, error, trouble, &out).await;
                data
            });
        }
        Ok(())
    }

    async fn pass(&mut self, id: u32, fin: bool, bytes: Bytes) {
        if let Some(sender) = self.data.get(&id)
            && !bytes.is_empty()
            && sender.send(bytes).await.is_err()
        {
            self.data.remove(&id);
        }
        if fin {
            self.data.remove(&id);
        }
    }

    async fn send(&self, bytes: Bytes) {
        send(&self.out, tunnel_frame::Frame::Data(bytes)).await;
    }
}

/// One connection from its start to its end.
async fn carry(
    pod: &str,
    port: u16,
    id: u32,
    from_client: mpsc::Receiver<Bytes>,
    out: &mpsc::Sender<TunnelFrame>,
) -> Result<(), String> {
    let (read, write) = connect(pod, port).await?.into_split();
    let up = up(id, read, out);
    let down = down(from_client, write);
    tokio::pin!(up, down);
    tokio::select! {
        // Nothing more will come for the client.
        () = &mut up => {}
        () = &mut down => up.await,
    }
    Ok(())
}

async fn up(id: u32, mut read: OwnedReadHalf, out: &mpsc::Sender<TunnelFrame>) {
    let mut buffer = BytesMut::new();
    loop {
        // A frame's head goes into the same chunk.
        buffer.reserve(TUNNEL_CHUNK_BYTES / 2);
        match read.read_buf(&mut buffer).await {
            Ok(count) if count > 0 => {}
            _ => return,
        }
        let piece = frame::data(id, false, &buffer.split());
        if !send(out, tunnel_frame::Frame::Data(piece)).await {
            return;
        }
    }
}

async fn down(mut from_client: mpsc::Receiver<Bytes>, mut write: OwnedWriteHalf) {
    while let Some(bytes) = from_client.recv().await {
        if write.write_all(&bytes).await.is_err() {
            return;
        }
    }
    // The program sees the end of the client's direction; it may be gone already.
    let _ = write.shutdown().await;
}

async fn end(data: u32, error: u32, trouble: Option<String>, out: &mpsc::Sender<TunnelFrame>) {
    let mut last = Vec::new();
    last.extend_from_slice(&frame::data(data, true, b""));
    let text = trouble.unwrap_or_default();
    last.extend_from_slice(&frame::data(error, true, text.as_bytes()));
    send(out, tunnel_frame::Frame::Data(last.into())).await;
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod forward_tests;
