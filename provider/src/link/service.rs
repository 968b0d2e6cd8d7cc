//! The Link service: who may speak, and what each stream is for.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use jiff::Timestamp;
use skerry_proto::SiteName;
use skerry_proto::limits::{MAX_FEATURES, MAX_WORD_BYTES};
use skerry_proto::link::Kind;
use skerry_proto::link::{
    self, CloudBulk, CloudControl, ConfirmRequest, ConfirmResponse, EdgeBulk, EdgeControl, FEATURE_DIGEST,
    Hello, JoinResponse, PROTOCOL_MAX, PROTOCOL_MIN, RenewRequest, TunnelFrame, Welcome, cloud_control,
    edge_bulk, edge_control, link_server, tunnel_frame,
};
use skerry_transport::{Handle, Lane};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use super::arrivals::{Arrivals, ComeBack};
use super::bulk::Bulk;
use super::class::{self, SiteClass};
use super::connection::Peer;
use super::reports::{Reply, Reports};
use super::sessions::{Session, Sessions};
use super::timing::Timings;
use super::tunnels::Tunnels;
use crate::cluster::Mirror;
use crate::metrics::Metrics;
use crate::pki::{CertificateRecord, Renewals, Revoked, SitePeer, current};

/// How long a new stream may stay silent before its first message.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// Orders and acknowledgements that may wait for a slow control connection.
const CONTROL_QUEUE: usize = 128;
/// Feature: statuses of critical pods may come on Control.
const CRITICAL_STATUS: &str = "critical-status";
/// Messages that may wait for a slow bulk connection.
const BULK_QUEUE: usize = 64;

/// What the service works with.
pub struct LinkDeps {
    /// The Kubernetes API.
    pub client: kube::Client,
    /// What sites should hold.
    pub mirror: Arc<Mirror>,
    /// Who is connected.
    pub sessions: Sessions,
    /// Streams for the kubelet endpoint.
    pub tunnels: Tunnels,
    /// Renews certificates, and knows the time.
    pub renewals: Renewals,
    /// Where reports go.
    pub reports: Arc<Reports>,
    /// Who may begin a session now.
    pub arrivals: Arrivals,
    /// Heartbeats.
    pub timings: Timings,
    /// Where round trips and more are counted.
    pub metrics: Arc<Metrics>,
}

/// The gRPC service.
pub struct LinkService {
    deps: Arc<LinkDeps>,
}

impl LinkService {
    /// A service over these parts.
    pub fn new(deps: Arc<LinkDeps>) -> Self {
        Self { deps }
    }

