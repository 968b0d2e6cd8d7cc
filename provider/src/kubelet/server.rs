//! Accepts connections, says who asks, and answers.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use skerry_proto::SiteName;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::authn::{Authenticator, User, certificate_user};
use super::authz::{Authorizer, forbidden, subresources, verb};
use super::nodes::{NodeDirectory, Nodes};
use super::ports::NodeListener;
use super::reviews::Reviews;
use super::routes::{self, PodPath, Refusal, Route};
use super::{PodDirectory, PodLocation, logs, upgrade};
use crate::link::tunnels::Tunnels;

/// A body of any kind; an error cuts the connection.
pub(super) type Body =
    http_body_util::combinators::UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// Scrapers keep a connection open to each node: an idle one costs some 30 KiB.
const MAX_CONNECTIONS: usize = 32_768;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// For a request's head, idle time before it included: longer than the API server keeps idle connections (90 s), so
/// that it is the one that closes them.
const HEAD_LIMIT: Duration = Duration::from_secs(100);
/// A kubelet's limit is 1 MiB, too.
const MAX_HEAD_BYTES: usize = 1024 * 1024;
/// How long requests may take to end after the order to stop.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// A kubelet's answer to who asks for too much.
const RETRY_AFTER: header::HeaderValue = header::HeaderValue::from_static("60");
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the server needs.
pub struct KubeletDeps {
    /// Finds pods.
    pub pods: Arc<dyn PodDirectory>,
    /// Knows the pods of a node.
    pub nodes: Arc<dyn NodeDirectory>,
    /// Ports of single nodes, as they are given.
    pub listeners: mpsc::UnboundedReceiver<NodeListener>,
    /// Opens streams to sites.
    pub tunnels: Tunnels,
    /// Authenticates and authorises, normally [`KubeReviews`](super::KubeReviews).
    pub reviews: Arc<dyn Reviews>,
}

/// The kubelet API's HTTPS server.
pub struct KubeletServer {
    pods: Arc<dyn PodDirectory>,
    tunnels: Tunnels,
    nodes: Nodes,
    authenticator: Authenticator,
    authorizer: Authorizer,
    stop: CancellationToken,
}

impl KubeletServer {
    /// Serves until `stop`, then lets requests end for a few seconds. `tls` is read for every connection, so that a
    /// rotated certificate is used at once; make its values with [`server_config`](super::server_config).
    pub async fn serve(
        listener: TcpListener,
        tls: watch::Receiver<Arc<ServerConfig>>,
        deps: KubeletDeps,
        stop: CancellationToken,
    ) {
        let server = Arc::new(Self {
            pods: deps.pods,
            nodes: Nodes::new(deps.tunnels.clone(), deps.nodes),
            tunnels: deps.tunnels,
            authenticator: Authenticator::new(deps.reviews.clone()),
            authorizer: Authorizer::new(deps.reviews),
            stop: stop.clone(),
        });
        let door = Door {
            server,
            tls,
            room: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            connections: TaskTracker::new(),
        };
        let mut listeners = deps.listeners;
        let more = async {
            while let Some(one) = listeners.recv().await {
                let door = door.clone();
                tokio::spawn(async move { door.serve(one.listener, Some(one.site), one.stop).await });
            }
            std::future::pending().await
        };
        tokio::select! {
            () = door.serve(listener, None, stop) => {}
            () = more => {}
        }
        let connections = door.connections;
        connections.close();
        if tokio::time::timeout(STOP_LIMIT, connections.wait())
            .await
            .is_err()
        {
            tracing::info!("kubelet API stopped with requests still open");
        }
    }

