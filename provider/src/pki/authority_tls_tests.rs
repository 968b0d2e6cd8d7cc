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
    (vec![issued.certificate], key)
}

fn client(
    trusted: &Authority,
    shown: Option<Shown>,
    version: &'static SupportedProtocolVersion,
    alpn: &str,
) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.certificate().clone()).unwrap();
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
    let names = Names {
        dns: vec!["provider.example".to_owned()],
        ips: vec![],
    };
    let acceptor = TlsAcceptor::from(Arc::new(authority.link_config(&names).unwrap()));
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
        Ok::<_, String>(())
    };
    let (seen, dialled) = tokio::join!(server, dial);
    let seen = seen?;
    dialled?;
    Ok(seen)
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
