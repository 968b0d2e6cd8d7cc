//! TLS settings: TLS 1.3, mutual, the provider recognised by its SPIFFE ID.

use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use sha2::{Digest, Sha256};
use skerry_proto::token::{hex, public_key_pin};
use skerry_proto::{SpiffeId, TrustDomain};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{Identity, TrustedTime};

/// Whether the provider's certificate must be in its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Timeliness {
    /// Yes.
    Required,
    /// No: the connection is for a renewal only, whose answer proves by itself that it is fresh.
    Proven,
}

/// How the provider's chain is anchored.
#[derive(Debug)]
enum Trust {
    /// Roots that were handed over at joining, and the trust domain.
    Roots(Vec<TrustAnchor<'static>>, TrustDomain),
    /// The pin of a join token: the chain must contain a CA with this public key.
    Pin(String),
}

/// Accepts the provider, whatever its address.
#[derive(Debug)]
struct ProviderVerifier {
    trust: Trust,
    provider: Arc<CryptoProvider>,
    timeliness: Timeliness,
    /// Told when a certificate is out of its time; absent while joining.
    time: Option<Arc<TrustedTime>>,
}

/// Settings of a site that has joined.
pub(super) fn joined(
    identity: &Identity,
    time: &Arc<TrustedTime>,
    timeliness: Timeliness,
) -> Result<ClientConfig, Error> {
    let trust = Trust::Roots(anchors(&identity.roots)?, identity.trust_domain.clone());
    let mut config = builder(trust, timeliness, Some(Arc::clone(time)))?
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Settings of a site that joins: it shows no certificate, and knows the CA by its pin.
pub(super) fn joining(pin: &str) -> Result<ClientConfig, Error> {
    // A person is there who can set the clock, and the token must not be shown to who only has an old certificate.
    let trust = Trust::Pin(pin.to_owned());
    let mut config = builder(trust, Timeliness::Required, None)?.with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Checks that a chain was issued for that public key, just now or ever, by a CA that is trusted already.
pub(super) fn issued_for(
    chain: &[CertificateDer<'_>],
    public_key_info: &[u8],
    roots: &[CertificateDer<'static>],
) -> Result<(), String> {
    let (leaf, intermediates) = chain.split_first().ok_or("it holds no certificate")?;
    if public_key_pin(leaf) != Some(hex(&Sha256::digest(public_key_info))) {
        return Err("its certificate is for another key than the one that was sent".to_owned());
    }
    let anchors = anchors(roots).map_err(|e| e.to_string())?;
    let provider = rustls::crypto::ring::default_provider();
    let at = last_moment(leaf).ok_or("its certificate cannot be read")?;
    webpki::EndEntityCert::try_from(leaf)
        .and_then(|cert| {
            let algorithms = provider.signature_verification_algorithms.all;
            let usage = webpki::KeyUsage::client_auth();
            cert.verify_for_usage(algorithms, &anchors, intermediates, at, usage, None, None)
                .map(drop)
        })
        .map_err(|e| format!("its certificate is not signed by a CA that this site trusts: {e:?}"))
}

/// Roots whose key a verified chain has passed through: an intermediate certificate was signed for it.
pub(super) fn vouched(
    chain: &[CertificateDer<'_>],
    roots: &[CertificateDer<'static>],
) -> Vec<CertificateDer<'static>> {
    // One that the chain did not need is not verified: so the leaf must be signed by it, too.
    let pins: Vec<String> = chain
        .iter()
        .skip(1)
        .filter_map(|der| public_key_pin(der))
        .collect();
    let leaf = chain.get(..1).unwrap_or_default();
    let vouches = |root: &&CertificateDer<'static>| {
        public_key_pin(root).is_some_and(|pin| pins.contains(&pin))
            && leaf.first().is_some_and(|leaf| signed_by(leaf, root))
    };
    roots.iter().filter(vouches).cloned().collect()
}

fn signed_by(leaf: &CertificateDer<'_>, root: &CertificateDer<'static>) -> bool {
    let (Ok(anchors), Some(at)) = (anchors(std::slice::from_ref(root)), last_moment(leaf)) else {
        return false;
    };
    let provider = rustls::crypto::ring::default_provider();
    let algorithms = provider.signature_verification_algorithms.all;
    webpki::EndEntityCert::try_from(leaf).is_ok_and(|cert| {
        let usage = webpki::KeyUsage::client_auth();
        cert.verify_for_usage(algorithms, &anchors, &[], at, usage, None, None)
            .is_ok()
    })
}

fn anchors(roots: &[CertificateDer<'static>]) -> Result<Vec<TrustAnchor<'static>>, Error> {
    let anchors = roots
        .iter()
        .map(|root| webpki::anchor_from_trusted_cert(root).map(|a| a.to_owned()));
    anchors
        .collect::<Result<_, _>>()
        .map_err(|e| Error::General(format!("a root certificate cannot be used: {e}")))
}

/// The last second of a certificate's validity.
fn last_moment(certificate: &[u8]) -> Option<UnixTime> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    Some(UnixTime::since_unix_epoch(Duration::from_secs(seconds)))
}

fn builder(
    trust: Trust,
    timeliness: Timeliness,
    time: Option<Arc<TrustedTime>>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(ProviderVerifier {
        trust,
        provider: Arc::clone(&provider),
        timeliness,
        time: time.clone(),
    });
    let clock: Arc<dyn TimeProvider> = match time {
        Some(time) => time,
        None => Arc::new(DefaultTimeProvider),
    };
    Ok(ClientConfig::builder_with_details(provider, clock)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier))
}

impl ProviderVerifier {
    fn chain(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        let pinned;
        let anchors = match &self.trust {
            Trust::Roots(anchors, _) => anchors.as_slice(),
            Trust::Pin(pin) => {
                let ca = intermediates.iter().find(|c| public_key_pin(c).as_ref() == Some(pin)).ok_or_else(|| {
                    refused("its CA is not the one that the join token was made for; is this the right provider?")
                })?;
                pinned = [webpki::anchor_from_trusted_cert(ca)
                    .map_err(webpki_error)?
                    .to_owned()];
                &pinned
            }
        };
        let ever = last_moment(leaf).ok_or_else(|| refused("it cannot be read"))?;
        let at = match self.timeliness {
            Timeliness::Required => now,
            Timeliness::Proven => ever,
        };
        let checked = self.signed(leaf, intermediates, anchors, at);
        let untimely = matches!(
            checked,
            Err(webpki::Error::CertExpired { .. } | webpki::Error::CertNotValidYet { .. })
        );
        // A certificate that was never good says nothing about the clock.
        if let Some(time) = self.time.as_ref().filter(|_| untimely)
            && self.signed(leaf, intermediates, anchors, ever).is_ok()
        {
            time.contradict();
        }
        checked.map_err(webpki_error)
    }

    fn signed(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        anchors: &[TrustAnchor<'_>],
        at: UnixTime,
    ) -> Result<(), webpki::Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let usage = webpki::KeyUsage::server_auth();
        webpki::EndEntityCert::try_from(leaf)?
            .verify_for_usage(algorithms, anchors, intermediates, at, usage, None, None)
            .map(drop)
    }

    fn identity(&self, leaf: &CertificateDer<'_>) -> Result<(), Error> {
        match (SpiffeId::from_certificate_der(leaf), &self.trust) {
            (Ok(SpiffeId::Provider(found)), Trust::Roots(_, wanted)) if found == *wanted => Ok(()),
            (Ok(SpiffeId::Provider(_)), Trust::Pin(_)) => Ok(()),
            (Ok(other), _) => Err(refused(&format!(
                "it is {other}, not the provider of this site's trust domain"
            ))),
            (Err(error), _) => Err(refused(&error.to_string())),
        }
    }
}

impl ServerCertVerifier for ProviderVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.identity(end_entity)?;
        self.chain(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken on the link".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

fn refused(reason: &str) -> Error {
    Error::General(format!("the provider's certificate is refused: {reason}"))
}

fn webpki_error(error: webpki::Error) -> Error {
    match error {
        webpki::Error::CertExpired { .. } | webpki::Error::CertNotValidYet { .. } => {
            refused(&format!("{error:?}: is this machine's clock right?"))
        }
        webpki::Error::UnknownIssuer => Error::InvalidCertificate(CertificateError::UnknownIssuer),
        other => refused(&format!("{other:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{
        BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
    };

    struct Ca {
        issuer: Issuer<'static, KeyPair>,
        der: CertificateDer<'static>,
    }

    fn ca() -> Ca {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let der = params.self_signed(&key).unwrap().der().clone();
        Ca {
            issuer: Issuer::new(params, key),
            der,
        }
    }

    fn leaf(ca: &Ca, uri: &str, usage: ExtendedKeyUsagePurpose) -> CertificateDer<'static> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.extended_key_usages = vec![usage];
        params.signed_by(&key, &ca.issuer).unwrap().der().clone()
    }

    fn verify(trust: Trust, leaf: &CertificateDer<'_>, ca: &Ca) -> Result<(), Error> {
        let verifier = ProviderVerifier {
            trust,
            provider: Arc::new(rustls::crypto::ring::default_provider()),
            timeliness: Timeliness::Required,
            time: None,
        };
        let name = ServerName::try_from("anything.example").unwrap();
        verifier
            .verify_server_cert(leaf, std::slice::from_ref(&ca.der), &name, &[], UnixTime::now())
            .map(|_| ())
    }

    fn roots(ca: &Ca) -> Trust {
        let anchor = webpki::anchor_from_trusted_cert(&ca.der).unwrap().to_owned();
        Trust::Roots(vec![anchor], "skerry.local".parse().unwrap())
    }

    #[test]
    fn the_provider_of_the_right_ca_and_trust_domain_is_accepted_whatever_its_name() {
        let ca = ca();
        let provider = leaf(
            &ca,
            "spiffe://skerry.local/provider",
            ExtendedKeyUsagePurpose::ServerAuth,
        );
        verify(roots(&ca), &provider, &ca).unwrap();
        verify(Trust::Pin(public_key_pin(&ca.der).unwrap()), &provider, &ca).unwrap();
    }

    #[test]
    fn another_ca_trust_domain_role_or_usage_is_refused() {
        let (own, other) = (ca(), ca());
        let server = ExtendedKeyUsagePurpose::ServerAuth;
        let provider = "spiffe://skerry.local/provider";
        assert!(verify(roots(&own), &leaf(&other, provider, server.clone()), &other).is_err());
        let pin = Trust::Pin(public_key_pin(&own.der).unwrap());
        assert!(verify(pin, &leaf(&other, provider, server.clone()), &other).is_err());
        for uri in [
            "spiffe://other.example/provider",
            "spiffe://skerry.local/site/harbour",
        ] {
            assert!(
                verify(roots(&own), &leaf(&own, uri, server.clone()), &own).is_err(),
                "{uri}"
            );
        }
        let client = leaf(&own, provider, ExtendedKeyUsagePurpose::ClientAuth);
        assert!(verify(roots(&own), &client, &own).is_err());
    }

    fn stamp(text: &str) -> jiff::Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_certificate_out_of_its_time_raises_doubt_only_if_it_was_ever_good_and_passes_only_for_the_proof() {
        let (own, other) = (ca(), ca());
        let old = |by: &Ca| {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            let id = "spiffe://skerry.local/provider";
            params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            params.not_before = rcgen::date_time_ymd(2025, 1, 1);
            params.not_after = rcgen::date_time_ymd(2025, 4, 1);
            params.signed_by(&key, &by.issuer).unwrap().der().clone()
        };
        let clock = super::super::testing::Hand::at("2026-01-01T00:00:00Z");
        let time = Arc::new(TrustedTime::new(
            clock,
            stamp("2025-02-01T00:00:00Z"),
            None,
            |_| {},
        ));
        let verify = |leaf: &CertificateDer<'_>, by: &Ca, timeliness| {
            let verifier = ProviderVerifier {
                trust: roots(&own),
                provider: Arc::new(rustls::crypto::ring::default_provider()),
                timeliness,
                time: Some(Arc::clone(&time)),
            };
            let name = ServerName::try_from("anything.example").unwrap();
            let now = time.current_time().unwrap();
            verifier
                .verify_server_cert(leaf, std::slice::from_ref(&by.der), &name, &[], now)
                .map(drop)
        };
        assert!(verify(&old(&other), &other, Timeliness::Required).is_err());
        assert!(verify(&old(&other), &other, Timeliness::Proven).is_err());
        assert_eq!(time.doubt(), None);
        assert!(verify(&old(&own), &own, Timeliness::Required).is_err());
        assert!(time.doubt().is_some());
        assert!(verify(&old(&own), &own, Timeliness::Proven).is_ok());
    }
}
