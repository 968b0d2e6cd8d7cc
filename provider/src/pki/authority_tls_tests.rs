//! Handshakes with the link's listener, in memory.

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

type Shown = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn authority(domain: &str) -> Authority {
    Authority::ephemeral(&domain.parse().unwrap())
}

/// A site's certificate with its key, as the site would show it.
fn site(authority: &Authority, name: &str) -> Shown {
    let key = KeyPair::generate().unwrap();
    let request = CertificateParams::default().serialize_request(&key).unwrap();
    let issued = authority
        .issue_site(
            request.der(),
            &name.parse().unwrap(),
            &Uid::from("uid-1".to_owned()),
        )
        .unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut chain = vec![issued.certificate];
    chain.extend(issued.intermediates);
    (chain, key)
}

fn client(
    trusted: &Authority,
    shown: Option<Shown>,
    version: &'static SupportedProtocolVersion,
    alpn: &str,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    for root in trusted.roots() {
        roots.add(root).unwrap();
    }
    let builder = ClientConfig::builder_with_provider(ring())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match shown {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    config
}

/// Shakes hands and sends a byte each way; the site that the listener saw, or why either side refused.
async fn shake(authority: &Authority, client: ClientConfig) -> Result<Option<SitePeer>, String> {
    shake_with(authority, &settings(authority), client).await.0
}

fn settings(authority: &Authority) -> Arc<ServerConfig> {
    let names = Names {
        dns: vec!["provider.example".to_owned()],
        ips: vec![],
    };
    Arc::new(authority.link_config(&names).unwrap())
}

/// The same with settings that several connections share, as in life; also what the client says of the handshake.
async fn shake_with(
    authority: &Authority,
    settings: &Arc<ServerConfig>,
    client: ClientConfig,
) -> (Result<Option<SitePeer>, String>, Option<rustls::HandshakeKind>) {
    let acceptor = TlsAcceptor::from(Arc::clone(settings));
    let (near, far) = tokio::io::duplex(64 * 1024);
    let server = async {
        let mut stream = acceptor.accept(far).await.map_err(|e| e.to_string())?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let site = authority.peer_site(chain).map_err(|e| e.to_string())?;
        stream.write_all(b"x").await.map_err(|e| e.to_string())?;
        stream.flush().await.map_err(|e| e.to_string())?;
        Ok::<_, String>(site)
    };
    let dial = async {
        let name = ServerName::try_from("provider.example").unwrap();
        let connector = TlsConnector::from(Arc::new(client));
        let mut stream = connector.connect(name, near).await.map_err(|e| e.to_string())?;
        // In TLS 1.3 a client learns that its certificate is refused only when it reads.
        stream.read_exact(&mut [0]).await.map_err(|e| e.to_string())?;
        Ok::<_, String>(stream.get_ref().1.handshake_kind())
    };
    let (seen, dialled) = tokio::join!(server, dial);
    match dialled {
        Ok(kind) => (seen, kind),
        Err(reason) => (seen.and(Err(reason)), None),
    }
}

const TLS13: &SupportedProtocolVersion = &rustls::version::TLS13;

#[tokio::test]
async fn a_site_is_known_by_its_certificate() {
    let authority = authority("skerry.local");
    let shown = site(&authority, "harbour");
    let seen = shake(&authority, client(&authority, Some(shown), TLS13, "h2")).await;
    assert_eq!(seen.unwrap().unwrap().site.as_str(), "harbour");
}

#[tokio::test]
async fn a_client_without_a_certificate_gets_in_as_nobody() {
    let authority = authority("skerry.local");
    let seen = shake(&authority, client(&authority, None, TLS13, "h2")).await;
    assert_eq!(seen, Ok(None));
}

#[tokio::test]
async fn a_site_of_another_ca_is_refused_even_with_the_same_trust_domain() {
    let own = authority("skerry.local");
    for domain in ["skerry.local", "other.example"] {
        let shown = site(&authority(domain), "harbour");
        let seen = shake(&own, client(&own, Some(shown), TLS13, "h2")).await;
        assert!(seen.is_err(), "{domain}: {seen:?}");
    }
}

#[tokio::test]
async fn the_providers_own_certificate_does_not_open_the_link() {
    let authority = authority("skerry.local");
    let shown = authority.issue_provider(&Names::default()).unwrap();
    let seen = shake(&authority, client(&authority, Some(shown), TLS13, "h2")).await;
    assert!(seen.is_err(), "{seen:?}");
}

#[tokio::test]
async fn an_expired_certificate_passes_the_handshake_and_is_known_to_be_expired() {
    struct Past;
    impl Clock for Past {
        fn now(&self) -> Timestamp {
            "2020-01-01T00:00:00Z".parse().unwrap()
        }
    }
    let authority = authority("skerry.local");
    let shown = site(&authority.clone().with_clock(Arc::new(Past)), "harbour");
    let seen = shake(&authority, client(&authority, Some(shown), TLS13, "h2")).await;
    let peer = seen.unwrap().unwrap();
    assert!(peer.not_after < Timestamp::now());
    assert!(crate::pki::current(&peer, Timestamp::now(), Duration::from_secs(86_400)).is_err());
}

#[tokio::test]
async fn a_session_is_never_resumed() {
    let authority = authority("skerry.local");
    let shown = site(&authority, "harbour");
    // The client keeps what it is given from one connection to the next.
    let client = client(&authority, Some(shown), TLS13, "h2");
    let settings = settings(&authority);
    for _ in 0..2 {
        let (seen, kind) = shake_with(&authority, &settings, client.clone()).await;
        assert_eq!(seen.unwrap().unwrap().site.as_str(), "harbour");
        assert_eq!(kind, Some(rustls::HandshakeKind::Full));
    }
}

#[tokio::test]
async fn older_tls_and_other_protocols_are_refused() {
    let authority = authority("skerry.local");
    let old = client(&authority, None, &rustls::version::TLS12, "h2");
    assert!(shake(&authority, old).await.is_err());
    let other = client(&authority, None, TLS13, "http/1.1");
    assert!(shake(&authority, other).await.is_err());
}

#[tokio::test]
async fn a_client_that_trusts_another_ca_does_not_talk_to_the_provider() {
    let own = authority("skerry.local");
    let seen = shake(&own, client(&authority("skerry.local"), None, TLS13, "h2")).await;
    assert!(seen.is_err(), "{seen:?}");
}

/// The client of a site that trusts these roots.
fn trusting(roots: &[CertificateDer<'static>], (chain, key): &Shown) -> ClientConfig {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).unwrap();
    }
    let mut config = ClientConfig::builder_with_provider(ring())
        .with_protocol_versions(&[TLS13])
        .unwrap()
        .with_root_certificates(store)
        .with_client_auth_cert(chain.clone(), key.clone_key())
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

/// The keys as the Secret brings them, so that they are read as a provider reads them that starts in between.
fn reread(keys: super::super::keys::Keys) -> super::super::keys::Keys {
    let domain = keys.domain.clone();
    super::super::keys::Keys::from_secret(&keys.to_secret("ns"), "ns", &domain).unwrap()
}

#[tokio::test]
async fn a_rotation_of_the_ca_leaves_every_site_connected_until_the_old_one_is_withdrawn() {
    let domain: TrustDomain = "skerry.local".parse().unwrap();
    let first = super::super::keys::Keys::generate(&domain, Timestamp::now()).unwrap();
    let authority = Authority::of(reread(first));
    let (early, early_roots) = (site(&authority, "early"), authority.roots());
    let pin = authority.pin();

    let keys = Arc::into_inner(authority.keys.send_replace(Arc::new(
        super::super::keys::Keys::generate(&domain, Timestamp::now()).unwrap(),
    )))
    .unwrap();
    authority.reload(reread(keys.rotate(Timestamp::now()).unwrap()));
    let (late, late_roots) = (site(&authority, "late"), authority.roots());
    assert_eq!((late_roots.len(), late.0.len()), (2, 2));
    // Who joins meets the CA that the tokens name.
    assert_eq!(authority.pin(), pin);
    for (shown, roots) in [
        (&early, &early_roots),
        (&early, &late_roots),
        (&late, &late_roots),
        // It was renewed, but has not stored the new roots.
        (&late, &early_roots),
    ] {
        let seen = shake(&authority, trusting(roots, shown)).await;
        assert!(matches!(seen, Ok(Some(_))), "{seen:?}");
    }

    let keys = authority.keys();
    let retired = super::super::keys::Keys::from_secret(&keys.to_secret("ns"), "ns", &domain).unwrap();
    authority.reload(reread(retired.retire()));
    assert_ne!(authority.pin(), pin);
    let seen = shake(&authority, trusting(&late_roots, &late)).await;
    assert!(matches!(seen, Ok(Some(_))), "{seen:?}");
    for (shown, roots) in [(&early, &late_roots), (&late, &early_roots)] {
        assert!(shake(&authority, trusting(roots, shown)).await.is_err());
    }
}
