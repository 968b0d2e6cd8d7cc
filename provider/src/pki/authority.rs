//! The CA and the TLS settings that follow from it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, PostParams};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use sha2::{Digest, Sha256};
use skerry_proto::object::Uid;
use skerry_proto::token::{hex, public_key_pin};
use skerry_proto::{InvalidSpiffeId, SiteName, SpiffeId, TrustDomain};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The Secret that holds the CA.
pub const CA_SECRET: &str = "skerry-ca";

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Life of a site's or the provider's certificate.
const LEAF_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);
/// The attribute `serialNumber` of a subject (X.520): here the Site's UID.
const SERIAL_NUMBER: [u64; 4] = [2, 5, 4, 5];
const CA_LIFE: Duration = Duration::from_secs(3650 * 24 * 3600);
/// Certificates are valid a little before they are made, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(300);

/// Why the CA cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// The Kubernetes API refused.
    #[error("Secret {namespace}/{CA_SECRET} cannot be read or created: {source}")]
    Api {
        /// Its namespace.
        namespace: String,
        /// The API's answer.
        source: kube::Error,
    },
    /// The Secret's content is damaged.
    #[error(
        "Secret {namespace}/{CA_SECRET} does not hold a CA: {reason}. Restore it from a backup; deleting it makes a new CA, and every site must join again"
    )]
    Damaged {
        /// Its namespace.
        namespace: String,
        /// What is wrong.
        reason: String,
    },
    /// It was made for another trust domain.
    #[error(
        "Secret {namespace}/{CA_SECRET} belongs to trust domain {found}, not {wanted}; start the provider with --trust-domain {found}"
    )]
    TrustDomain {
        /// Its namespace.
        namespace: String,
        /// What it is for.
        found: String,
        /// What was asked for.
        wanted: TrustDomain,
    },
    /// A certificate could not be made.
    #[error("a certificate cannot be made: {0}")]
    Issue(#[from] rcgen::Error),
    /// TLS settings could not be made.
    #[error("TLS cannot be set up: {0}")]
    Tls(String),
}

/// Names in the provider's own certificates, beside its SPIFFE ID.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// DNS names.
    pub dns: Vec<String>,
    /// Addresses.
    pub ips: Vec<IpAddr>,
}

/// A certificate for a site.
#[derive(Clone, Debug)]
pub struct Issued {
    /// The certificate, DER.
    pub certificate: CertificateDer<'static>,
    /// When it expires.
    pub not_after: Timestamp,
    /// Serial number, hexadecimal.
    pub serial: String,
}

/// Who a site's certificate speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SitePeer {
    /// The Site's name, from the SPIFFE ID.
    pub site: SiteName,
    /// UID of the Site object that the certificate was issued for: a Site made anew under the same name is another.
    pub uid: Uid,
    /// When the certificate expires.
    pub not_after: Timestamp,
}

/// Why a client's certificate speaks for no site.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidPeer {
    /// Its SPIFFE ID is missing, or is not a site's of this trust domain.
    #[error(transparent)]
    Identity(#[from] InvalidSpiffeId),
    /// It carries no Site UID.
    #[error(
        "the certificate of site {0} does not say for which Site object it was issued; join again with a new token"
    )]
    NoUid(SiteName),
}

/// The CA. Clones share it.
#[derive(Clone)]
pub struct Authority {
    inner: Arc<Inner>,
}

struct Inner {
    domain: TrustDomain,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pin: String,
}

struct Material {
    certificate_pem: String,
    key_pem: String,
}

