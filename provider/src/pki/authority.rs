//! The CA and the TLS settings that follow from it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, PostParams};
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::{RootCertStore, ServerConfig};
use skerry_proto::limits::CERTIFICATE_BACKDATE;
use skerry_proto::object::Uid;
use skerry_proto::token::hex;
use skerry_proto::{InvalidSpiffeId, SiteName, SpiffeId, TrustDomain};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::clients::SiteVerifier;
use super::keys::Keys;
use crate::clock::{Clock, SystemClock};

/// The Secret that holds the CA.
pub const CA_SECRET: &str = "skerry-ca";

/// Life of a site's or the provider's certificate, unless [`Authority::with_life`] says otherwise.
pub const LEAF_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);
/// How often the age of the provider's own certificate is looked at: by the wall clock, since a long sleep would not
/// notice that the clock was set.
const LOOK: Duration = Duration::from_secs(600);
/// The attribute `serialNumber` of a subject (X.520): here the Site's UID.
const SERIAL_NUMBER: [u64; 4] = [2, 5, 4, 5];

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
    /// What leads from it to an older CA, while that is still trusted.
    pub intermediates: Vec<CertificateDer<'static>>,
    /// Which CA has signed it, as in a Site's status.
    pub issuer: String,
    /// From when on it is valid, whole seconds.
    pub not_before: Timestamp,
    /// When it expires, whole seconds.
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
    /// The certificate's serial number, hexadecimal.
    pub serial: String,
    /// From when on the certificate is valid.
    pub not_before: Timestamp,
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
    domain: TrustDomain,
    /// Replaced while a CA is rotated; who has made something of them watches.
    keys: Arc<watch::Sender<Arc<Keys>>>,
    clock: Arc<dyn Clock>,
    life: Duration,
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
                let fresh = Keys::generate(domain, SystemClock.now())?.to_secret(namespace);
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
        Ok(Self::of(Keys::from_secret(&secret, namespace, domain)?))
    }

    fn of(keys: Keys) -> Self {
        Self {
            domain: keys.domain.clone(),
            keys: Arc::new(watch::Sender::new(Arc::new(keys))),
            clock: Arc::new(SystemClock),
            life: LEAF_LIFE,
        }
    }

    /// A CA that lives in memory only, for tests.
    #[cfg(test)]
    pub(crate) fn ephemeral(domain: &TrustDomain) -> Self {
        Self::of(Keys::generate(domain, Timestamp::now()).unwrap())
    }

    /// Takes other keys; everything that was made with the former ones is made anew.
    pub(super) fn reload(&self, keys: Keys) {
        self.keys.send_replace(Arc::new(keys));
    }

    /// The present keys.
    pub(super) fn keys(&self) -> Arc<Keys> {
        Arc::clone(&self.keys.borrow())
    }

    /// The same CA, which tells the time by that clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// The same CA, whose certificates for sites and for the provider live that long.
    #[must_use]
    pub fn with_life(mut self, life: Duration) -> Self {
        self.life = life;
        self
    }

    /// The trust domain of every certificate.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// The CAs' certificates: whom sites must trust.
    pub fn roots(&self) -> Vec<CertificateDer<'static>> {
        self.keys().roots().cloned().collect()
    }

    /// When the CA's own certificate expires.
    pub fn not_after(&self) -> Timestamp {
        self.keys().current.not_after()
    }

    /// SHA-256 of the public key of the CA that has signed the provider's certificate, for join tokens.
    pub fn pin(&self) -> String {
        self.keys().serving().pin.clone()
    }

    /// SHA-256 of the public key of a request whose signature is good.
    pub fn request_key(csr_der: &[u8]) -> Result<String, AuthorityError> {
        let request = read_request(csr_der)?;
        let info = rcgen::PublicKeyData::subject_public_key_info(&request.public_key);
        Ok(hex(&sha2::Digest::finalize(
            <sha2::Sha256 as sha2::Digest>::new_with_prefix(info),
        )))
    }

    /// Issues a certificate for a site. Takes the public key from the request, whose signature is checked, and nothing
    /// else.
    pub fn issue_site(&self, csr_der: &[u8], site: &SiteName, uid: &Uid) -> Result<Issued, AuthorityError> {
        let request = read_request(csr_der)?;
        let id = SpiffeId::Site(self.domain.clone(), site.clone());
        let Leaf {
            mut params,
            serial,
            not_before,
            not_after,
        } = self.leaf(&id, site.as_str(), ExtendedKeyUsagePurpose::ClientAuth)?;
        // In the subject, because a SPIFFE certificate must not carry a second URI.
        params
            .distinguished_name
            .push(DnType::CustomDnType(SERIAL_NUMBER.to_vec()), uid.as_str());
        let keys = self.keys();
        let certificate = params.signed_by(&request.public_key, &keys.current.issuer)?;
        Ok(Issued {
            certificate: certificate.der().clone(),
            intermediates: keys.old.iter().map(|old| old.cross.clone()).collect(),
            issuer: keys.current.id().to_owned(),
            not_before,
            not_after,
            serial,
        })
    }

    /// The site that a client certificate names whose chain was verified; `None` when the client showed none. Whether
    /// the certificate is in time is for [`standing`](super::standing) to say.
    pub fn peer_site(&self, chain: &[CertificateDer<'_>]) -> Result<Option<SitePeer>, InvalidPeer> {
        let Some(leaf) = chain.first() else {
            return Ok(None);
        };
        match SpiffeId::from_certificate_der(leaf)? {
            SpiffeId::Site(domain, site) if domain == self.domain => {
                let peer = site_peer(leaf, &site).ok_or_else(|| InvalidPeer::NoUid(site.clone()))?;
                Ok(Some(peer))
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
            let mut made = authority.clock.now();
            let mut look = tokio::time::interval(LOOK);
            let mut keys = authority.keys.subscribe();
            look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                let other_keys = tokio::select! {
                    () = stop.cancelled() => return,
                    _ = look.tick() => false,
                    // The sender lives as long as `authority`.
                    _ = keys.changed() => true,
                };
                let now = authority.clock.now();
                // A clock that was set back would leave a certificate that is not valid yet.
                let due = now < made || now.duration_since(made).unsigned_abs() >= authority.life / 3 * 2;
                if !due && !other_keys {
                    continue;
                }
                match make(&authority) {
                    Ok(config) => {
                        sender.send_replace(Arc::new(config));
                        made = now;
                    }
                    Err(error) => {
                        tracing::error!(%error, "the provider's certificate could not be renewed; it is tried again");
                    }
                }
            }
        });
        Ok(receiver)
    }

    fn link_config(&self, names: &Names) -> Result<ServerConfig, AuthorityError> {
        let (chain, key) = self.issue_provider(names)?;
        let verifier = SiteVerifier::new(self.keys().roots(), ring()).map_err(tls)?;
        let mut config = ServerConfig::builder_with_provider(ring())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(tls)?
            .with_client_cert_verifier(Arc::new(verifier))
            .with_single_cert(chain, key)
            .map_err(tls)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would bring a certificate that nobody has verified again.
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
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
        let id = SpiffeId::Provider(self.domain.clone());
        let Leaf { mut params, .. } =
            self.leaf(&id, "skerry-provider", ExtendedKeyUsagePurpose::ServerAuth)?;
        for name in &names.dns {
            params
                .subject_alt_names
                .push(SanType::DnsName(name.as_str().try_into()?));
        }
        params
            .subject_alt_names
            .extend(names.ips.iter().copied().map(SanType::IpAddress));
        let key = KeyPair::generate()?;
        let keys = self.keys();
        let ca = keys.serving();
        let certificate = params.signed_by(&key, &ca.issuer)?;
        // The CA travels along: a joining site knows only its pin.
        let chain = vec![certificate.der().clone(), ca.certificate.clone()];
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
    ) -> Result<Leaf, AuthorityError> {
        let now = self.clock.now();
        let (not_before, not_after) = (
            whole_seconds(now, -seconds(CERTIFICATE_BACKDATE)),
            whole_seconds(now, seconds(self.life)),
        );
        let mut params = CertificateParams::default();
        params.distinguished_name = distinguished(common_name);
        params.subject_alt_names = vec![SanType::URI(id.to_string().try_into()?)];
        params.not_before = SystemTime::from(not_before).into();
        params.not_after = SystemTime::from(not_after).into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        // A positive number of at most 20 bytes (RFC 5280 §4.1.2.2), whose digits are the same whoever reads them: DER
        // leaves out a zero in front.
        let mut serial: [u8; 16] = rand::random();
        serial[0] = serial[0] & 0x7f | 0x40;
        params.serial_number = Some(SerialNumber::from(serial.to_vec()));
        Ok(Leaf {
            params,
            serial: hex(&serial),
            not_before,
            not_after,
        })
    }
}

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

