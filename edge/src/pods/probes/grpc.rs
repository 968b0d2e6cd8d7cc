//! The gRPC health check (`grpc.health.v1`, plaintext).
//!
//! The two messages are written out here: they are smaller than what it takes to generate them. Source:
//! <https://github.com/grpc/grpc-proto/blob/master/grpc/health/v1/health.proto>.

use std::time::Duration;

use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;

use super::super::httpget::join;
use super::act::{Outcome, seconds};

/// Asks for the health of one service.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HealthCheckRequest {
    /// Its name; empty for the server as a whole.
    #[prost(string, tag = "1")]
    pub(super) service: String,
}

/// The health of that service.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HealthCheckResponse {
    /// A [`ServingStatus`].
    #[prost(enumeration = "ServingStatus", tag = "1")]
    pub(super) status: i32,
}

/// How a service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub(super) enum ServingStatus {
    /// It does not say.
    Unknown = 0,
    /// Well.
    Serving = 1,
    /// Not well.
    NotServing = 2,
    /// There is no such service; used by `Watch` only.
    ServiceUnknown = 3,
}

impl ServingStatus {
    fn text(self) -> &'static str {
        match self {
            Self::Unknown => "UNKNOWN",
            Self::Serving => "SERVING",
            Self::NotServing => "NOT_SERVING",
            Self::ServiceUnknown => "SERVICE_UNKNOWN",
        }
    }
}

/// Asks once; everything but `SERVING` is a failure.
pub(super) async fn check(host: &str, port: u16, service: &str, limit: Duration) -> Outcome {
    let address = join(host, port);
    let began = tokio::time::Instant::now();
    let endpoint =
        Endpoint::from_shared(format!("http://{address}")).and_then(|e| e.user_agent(super::AGENT));
    let endpoint = match endpoint {
        Ok(endpoint) => endpoint,
        Err(error) => {
            return Outcome::Failure(format!(
                "error: failed to connect service at \"{address}\": {error}"
            ));
        }
    };
    let channel = match tokio::time::timeout(limit, endpoint.connect()).await {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => {
            let why = innermost(&error);
            return Outcome::Failure(format!(
                "error: failed to connect service at \"{address}\": {why}"
            ));
        }
        Err(_) => {
            return Outcome::Failure(format!(
                "timeout: failed to connect service \"{address}\" within {}: context deadline exceeded",
                seconds(limit)
            ));
        }
    };
    let late = || {
        Outcome::Failure(format!(
            "timeout: health rpc did not complete within {}",
            seconds(limit)
        ))
    };
    let ask = async {
        let mut client = tonic::client::Grpc::new(channel);
        client
            .ready()
            .await
            .map_err(|e| tonic::Status::unavailable(e.to_string()))?;
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let path = http::uri::PathAndQuery::from_static("/grpc.health.v1.Health/Check");
        let codec = ProstCodec::<HealthCheckRequest, HealthCheckResponse>::default();
        client.unary(tonic::Request::new(request), path, codec).await
    };
    match tokio::time::timeout(limit.saturating_sub(began.elapsed()), ask).await {
        Err(_) => late(),
        Ok(Ok(answer)) => match answer.into_inner().status() {
            ServingStatus::Serving => Outcome::Success,
            other => Outcome::Failure(format!("service unhealthy (responded with \"{}\")", other.text())),
        },
        Ok(Err(status)) => match status.code() {
            tonic::Code::Unimplemented => Outcome::Failure(format!(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {}",
                status.message()
            )),
            tonic::Code::DeadlineExceeded => late(),
            code => Outcome::Failure(format!(
                "error: health rpc probe failed: rpc error: code = {code:?} desc = {}",
                status.message()
            )),
        },
    }
}

/// The transport wraps its causes; only the innermost says anything.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::future::{Ready, ready};
    use std::task::{Context, Poll};

    use tonic::body::Body;

    /// A health server that knows the services `up` and `down`.
    #[derive(Clone)]
    struct Health;

    impl tonic::server::NamedService for Health {
        const NAME: &'static str = "grpc.health.v1.Health";
    }

    impl tonic::server::UnaryService<HealthCheckRequest> for Health {
        type Response = HealthCheckResponse;
        type Future = Ready<Result<tonic::Response<HealthCheckResponse>, tonic::Status>>;

        fn call(&mut self, request: tonic::Request<HealthCheckRequest>) -> Self::Future {
            let status = match request.into_inner().service.as_str() {
                "up" => ServingStatus::Serving,
                "down" => ServingStatus::NotServing,
                _ => return ready(Err(tonic::Status::not_found("unknown service"))),
            };
            ready(Ok(tonic::Response::new(HealthCheckResponse {
                status: status.into(),
            })))
        }
    }

    impl tower::Service<http::Request<Body>> for Health {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            Box::pin(async move {
                let codec = ProstCodec::<HealthCheckResponse, HealthCheckRequest>::default();
                Ok(tonic::server::Grpc::new(codec).unary(Health, request).await)
            })
        }
    }

    #[tokio::test]
    async fn only_a_service_that_serves_is_healthy() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(Health)
                .serve_with_incoming(incoming),
        );
        let limit = Duration::from_secs(10);
        assert_eq!(check("127.0.0.1", port, "up", limit).await, Outcome::Success);
        assert_eq!(
            check("127.0.0.1", port, "down", limit).await,
            Outcome::Failure("service unhealthy (responded with \"NOT_SERVING\")".into())
        );
        let Outcome::Failure(text) = check("127.0.0.1", port, "", limit).await else {
            panic!()
        };
        assert_eq!(
            text,
            "error: health rpc probe failed: rpc error: code = NotFound desc = unknown service"
        );
    }

    #[tokio::test]
    async fn a_server_without_the_protocol_and_one_that_is_not_there_fail() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let limit = Duration::from_millis(200);
        let Outcome::Failure(text) = check("127.0.0.1", port, "", limit).await else {
            panic!()
        };
        assert!(text.starts_with("timeout: "), "{text}");
        drop(listener);
        let Outcome::Failure(text) = check("127.0.0.1", port, "", limit).await else {
            panic!()
        };
        assert!(text.starts_with("error: failed to connect service at"), "{text}");
    }
}