impl Authority {
    /// Reads the CA from its Secret, or makes it. Two providers that start at once end with the same CA.
    pub async fn load_or_create(
        client: &Client,
        namespace: &str,
        domain: &TrustDomain,
    ) -> Result<Self, AuthorityError> {
        let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let api = |source| AuthorityError::Api {
            namespace: namespace.to_owned(),
            source,
        };
        let secret = match secrets.get_opt(CA_SECRET).await.map_err(api)? {
            Some(secret) => secret,
            None => {
                let fresh = new_secret(namespace, domain, &generate(domain)?);
                match secrets.create(&PostParams::default(), &fresh).await {
                    Ok(secret) => {
                        tracing::info!(namespace, secret = CA_SECRET, "a new site CA was made");
                        secret
                    }
                    // Another provider was faster: its CA counts.
                    Err(kube::Error::Api(status)) if status.code == 409 => {
                        secrets.get(CA_SECRET).await.map_err(api)?
                    }
                    Err(error) => return Err(api(error)),
                }
            }
        };
        Self::from_secret(&secret, namespace, domain)
    }

    fn from_secret(secret: &Secret, namespace: &str, domain: &TrustDomain) -> Result<Self, AuthorityError> {
        let damaged = |reason: String| AuthorityError::Damaged {
            namespace: namespace.to_owned(),
            reason,
        };
        let text = |key: &str| {
            let bytes = secret.data.as_ref().and_then(|data| data.get(key));
            let bytes = bytes.ok_or_else(|| damaged(format!("the key {key} is missing")))?;
            String::from_utf8(bytes.0.clone()).map_err(|_| damaged(format!("the key {key} is no text")))
        };
        let found = text("trust-domain")?;
        if found != domain.as_str() {
            return Err(AuthorityError::TrustDomain {
                namespace: namespace.to_owned(),
                found,
                wanted: domain.clone(),
            });
        }
        let material = Material {
            certificate_pem: text("tls.crt")?,
            key_pem: text("tls.key")?,
        };
        Self::from_material(&material, domain).map_err(|e| damaged(e.to_string()))
    }

    fn from_material(material: &Material, domain: &TrustDomain) -> Result<Self, AuthorityError> {
        let key = KeyPair::from_pem(&material.key_pem)?;
        let certificate = rustls_pemfile::certs(&mut material.certificate_pem.as_bytes())
            .next()
            .and_then(Result::ok)
            .ok_or_else(|| AuthorityError::Tls("tls.crt holds no certificate".to_owned()))?;
        let pin = public_key_pin(&certificate)
            .ok_or_else(|| AuthorityError::Tls("tls.crt cannot be read".to_owned()))?;
        // rcgen does not compare them, and whatever such a pair signs is trusted by nobody.
        if hex(&Sha256::digest(key.subject_public_key_info())) != pin {
            return Err(AuthorityError::Tls(
                "tls.key is not the key of tls.crt".to_owned(),
            ));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self {
            inner: Arc::new(Inner {
                domain: domain.clone(),
                issuer,
                certificate,
                pin,
            }),
        })
    }

    /// A CA that lives in memory only, for tests.
    #[cfg(test)]
    pub(crate) fn ephemeral(domain: &TrustDomain) -> Self {
        Self::from_material(&generate(domain).unwrap(), domain).unwrap()
    }

