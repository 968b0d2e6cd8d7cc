//! Counts and times the calls to the engine, under the kubelet's metric names.
//!
//! A service around the connection: the name of the call is in the request's path, a failure in the head of the answer.
//! So every call counts, whoever makes it.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

/// The call that never answers.
const EVENTS: &str = "get_container_events";

/// Labels of a call.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Operation {
    operation_type: String,
}

/// Counters of the calls. Clones count together.
#[derive(Clone, Debug)]
pub struct Operations {
    calls: Family<Operation, Counter>,
    errors: Family<Operation, Counter>,
    durations: Family<Operation, Histogram, fn() -> Histogram>,
}

impl Default for Operations {
    fn default() -> Self {
        Self {
            calls: Family::default(),
            errors: Family::default(),
            durations: Family::new_with_constructor(|| {
                Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(
                    0.005, 2.5, 14,
                ))
            }),
        }
    }
}

impl Operations {
    /// Shows the counters in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "kubelet_runtime_operations",
            "Cumulative number of runtime operations by operation type",
            self.calls.clone(),
        );
        registry.register(
            "kubelet_runtime_operations_errors",
            "Cumulative number of runtime operation errors by operation type",
            self.errors.clone(),
        );
        registry.register(
            "kubelet_runtime_operations_duration_seconds",
            "Duration in seconds of runtime operations, broken down by operation type",
            self.durations.clone(),
        );
    }

    fn count(&self, operation: String, began: Instant, failed: bool) {
        let labels = Operation {
            operation_type: operation,
        };
        self.calls.get_or_create(&labels).inc();
        self.durations
            .get_or_create(&labels)
            .observe(began.elapsed().as_secs_f64());
        if failed {
            self.errors.get_or_create(&labels).inc();
        }
    }
}

/// `/runtime.v1.RuntimeService/RunPodSandbox` as the kubelet names it: `run_podsandbox`.
fn operation(path: &str) -> String {
    let method = path.rsplit('/').next().unwrap_or_default();
    let mut name = String::with_capacity(method.len() + 4);
    for c in method.chars() {
        if c.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_lowercase());
    }
    name.replace("pod_sandbox", "podsandbox")
}

/// A connection whose calls are counted.
#[derive(Clone)]
pub(super) struct Counted<S> {
    inner: S,
    operations: Operations,
}

impl<S> Counted<S> {
    pub(super) fn new(inner: S, operations: Operations) -> Self {
        Self { inner, operations }
    }
}

impl<S, B, R> tower::Service<http::Request<B>> for Counted<S>
where
    S: tower::Service<http::Request<B>, Response = http::Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let (name, began) = (operation(request.uri().path()), Instant::now());
        let (operations, answer) = (self.operations.clone(), self.inner.call(request));
        Box::pin(async move {
            let answer = answer.await;
            if name != EVENTS {
                // An error comes without a body, so that its status stands in the head.
                let failed = answer.as_ref().map_or(true, |head| {
                    head.headers().get("grpc-status").is_some_and(|code| code != "0")
                });
                operations.count(name, began, failed);
            }
            answer
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tower::{Service, ServiceExt};

    #[test]
    fn calls_are_named_as_the_kubelet_names_them() {
        for (method, expected) in [
            ("RunPodSandbox", "run_podsandbox"),
            ("ListContainers", "list_containers"),
            ("ExecSync", "exec_sync"),
            ("ListContainerStats", "list_container_stats"),
            ("Version", "version"),
        ] {
            assert_eq!(
                operation(&format!("/runtime.v1.RuntimeService/{method}")),
                expected
            );
        }
    }

    #[tokio::test]
    async fn an_answer_with_an_error_in_its_head_counts_as_one() {
        let operations = Operations::default();
        let engine = tower::service_fn(|request: http::Request<()>| async move {
            let code = if request.uri().path().ends_with("Attach") {
                "5"
            } else {
                "0"
            };
            Ok::<_, std::convert::Infallible>(
                http::Response::builder()
                    .header("grpc-status", code)
                    .body(())
                    .unwrap(),
            )
        });
        let mut counted = Counted::new(engine, operations.clone());
        for path in ["/x/Attach", "/x/Exec", "/x/GetContainerEvents"] {
            let request = http::Request::get(path).body(()).unwrap();
            counted.ready().await.unwrap().call(request).await.unwrap();
        }
        let of = |family: &Family<Operation, Counter>, name: &str| {
            let labels = Operation {
                operation_type: name.to_owned(),
            };
            family.get_or_create(&labels).get()
        };
        assert_eq!(
            (of(&operations.calls, "attach"), of(&operations.errors, "attach")),
            (1, 1)
        );
        assert_eq!(
            (of(&operations.calls, "exec"), of(&operations.errors, "exec")),
            (1, 0)
        );
        assert_eq!(of(&operations.calls, EVENTS), 0);
    }
}
