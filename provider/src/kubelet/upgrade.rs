//! Relays an upgraded connection to a tunnel, byte by byte, without looking into it.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{HeaderName, HeaderValue};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use skerry_proto::SiteName;
use skerry_proto::limits::TUNNEL_CHUNK_BYTES;
use skerry_proto::link::{StreamTarget, TunnelReady, open_tunnel::Target};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::routes::Refusal;
use super::server::{Body, full};
use crate::link::tunnels::{Tunnel, TunnelBroken, Tunnels};

/// Largest text of a refusal that is passed on.
const MAX_REFUSAL_BYTES: usize = 64 * 1024;

/// Opens the stream at the site; on 101 relays until both directions have ended, or `stop`.
pub(super) async fn serve(
    tunnels: &Tunnels,
    site: &SiteName,
    target: StreamTarget,
    request: &mut Request<Incoming>,
    stop: CancellationToken,
) -> Result<Response<Body>, Refusal> {
    let upgrade = hyper::upgrade::on(request);
    let opened = tunnels.open(site, Target::Stream(target)).await;
    let mut tunnel = opened.map_err(|error| Refusal::new(error.http_status(), format!("{error}\n")))?;
    let status = u16::try_from(tunnel.ready.status)
        .ok()
        .and_then(|status| StatusCode::from_u16(status).ok());
    let status = status.unwrap_or(StatusCode::BAD_GATEWAY);
    let ready = std::mem::take(&mut tunnel.ready);
    if status != StatusCode::SWITCHING_PROTOCOLS {
        let status = if status.is_informational() {
            StatusCode::BAD_GATEWAY
        } else {
            status
        };
        return Ok(response(status, ready, full(text(tunnel).await)));
    }
    tokio::spawn(async move {
        tokio::select! {
            () = relay(upgrade, tunnel) => {}
            () = stop.cancelled() => {}
        }
    });
    Ok(response(status, ready, full(Bytes::new())))
}

fn response(status: StatusCode, ready: TunnelReady, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    for header in ready.headers {
        let parsed = (
            HeaderName::from_bytes(header.name.as_bytes()),
            HeaderValue::from_bytes(&header.value),
        );
        // Framing is the business of this connection.
        if let (Ok(name), Ok(value)) = parsed
            && name != http::header::CONTENT_LENGTH
            && name != http::header::TRANSFER_ENCODING
        {
            // A map that is full refuses: a site with ten thousands of headers must not end this task.
            if response.headers_mut().try_append(name, value).is_err() {
                break;
            }
        }
    }
    response
}

/// The head that a site's answer makes, for hostile bytes.
pub(crate) fn any_ready(ready: &TunnelReady) -> usize {
    let status = u16::try_from(ready.status).ok();
    let status = status.and_then(|status| StatusCode::from_u16(status).ok());
    let status = status.unwrap_or(StatusCode::BAD_GATEWAY);
    response(status, ready.clone(), full(Bytes::new()))
        .headers()
        .len()
}

async fn text(mut tunnel: Tunnel) -> Bytes {
    let mut text = BytesMut::new();
    while let Some(Ok(bytes)) = tunnel.incoming.recv().await {
        text.extend_from_slice(&bytes);
        if text.len() > MAX_REFUSAL_BYTES {
            text.truncate(MAX_REFUSAL_BYTES);
            break;
        }
    }
    text.freeze()
}

/// How long a client may go on after the site has ended a stream.
const LINGER: Duration = Duration::from_secs(2);

async fn relay(upgrade: OnUpgrade, tunnel: Tunnel) {
    let upgraded = match upgrade.await {
        Ok(upgraded) => TokioIo::new(upgraded),
        Err(error) => {
            tracing::debug!(%error, "a client went away during its upgrade");
            return;
        }
    };
    let (read, write) = tokio::io::split(upgraded);
    let Tunnel {
        incoming, outgoing, ..
    } = tunnel;
    let down = down(read, outgoing);
    let up = up(incoming, write);
    tokio::pin!(down, up);
    tokio::select! {
        // The client may have closed its direction only: what the site still sends is for it.
        () = &mut down => up.await,
        // The site has nothing more to say. What the client still says is read and dropped: closing a socket with
        // unread bytes could take the last bytes from the client.
        () = &mut up => { let _ = tokio::time::timeout(LINGER, down).await; }
    }
}

async fn down(mut read: ReadHalf<TokioIo<Upgraded>>, outgoing: mpsc::Sender<Bytes>) {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(TUNNEL_CHUNK_BYTES);
        match read.read_buf(&mut buffer).await {
            Ok(count) if count > 0 => {}
            _ => return,
        }
        while !buffer.is_empty() {
            let chunk = buffer.split_to(buffer.len().min(TUNNEL_CHUNK_BYTES)).freeze();
            // After the tunnel's end nobody wants it; see `relay`.
            let _ = outgoing.send(chunk).await;
        }
    }
}

async fn up(
    mut incoming: mpsc::Receiver<Result<Bytes, TunnelBroken>>,
    mut write: WriteHalf<TokioIo<Upgraded>>,
) {
    while let Some(next) = incoming.recv().await {
        match next {
            Ok(bytes) => {
                if write.write_all(&bytes).await.is_err() || write.flush().await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::info!(%error, "a relayed connection was cut");
                return;
            }
        }
    }
    // The client may be gone already.
    let _ = write.shutdown().await;
}