    /// The trust domain of every certificate.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.inner.domain
    }

    /// The CA's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.inner.certificate
    }

    /// When the CA's own certificate expires.
    pub fn not_after(&self) -> Timestamp {
        let seconds = x509_parser::parse_x509_certificate(&self.inner.certificate)
            .map_or(0, |(_, certificate)| certificate.validity().not_after.timestamp());
        Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH)
    }

    /// SHA-256 of the CA's public key, for join tokens.
    pub fn pin(&self) -> &str {
        &self.inner.pin
    }

    /// Issues a certificate for a site. Takes the public key from the request, whose signature is checked, and nothing
    /// else.
    pub fn issue_site(&self, csr_der: &[u8], site: &SiteName, uid: &Uid) -> Result<Issued, AuthorityError> {
        let request = read_request(csr_der)?;
        let id = SpiffeId::Site(self.inner.domain.clone(), site.clone());
        let (mut params, serial, not_after) =
            self.leaf(&id, site.as_str(), ExtendedKeyUsagePurpose::ClientAuth)?;
        // In the subject, because a SPIFFE certificate must not carry a second URI.
        params
            .distinguished_name
            .push(DnType::CustomDnType(SERIAL_NUMBER.to_vec()), uid.as_str());
        let certificate = params.signed_by(&request.public_key, &self.inner.issuer)?;
        Ok(Issued {
            certificate: certificate.der().clone(),
            not_after,
            serial,
        })
    }

    /// The site that a verified client certificate names; `None` when the client showed none.
    pub fn peer_site(&self, chain: &[CertificateDer<'_>]) -> Result<Option<SitePeer>, InvalidPeer> {
        let Some(leaf) = chain.first() else {
            return Ok(None);
        };
        match SpiffeId::from_certificate_der(leaf)? {
            SpiffeId::Site(domain, site) if domain == self.inner.domain => {
                let (uid, not_after) = site_uid(leaf).ok_or_else(|| InvalidPeer::NoUid(site.clone()))?;
                Ok(Some(SitePeer { site, uid, not_after }))
            }
            other => Err(InvalidSpiffeId::Form(other.to_string()).into()),
        }
    }

    /// TLS settings of the link's listener, renewed at two thirds of the certificate's life until `stop`.
    pub fn link_tls(
        &self,
        names: Names,
        stop: CancellationToken,
    ) -> Result<watch::Receiver<Arc<ServerConfig>>, AuthorityError> {
        self.rotating(stop, move |authority| authority.link_config(&names))
    }

    /// TLS settings of the kubelet listener; client certificates are checked against `client_ca` where it is known.
    pub fn kubelet_tls(
        &self,
        names: Names,
        client_ca: Option<RootCertStore>,
        stop: CancellationToken,
    ) -> Result<watch::Receiver<Arc<ServerConfig>>, AuthorityError> {
        self.rotating(stop, move |authority| {
            authority.kubelet_config(&names, client_ca.clone())
        })
    }

    fn rotating(
        &self,
        stop: CancellationToken,
        make: impl Fn(&Self) -> Result<ServerConfig, AuthorityError> + Send + 'static,
    ) -> Result<watch::Receiver<Arc<ServerConfig>>, AuthorityError> {
        let (sender, receiver) = watch::channel(Arc::new(make(self)?));
        let authority = self.clone();
        tokio::spawn(async move {
            let mut pause = LEAF_LIFE / 3 * 2;
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
                match make(&authority) {
                    Ok(config) => {
                        sender.send_replace(Arc::new(config));
                        pause = LEAF_LIFE / 3 * 2;
                    }
                    Err(error) => {
                        tracing::error!(%error, "the provider's certificate could not be renewed; it is tried again daily");
                        pause = DAY;
                    }
                }
            }
        });
        Ok(receiver)
    }

    fn link_config(&self, names: &Names) -> Result<ServerConfig, AuthorityError> {
        let (chain, key) = self.issue_provider(names)?;
        let mut roots = RootCertStore::empty();
        roots.add(self.inner.certificate.clone()).map_err(tls)?;
        // Enrolment is open to clients without a certificate; every other call checks for one.
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), ring())
            .allow_unauthenticated()
            .build()
            .map_err(tls)?;
        let mut config = ServerConfig::builder_with_provider(ring())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(tls)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }

    fn kubelet_config(
        &self,
        names: &Names,
        client_ca: Option<RootCertStore>,
    ) -> Result<ServerConfig, AuthorityError> {
        let (chain, key) = self.issue_provider(names)?;
        crate::kubelet::server_config(chain, key, client_ca).map_err(tls)
    }

    fn issue_provider(
        &self,
        names: &Names,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), AuthorityError> {
        let id = SpiffeId::Provider(self.inner.domain.clone());
        let (mut params, _, _) = self.leaf(&id, "skerry-provider", ExtendedKeyUsagePurpose::ServerAuth)?;
        for name in &names.dns {
            params
                .subject_alt_names
                .push(SanType::DnsName(name.as_str().try_into()?));
        }
        params
            .subject_alt_names
            .extend(names.ips.iter().copied().map(SanType::IpAddress));
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.inner.issuer)?;
        // The CA travels along: a joining site knows only its pin.
        let chain = vec![certificate.der().clone(), self.inner.certificate.clone()];
        Ok((
            chain,
            PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der())),
        ))
    }

    fn leaf(
        &self,
        id: &SpiffeId,
        common_name: &str,
        usage: ExtendedKeyUsagePurpose,
    ) -> Result<(CertificateParams, String, Timestamp), AuthorityError> {
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished(common_name);
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + LEAF_LIFE).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        // A positive number of at most 20 bytes (RFC 5280 §4.1.2.2).
        let mut serial: [u8; 16] = rand::random();
        serial[0] &= 0x7f;
        params.serial_number = Some(SerialNumber::from(serial.to_vec()));
        let not_after = Timestamp::try_from(now + LEAF_LIFE).unwrap_or(Timestamp::MAX);
        Ok((params, hex(&serial), not_after))
    }
}

