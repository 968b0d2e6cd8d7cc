//! TLS settings: TLS 1.3, mutual, the provider recognised by its SPIFFE ID.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use skerry_proto::token::public_key_pin;
use skerry_proto::{SpiffeId, TrustDomain};

use super::Identity;

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
}

/// Settings of a site that has joined.
pub(super) fn joined(identity: &Identity) -> Result<ClientConfig, Error> {
    let anchors: Result<Vec<_>, _> = identity
        .roots
        .iter()
        .map(|root| webpki::anchor_from_trusted_cert(root).map(|a| a.to_owned()))
        .collect();
    let anchors = anchors.map_err(|e| Error::General(format!("a root certificate cannot be used: {e}")))?;
    let mut config = builder(Trust::Roots(anchors, identity.trust_domain.clone()))?
        .with_client_auth_cert(identity.chain.clone(), identity.key.clone_key())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

/// Settings of a site that joins: it shows no certificate, and knows the CA by its pin.
pub(super) fn joining(pin: &str) -> Result<ClientConfig, Error> {
    let mut config = builder(Trust::Pin(pin.to_owned()))?.with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn builder(
    trust: Trust,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(ProviderVerifier {
        trust,
        provider: Arc::clone(&provider),
    });
    Ok(ClientConfig::builder_with_provider(provider)
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
        webpki::EndEntityCert::try_from(leaf)
            .and_then(|cert| {
                cert.verify_for_usage(
                    self.provider.signature_verification_algorithms.all,
                    anchors,
                    intermediates,
                    now,
                    webpki::KeyUsage::server_auth(),
                    None,
                    None,
                )
                .map(|_| ())
            })
            .map_err(webpki_error)
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
        self.chain(end_entity, intermediates, now)?;
        self.identity(end_entity)?;
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
}