    fn greet(&self, peer: &SiteName, hello: &Hello) -> Result<u32, Status> {
        if let Some(field) = oversized(hello) {
            return Err(Status::invalid_argument(format!(
                "Hello: {field} is longer than an edge daemon makes it"
            )));
        }
        if hello.site != peer.as_str() {
            return Err(Status::permission_denied(format!(
                "the certificate is for site {peer:?}, but the daemon says that it is site {:?}; join again with a \
                 token for the right site",
                hello.site
            )));
        }
        let newest = hello.protocol_max.min(PROTOCOL_MAX);
        if newest < hello.protocol_min || newest < PROTOCOL_MIN {
            return Err(Status::failed_precondition(format!(
                "no common protocol version: the edge ({}) speaks {} to {}, the provider {PROTOCOL_MIN} to \
                 {PROTOCOL_MAX}; upgrade the older one",
                hello.version, hello.protocol_min, hello.protocol_max
            )));
        }
        Ok(newest)
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl link_server::Link for LinkService {
    type ControlStream = Answers<CloudControl>;
    type BulkStream = Answers<CloudBulk>;
    type TunnelStream = Answers<TunnelFrame>;

    async fn control(
        &self,
        request: Request<Streaming<EdgeControl>>,
    ) -> Result<Response<Self::ControlStream>, Status> {
        let peer = peer_of(&request);
        refused("Control", peer.as_ref(), self.take_control(request).await)
    }

    async fn bulk(
        &self,
        request: Request<Streaming<EdgeBulk>>,
    ) -> Result<Response<Self::BulkStream>, Status> {
        let peer = peer_of(&request);
        refused("Bulk", peer.as_ref(), self.take_bulk(request).await)
    }

    async fn tunnel(
        &self,
        request: Request<Streaming<TunnelFrame>>,
    ) -> Result<Response<Self::TunnelStream>, Status> {
        let peer = peer_of(&request);
        refused("Tunnel", peer.as_ref(), self.take_tunnel(request).await)
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<JoinResponse>, Status> {
        let peer = peer_of(&request);
        refused("Renew", peer.as_ref(), self.take_renew(request).await)
    }

    async fn confirm(&self, request: Request<ConfirmRequest>) -> Result<Response<ConfirmResponse>, Status> {
        let peer = peer_of(&request);
        refused("Confirm", peer.as_ref(), self.take_confirm(request).await)
    }
}

/// What each call does.
impl LinkService {
    async fn take_control(
        &self,
        request: Request<Streaming<EdgeControl>>,
    ) -> Result<Response<Answers<CloudControl>>, Status> {
        let (peer, remote) = self.admitted(&request)?;
        let line = line_of(&request);
        let site = peer.site.clone();
        let mut inbound = request.into_inner();
        let Some(edge_control::Message::Hello(hello)) = first(&mut inbound).await?.message else {
            return Err(Status::invalid_argument(
                "the first message on Control must be Hello",
            ));
        };
        let protocol = self.greet(&site, &hello)?;
        let place = match self.deps.arrivals.admit().await {
            Ok(place) => place,
            Err(ComeBack(after)) => return Ok(Response::new(come_back(after))),
        };
        let (orders, queue) = mpsc::channel(CONTROL_QUEUE);
        let now = Timestamp::now();
        let declared = self.deps.mirror.named(Kind::Site, "", site.as_str());
        let status = declared
            .map(|site| site.value["status"].clone())
            .unwrap_or_default();
        let session = match self
            .deps
            .sessions
            .begin(&peer, &hello, &status, orders.clone(), now)
        {
            Ok(session) => session,
            Err(conflict) => {
                tracing::warn!(%site, %remote, %conflict, "a daemon was refused");
                let refusal = cloud_control::Message::Goodbye(conflict.goodbye());
                let refusal = CloudControl {
                    message: Some(refusal),
                };
                return Ok(Response::new(Box::pin(futures::stream::iter([Ok(refusal)]))));
            }
        };
        tracing::info!(%site, %remote, version = %hello.version, session = %session.id, "a site connected");
        let class = class::declared(&self.deps.mirror, &site);
        let timing = self.deps.timings.of(class);
        if let Some(line) = line {
            session.lines.add(Lane::Control, line, class, timing.life_signs());
        }
        let welcome = Welcome {
            protocol,
            session: session.id.clone(),
            heartbeat_millis: millis(timing.heartbeat),
            deadline_millis: millis(timing.deadline),
            now_unix_nanos: i64::try_from(now.as_nanosecond()).unwrap_or(i64::MAX),
            features: vec![CRITICAL_STATUS.to_owned(), FEATURE_DIGEST.to_owned()],
            version: env!("CARGO_PKG_VERSION").to_owned(),
            class: link::Class::from(class).into(),
            critical_priority: self.deps.timings.critical_priority,
        };
        // The queue is new and has room.
        let _ = orders.try_send(Ok(CloudControl {
            message: Some(cloud_control::Message::Welcome(welcome)),
        }));
        tokio::spawn(place.until(session.clone().settled()));
        self.note_use(&peer);
        let (mirror, timings) = (&self.deps.mirror, self.deps.timings);
        let class = SiteClass::new(mirror, timings, &session, &hello, class);
        tokio::spawn(listen(
            Arc::clone(&self.deps),
            session.clone(),
            class,
            inbound,
            orders,
        ));
        Ok(Response::new(Box::pin(until_over(queue, session))))
    }

    async fn take_bulk(
        &self,
        request: Request<Streaming<EdgeBulk>>,
    ) -> Result<Response<Answers<CloudBulk>>, Status> {
        let (peer, _) = self.declared(&request)?;
        let line = line_of(&request);
        let mut inbound = request.into_inner();
        let Some(edge_bulk::Message::Hello(hello)) = first(&mut inbound).await?.message else {
            return Err(Status::invalid_argument(
                "the first message on Bulk must be BulkHello",
            ));
        };
        let session = self.session(&peer, &hello.session)?;
        if let Some(line) = line {
            let class = class::declared(&self.deps.mirror, &peer.site);
            let signs = self.deps.timings.of(class).life_signs();
            session.lines.add(Lane::Bulk, line, class, signs);
        }
        let (outbound, queue) = mpsc::channel(BULK_QUEUE);
        let remembered = self.deps.sessions.recall(&session);
        let farewell = outbound.clone();
        let bulk = Bulk::new(Arc::clone(&self.deps), session.clone(), remembered, outbound);
        let deps = Arc::clone(&self.deps);
        let task = session.clone();
        tokio::spawn(async move {
            let (tokens, ended) = bulk.run(inbound).await;
            deps.sessions.remember(&task, tokens);
            if let Err(status) = ended {
                tracing::info!(site = %task.peer.site, session = %task.id, %status, "the bulk stream ended");
                // The edge should hear why, if it still reads.
                let _ = farewell.try_send(Err(status));
            }
            // Neither half of a session is of use without the other.
            deps.sessions.end(&task, Timestamp::now());
        });
        Ok(Response::new(Box::pin(until_over(queue, session))))
    }

    async fn take_tunnel(
        &self,
        request: Request<Streaming<TunnelFrame>>,
    ) -> Result<Response<Answers<TunnelFrame>>, Status> {
        let (peer, _) = self.declared(&request)?;
        let mut inbound = request.into_inner();
        let Some(tunnel_frame::Frame::Open(open)) = first(&mut inbound).await?.frame else {
            return Err(Status::invalid_argument(
                "the first frame on Tunnel must be TunnelOpen",
            ));
        };
        self.session(&peer, &open.session)?;
        Ok(Response::new(self.deps.tunnels.accept(&peer.site, open, inbound)))
    }

    async fn take_renew(&self, request: Request<RenewRequest>) -> Result<Response<JoinResponse>, Status> {
        let (peer, _) = self.declared(&request)?;
        let (answer, issued) = self.deps.renewals.renew(&peer, &request.into_inner()).await?;
        let new = SitePeer {
            serial: issued.serial,
            not_before: issued.not_before,
            not_after: issued.not_after,
            ..peer.clone()
        };
        self.deps.sessions.renewed(&peer, &new);
        Ok(Response::new(answer))
    }

    async fn take_confirm(
        &self,
        request: Request<ConfirmRequest>,
    ) -> Result<Response<ConfirmResponse>, Status> {
        let (peer, _) = self.admitted(&request)?;
        let noted = self.deps.renewals.used(&peer).await;
        noted.map_err(Status::unavailable)?;
        Ok(Response::new(ConfirmResponse {}))
    }
}

impl LinkService {
    /// Who calls: a site whose certificate is in time and was issued for the Site as it is declared now.
    fn admitted<T>(&self, request: &Request<T>) -> Result<(SitePeer, SocketAddr), Status> {
        let (peer, remote) = self.declared(request)?;
        self.in_time(&peer)?;
        Ok((peer, remote))
    }

    fn in_time(&self, peer: &SitePeer) -> Result<(), Status> {
        let Renewals { clock, grace, .. } = &self.deps.renewals;
        current(peer, clock.now(), *grace).map_err(|e| Status::unauthenticated(e.to_string()))
    }

    /// Who calls: a site whose certificate was issued for the Site as it is declared now, and was not revoked. It may be
    /// out of its time.
    fn declared<T>(&self, request: &Request<T>) -> Result<(SitePeer, SocketAddr), Status> {
        let Some(Peer {
            site: Some(peer),
            remote,
            ..
        }) = request.extensions().get::<Peer>()
        else {
            return Err(Status::unauthenticated(
                "this call needs a site's certificate; run skerry-edge join first",
            ));
        };
        let name = &peer.site;
        if !self.deps.mirror.is_synced() {
            return Err(Status::unavailable(
                "the provider is still reading the cluster; try again",
            ));
        }
        let Some(declared) = self.deps.mirror.named(Kind::Site, "", name.as_str()) else {
            return Err(Status::failed_precondition(format!(
                "there is no Site {name} in the cluster; declare it with kubectl and join again, or remove this edge"
            )));
        };
        if declared.key.uid != peer.uid {
            return Err(Status::permission_denied(format!(
                "the certificate was issued for an earlier Site {name}, which was deleted; join again with a new token"
            )));
        }
        if Revoked::of(&declared.value["spec"]).covers(peer) {
            return Err(Status::permission_denied(Revoked::refusal(peer)));
        }
        Ok((peer.clone(), *remote))
    }

    /// The first session with a renewed certificate ends the time of the one before it.
    fn note_use(&self, peer: &SitePeer) {
        let site = self.deps.mirror.named(Kind::Site, "", peer.site.as_str());
        // A mirror that lags behind is put right by the next session.
        if !site.is_some_and(|site| CertificateRecord::of(&site.value["status"]).first_use(peer)) {
            return;
        }
        let (deps, peer) = (Arc::clone(&self.deps), peer.clone());
        tokio::spawn(async move {
            if let Err(error) = deps.renewals.used(&peer).await {
                tracing::warn!(site = %peer.site, %error, "the site's former certificate could not be retired; it is tried again with the next session");
            }
        });
    }

    /// The site's session of that name. A certificate that is out of its time serves only the session that began with it
    /// and is kept by a younger one.
    fn session(&self, peer: &SitePeer, id: &str) -> Result<Session, Status> {
        let site = &peer.site;
        let session = self
            .deps
            .sessions
            .current(site, id)
            .ok_or_else(|| Status::aborted(format!("session {id} of site {site} is over")))?;
        let kept = session.began_with(peer) && session.expires() > self.deps.renewals.clock.now();
        if !kept {
            self.in_time(peer)?;
        }
        Ok(session)
    }
}

/// The field of a greeting that is too long to be kept.
fn oversized(hello: &Hello) -> Option<&'static str> {
    let words = [
        ("site", &hello.site),
        ("version", &hello.version),
        ("boot_id", &hello.boot_id),
        ("store_id", &hello.store_id),
        ("instance", &hello.instance),
    ];
    let long = |word: &String| word.len() > MAX_WORD_BYTES;
    let word = words.into_iter().find(|(_, word)| long(word));
    let features = hello.features.len() > MAX_FEATURES || hello.features.iter().any(long);
    word.map(|(field, _)| field).or(features.then_some("features"))
}

/// Says who was refused what, and why.
fn refused<T>(call: &'static str, peer: Option<&Peer>, answer: Result<T, Status>) -> Result<T, Status> {
    if let Err(status) = &answer {
        let site = peer.and_then(|peer| peer.site.as_ref());
        let site = site.map_or("", |peer| peer.site.as_str());
        let remote = peer.map(|peer| peer.remote);
        tracing::info!(call, site, ?remote, code = ?status.code(), reason = status.message(), "a call was refused");
    }
    answer
}

/// Reads the control stream until the session is over or silent for too long.
async fn listen(
    deps: Arc<LinkDeps>,
    session: Session,
    mut class: SiteClass,
    mut inbound: Streaming<EdgeControl>,
    orders: mpsc::Sender<Result<CloudControl, Status>>,
) {
    let mut heard = Instant::now();
    let reason = loop {
        let deadline = class.timing().deadline;
        let message = tokio::select! {
            () = session.over.cancelled() => break "another session took over, or this one was dismissed".to_owned(),
            message = tokio::time::timeout_at(heard + deadline, inbound.message()) => message,
            changed = class.changed() => match class.take(changed, &orders) {
                // Silence counts anew: until now the edge had other orders.
                Ok(()) => { heard = Instant::now(); continue }
                Err(reason) => break reason,
            }
        };
        heard = Instant::now();
        let message = match message {
            Ok(Ok(Some(message))) => message.message,
            Ok(Ok(None)) => break "the edge closed it".to_owned(),
            Ok(Err(status)) => break status.message().to_owned(),
            Err(_) => break format!("nothing was heard for {deadline:?}"),
        };
        // Looked at with each message, at least once per heartbeat: a timer would be fooled by a clock that is set.
        if session.expires() <= deps.renewals.clock.now() {
            break "its certificate has expired".to_owned();
        }
        deps.sessions.heard(&session, Timestamp::now());
        match message {
            Some(edge_control::Message::Heartbeat(beat)) => {
                if beat.round_trip_micros > 0 {
                    let took = Duration::from_micros(beat.round_trip_micros);
                    deps.metrics.observe_heartbeat(class.class(), took);
                }
                deps.sessions.note_use(&session, &beat);
                deps.metrics.set_uplink(&session.peer.site, &beat);
                deps.sessions.dropped(&session, beat.drops);
                let ack = cloud_control::Message::HeartbeatAck(link::HeartbeatAck { seq: beat.seq });
                if orders.try_send(Ok(CloudControl { message: Some(ack) })).is_err() {
                    break "the edge does not read its control stream".to_owned();
                }
            }
            Some(edge_control::Message::TunnelFailed(failed)) => {
                deps.tunnels.failed(&session.peer.site, failed)
            }
            Some(edge_control::Message::Report(report)) => {
                let lanes = session.lanes(&deps.reports);
                if let Err(reason) = lanes.take_urgent(report, Reply::Control(orders.clone())) {
                    break reason;
                }
            }
            // A second Hello, or something newer than this build: ignored, as link.proto says.
            _ => {}
        }
    };
    let current = deps.sessions.current(&session.peer.site, &session.id).is_some();
    deps.sessions.end(&session, Timestamp::now());
    if current {
        deps.tunnels.drop_site(&session.peer.site);
    }
    tracing::info!(site = %session.peer.site, session = %session.id, %reason, "a site's session ended");
}

/// The answer to a site for which there is no room yet.
fn come_back(after: Duration) -> Answers<CloudControl> {
    let goodbye = link::Goodbye {
        reason: "the provider is busy with other sites that came at the same time".to_owned(),
        retry_after_millis: millis(after),
    };
    let message = CloudControl {
        message: Some(cloud_control::Message::Goodbye(goodbye)),
    };
    Box::pin(futures::stream::once(async { Ok(message) }))
}

/// The messages of a queue until the session is over; what was queued before its end still goes out.
fn until_over<T: Send + 'static>(
    queue: mpsc::Receiver<Result<T, Status>>,
    session: Session,
) -> impl Stream<Item = Result<T, Status>> + Send {
    futures::stream::unfold((queue, session), |(mut queue, session)| async move {
        let message = tokio::select! {
            biased;
            message = queue.recv() => message,
            () = session.over.cancelled() => queue.try_recv().ok(),
        }?;
        Some((message, (queue, session)))
    })
}

fn peer_of<T>(request: &Request<T>) -> Option<Peer> {
    request.extensions().get::<Peer>().cloned()
}

/// The connection on which a call came.
fn line_of<T>(request: &Request<T>) -> Option<Handle> {
    request.extensions().get::<Peer>().map(|peer| peer.line.clone())
}

async fn first<T>(inbound: &mut Streaming<T>) -> Result<T, Status> {
    match tokio::time::timeout(GREETING_LIMIT, inbound.message()).await {
        Ok(message) => {
            message?.ok_or_else(|| Status::invalid_argument("the stream ended before its first message"))
        }
        Err(_) => Err(Status::deadline_exceeded("no first message came")),
    }
}

pub(super) fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