/// The Site's UID in a certificate's subject, and when the certificate expires.
/// Reads a certificate request and checks its signature.
pub(crate) fn read_request(csr_der: &[u8]) -> Result<CertificateSigningRequestParams, rcgen::Error> {
    CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(csr_der))
}

/// A request as an edge makes it; empty where no key can be made.
pub(crate) fn sample_request() -> Vec<u8> {
    let make = || {
        let key = rcgen::KeyPair::generate()?;
        let request = CertificateParams::default().serialize_request(&key)?;
        Ok::<_, rcgen::Error>(request.der().to_vec())
    };
    make().unwrap_or_default()
}

fn site_uid(leaf: &[u8]) -> Option<(Uid, Timestamp)> {
    let (_, certificate) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let oid = x509_parser::oid_registry::OID_X509_SERIALNUMBER;
    let uid = certificate
        .subject()
        .iter_by_oid(&oid)
        .next()?
        .as_str()
        .ok()?
        .to_owned();
    let not_after = Timestamp::from_second(certificate.validity().not_after.timestamp()).ok()?;
    Some((Uid::from(uid), not_after))
}

fn generate(domain: &TrustDomain) -> Result<Material, AuthorityError> {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = distinguished(&format!("Skerry site CA {domain}"));
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{domain}").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + CA_LIFE).into();
    let key = KeyPair::generate()?;
    let certificate = params.self_signed(&key)?;
    Ok(Material {
        certificate_pem: certificate.pem(),
        key_pem: key.serialize_pem(),
    })
}

fn new_secret(namespace: &str, domain: &TrustDomain, material: &Material) -> Secret {
    let data = [
        ("tls.crt", material.certificate_pem.as_str()),
        ("tls.key", material.key_pem.as_str()),
        ("trust-domain", domain.as_str()),
    ];
    Secret {
        metadata: kube::api::ObjectMeta {
            name: Some(CA_SECRET.to_owned()),
            namespace: Some(namespace.to_owned()),
            labels: Some(BTreeMap::from([(
                "app.kubernetes.io/part-of".to_owned(),
                "skerry".to_owned(),
            )])),
            ..Default::default()
        },
        type_: Some("edge.skerry.dev/ca".to_owned()),
        data: Some(
            data.map(|(key, text)| (key.to_owned(), ByteString(text.as_bytes().to_vec())))
                .into(),
        ),
        ..Default::default()
    }
}

fn distinguished(common_name: &str) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    name.push(DnType::OrganizationName, "skerry");
    name.push(DnType::CommonName, common_name);
    name
}

fn ring() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn tls(error: impl std::fmt::Display) -> AuthorityError {
    AuthorityError::Tls(error.to_string())
}