/// A certificate that is still to be signed.
struct Leaf {
    params: CertificateParams,
    serial: String,
    not_before: Timestamp,
    not_after: Timestamp,
}

/// What a site's certificate says, the Site's UID in its subject included.
fn site_peer(leaf: &[u8], site: &SiteName) -> Option<SitePeer> {
    let (_, certificate) = x509_parser::parse_x509_certificate(leaf).ok()?;
    let oid = x509_parser::oid_registry::OID_X509_SERIALNUMBER;
    let uid = certificate
        .subject()
        .iter_by_oid(&oid)
        .next()?
        .as_str()
        .ok()?
        .to_owned();
    let time = |t: x509_parser::time::ASN1Time| Timestamp::from_second(t.timestamp()).ok();
    Some(SitePeer {
        site: site.clone(),
        uid: Uid::from(uid),
        serial: hex(certificate.raw_serial()),
        not_before: time(certificate.validity().not_before)?,
        not_after: time(certificate.validity().not_after)?,
    })
}

fn seconds(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

/// A certificate knows whole seconds only.
fn whole_seconds(now: Timestamp, later: SignedDuration) -> Timestamp {
    let at = now.saturating_add(later).unwrap_or(Timestamp::MAX);
    Timestamp::from_second(at.as_second()).unwrap_or(at)
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
        assert_eq!(
            (&peer.serial, peer.not_before, peer.not_after),
            (&issued.serial, issued.not_before, issued.not_after)
        );
        assert!(!issued.certificate.windows(12).any(|w| w == b"evil.example"));
        assert!(!issued.certificate.windows(14).any(|w| w == b"system:masters"));
    }

    #[test]
    fn the_serial_number_on_record_is_the_one_in_the_certificate() {
        let authority = Authority::ephemeral(&domain());
        for _ in 0..600 {
            let issued = authority
                .issue_site(&request(), &"harbour".parse().unwrap(), &uid())
                .unwrap();
            let peer = authority.peer_site(&[issued.certificate]).unwrap().unwrap();
            assert_eq!(peer.serial, issued.serial);
        }
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
        let Leaf { params, .. } = authority
            .leaf(&id, site.as_str(), ExtendedKeyUsagePurpose::ClientAuth)
            .unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority.keys().current.issuer).unwrap();
        let refused = authority.peer_site(&[certificate.der().clone()]);
        assert_eq!(refused, Err(InvalidPeer::NoUid(site)));
    }

    #[test]
    fn a_secret_of_another_trust_domain_or_whose_parts_do_not_fit_is_refused() {
        let fresh = || {
            Keys::generate(&domain(), Timestamp::now())
                .unwrap()
                .to_secret("ns")
        };
        let secret = fresh();
        assert!(Keys::from_secret(&secret, "ns", &domain()).is_ok());
        let other = Keys::from_secret(&secret, "ns", &"other.example".parse().unwrap());
        assert!(matches!(other, Err(AuthorityError::TrustDomain { .. })));
        let mut mixed = secret.clone();
        let key = fresh().data.unwrap()["tls.key"].clone();
        mixed.data.as_mut().unwrap().insert("tls.key".to_owned(), key);
        let error = Keys::from_secret(&mixed, "ns", &domain()).err().unwrap();
        assert!(
            error.to_string().contains("tls.key is not the key of tls.crt"),
            "{error}"
        );
        let mut broken = secret;
        broken.data.as_mut().unwrap().remove("tls.key");
        assert!(matches!(
            Keys::from_secret(&broken, "ns", &domain()),
            Err(AuthorityError::Damaged { .. })
        ));
    }
}
