//! TLS connections of sites, handed to tonic with the peer's identity.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use rustls::ServerConfig;
use skerry_proto::SiteName;
use skerry_transport::{Handle, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use super::door::Door;
use crate::pki::{Authority, SitePeer};

/// How long a client may take for its TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Handshakes under way at one time; more wait for their turn.
const HANDSHAKES: usize = 256;
/// Connections that wait for it: a few seconds' work. More are closed.
const WAITING: usize = 4096;
/// Connections that the kernel keeps until they are looked at (it takes `net.core.somaxconn` at most).
const BACKLOG: u32 = 4096;
/// A client without a certificate comes to join, which takes seconds.
const STRANGER_LIFE: Duration = Duration::from_secs(30);
/// So many of them at one time.
const STRANGERS: usize = 1024;
/// Connections of one site. It needs two, and a third to renew; those that its line has lost stay until that is noticed.
/// With one more the oldest is closed.
const PER_SITE: usize = 32;

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
    /// Says why the connection must end now.
    ended: Pin<Box<dyn Future<Output = &'static str> + Send>>,
    _place: Place,
}

/// What is given back when a connection is gone.
enum Place {
    Stranger(#[allow(dead_code, reason = "held for its drop")] OwnedSemaphorePermit),
    Site(#[allow(dead_code, reason = "held for its drop")] Seat),
}

/// Open connections.
#[derive(Clone)]
struct House {
    strangers: Arc<Semaphore>,
    sites: Arc<Mutex<HashMap<SiteName, Seats>>>,
}

/// A site's connections, oldest first: a number each, and what ends it.
type Seats = VecDeque<(u64, CancellationToken)>;

/// A site's connection in the [`House`].
struct Seat {
    house: House,
    site: SiteName,
    number: u64,
}

impl House {
    fn new() -> Self {
        Self {
            strangers: Arc::new(Semaphore::new(STRANGERS)),
            sites: Arc::default(),
        }
    }

    /// Takes a site in; its oldest connection may have to go. The token ends this one.
    fn seat(&self, site: &SiteName) -> (Seat, CancellationToken) {
        let token = CancellationToken::new();
        let mut sites = self.sites();
        let seats = sites.entry(site.clone()).or_default();
        let number = seats.back().map_or(0, |(number, _)| number + 1);
        seats.push_back((number, token.clone()));
        if seats.len() > PER_SITE
            && let Some((_, oldest)) = seats.pop_front()
        {
            oldest.cancel();
        }
        let seat = Seat {
            house: self.clone(),
            site: site.clone(),
            number,
        };
        (seat, token)
    }

    fn sites(&self) -> MutexGuard<'_, HashMap<SiteName, Seats>> {
        // Every entry is whole at any moment.
        self.sites.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut sites = self.house.sites();
        if let Some(seats) = sites.get_mut(&self.site) {
            seats.retain(|(number, _)| *number != self.number);
            if seats.is_empty() {
                sites.remove(&self.site);
            }
        }
    }
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
    let house = House::new();
    tokio::spawn(async move {
        let mut door = Door::new(HANDSHAKES, WAITING);
        let (over, mut ended) = mpsc::unbounded_channel();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                Some(source) = ended.recv() => { door.done(source); None }
                accepted = listener.accept() => Some(accepted),
            };
            match accepted {
                Some(Ok((stream, remote))) => {
                    let surplus = door.arrive(remote.ip().into(), (stream, remote));
                    refused.inc_by(u64::from(surplus.is_some()));
                }
                Some(Err(error)) => {
                    tracing::warn!(%error, "the link listener cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                None => {}
            }
            while let Some((source, (stream, remote))) = door.next() {
                let acceptor = TlsAcceptor::from(Arc::clone(&tls.borrow()));
                let (ready, authority, refused) = (ready.clone(), authority.clone(), refused.clone());
                let (house, over) = (house.clone(), over.clone());
                tokio::spawn(async move {
                    let shaken = shake(stream, remote, acceptor, &authority, &house);
                    match tokio::time::timeout(HANDSHAKE_LIMIT, shaken).await {
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
                    // The listener ends before its handshakes when the provider stops.
                    let _ = over.send(source);
                });
            }
        }
    });
    ReceiverStream::new(connections)
}

async fn shake(
    stream: TcpStream,
    remote: SocketAddr,
    acceptor: TlsAcceptor,
    authority: &Authority,
    house: &House,
) -> Result<Connection, String> {
    let stream = Stream::new(stream).map_err(|e| e.to_string())?;
    let line = stream.handle();
    let stream = acceptor.accept(stream).await.map_err(|e| e.to_string())?;
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let site = authority.peer_site(certificates).map_err(|e| e.to_string())?;
    let (place, ended): (_, Pin<Box<dyn Future<Output = _> + Send>>) = match &site {
        Some(peer) => {
            let (seat, token) = house.seat(&peer.site);
            let ended = async move {
                token.cancelled().await;
                "the site has opened too many connections"
            };
            (Place::Site(seat), Box::pin(ended))
        }
        None => {
            let place = Arc::clone(&house.strangers).try_acquire_owned();
            let place = place.map_err(|_| "too many clients without a certificate".to_owned())?;
            let ended = async {
                tokio::time::sleep(STRANGER_LIFE).await;
                "a client without a certificate has only this long to join"
            };
            (Place::Stranger(place), Box::pin(ended))
        }
    };
    Ok(Connection {
        stream,
        peer: Peer { site, remote, line },
        ended,
        _place: place,
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
        // A connection is always read from, also while nothing happens on it.
        if let Poll::Ready(reason) = self.ended.as_mut().poll(cx) {
            self.ended = Box::pin(std::future::ready(reason));
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, reason)));
        }
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
