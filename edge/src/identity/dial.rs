//! Connections to the provider.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use skerry_proto::limits::{LINK_CONNECTION_WINDOW, LINK_STREAM_WINDOW};
use skerry_transport::{Handle, Stream};
use tokio::sync::{Notify, watch};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::proxy::{Proxy, ProxyRules};
use super::{Doubt, Identity, TrustedTime, reach, tls};
use crate::clock::SystemClock;
use crate::link::Dial;

/// How long TCP and TLS may take together.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// How often a connection through a proxy is tried out, and how long the answer may take.
const PROXIED_PING: Duration = Duration::from_secs(60);

/// Dials the provider with the site's newest certificate.
pub struct Dialer {
    provider: String,
    proxies: ProxyRules,
    identity: watch::Receiver<Arc<Identity>>,
    time: Arc<TrustedTime>,
    urge: Arc<Notify>,
}

impl Dialer {
    /// A dialer of `provider` (`host:port`, with or without `https://`).
    ///
    /// It believes the system's clock, and nobody renews anything: see [`Dialer::telling`].
    pub fn new(provider: &str, identity: watch::Receiver<Arc<Identity>>) -> Result<Self, String> {
        let issued = identity.borrow().not_before;
        Ok(Self {
            provider: address(provider)?,
            proxies: ProxyRules::default(),
            identity,
            time: Arc::new(TrustedTime::new(Arc::new(SystemClock), issued, None, |_| {})),
            urge: Arc::default(),
        })
    }

    /// The same through the proxies that these rules name.
    #[must_use]
    pub fn through(mut self, proxies: ProxyRules) -> Self {
        self.proxies = proxies;
        self
    }

    /// Checks certificates by `time`, and notifies `urge` when only a renewal of the site's own helps.
    #[must_use]
    pub fn telling(mut self, time: Arc<TrustedTime>, urge: Arc<Notify>) -> Self {
        (self.time, self.urge) = (time, urge);
        self
    }

    async fn dial_with(&self, timeliness: tls::Timeliness) -> Result<(Channel, Handle), String> {
        let identity = Arc::clone(&self.identity.borrow());
        let config = tls::joined(&identity, &self.time, timeliness)
            .map_err(|e| format!("TLS cannot be set up: {e}"))?;
        connect(&self.provider, &self.proxies, Arc::new(config)).await
    }
}

#[async_trait]
impl Dial for Dialer {
    async fn dial(&self) -> Result<Channel, String> {
        self.dial_line().await.map(|(channel, _)| channel)
    }

    async fn dial_line(&self) -> Result<(Channel, Option<Handle>), String> {
        if let Some(doubt @ Doubt::Behind { .. }) = self.time.doubt() {
            self.urge.notify_one();
            return Err(doubt.to_string());
        }
        let dialled = self.dial_with(tls::Timeliness::Required).await;
        // An old certificate that somebody shows raises this doubt too: the renewal then fails, and nothing else changes.
        if dialled.is_err() && self.time.doubt().is_some() {
            self.urge.notify_one();
        }
        dialled.map(|(channel, line)| (channel, Some(line)))
    }

    async fn dial_for_renewal(&self) -> Result<Channel, String> {
        let dialled = self.dial_with(tls::Timeliness::Proven).await;
        dialled.map(|(channel, _)| channel)
    }

    fn greeted(&self, provider_now: Timestamp) {
        self.time.attest(provider_now);
    }

    fn renewal_wanted(&self) {
        self.urge.notify_one();
    }

    fn refused(&self, code: tonic::Code) {
        if code == tonic::Code::Unauthenticated {
            self.urge.notify_one();
        }
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
pub(super) async fn connect(
    provider: &str,
    proxies: &ProxyRules,
    config: Arc<ClientConfig>,
) -> Result<(Channel, Handle), String> {
    let (host, port) = split(provider)?;
    let proxy = proxies.through(host, port);
    let stream = tokio::time::timeout(CONNECT_LIMIT, open(provider, proxy, config))
        .await
        .map_err(|_| format!("the provider at {provider} did not answer within {CONNECT_LIMIT:?}"))??;
    let line = stream.get_ref().0.handle();
    let mut once = Some(TokioIo::new(stream));
    // The connection exists already, so that its own errors could be told apart; a second one is never made.
    let connector = service_fn(move |_| {
        let stream = once.take();
        async move { stream.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected)) }
    });
    let endpoint = match proxy {
        // Heartbeats and the kernel (transport) watch over the connection, and the latter costs nothing.
        None => Endpoint::from_static("http://provider.skerry"),
        // The kernel sees no further than the proxy.
        Some(_) => Endpoint::from_static("http://provider.skerry")
            .http2_keep_alive_interval(PROXIED_PING)
            .keep_alive_timeout(PROXIED_PING),
    };
    let channel = endpoint
        // A stream whose reader has stopped holds its own window only: the connection's has room for all.
        .initial_stream_window_size(LINK_STREAM_WINDOW)
        .initial_connection_window_size(LINK_CONNECTION_WINDOW)
        .connect_with_connector(connector)
        .await
        .map_err(|e| format!("the provider at {provider} does not speak the link's protocol: {e}"))?;
    Ok((channel, line))
}

/// Host and port of a checked address.
fn split(provider: &str) -> Result<(&str, u16), String> {
    let parts = provider
        .rsplit_once(':')
        .and_then(|(host, port)| Some((host, port.parse().ok()?)));
    parts.ok_or_else(|| format!("{provider:?} is no address of a provider"))
}

async fn open(
    provider: &str,
    proxy: Option<&Proxy>,
    config: Arc<ClientConfig>,
) -> Result<tokio_rustls::client::TlsStream<Stream>, String> {
    let (host, port) = split(provider)?;
    let stream = match proxy {
        None => reach::connect(host, port)
            .await
            .map_err(|e| format!("the provider at {provider} cannot be reached: {e}"))?,
        Some(proxy) => {
            let mut stream = reach::connect(&proxy.host, proxy.port)
                .await
                .map_err(|e| format!("the proxy {proxy:?} cannot be reached: {e}"))?;
            proxy.connect(&mut stream, host, port).await?;
            stream
        }
    };
    let stream = Stream::new(stream).map_err(|e| format!("the connection to {provider} failed: {e}"))?;
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
