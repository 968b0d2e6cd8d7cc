//! How many requests to the Kubernetes API may be under way at one time.
//!
//! After an outage thousands of sites want something written at the same moment. Each request under way has a connection
//! of its own, so without a limit the provider would open thousands, and the API server, which refuses beyond a few
//! hundred, would do everyone's work slowly instead of some of it quickly. With a limit the rest waits here, in the
//! order in which it came, and the rate follows from how fast the API server answers.
//!
//! What keeps a Node alive, Nodes and their leases, has places of its own: it never waits behind statuses of pods.

use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::Semaphore;

/// Places for Nodes and leases.
const VITAL: usize = 16;
/// Places for everything else.
const ORDINARY: usize = 32;

/// Makes [`Paced`] services that share their places.
#[derive(Clone)]
pub struct Pace {
    vital: Arc<Semaphore>,
    ordinary: Arc<Semaphore>,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            vital: Arc::new(Semaphore::new(VITAL)),
            ordinary: Arc::new(Semaphore::new(ORDINARY)),
        }
    }
}

impl Pace {
    fn places(&self, uri: &http::Uri) -> &Arc<Semaphore> {
        let path = uri.path();
        let vital = path.starts_with("/api/v1/nodes/")
            || path.starts_with("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/");
        if vital { &self.vital } else { &self.ordinary }
    }
}

impl<S> tower::Layer<S> for Pace {
    type Service = Paced<S>;

    fn layer(&self, service: S) -> Paced<S> {
        Paced {
            service,
            pace: self.clone(),
        }
    }
}

/// A service whose requests wait for a place. A place is held until the head of the answer has come, so that a watch
/// holds none.
#[derive(Clone)]
pub struct Paced<S> {
    service: S,
    pace: Pace,
}

impl<S, B> tower::Service<http::Request<B>> for Paced<S>
where
    S: tower::Service<http::Request<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = std::pin::Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let places = Arc::clone(self.pace.places(request.uri()));
        // Does nothing before it is polled: a request is sent by its future, not by the call.
        let answer = self.service.call(request);
        Box::pin(async move {
            // Never closed; without a place the request goes out all the same.
            let _place = places.acquire_owned().await;
            answer.await
        })
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tower::{Layer, Service};

    use super::*;

    /// Answers never, and counts who waits for an answer.
    #[derive(Clone, Default)]
    struct Deaf(Arc<AtomicUsize>);

    impl Service<http::Request<()>> for Deaf {
        type Response = http::Response<()>;
        type Error = Infallible;
        type Future = std::pin::Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: http::Request<()>) -> Self::Future {
            let asked = Arc::clone(&self.0);
            Box::pin(async move {
                asked.fetch_add(1, Ordering::SeqCst);
                std::future::pending().await
            })
        }
    }

    #[tokio::test]
    async fn a_crowd_of_pods_leaves_places_for_nodes_and_leases() {
        let deaf = Deaf::default();
        let mut service = Pace::default().layer(deaf.clone());
        let mut ask = |path: &str| {
            let answer = service.call(http::Request::get(path).body(()).unwrap());
            tokio::spawn(answer);
        };
        for _ in 0..2 * ORDINARY {
            ask("/api/v1/namespaces/default/pods/p/status");
        }
        tokio::task::yield_now().await;
        assert_eq!(deaf.0.load(Ordering::SeqCst), ORDINARY);
        ask("/api/v1/nodes/harbour/status");
        ask("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/harbour");
        tokio::task::yield_now().await;
        assert_eq!(deaf.0.load(Ordering::SeqCst), ORDINARY + 2);
    }
}
