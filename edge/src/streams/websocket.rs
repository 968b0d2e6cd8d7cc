//! The server side of the WebSocket protocols of exec and attach, and in [`forward`] of port-forward: one channel byte,
//! then the payload.
//!
//! Channels: 0 stdin, 1 stdout, 2 stderr, 3 outcome, 4 resize; `v5` adds the message `[255, n]`, the end of channel
//! n. The `base64` variants have an ASCII digit and base64 text in text messages. Source: Kubernetes,
//! `k8s.io/apimachinery/pkg/util/remotecommand` and `k8s.io/streaming`.

pub(super) mod forward;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{BufMut, Bytes, BytesMut};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use http::StatusCode;
use skerry_proto::limits::TUNNEL_CHUNK_BYTES;
use skerry_proto::link::{Header, StreamTarget, TunnelFrame, tunnel_frame::Frame};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};

use super::process::{self, FromClient, LINGER, QUEUE, Resizes, ToClient};
use super::{StreamError, Wire, send};
use crate::runtime::{ExecRequest, StreamedProcess};

const MAX_MESSAGE_BYTES: usize = 1024 * 1024;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const OUTCOME: u8 = 3;
const RESIZE: u8 = 4;
/// Version 5: the end of the channel that the next byte names.
const CLOSE: u8 = 255;

/// A subprotocol's ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Protocol {
    name: &'static str,
    base64: bool,
    /// The outcome is a JSON Status.
    json: bool,
    /// A client can end its stdin.
    close: bool,
}

const fn protocol(name: &'static str, base64: bool, json: bool, close: bool) -> Protocol {
    Protocol {
        name,
        base64,
        json,
        close,
    }
}

/// Of a client that names none.
const UNNAMED: Protocol = protocol("", false, false, false);

const PROTOCOLS: [Protocol; 5] = [
    protocol("v5.channel.k8s.io", false, true, true),
    protocol("v4.channel.k8s.io", false, true, false),
    protocol("v4.base64.channel.k8s.io", true, true, false),
    protocol("channel.k8s.io", false, false, false),
    protocol("base64.channel.k8s.io", true, false, false),
];

type Socket = WebSocketStream<DuplexStream>;

/// Serves a process to a WebSocket client.
pub(super) async fn serve(
    process: StreamedProcess,
    request: &ExecRequest,
    target: &StreamTarget,
    attach: bool,
    wire: Wire,
) -> Result<(), StreamError> {
    let (protocol, headers) = handshake(target)?;
    if !wire
        .ready(StatusCode::SWITCHING_PROTOCOLS.as_u16(), headers)
        .await
    {
        return Ok(());
    }
    session(wire, |socket| {
        serve_socket(process, request, attach, protocol, socket)
    })
    .await;
    Ok(())
}

/// Runs `serve` on a WebSocket whose bytes are those of the tunnel.
async fn session<S: Future<Output = ()>>(wire: Wire, serve: impl FnOnce(Socket) -> S) {
    let Wire { incoming, out } = wire;
    let (ours, theirs) = tokio::io::duplex(TUNNEL_CHUNK_BYTES);
    let (from_socket, to_socket) = tokio::io::split(theirs);
    let session = async {
        let socket = WebSocketStream::from_raw_socket(ours, Role::Server, Some(socket_config())).await;
        serve(socket).await;
    };
    // The session drops its end of the pipe, which ends `upwards` after the last byte; `downwards` then has no reader.
    let up = async { tokio::join!(session, upwards(from_socket, out)) };
    tokio::select! {
        _ = up => {}
        () = downwards(incoming, to_socket) => {}
    }
}

/// Takes any bytes as a message of each protocol.
pub(super) fn decode_any(message: Bytes) {
    for protocol in PROTOCOLS.into_iter().chain([UNNAMED]) {
        let mut resizes = Resizes::default();
        let _ = decode(protocol, message.clone(), &mut resizes);
    }
}

/// Takes any bytes as what comes on the connection.
pub(super) fn read_any(bytes: &[u8]) {
    use tokio_tungstenite::tungstenite::WebSocket;
    let config = socket_config();
    let pipe = std::io::Cursor::new(bytes.to_vec());
    let mut socket = WebSocket::from_raw_socket(pipe, Role::Server, Some(config));
    while let Ok(message) = socket.read() {
        assert!(message.len() <= MAX_MESSAGE_BYTES, "a limit is kept");
    }
}

fn socket_config() -> WebSocketConfig {
    WebSocketConfig::default()
        .max_message_size(Some(MAX_MESSAGE_BYTES))
        .max_frame_size(Some(MAX_MESSAGE_BYTES))
}

pub(super) fn handshake(target: &StreamTarget) -> Result<(Protocol, Vec<Header>), StreamError> {
    let key = process::header(&target.headers, "sec-websocket-key")
        .ok_or_else(|| StreamError::bad_request("the WebSocket upgrade has no Sec-WebSocket-Key"))?;
    let offered = process::list(&target.headers, "sec-websocket-protocol");
    let known = |offer: &String| PROTOCOLS.into_iter().find(|protocol| protocol.name == offer);
    let protocol = match offered.iter().find_map(known) {
        Some(protocol) => protocol,
        None if offered.is_empty() => UNNAMED,
        None => {
            let names = PROTOCOLS.map(|protocol| protocol.name).join(", ");
            let message = format!("none of the WebSocket protocols {offered:?} is served, only {names}");
            return Err(StreamError::bad_request(message));
        }
    };
    let mut headers = vec![
        process::our_header("Connection", "Upgrade"),
        process::our_header("Upgrade", "websocket"),
        process::our_header("Sec-WebSocket-Accept", &derive_accept_key(key.as_bytes())),
    ];
    if !protocol.name.is_empty() {
        headers.push(process::our_header("Sec-WebSocket-Protocol", protocol.name));
    }
    Ok((protocol, headers))
}

