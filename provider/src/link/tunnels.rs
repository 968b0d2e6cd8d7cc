//! Tunnels: byte streams between the kubelet API and a site.
//!
//! In comes a request for a log, exec, attach or port-forward ([`Tunnels::open`]); an order goes out on the site's
//! control lane ([`Orders`]); the edge answers by opening the gRPC `Tunnel` stream, which the link's service hands
//! to [`Tunnels::accept`]. From then on bytes are relayed raw, with back-pressure in both directions: every channel
//! holds at most [`CHANNEL_CHUNKS`] chunks.
//!
//! What must always hold:
//! * A site can only claim tunnels that were ordered from that very site, each once.
//! * Nothing outlives its user: dropping a [`Tunnel`] ends the stream at the edge, and so does dropping the future
//!   of [`Tunnels::open`].
//! * The end of one direction leaves the other one open.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};
use http::StatusCode;
use jiff::Timestamp;
use skerry_proto::SiteName;
use skerry_proto::limits::{MAX_TUNNELS_PER_SITE, TUNNEL_CHUNK_BYTES};
use skerry_proto::link::{
    OpenTunnel, TunnelFailed, TunnelFrame, TunnelOpen, TunnelReady, open_tunnel::Target, tunnel_frame::Frame,
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// How long a site may take to open a tunnel and to say that it is ready.
pub const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// Chunks that wait in one direction before the sender is held back.
const CHANNEL_CHUNKS: usize = 8;

/// Outgoing and incoming frames as the gRPC service sees them.
pub type FrameStream = BoxStream<'static, Result<TunnelFrame, Status>>;

/// A site has no session just now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct SiteAway {
    /// The site.
    pub site: SiteName,
    /// When its last session ended; absent when it has had none since this provider started.
    pub since: Option<Timestamp>,
}

impl std::fmt::Display for SiteAway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.since {
            Some(since) => write!(
                f,
                "site {:?} is not connected since {since:.0}",
                self.site.as_str()
            )?,
            None => write!(f, "site {:?} is not connected", self.site.as_str())?,
        }
        f.write_str("; its pods go on without the cloud, try again when it is back")
    }
}

/// Carries an order to a site's session.
pub trait Orders: Send + Sync + 'static {
    /// Queues the order on the site's control lane. Must not block.
    fn send(&self, site: &SiteName, order: OpenTunnel) -> Result<(), SiteAway>;
}

/// Why a tunnel could not be opened. The kubelet API answers it with [`TunnelOpenError::http_status`] and the text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunnelOpenError {
    /// The site has no session, or lost it while the tunnel was being opened. Retry when it is back.
    #[error(transparent)]
    Away(#[from] SiteAway),
    /// The site has a session but did not answer.
    #[error("site {site} did not open the stream within {} s; its link may be slow or cut, try again", OPEN_LIMIT.as_secs())]
    TimedOut {
        /// The site.
        site: SiteName,
    },
    /// The site has [`MAX_TUNNELS_PER_SITE`] tunnels already.
    #[error("site {site} serves {MAX_TUNNELS_PER_SITE} streams already; end some of them and try again")]
    TooMany {
        /// The site.
        site: SiteName,
    },
    /// The edge cannot serve the target; its own status and words.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// For the person who asked.
        message: String,
    },
}

