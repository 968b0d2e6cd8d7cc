//! Connections to the provider.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use skerry_proto::limits::{LINK_CONNECTION_WINDOW, LINK_STREAM_WINDOW};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::{Identity, tls};
use crate::link::Dial;

/// How long TCP and TLS may take together.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Dials the provider with the site's newest certificate.
pub struct Dialer {
    provider: String,
    identity: watch::Receiver<Arc<Identity>>,
}

impl Dialer {
    /// A dialer of `provider` (`host:port`, with or without `https://`).
    pub fn new(provider: &str, identity: watch::Receiver<Arc<Identity>>) -> Result<Self, String> {
        Ok(Self {
            provider: address(provider)?,
            identity,
        })
    }
}

#[async_trait]
impl Dial for Dialer {
    async fn dial(&self) -> Result<Channel, String> {
        let identity = Arc::clone(&self.identity.borrow());
        let config = tls::joined(&identity).map_err(|e| format!("TLS cannot be set up: {e}"))?;
        connect(&self.provider, Arc::new(config)).await
    }
}

/// Checks an address and takes off its scheme.
pub(super) fn address(provider: &str) -> Result<String, String> {
    let bare = provider
        .strip_prefix("https://")
        .unwrap_or(provider)
        .trim_end_matches('/');
    let wrong = || {
        format!("{provider:?} is no address of a provider: use HOST:PORT, for example provider.example:10443")
    };
    let (host, port) = bare.rsplit_once(':').ok_or_else(wrong)?;
    if host.is_empty() || host.contains('/') || port.parse::<u16>().is_err() {
        return Err(wrong());
    }
    Ok(bare.to_owned())
}

/// One TCP connection with TLS and HTTP/2. The error says where was dialled and what went wrong.
pub(super) async fn connect(provider: &str, config: Arc<ClientConfig>) -> Result<Channel, String> {
    let stream = tokio::time::timeout(CONNECT_LIMIT, open(provider, config))
        .await
        .map_err(|_| format!("the provider at {provider} did not answer within {CONNECT_LIMIT:?}"))??;
    let mut once = Some(TokioIo::new(stream));
    // The connection exists already, so that its own errors could be told apart; a second one is never made.
    let connector = service_fn(move |_| {
        let stream = once.take();
        async move { stream.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected)) }
    });
    Endpoint::from_static("http://provider.skerry")
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(15))
        // A stream whose reader has stopped holds its own window only: the connection's has room for all.
        .initial_stream_window_size(LINK_STREAM_WINDOW)
        .initial_connection_window_size(LINK_CONNECTION_WINDOW)
        .connect_with_connector(connector)
        .await
        .map_err(|e| format!("the provider at {provider} does not speak the link's protocol: {e}"))
}

async fn open(
    provider: &str,
    config: Arc<ClientConfig>,
) -> Result<tokio_rustls::client::TlsStream<TcpStream>, String> {
    let stream = TcpStream::connect(provider)
        .await
        .map_err(|e| format!("the provider at {provider} cannot be reached: {e}"))?;
    stream
        .set_nodelay(true)
        .map_err(|e| format!("the connection to {provider} failed: {e}"))?;
    // The provider is known by its SPIFFE ID; the name is only what TLS needs to start.
    let name = ServerName::try_from("provider.skerry").map_err(|e| e.to_string())?;
    TlsConnector::from(config)
        .connect(name, stream)
        .await
        .map_err(|e| format!("the connection to the provider at {provider} was refused: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_needs_a_host_and_a_port() {
        assert_eq!(address("https://a.example:1/").unwrap(), "a.example:1");
        assert_eq!(address("[::1]:10443").unwrap(), "[::1]:10443");
        for wrong in [
            "",
            "a.example",
            ":1",
            "a.example:x",
            "a.example:99999",
            "http://a:1/x",
        ] {
            assert!(address(wrong).is_err(), "{wrong:?}");
        }
    }
}
