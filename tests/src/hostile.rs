//! A site in somebody else's hands: it has a good certificate, and says what it likes on the raw protocol.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use skerry_edge::identity::{Dialer, Identity};
use skerry_edge::link::Dial;
use skerry_proto::limits::MAX_MESSAGE_BYTES;
use skerry_proto::link::link_client::LinkClient;
use skerry_proto::link::{
    BulkHello, CloudBulk, CloudControl, EdgeBulk, EdgeControl, Heartbeat, Hello, Inventory, Report,
    ReportResult, cloud_bulk, cloud_control, edge_bulk, edge_control, report,
};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

use crate::site::Site;

/// How long the provider may take for any answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// One who has a site's certificate.
pub struct Hostile {
    name: String,
    provider: SocketAddr,
    identity: watch::Receiver<Arc<Identity>>,
}

/// Both ends of a stream, and the connection below.
pub struct Duplex<T, U> {
    /// What goes to the provider.
    pub send: mpsc::Sender<T>,
    /// What comes back.
    pub receive: Streaming<U>,
    _channel: Channel,
}

/// A session as the provider sees it.
pub struct Session {
    /// Its name.
    pub id: String,
    /// Heartbeats and orders.
    pub control: Duplex<EdgeControl, CloudControl>,
    /// Objects and reports.
    pub bulk: Duplex<EdgeBulk, CloudBulk>,
    seq: u64,
}

impl Hostile {
    /// Takes the identity of an enrolled site, whose daemon must not run.
    ///
    /// # Panics
    /// When it has none.
    pub fn of(site: &Site, provider: SocketAddr) -> Self {
        let identity = Identity::load(&site.data_dir()).expect("the site has joined");
        // Nobody renews it.
        let (_, identity) = watch::channel(Arc::new(identity));
        Self {
            name: site.name().to_owned(),
            provider,
            identity,
        }
    }

    /// A connection of its own.
    ///
    /// # Panics
    /// When the provider does not take it.
    pub async fn channel(&self) -> Channel {
        let dialer = Dialer::new(&self.provider.to_string(), self.identity.clone()).expect("an address");
        dialer.dial().await.expect("the provider takes the connection")
    }

    /// An honest greeting.
    pub fn hello(&self) -> Hello {
        Hello {
            site: self.name.clone(),
            protocol_max: 1,
            protocol_min: 1,
            version: "0.0.0-hostile".into(),
            boot_id: "boot".into(),
            store_id: "store".into(),
            incarnation: 1,
            instance: "one".into(),
            ..Default::default()
        }
    }

    /// Opens Control with these first messages.
    ///
    /// # Errors
    /// What the provider says.
    pub async fn control(
        &self,
        first: Vec<EdgeControl>,
    ) -> Result<Duplex<EdgeControl, CloudControl>, Status> {
        let channel = self.channel().await;
        let (send, messages) = stream(first);
        let receive = answer(client(&channel).control(messages)).await?.into_inner();
        Ok(Duplex {
            send,
            receive,
            _channel: channel,
        })
    }

    /// Opens Bulk with these first messages.
    ///
    /// # Errors
    /// What the provider says.
    pub async fn bulk(&self, first: Vec<EdgeBulk>) -> Result<Duplex<EdgeBulk, CloudBulk>, Status> {
        let channel = self.channel().await;
        let (send, messages) = stream(first);
        let receive = answer(client(&channel).bulk(messages)).await?.into_inner();
        Ok(Duplex {
            send,
            receive,
            _channel: channel,
        })
    }

    /// Greets and opens both streams; what the site holds is not told yet.
    ///
    /// # Panics
    /// When the provider refuses that.
    pub async fn session(&self) -> Session {
        let greeting = control(edge_control::Message::Hello(self.hello()));
        let mut control = self.control(vec![greeting]).await.expect("a session");
        let first = next(&mut control.receive)
            .await
            .expect("a greeting")
            .expect("a greeting");
        let Some(cloud_control::Message::Welcome(welcome)) = first.message else {
            panic!("no welcome: {first:?}");
        };
        let hello = BulkHello {
            session: welcome.session.clone(),
        };
        let bulk = self.bulk(vec![bulk(edge_bulk::Message::Hello(hello))]).await;
        Session {
            id: welcome.session,
            control,
            bulk: bulk.expect("the other half of the session"),
            seq: 0,
        }
    }
}