impl TunnelOpenError {
    /// The HTTP status that the kubelet API answers with.
    pub fn http_status(&self) -> StatusCode {
        match self {
            Self::Away(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::TimedOut { .. } => StatusCode::GATEWAY_TIMEOUT,
            Self::TooMany { .. } => StatusCode::TOO_MANY_REQUESTS,
            Self::Refused { status, .. } => StatusCode::from_u16(*status)
                .ok()
                .filter(|status| status.is_client_error() || status.is_server_error())
                .unwrap_or(StatusCode::BAD_GATEWAY),
        }
    }
}

/// A tunnel ended before the edge had sent everything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream of site {site} broke off: {message}")]
pub struct TunnelBroken {
    /// The site.
    pub site: SiteName,
    /// What happened.
    pub message: String,
}

/// An open tunnel. Dropping both channels ends the stream at the edge.
#[derive(Debug)]
pub struct Tunnel {
    /// What the edge said: status and headers of an upgrade, or 200.
    pub ready: TunnelReady,
    /// Bytes from the edge. `None` is the end of that direction, an error the end of the tunnel.
    pub incoming: mpsc::Receiver<Result<Bytes, TunnelBroken>>,
    /// Bytes to the edge, at most [`TUNNEL_CHUNK_BYTES`] each; dropping it half-closes.
    pub outgoing: mpsc::Sender<Bytes>,
}

type Answer = oneshot::Sender<Result<Tunnel, TunnelOpenError>>;

enum Entry {
    /// Ordered; the edge has not opened it yet.
    Pending { answer: Answer },
    /// Opened by the edge.
    Open { cancel: CancellationToken },
}

struct Shared {
    orders: Arc<dyn Orders>,
    entries: Mutex<HashMap<String, (SiteName, Entry)>>,
}

impl Shared {
    fn entries(&self) -> MutexGuard<'_, HashMap<String, (SiteName, Entry)>> {
        // No code panics while it holds the lock, and the map is valid between any two statements.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Removes an entry when its user is gone.
struct Forget {
    shared: Arc<Shared>,
    id: String,
    pending_only: bool,
}

impl Drop for Forget {
    fn drop(&mut self) {
        let mut entries = self.shared.entries();
        if self.pending_only && !matches!(entries.get(&self.id), Some((_, Entry::Pending { .. }))) {
            return;
        }
        entries.remove(&self.id);
    }
}

/// All tunnels of all sites.
#[derive(Clone)]
pub struct Tunnels {
    shared: Arc<Shared>,
}

impl Tunnels {
    /// No tunnels yet; orders go out through `orders`.
    pub fn new(orders: Arc<dyn Orders>) -> Self {
        Self {
            shared: Arc::new(Shared {
                orders,
                entries: Mutex::default(),
            }),
        }
    }

    /// Tunnels that are pending or open.
    pub fn count(&self) -> usize {
        self.shared.entries().len()
    }

    /// The same by site; sites without any are left out.
    pub fn by_site(&self) -> HashMap<SiteName, usize> {
        let mut counts = HashMap::new();
        for (site, _) in self.shared.entries().values() {
            *counts.entry(site.clone()).or_default() += 1;
        }
        counts
    }

    /// Asks a site for a stream and waits, at most [`OPEN_LIMIT`], until it is ready.
    ///
    /// Cancellation safe: a dropped call forgets the tunnel, and the edge is told so when it opens it.
    pub async fn open(&self, site: &SiteName, target: Target) -> Result<Tunnel, TunnelOpenError> {
        let id = format!("{:032x}", rand::random::<u128>());
        let (answer, answered) = oneshot::channel();
        {
            let mut entries = self.shared.entries();
            if entries.values().filter(|(owner, _)| owner == site).count() >= MAX_TUNNELS_PER_SITE {
                return Err(TunnelOpenError::TooMany { site: site.clone() });
            }
            entries.insert(id.clone(), (site.clone(), Entry::Pending { answer }));
        }
        let _forget = Forget {
            shared: self.shared.clone(),
            id: id.clone(),
            pending_only: true,
        };
        let order = OpenTunnel {
            id,
            target: Some(target),
        };
        self.shared.orders.send(site, order)?;
        match tokio::time::timeout(OPEN_LIMIT, answered).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(lost(site)),
            Err(_) => Err(TunnelOpenError::TimedOut { site: site.clone() }),
        }
    }

    /// Takes the stream that a site opened; `first` is the message that it opened it with. The returned stream is
    /// what the site is to be sent.
    pub fn accept<S>(&self, site: &SiteName, first: TunnelOpen, inbound: S) -> FrameStream
    where
        S: Stream<Item = Result<TunnelFrame, Status>> + Send + 'static,
    {
        let cancel = CancellationToken::new();
        let answer = {
            let mut entries = self.shared.entries();
            match entries.remove(&first.id) {
                Some((owner, Entry::Pending { answer })) if owner == *site => {
                    let open = Entry::Open {
                        cancel: cancel.clone(),
                    };
                    entries.insert(first.id.clone(), (owner, open));
                    answer
                }
                other => {
                    if let Some(other) = other {
                        entries.insert(first.id, other);
                    }
                    let status = Status::not_found("no such tunnel: it was given up, or is another site's");
                    return stream::once(async { Err(status) }).boxed();
                }
            }
        };
        let forget = Forget {
            shared: self.shared.clone(),
            id: first.id,
            pending_only: false,
        };
        let (outgoing, to_edge) = mpsc::channel(CHANNEL_CHUNKS);
        let inward = Inward {
            site: site.clone(),
            cancel: cancel.clone(),
            _forget: forget,
        };
        tokio::spawn(inward.run(answer, outgoing, Box::pin(inbound)));
        tokio_stream::wrappers::ReceiverStream::new(to_edge)
            .flat_map(|bytes: Bytes| stream::iter(chunks(bytes)))
            .map(|bytes| {
                Ok(TunnelFrame {
                    frame: Some(Frame::Data(bytes)),
                })
            })
            .take_until(cancel.cancelled_owned())
            .boxed()
    }

