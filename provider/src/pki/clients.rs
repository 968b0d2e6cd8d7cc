//! Which client certificates the link's listener takes.

use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, TrustAnchor, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};

/// Verifies that a client holds the key of a certificate that this CA has signed for a client, whatever the time.
///
/// Whether the certificate is in time is judged by [`standing`](super::standing) with each call, where a refusal can say
/// why: a site whose certificate has expired while it was away must reach the renewal. A client without a certificate
/// passes, and reaches only the enrolment.
#[derive(Debug)]
pub(super) struct SiteVerifier {
    anchors: Vec<TrustAnchor<'static>>,
    provider: Arc<CryptoProvider>,
}

impl SiteVerifier {
    pub(super) fn new<'a>(
        roots: impl IntoIterator<Item = &'a CertificateDer<'static>>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, webpki::Error> {
        let anchors = roots
            .into_iter()
            .map(|root| Ok(webpki::anchor_from_trusted_cert(root)?.to_owned()))
            .collect::<Result<_, webpki::Error>>()?;
        Ok(Self { anchors, provider })
    }
}

impl ClientCertVerifier for SiteVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A site has one certificate: there is nothing to choose.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let last = last_moment(end_entity).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        webpki::EndEntityCert::try_from(end_entity)
            .and_then(|certificate| {
                certificate
                    .verify_for_usage(
                        self.provider.signature_verification_algorithms.all,
                        &self.anchors,
                        intermediates,
                        last,
                        webpki::KeyUsage::client_auth(),
                        None,
                        None,
                    )
                    .map(drop)
            })
            .map_err(refused)?;
        Ok(ClientCertVerified::assertion())
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

/// The last second of a certificate's validity.
fn last_moment(certificate: &[u8]) -> Option<UnixTime> {
    let (_, certificate) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).ok()?;
    Some(UnixTime::since_unix_epoch(std::time::Duration::from_secs(
        seconds,
    )))
}

/// The alert that the client gets should tell a foreign CA from a certificate that is wrong in itself.
fn refused(error: webpki::Error) -> Error {
    Error::InvalidCertificate(match error {
        webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
        webpki::Error::BadDer | webpki::Error::BadDerTime => CertificateError::BadEncoding,
        other => CertificateError::Other(OtherError(Arc::new(other))),
    })
}
