//! Port-forward over WebSocket (`v4.channel.k8s.io`): channel 2i has the data of the i-th port that was asked for,
//! channel 2i + 1 its error text. The server begins each with the port, two bytes, the low one first.

use bytes::{Bytes, BytesMut};
use futures::{SinkExt, StreamExt};
use http::StatusCode;
use skerry_proto::limits::TUNNEL_CHUNK_BYTES;
use skerry_proto::link::StreamTarget;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;

use super::{Protocol, Socket, encode, handshake, session};
use crate::streams::forward::connect;
use crate::streams::process::QUEUE;
use crate::streams::{StreamError, Wire};

/// Each port needs two channels, and a channel is one byte.
const MAX_PORTS: usize = 127;

/// Serves connections to the ports that the request names.
pub(in super::super) async fn serve(target: &StreamTarget, wire: Wire) -> Result<(), StreamError> {
    let ports: Vec<u16> = target
        .ports
        .iter()
        .filter_map(|&port| u16::try_from(port).ok())
        .filter(|port| *port > 0)
        .collect();
    if ports.is_empty() {
        return Err(StreamError::bad_request("query parameter \"port\" is required"));
    }
    if ports.len() > MAX_PORTS {
        return Err(StreamError::bad_request("too many ports are asked for"));
    }
    let (protocol, headers) = handshake(target)?;
    if !wire
        .ready(StatusCode::SWITCHING_PROTOCOLS.as_u16(), headers)
        .await
    {
        return Ok(());
    }
    let pod = target.pod.clone();
    session(wire, |socket| serve_socket(pod, ports, protocol, socket)).await;
    Ok(())
}

async fn serve_socket(pod: String, ports: Vec<u16>, protocol: Protocol, socket: Socket) {
    let (mut sink, mut stream) = socket.split();
    let (out, mut messages) = mpsc::channel::<Message>(QUEUE);
    let mut connections = JoinSet::new();
    let mut inputs = Vec::new();
    for (port, data) in ports.into_iter().zip((0_u8..).step_by(2)) {
        let number = port.to_le_bytes();
        for channel in [data, data + 1] {
            if sink.send(encode(protocol, channel, &number)).await.is_err() {
                return;
            }
        }
        let (to_port, input) = mpsc::channel::<Bytes>(QUEUE);
        inputs.push(Some(to_port));
        let (pod, out) = (pod.clone(), out.clone());
        connections.spawn(async move {
            if let Err(trouble) = carry(&pod, port, data, protocol, input, &out).await {
                // The client may be gone.
                let _ = out.send(encode(protocol, data + 1, trouble.as_bytes())).await;
            }
        });
    }
    drop(out);
    let read = async {
        while let Some(Ok(next)) = stream.next().await {
            let bytes = match next {
                Message::Binary(bytes) => bytes,
                Message::Text(text) => text.into(),
                Message::Close(_) => return,
                Message::Ping(_) | Message::Pong(_) | Message::Frame(_) => continue,
            };
            let Some((channel, payload)) = super::split(protocol, bytes) else {
                continue;
            };
            let input = inputs
                .get_mut(usize::from(channel / 2))
                .filter(|_| channel % 2 == 0);
            if let Some(Some(to_port)) = input
                && !payload.is_empty()
                && to_port.send(payload).await.is_err()
            {
                // The port takes no more.
                inputs[usize::from(channel / 2)] = None;
            }
        }
    };
    let write = async {
        while let Some(message) = messages.recv().await {
            if sink.send(message).await.is_err() {
                return;
            }
        }
        // All connections have ended.
        let _ = sink.send(super::normal_close()).await;
    };
    tokio::select! {
        () = read => {}
        () = write => {}
    }
}

/// One connection from its start to its end.
async fn carry(
    pod: &str,
    port: u16,
    channel: u8,
    protocol: Protocol,
    mut input: mpsc::Receiver<Bytes>,
    out: &mpsc::Sender<Message>,
) -> Result<(), String> {
    let (mut read, mut write) = connect(pod, port).await?.into_split();
    let up = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(TUNNEL_CHUNK_BYTES);
            match read.read_buf(&mut buffer).await {
                Ok(count) if count > 0 => {}
                _ => return,
            }
            if out
                .send(encode(protocol, channel, &buffer.split()))
                .await
                .is_err()
            {
                return;
            }
        }
    };
    let down = async {
        while let Some(bytes) = input.recv().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::pin!(up, down);
    tokio::select! {
        () = &mut up => {}
        () = &mut down => up.await,
    }
    Ok(())
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod forward_tests;