    /// A site said that it cannot even open the stream.
    pub fn failed(&self, site: &SiteName, failed: TunnelFailed) {
        let mut entries = self.shared.entries();
        if !matches!(entries.get(&failed.id), Some((owner, Entry::Pending { .. })) if owner == site) {
            return;
        }
        if let Some((_, Entry::Pending { answer })) = entries.remove(&failed.id) {
            let error = failed.error.unwrap_or_default();
            // The one who asked may be gone already.
            let _ = answer.send(Err(refused(error.status, error.message)));
        }
    }

    /// The site's session ended: its pending tunnels fail and its open ones break off.
    pub fn drop_site(&self, site: &SiteName) {
        self.shared.entries().retain(|_, (owner, entry)| {
            if owner != site {
                return true;
            }
            if let Entry::Open { cancel } = entry {
                cancel.cancel();
            }
            // Dropping a pending answer tells `open` that the session was lost.
            false
        });
    }
}

fn lost(site: &SiteName) -> TunnelOpenError {
    TunnelOpenError::Away(SiteAway {
        site: site.clone(),
        since: Some(Timestamp::now()),
    })
}

fn refused(status: u32, message: String) -> TunnelOpenError {
    TunnelOpenError::Refused {
        status: u16::try_from(status).unwrap_or(502),
        message,
    }
}

fn chunks(mut bytes: Bytes) -> Vec<Bytes> {
    let mut parts = Vec::with_capacity(1);
    while bytes.len() > TUNNEL_CHUNK_BYTES {
        parts.push(bytes.split_to(TUNNEL_CHUNK_BYTES));
    }
    parts.push(bytes);
    parts
}

/// The task that reads what the edge sends.
struct Inward {
    site: SiteName,
    cancel: CancellationToken,
    _forget: Forget,
}

impl Inward {
    async fn run<S>(self, answer: Answer, outgoing: mpsc::Sender<Bytes>, mut inbound: S)
    where
        S: Stream<Item = Result<TunnelFrame, Status>> + Send + Unpin,
    {
        let (to_user, incoming) = mpsc::channel(CHANNEL_CHUNKS);
        let mut answer = Some((answer, incoming, outgoing));
        loop {
            let next = tokio::select! {
                next = inbound.next() => next,
                () = self.cancel.cancelled() => Some(Err(Status::unavailable("the site's link was lost"))),
                () = to_user.closed() => return,
                () = asker_gone(&mut answer) => return,
            };
            let frame = match next {
                None => {
                    if let Some((answer, ..)) = answer {
                        let _ = answer.send(Err(refused(
                            502,
                            "the site ended the stream without an answer".into(),
                        )));
                    }
                    return;
                }
                Some(Err(status)) => {
                    match answer {
                        Some((answer, ..)) => drop(answer.send(Err(lost(&self.site)))),
                        None => self.broken(&to_user, status.message()).await,
                    }
                    return;
                }
                Some(Ok(frame)) => frame.frame,
            };
            match (frame, answer.take()) {
                (Some(Frame::Ready(ready)), Some((answer, incoming, outgoing))) => {
                    let tunnel = Tunnel {
                        ready,
                        incoming,
                        outgoing,
                    };
                    if answer.send(Ok(tunnel)).is_err() {
                        return;
                    }
                }
                (Some(Frame::Error(error)), Some((answer, ..))) => {
                    let _ = answer.send(Err(refused(error.status, error.message)));
                    return;
                }
                (Some(Frame::Error(error)), None) => return self.broken(&to_user, &error.message).await,
                (Some(Frame::Data(bytes)), None) => {
                    tokio::select! {
                        sent = to_user.send(Ok(bytes)) => if sent.is_err() { return },
                        () = self.cancel.cancelled() => return self.broken(&to_user, "the site's link was lost").await,
                    }
                }
                (Some(Frame::Data(_)), Some((answer, ..))) => {
                    let _ = answer.send(Err(refused(502, "the site sent data before it was ready".into())));
                    return;
                }
                // A newer edge may send what this provider does not know.
                (_, waiting) => answer = waiting,
            }
        }
    }

