//! TLS connections of sites, handed to tonic with the peer's identity.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use rustls::ServerConfig;
use skerry_transport::{Handle, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::pki::{Authority, SitePeer};

/// How long a client may take for its TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Handshakes under way at one time; more wait in the kernel's queue.
const HANDSHAKES: usize = 256;
/// Connections that wait in the kernel for their handshake (it takes `net.core.somaxconn` at most): a few seconds' work.
/// Who finds it full is not answered, and tries again as TCP does, after one, three and seven seconds.
const BACKLOG: u32 = 4096;

/// Who is at the other end of a connection.
#[derive(Clone)]
pub struct Peer {
    /// The site that the client's certificate names; `None` without a certificate.
    pub site: Option<SitePeer>,
    /// Its address.
    pub remote: SocketAddr,
    /// The connection itself, to be marked.
    pub line: Handle,
}

/// A connection whose handshake is done.
pub struct Connection {
    stream: TlsStream<Stream>,
    peer: Peer,
}

/// Opens the listener of the link.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts connections until `stop`, shakes hands concurrently, and yields the good ones.
///
/// A peer that fails its handshake is logged, counted and forgotten; the listener goes on.
pub fn serve(
    listener: TcpListener,
    tls: watch::Receiver<Arc<ServerConfig>>,
    authority: Authority,
    refused: Counter,
    stop: CancellationToken,
) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(16);
    let places = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES));
    tokio::spawn(async move {
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let (stream, remote) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "the link listener cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let acceptor = TlsAcceptor::from(Arc::clone(&tls.borrow()));
            let (ready, authority, refused) = (ready.clone(), authority.clone(), refused.clone());
            tokio::spawn(async move {
                match tokio::time::timeout(HANDSHAKE_LIMIT, shake(stream, remote, acceptor, &authority)).await
                {
                    Ok(Ok(connection)) => {
                        let _ = ready.send(Ok(connection)).await;
                    }
                    Ok(Err(reason)) => {
                        refused.inc();
                        tracing::info!(%remote, %reason, "a link connection was refused");
                    }
                    Err(_) => {
                        refused.inc();
                        tracing::info!(%remote, "a link connection did not finish its TLS handshake");
                    }
                }
                drop(place);
            });
        }
    });
    ReceiverStream::new(connections)
}

async fn shake(
    stream: TcpStream,
    remote: SocketAddr,
    acceptor: TlsAcceptor,
    authority: &Authority,
) -> Result<Connection, String> {
    let stream = Stream::new(stream).map_err(|e| e.to_string())?;
    let line = stream.handle();
    let stream = acceptor.accept(stream).await.map_err(|e| e.to_string())?;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let site = authority.peer_site(certificates).map_err(|e| e.to_string())?;
    Ok(Connection {
        stream,
        peer: Peer { site, remote, line },
    })
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