    async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        config: Arc<ServerConfig>,
        node: Option<SiteName>,
    ) {
        let handshake = tokio::time::timeout(HANDSHAKE_LIMIT, TlsAcceptor::from(config).accept(stream));
        let stream = match handshake.await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                return tracing::debug!(%error, "TLS handshake with a client of the kubelet API failed");
            }
            Err(_) => return tracing::debug!("a client of the kubelet API did not finish its TLS handshake"),
        };
        let certificates = stream.get_ref().1.peer_certificates();
        // TLS has verified it against the client CA, or would have ended.
        let caller = Arc::new(Caller {
            certificate: certificates.and_then(|chain| certificate_user(chain.first()?)),
            node,
        });
        let service = service_fn({
            let server = self.clone();
            move |request| {
                let (server, caller) = (server.clone(), caller.clone());
                async move { Ok::<_, Infallible>(server.answer(&caller, request).await) }
            }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_LIMIT)
            .max_buf_size(MAX_HEAD_BYTES)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        tokio::pin!(connection);
        let outcome = tokio::select! {
            outcome = connection.as_mut() => outcome,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                match tokio::time::timeout(STOP_LIMIT, connection).await {
                    Ok(outcome) => outcome,
                    Err(_) => return,
                }
            }
        };
        if let Err(error) = outcome {
            tracing::debug!(%error, "a connection of the kubelet API ended");
        }
    }

    async fn answer(&self, caller: &Caller, mut request: Request<Incoming>) -> Response<Body> {
        match self.serve_request(caller, &mut request).await {
            Ok(response) => response,
            Err(refusal) => {
                let mut response = text(refusal.status, refusal.text);
                if refusal.status == StatusCode::TOO_MANY_REQUESTS {
                    response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
                }
                response
            }
        }
    }

    async fn serve_request(
        &self,
        caller: &Caller,
        request: &mut Request<Incoming>,
    ) -> Result<Response<Body>, Refusal> {
        let unauthorized = || Refusal::new(StatusCode::UNAUTHORIZED, "Unauthorized");
        let certificate = caller.certificate.as_ref();
        let user = match self.authenticator.user(certificate, request.headers()).await {
            Ok(user) => user.ok_or_else(unauthorized)?,
            Err(error) => {
                tracing::warn!(%error, "cannot authenticate a request to the kubelet API");
                return Err(unauthorized());
            }
        };
        let whole = request.uri().path().to_owned();
        let (named, path) = routes::split_node(&whole);
        let node = named.or_else(|| caller.node.clone());
        let route = Route::parse(path);
        // Seen from a node, pods of other nodes do not exist.
        let location = route
            .pod()
            .and_then(|path| self.pods.locate(&path.namespace, &path.pod))
            .filter(|location| node.as_ref().is_none_or(|node| *node == location.site));
        let about = node.as_ref().or(location.as_ref().map(|location| &location.site));
        let about = about.map_or("", |site| site.as_str());
        self.authorise(&user, request.method(), about, path).await?;
        match route {
            Route::Health => {
                if let Some(node) = &node {
                    self.nodes.health(node).await?;
                }
                Ok(text(StatusCode::OK, "ok"))
            }
            Route::Unknown => Err(Refusal::new(
                StatusCode::NOT_FOUND,
                format!("404 page not found: the kubelet API of Skerry does not serve {path}\n"),
            )),
            Route::Node(path) => match node {
                Some(node) => {
                    self.nodes
                        .serve(&node, path, request.method(), request.uri())
                        .await
                }
                None => Err(no_node(&whole)),
            },
            route => self.serve_pod(route, location, request).await,
        }
    }

    async fn serve_pod(
        &self,
        route: Route,
        location: Option<PodLocation>,
        request: &mut Request<Incoming>,
    ) -> Result<Response<Body>, Refusal> {
        match route {
            Route::Logs(_) if request.method() != Method::GET => Err(wrong_method("GET")),
            Route::Logs(path) => {
                let target = routes::logs(request.uri(), &path)?;
                let location = routes::check_pod(&path, location, true)?;
                logs::serve(&self.tunnels, &location.site, target).await
            }
            Route::Run(_) | Route::Checkpoint(_) if request.method() != Method::POST => {
                Err(wrong_method("POST"))
            }
            Route::Run(path) => {
                let location = routes::check_pod(&path, location, false)?;
                self.nodes.run(&location.site, &path, request.uri()).await
            }
            Route::Checkpoint(path) => {
                let location = routes::check_pod(&path, location, false)?;
                Err(no_checkpoint(&location, &path))
            }
            Route::Stream(..) if !matches!(*request.method(), Method::GET | Method::POST) => {
                Err(wrong_method("GET or POST"))
            }
            Route::Stream(verb, path) => {
                let target = routes::stream(verb, &path, request.method(), request.uri(), request.headers())?;
                let location = routes::check_pod(&path, location, false)?;
                upgrade::serve(&self.tunnels, &location.site, target, request, self.stop.clone()).await
            }
            Route::Health | Route::Node(_) | Route::Unknown => {
                Err(Refusal::new(StatusCode::NOT_FOUND, "404 page not found\n"))
            }
        }
    }

    async fn authorise(&self, user: &User, method: &Method, node: &str, path: &str) -> Result<(), Refusal> {
        let (verb, subresources) = (verb(method), subresources(path));
        match self.authorizer.allows(user, verb, node, subresources).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Refusal::new(
                StatusCode::FORBIDDEN,
                forbidden(user, verb, subresources),
            )),
            Err(error) => {
                tracing::warn!(%error, "cannot authorise a request to the kubelet API");
                let text = format!(
                    "Authorization error (user={}, verb={verb}, resource=nodes, subresource(s)=[{}])\n",
                    user.name,
                    subresources.join(" ")
                );
                Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, text))
            }
        }
    }
}