#[cfg(test)]
#[path = "authority_tls_tests.rs"]
mod tls_tests;

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> TrustDomain {
        "skerry.local".parse().unwrap()
    }

    fn uid() -> Uid {
        Uid::from("2a6e2a42-0b6c-4f3d-9d0e-6c1f2c3b4a5d".to_owned())
    }

    fn request() -> Vec<u8> {
        let key = KeyPair::generate().unwrap();
        // What a request asks for beyond its key is of no account.
        let mut params = CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        params.distinguished_name = distinguished("system:masters");
        params.serialize_request(&key).unwrap().der().to_vec()
    }

    #[test]
    fn a_certificate_names_the_site_and_nothing_that_the_request_asked_for() {
        let authority = Authority::ephemeral(&domain());
        let issued = authority
            .issue_site(&request(), &"harbour".parse().unwrap(), &uid())
            .unwrap();
        let id = SpiffeId::from_certificate_der(&issued.certificate).unwrap();
        assert_eq!(id.to_string(), "spiffe://skerry.local/site/harbour");
        let peer = authority
            .peer_site(std::slice::from_ref(&issued.certificate))
            .unwrap()
            .unwrap();
        assert_eq!((peer.site.as_str(), &peer.uid), ("harbour", &uid()));
        // A certificate knows whole seconds only.
        assert_eq!(peer.not_after.as_second(), issued.not_after.as_second());
        assert!(!issued.certificate.windows(12).any(|w| w == b"evil.example"));
        assert!(!issued.certificate.windows(14).any(|w| w == b"system:masters"));
    }

    #[test]
    fn a_request_that_is_damaged_is_refused() {
        let authority = Authority::ephemeral(&domain());
        let mut bytes = request();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        let issue = |csr: &[u8]| authority.issue_site(csr, &"harbour".parse().unwrap(), &uid());
        assert!(issue(&bytes).is_err());
        assert!(issue(b"").is_err());
    }

    #[test]
    fn a_peer_of_another_trust_domain_or_role_is_no_site() {
        let authority = Authority::ephemeral(&domain());
        let other = Authority::ephemeral(&"other.example".parse().unwrap());
        let foreign = other
            .issue_site(&request(), &"harbour".parse().unwrap(), &uid())
            .unwrap();
        assert!(authority.peer_site(&[foreign.certificate]).is_err());
        let (chain, _) = authority.issue_provider(&Names::default()).unwrap();
        assert!(authority.peer_site(&chain).is_err());
        assert_eq!(authority.peer_site(&[]).unwrap(), None);
    }

    #[test]
    fn a_certificate_without_a_site_uid_speaks_for_no_site() {
        let authority = Authority::ephemeral(&domain());
        let site: SiteName = "harbour".parse().unwrap();
        let id = SpiffeId::Site(domain(), site.clone());
        let (params, ..) = authority
            .leaf(&id, site.as_str(), ExtendedKeyUsagePurpose::ClientAuth)
            .unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority.inner.issuer).unwrap();
        let refused = authority.peer_site(&[certificate.der().clone()]);
        assert_eq!(refused, Err(InvalidPeer::NoUid(site)));
    }

    #[test]
    fn a_secret_of_another_trust_domain_or_whose_parts_do_not_fit_is_refused() {
        let secret = new_secret("ns", &domain(), &generate(&domain()).unwrap());
        assert!(Authority::from_secret(&secret, "ns", &domain()).is_ok());
        let other = Authority::from_secret(&secret, "ns", &"other.example".parse().unwrap());
        assert!(matches!(other, Err(AuthorityError::TrustDomain { .. })));
        let mut mixed = secret.clone();
        let other = new_secret("ns", &domain(), &generate(&domain()).unwrap());
        let key = other.data.unwrap()["tls.key"].clone();
        mixed.data.as_mut().unwrap().insert("tls.key".to_owned(), key);
        let error = Authority::from_secret(&mixed, "ns", &domain()).err().unwrap();
        assert!(
            error.to_string().contains("tls.key is not the key of tls.crt"),
            "{error}"
        );
        let mut broken = secret;
        broken.data.as_mut().unwrap().remove("tls.key");
        assert!(matches!(
            Authority::from_secret(&broken, "ns", &domain()),
            Err(AuthorityError::Damaged { .. })
        ));
    }
}
