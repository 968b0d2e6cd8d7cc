//! Port-forward to ports of the host itself, for pods that have no network of their own.
//!
//! A client asks for connections, each by a pair of streams or channels: one for data, one for an error text. Both
//! protocols, [`spdy`](super::spdy) and [`websocket`](super::websocket), turn them into [`connect`] and copy bytes.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use skerry_proto::link::StreamTarget;
use tokio::net::TcpStream;

use super::process::header;
use super::{StreamError, Wire, spdy, websocket};

/// How long a port may take to accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Most connections of one client at a time.
pub(super) const MAX_CONNECTIONS: usize = 256;

/// Chooses the protocol by the client's upgrade request and serves it.
pub(super) async fn serve(target: &StreamTarget, wire: Wire) -> Result<(), StreamError> {
    match header(&target.headers, "upgrade")
        .map(str::to_ascii_lowercase)
        .as_deref()
    {
        Some("spdy/3.1") => spdy::forward::serve(target, wire).await,
        Some("websocket") => websocket::forward::serve(target, wire).await,
        other => Err(StreamError::bad_request(format!(
            "cannot upgrade to {other:?}: use SPDY/3.1 or websocket"
        ))),
    }
}

/// Connects to a port of this machine, as a process beside the pod's would; the error is for the client.
pub(super) async fn connect(pod: &str, port: u16) -> Result<TcpStream, String> {
    let words = |error: &dyn std::fmt::Display| {
        format!("error forwarding port {port} to pod {pod}: failed to connect to localhost:{port}: {error}")
    };
    let dial = async {
        match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
            Ok(stream) => Ok(stream),
            // What the first one says is what a person expects to read.
            Err(error) => TcpStream::connect((Ipv6Addr::LOCALHOST, port))
                .await
                .map_err(|_| error),
        }
    };
    match tokio::time::timeout(CONNECT_LIMIT, dial).await {
        Ok(Ok(stream)) => {
            // Keystrokes must not wait for company.
            let _ = stream.set_nodelay(true);
            Ok(stream)
        }
        Ok(Err(error)) => Err(words(&error)),
        Err(_) => Err(words(&"timed out")),
    }
}
