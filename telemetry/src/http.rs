//! `/healthz`, `/readyz` and `/metrics` over plain HTTP/1.1.
//!
//! `/healthz` says that the process is alive; `/readyz` says that it does its job, and if not, why; `/metrics` is the
//! registry in OpenMetrics text.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Answers "ready?" with `Ok`, or with the reason why not, one line.
pub type ReadyCheck = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Refreshes gauges that are computed when scraped.
pub type Refresh = Arc<dyn Fn() + Send + Sync>;

/// What the endpoints show.
#[derive(Clone)]
pub struct Endpoints {
    /// The metrics.
    pub registry: Arc<Mutex<Registry>>,
    /// Readiness.
    pub ready: ReadyCheck,
    /// Runs before each scrape.
    pub refresh: Refresh,
}

/// Why the endpoints could not be served.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen on {address} for health and metrics: {source}; choose another address with --metrics-listen"
)]
pub struct ListenError {
    address: SocketAddr,
    source: std::io::Error,
}

/// Binds `address` and serves until `stop`. Answers the bound address and the serving task.
pub async fn serve(
    address: SocketAddr,
    endpoints: Endpoints,
    stop: CancellationToken,
) -> Result<(SocketAddr, tokio::task::JoinHandle<()>), ListenError> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| ListenError { address, source })?;
    let bound = listener
        .local_addr()
        .map_err(|source| ListenError { address, source })?;
    let task = tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let endpoints = endpoints.clone();
                    let stop = stop.clone();
                    tokio::spawn(async move {
                        let service = service_fn(move |request| answer(endpoints.clone(), request));
                        let connection = hyper::server::conn::http1::Builder::new()
                            .serve_connection(TokioIo::new(stream), service);
                        tokio::select! {
                            () = stop.cancelled() => {}
                            // A scraper that hangs up is its own business.
                            _ = connection => {}
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the health endpoint cannot accept a connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    });
    Ok((bound, task))
}

async fn answer(
    endpoints: Endpoints,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.method() != Method::GET {
        return Ok(text(StatusCode::METHOD_NOT_ALLOWED, "use GET\n"));
    }
    Ok(match request.uri().path() {
        "/healthz" => text(StatusCode::OK, "ok"),
        "/readyz" => match (endpoints.ready)() {
            Ok(()) => text(StatusCode::OK, "ok"),
            Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("{reason}\n")),
        },
        "/metrics" => metrics(&endpoints),
        _ => text(StatusCode::NOT_FOUND, "try /healthz, /readyz or /metrics\n"),
    })
}

fn metrics(endpoints: &Endpoints) -> Response<Full<Bytes>> {
    (endpoints.refresh)();
    let mut body = String::new();
    let registry = endpoints.registry.lock().unwrap_or_else(PoisonError::into_inner);
    match prometheus_client::encoding::text::encode(&mut body, &registry) {
        Ok(()) => {
            let mut response = text(StatusCode::OK, &body);
            response.headers_mut().insert(
                header::CONTENT_TYPE,
                header::HeaderValue::from_static(
                    "application/openmetrics-text; version=1.0.0; charset=utf-8",
                ),
            );
            response
        }
        Err(error) => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            &format!("cannot encode metrics: {error}\n"),
        ),
    }
}

fn text(status: StatusCode, body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_owned())));
    *response.status_mut() = status;
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    response
}
