//! Answers a log request with the bytes of a tunnel.

use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http::{Response, StatusCode, header};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use skerry_proto::SiteName;
use skerry_proto::link::{LogsTarget, open_tunnel::Target};

use super::routes::Refusal;
use super::server::Body;
use crate::link::tunnels::{Tunnel, TunnelBroken, Tunnels};

/// How long the end of a log is held back after its last bytes.
///
/// The API server's WebSocket relay of a log throws bytes away that it reads together with the end of the answer
/// (`Reader.Copy` of its `wsstream` package), and over HTTP/1.1 it reads both at once when they arrive at once.
const END_APART: Duration = Duration::from_millis(50);

/// Opens the log and answers 200 with a chunked body that ends with it; a stream that breaks off cuts the connection.
pub(super) async fn serve(
    tunnels: &Tunnels,
    site: &SiteName,
    target: LogsTarget,
) -> Result<Response<Body>, Refusal> {
    let opened = tunnels.open(site, Target::Logs(target)).await;
    let tunnel = opened.map_err(|error| Refusal::new(error.http_status(), format!("{error}\n")))?;
    let mut response = Response::new(body(tunnel));
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("text/plain"),
    );
    Ok(response)
}

/// The body owns the tunnel: when the client goes, hyper drops it and the edge stops reading.
fn body(tunnel: Tunnel) -> Body {
    let frames = stream::unfold(tunnel, |mut tunnel| async move {
        let Some(next) = tunnel.incoming.recv().await else {
            tokio::time::sleep(END_APART).await;
            return None;
        };
        let next: Result<Bytes, TunnelBroken> = next;
        Some((next.map(Frame::data).map_err(Into::into), tunnel))
    });
    StreamBody::new(frames).boxed_unsync()
}