    async fn broken(&self, to_user: &mpsc::Sender<Result<Bytes, TunnelBroken>>, message: &str) {
        let broken = TunnelBroken {
            site: self.site.clone(),
            message: message.to_owned(),
        };
        let _ = to_user.send(Err(broken)).await;
    }
}

type Waiting = Option<(
    Answer,
    mpsc::Receiver<Result<Bytes, TunnelBroken>>,
    mpsc::Sender<Bytes>,
)>;

/// Resolves when nobody waits for the answer any more; never once it was given.
async fn asker_gone(waiting: &mut Waiting) {
    match waiting {
        Some((answer, ..)) => answer.closed().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use skerry_proto::link::{LogsTarget, TunnelError};

    struct Queue(mpsc::UnboundedSender<OpenTunnel>);

    impl Orders for Queue {
        fn send(&self, site: &SiteName, order: OpenTunnel) -> Result<(), SiteAway> {
            self.0.send(order).map_err(|_| SiteAway {
                site: site.clone(),
                since: Some(Timestamp::UNIX_EPOCH),
            })
        }
    }

    fn site(name: &str) -> SiteName {
        name.parse().unwrap()
    }

    fn target() -> Target {
        Target::Logs(LogsTarget::default())
    }

    fn frame(frame: Frame) -> Result<TunnelFrame, Status> {
        Ok(TunnelFrame { frame: Some(frame) })
    }

    fn opened(id: &str) -> TunnelOpen {
        TunnelOpen {
            session: String::new(),
            id: id.to_owned(),
        }
    }

    type EdgeSender = mpsc::Sender<Result<TunnelFrame, Status>>;

    /// Opens a tunnel with an edge in memory that says ready.
    async fn ready() -> (Tunnels, Tunnel, EdgeSender, FrameStream) {
        let (orders, mut queue) = mpsc::unbounded_channel();
        let tunnels = Tunnels::new(Arc::new(Queue(orders)));
        let edge = {
            let tunnels = tunnels.clone();
            async move {
                let order = queue.recv().await.unwrap();
                let (to_cloud, inbound) = mpsc::channel(4);
                let inbound = tokio_stream::wrappers::ReceiverStream::new(inbound);
                let from_cloud = tunnels.accept(&site("harbour"), opened(&order.id), inbound);
                let ready = TunnelReady {
                    status: 200,
                    headers: vec![],
                };
                to_cloud.send(frame(Frame::Ready(ready))).await.unwrap();
                // A session keeps its end of the queue.
                std::mem::forget(queue);
                (to_cloud, from_cloud)
            }
        };
        let name = site("harbour");
        let (tunnel, (to_cloud, from_cloud)) = tokio::join!(tunnels.open(&name, target()), edge);
        (tunnels, tunnel.unwrap(), to_cloud, from_cloud)
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_and_each_direction_ends_alone() {
        let (tunnels, mut tunnel, to_cloud, mut from_cloud) = ready().await;
        tunnel.outgoing.send(Bytes::from_static(b"down")).await.unwrap();
        let down = from_cloud.next().await.unwrap().unwrap();
        assert_eq!(down.frame, Some(Frame::Data(Bytes::from_static(b"down"))));
        drop(tunnel.outgoing);
        assert!(from_cloud.next().await.is_none());
        to_cloud
            .send(frame(Frame::Data(Bytes::from_static(b"up"))))
            .await
            .unwrap();
        assert_eq!(tunnel.incoming.recv().await.unwrap().unwrap(), "up");
        drop(to_cloud);
        assert!(tunnel.incoming.recv().await.is_none());
        assert_eq!(tunnels.count(), 0);
    }

    #[tokio::test]
    async fn dropping_a_tunnel_ends_both_directions_at_the_edge() {
        let (_, tunnel, to_cloud, mut from_cloud) = ready().await;
        drop(tunnel);
        assert!(from_cloud.next().await.is_none());
        to_cloud.closed().await;
    }

    #[tokio::test]
    async fn a_chunk_that_is_too_large_is_split() {
        let (_, tunnel, _to_cloud, mut from_cloud) = ready().await;
        let big = Bytes::from(vec![7; TUNNEL_CHUNK_BYTES + 1]);
        tunnel.outgoing.send(big).await.unwrap();
        drop(tunnel.outgoing);
        let mut sizes = vec![];
        while let Some(Ok(TunnelFrame {
            frame: Some(Frame::Data(bytes)),
        })) = from_cloud.next().await
        {
            sizes.push(bytes.len());
        }
        assert_eq!(sizes, [TUNNEL_CHUNK_BYTES, 1]);
    }

    #[tokio::test]
    async fn a_lost_session_breaks_open_tunnels_and_fails_pending_ones() {
        let (tunnels, mut tunnel, _to_cloud, _from_cloud) = ready().await;
        tunnels.drop_site(&site("other"));
        assert_eq!(tunnels.count(), 1);
        tunnels.drop_site(&site("harbour"));
        let broken = tunnel.incoming.recv().await.unwrap().unwrap_err();
        assert!(broken.to_string().contains("harbour"), "{broken}");

        let (orders, mut queue) = mpsc::unbounded_channel();
        let tunnels = Tunnels::new(Arc::new(Queue(orders)));
        let name = site("harbour");
        let cut = async {
            queue.recv().await.unwrap();
            tunnels.drop_site(&name);
        };
        let (outcome, ()) = tokio::join!(tunnels.open(&name, target()), cut);
        assert!(matches!(outcome, Err(TunnelOpenError::Away(_))));
    }

    #[tokio::test]
    async fn another_site_cannot_claim_or_fail_a_tunnel() {
        let (orders, mut queue) = mpsc::unbounded_channel();
        let tunnels = Tunnels::new(Arc::new(Queue(orders)));
        let name = site("harbour");
        let thief = async {
            let order = queue.recv().await.unwrap();
            let mut answer = tunnels.accept(&site("thief"), opened(&order.id), stream::pending());
            assert_eq!(
                answer.next().await.unwrap().unwrap_err().code(),
                tonic::Code::NotFound
            );
            let failed = |status, message: &str| TunnelFailed {
                id: order.id.clone(),
                error: Some(TunnelError {
                    status,
                    message: message.into(),
                }),
            };
            tunnels.failed(&site("thief"), failed(500, "stolen"));
            tunnels.failed(&name, failed(404, "no such pod"));
        };
        let (outcome, ()) = tokio::join!(tunnels.open(&name, target()), thief);
        let error = outcome.unwrap_err();
        assert_eq!(error.to_string(), "no such pod");
        assert_eq!(error.http_status(), StatusCode::NOT_FOUND);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_site_times_out_and_its_late_stream_is_refused() {
        let (orders, mut queue) = mpsc::unbounded_channel();
        let tunnels = Tunnels::new(Arc::new(Queue(orders)));
        let error = tunnels.open(&site("harbour"), target()).await.unwrap_err();
        assert_eq!(error.http_status(), StatusCode::GATEWAY_TIMEOUT);
        assert_eq!(tunnels.count(), 0);
        let order = queue.recv().await.unwrap();
        let mut late = tunnels.accept(&site("harbour"), opened(&order.id), stream::pending());
        assert!(late.next().await.unwrap().is_err());
    }

    #[tokio::test]
    async fn a_site_that_is_away_is_named_with_the_time() {
        let (orders, queue) = mpsc::unbounded_channel();
        drop(queue);
        let tunnels = Tunnels::new(Arc::new(Queue(orders)));
        let error = tunnels.open(&site("harbour"), target()).await.unwrap_err();
        assert_eq!(error.http_status(), StatusCode::SERVICE_UNAVAILABLE);
        let text = error.to_string();
        assert!(
            text.contains("\"harbour\"") && text.contains("1970-01-01T00:00:00Z"),
            "{text}"
        );
        assert_eq!(tunnels.count(), 0);
    }
}