impl Session {
    /// Says that it holds nothing.
    ///
    /// # Panics
    /// When the stream is over.
    pub async fn empty(mut self) -> Self {
        let nothing = Inventory {
            entries: Vec::new(),
            last: true,
        };
        self.say(edge_bulk::Message::Inventory(nothing)).await;
        self
    }

    /// Sends a message on Bulk, and a sign of life.
    ///
    /// # Panics
    /// When the stream is over.
    pub async fn say(&mut self, message: edge_bulk::Message) {
        let beat = control(edge_control::Message::Heartbeat(Heartbeat::default()));
        // Without room one is on its way already.
        let _ = self.control.send.try_send(beat);
        self.bulk
            .send
            .send(bulk(message))
            .await
            .expect("the stream is open");
    }

    /// What the provider makes of a report.
    ///
    /// # Errors
    /// How the stream ended without a result.
    pub async fn report(&mut self, body: Option<report::Report>) -> Result<ReportResult, String> {
        self.seq += 1;
        let report = Report {
            seq: self.seq,
            report: body,
            ..Default::default()
        };
        self.say(edge_bulk::Message::Report(report)).await;
        loop {
            let message = next(&mut self.bulk.receive)
                .await
                .map_err(|status| status.to_string())?;
            match message.ok_or("the stream ended")?.message {
                Some(cloud_bulk::Message::ReportResult(result)) if result.seq == self.seq => {
                    return Ok(result);
                }
                _ => {}
            }
        }
    }

    /// How the provider ends Bulk.
    pub async fn end(&mut self) -> Result<(), Status> {
        while next(&mut self.bulk.receive).await?.is_some() {}
        Ok(())
    }
}

/// Wraps a message for Control.
pub fn control(message: edge_control::Message) -> EdgeControl {
    EdgeControl {
        message: Some(message),
    }
}

/// Wraps a message for Bulk.
pub fn bulk(message: edge_bulk::Message) -> EdgeBulk {
    EdgeBulk {
        message: Some(message),
    }
}

/// A client of the link that sends whatever it is given.
pub fn client(channel: &Channel) -> LinkClient<Channel> {
    LinkClient::new(channel.clone()).max_decoding_message_size(2 * MAX_MESSAGE_BYTES)
}

/// The next message.
///
/// # Errors
/// When the stream ends with an error, or nothing comes for long.
pub async fn next<T>(stream: &mut Streaming<T>) -> Result<Option<T>, Status> {
    answer(stream.message()).await
}

/// What comes, but not for ever.
///
/// # Errors
/// What the provider says, or that it says nothing.
pub async fn answer<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let waited = tokio::time::timeout(PATIENCE, call).await;
    waited.unwrap_or_else(|_| Err(Status::cancelled("the provider says nothing")))
}

/// A stream that begins with these messages and stays open while the sender lives.
pub fn stream<T>(first: Vec<T>) -> (mpsc::Sender<T>, ReceiverStream<T>) {
    let (send, receive) = mpsc::channel(first.len().max(16));
    for message in first {
        send.try_send(message)
            .unwrap_or_else(|_| unreachable!("there is room for all"));
    }
    (send, ReceiverStream::new(receive))
}

/// A TLS connection without a certificate, that looks at none either.
///
/// # Errors
/// When the provider does not take it.
pub async fn stranger(provider: SocketAddr) -> Result<Channel, String> {
    let crypto = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(crypto)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let tcp = TcpStream::connect(provider).await.map_err(|e| e.to_string())?;
    let name = ServerName::try_from("provider.skerry").map_err(|e| e.to_string())?;
    let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp);
    let mut once = Some(TokioIo::new(tls.await.map_err(|e| e.to_string())?));
    Endpoint::from_static("http://provider.skerry")
        .connect_with_connector(tower::service_fn(move |_| {
            let stream = once.take();
            async move { stream.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected)) }
        }))
        .await
        .map_err(|e| e.to_string())
}

/// Takes any server for the right one.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::ring::default_provider()
            .signature_verification_algorithms
            .supported_schemes()
    }
}