/// Who has connected, and where.
struct Caller {
    certificate: Option<User>,
    /// The node whose port it is; `None` on the port for all.
    node: Option<SiteName>,
}

/// What all listeners share.
#[derive(Clone)]
struct Door {
    server: Arc<KubeletServer>,
    tls: watch::Receiver<Arc<ServerConfig>>,
    room: Arc<Semaphore>,
    connections: TaskTracker,
}

impl Door {
    /// Accepts connections until `stop`, or the server's own.
    async fn serve(&self, listener: TcpListener, node: Option<SiteName>, stop: CancellationToken) {
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                () = self.server.stop.cancelled() => return,
                accepted = accept(&listener, &self.room) => accepted,
            };
            let Some((stream, permit)) = accepted else {
                continue;
            };
            let config = self.tls.borrow().clone();
            let (server, node) = (self.server.clone(), node.clone());
            self.connections.spawn(async move {
                server.connection(stream, config, node).await;
                drop(permit);
            });
        }
    }
}

fn no_node(path: &str) -> Refusal {
    let text = format!(
        "{path} says nothing of a node, and this port serves all: use the port in the Node's status, or put \
         /nodes/<name> before the path\n"
    );
    Refusal::new(StatusCode::NOT_FOUND, text)
}

fn no_checkpoint(location: &PodLocation, path: &PodPath) -> Refusal {
    let text = format!(
        "container {:?} of pod {:?} cannot be checkpointed: node {} does not support checkpoints\n",
        path.container, path.pod, location.site
    );
    Refusal::new(StatusCode::NOT_IMPLEMENTED, text)
}

/// The next connection, once there is room for it.
async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> Option<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let permit = room.clone().acquire_owned().await.ok()?;
    match listener.accept().await {
        Ok((stream, _)) => {
            // Keystrokes must not wait for company.
            let _ = stream.set_nodelay(true);
            Some((stream, permit))
        }
        Err(error) => {
            tracing::warn!(%error, "the kubelet API cannot accept a connection");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}

fn wrong_method(allowed: &str) -> Refusal {
    Refusal::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("405: Method Not Allowed, use {allowed}\n"),
    )
}

/// A body that is there already.
pub(super) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into())
        .map_err(|never| match never {})
        .boxed_unsync()
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(full(text));
    *response.status_mut() = status;
    let plain = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod server_tests;

#[cfg(test)]
pub(super) mod testing {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::future::BoxFuture;

    use super::super::reviews::{NodeAccess, ReviewError, Reviews};
    use super::*;

    /// Knows the tokens `good` and `bad`; `good` may do everything to `proxy` of every node.
    #[derive(Default)]
    pub(in super::super) struct FakeReviews {
        tokens: AtomicUsize,
        accesses: AtomicUsize,
    }

    impl FakeReviews {
        pub(in super::super) fn token_reviews(&self) -> usize {
            self.tokens.load(Ordering::SeqCst)
        }

        pub(in super::super) fn access_reviews(&self) -> usize {
            self.accesses.load(Ordering::SeqCst)
        }
    }

    impl Reviews for FakeReviews {
        fn token<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<Option<User>, ReviewError>> {
            self.tokens.fetch_add(1, Ordering::SeqCst);
            let known = matches!(token, "good" | "bad");
            let user = known.then(|| User {
                name: token.to_owned(),
                ..User::default()
            });
            Box::pin(async move { Ok(user) })
        }

        fn access<'a>(
            &'a self,
            user: &'a User,
            access: &'a NodeAccess,
        ) -> BoxFuture<'a, Result<bool, ReviewError>> {
            self.accesses.fetch_add(1, Ordering::SeqCst);
            let allowed = user.name == "good" && access.subresource == "proxy";
            Box::pin(async move { Ok(allowed) })
        }
    }
}
