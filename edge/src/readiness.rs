//! Asks a running daemon whether it is ready, for `skerry-edge status`.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

const ANSWER_LIMIT: Duration = Duration::from_secs(3);
/// Longest answer that is read; a reason is one line.
const BODY_LIMIT: usize = 4096;

/// What the daemon at `address` says on `/readyz`, as one line for people.
///
/// Never fails: that nobody answers is an answer, too.
pub async fn ask(address: SocketAddr) -> String {
    match tokio::time::timeout(ANSWER_LIMIT, get(address)).await {
        Ok(Ok((StatusCode::OK, _))) => "ready".to_owned(),
        Ok(Ok((_, reason))) => format!("not ready: {}", reason.trim()),
        Ok(Err(reason)) => format!("does not answer at {address}: {reason}"),
        Err(_) => format!("did not answer at {address} within {ANSWER_LIMIT:?}"),
    }
}

async fn get(address: SocketAddr) -> Result<(StatusCode, String), String> {
    let stream = TcpStream::connect(address).await.map_err(|e| e.to_string())?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| e.to_string())?;
    let exchange = async {
        let request = Request::get("/readyz")
            .header(http::header::HOST, address.to_string())
            .body(Empty::<Bytes>::new())
            .map_err(|e| e.to_string())?;
        let answer = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), BODY_LIMIT).collect().await;
        let body = body.map_err(|e| e.to_string())?.to_bytes();
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    };
    tokio::pin!(exchange, connection);
    tokio::select! {
        biased;
        answer = &mut exchange => answer,
        // The last bytes of an answer may still be on their way from the connection to the exchange.
        _ = &mut connection => exchange.await,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use skerry_telemetry::http::{Endpoints, serve};
    use tokio::net::TcpListener;
    use tokio_util::sync::CancellationToken;

    use super::*;

    async fn answer(ready: Result<(), String>) -> String {
        let stop = CancellationToken::new();
        let endpoints = Endpoints {
            registry: Arc::new(Mutex::new(prometheus_client::registry::Registry::default())),
            ready: Arc::new(move || ready.clone()),
            refresh: Arc::new(|| {}),
        };
        let (address, _) = serve(([127, 0, 0, 1], 0).into(), endpoints, stop.clone())
            .await
            .unwrap();
        let said = ask(address).await;
        stop.cancel();
        said
    }

    #[tokio::test]
    async fn the_daemons_answer_is_told_with_its_reason() {
        assert_eq!(answer(Ok(())).await, "ready");
        let reason = Err("the runtime does not answer".to_owned());
        assert_eq!(answer(reason).await, "not ready: the runtime does not answer");
    }

    #[tokio::test]
    async fn a_daemon_that_does_not_run_is_told_with_its_address() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert!(ask(address).await.contains(&address.to_string()));
    }
}