async fn upwards(mut from: ReadHalf<DuplexStream>, out: mpsc::Sender<TunnelFrame>) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(TUNNEL_CHUNK_BYTES);
        match from.read_buf(&mut buffer).await {
            Ok(count) if count > 0 => {}
            _ => return,
        }
        if !send(&out, Frame::Data(buffer.split().freeze())).await {
            return;
        }
    }
}

async fn downwards(mut incoming: mpsc::Receiver<Bytes>, mut to: WriteHalf<DuplexStream>) {
    while let Some(bytes) = incoming.recv().await {
        if to.write_all(&bytes).await.is_err() {
            // The session is over; `upwards` still has its last bytes to send.
            std::future::pending::<()>().await;
        }
    }
}

async fn serve_socket(
    process: StreamedProcess,
    request: &ExecRequest,
    attach: bool,
    protocol: Protocol,
    socket: Socket,
) {
    let (sink, stream) = socket.split();
    let (to_process, from_client) = mpsc::channel(QUEUE);
    let (to_client, events) = mpsc::channel(QUEUE);
    let first = if request.stdout {
        STDOUT
    } else if request.stderr {
        STDERR
    } else {
        OUTCOME
    };
    let read = read(stream, protocol, to_process);
    let write = async {
        tokio::join!(
            process::drive(process, from_client, to_client),
            write(sink, protocol, first, attach, events)
        )
    };
    tokio::pin!(read, write);
    tokio::select! {
        () = &mut read => {}
        // The client answers the close message and goes.
        _ = &mut write => { let _ = tokio::time::timeout(LINGER, read).await; }
    }
}

/// Until the client goes. Pings are answered by the socket itself while it is read.
async fn read(mut stream: SplitStream<Socket>, protocol: Protocol, to_process: mpsc::Sender<FromClient>) {
    let mut resizes = Resizes::default();
    while let Some(Ok(message)) = stream.next().await {
        let message = match message {
            Message::Binary(bytes) => bytes,
            Message::Text(text) => text.into(),
            Message::Close(_) => return,
            Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
        };
        for event in decode(protocol, message, &mut resizes) {
            // A process that has ended needs no input.
            let _ = to_process.send(event).await;
        }
    }
}

/// Channel and payload of a message; `None` when it is malformed.
fn split(protocol: Protocol, mut message: Bytes) -> Option<(u8, Bytes)> {
    if message.is_empty() {
        return None;
    }
    let channel = message.split_to(1)[0];
    if !protocol.base64 {
        return Some((channel, message));
    }
    let payload = STANDARD.decode(&message).ok()?;
    Some((channel.wrapping_sub(b'0'), Bytes::from(payload)))
}

fn decode(protocol: Protocol, message: Bytes, resizes: &mut Resizes) -> Vec<FromClient> {
    let Some((channel, payload)) = split(protocol, message) else {
        return Vec::new();
    };
    match channel {
        STDIN if !payload.is_empty() => vec![FromClient::Stdin(payload)],
        RESIZE => resizes.push(&payload),
        CLOSE if protocol.close && payload.first() == Some(&STDIN) => vec![FromClient::StdinEnd],
        _ => Vec::new(),
    }
}

async fn write(
    mut sink: SplitSink<Socket, Message>,
    protocol: Protocol,
    first: u8,
    attach: bool,
    mut events: mpsc::Receiver<ToClient>,
) {
    // Tells the client that the connection is served.
    if sink.send(encode(protocol, first, b"")).await.is_err() {
        return;
    }
    while let Some(event) = events.recv().await {
        let message = match event {
            ToClient::Stdout(bytes) => encode(protocol, STDOUT, &bytes),
            ToClient::Stderr(bytes) => encode(protocol, STDERR, &bytes),
            ToClient::Exit(code) => match process::outcome(code, attach, protocol.json) {
                Some(outcome) => encode(protocol, OUTCOME, outcome.as_bytes()),
                None => continue,
            },
        };
        if sink.send(message).await.is_err() {
            return;
        }
    }
    // It may be gone already.
    let _ = sink.send(normal_close()).await;
}

/// Go's client takes any other close for a failure.
fn normal_close() -> Message {
    Message::Close(Some(CloseFrame {
        code: CloseCode::Normal,
        reason: "".into(),
    }))
}

fn encode(protocol: Protocol, channel: u8, payload: &[u8]) -> Message {
    if protocol.base64 {
        let mut text = String::from(char::from(b'0' + channel));
        STANDARD.encode_string(payload, &mut text);
        return Message::text(text);
    }
    let mut bytes = BytesMut::with_capacity(1 + payload.len());
    bytes.put_u8(channel);
    bytes.put_slice(payload);
    Message::binary(bytes.freeze())
}

#[cfg(test)]
#[path = "websocket_tests.rs"]
mod websocket_tests;
