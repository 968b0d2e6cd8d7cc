//! The CA's keys: the one that signs, and during a rotation the one before it.
//!
//! During a rotation both are trusted. Sites get certificates of the new CA, together with a *cross certificate*: the new
//! CA's key, signed by the old one, so that who trusts only the old CA can check them. The provider itself shows a
//! certificate of the old CA until that is withdrawn, since every site trusts that one.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData, SanType,
};
use rustls::pki_types::CertificateDer;
use sha2::{Digest, Sha256};
use skerry_proto::TrustDomain;
use skerry_proto::limits::CERTIFICATE_BACKDATE;
use skerry_proto::token::{hex, public_key_pin};

use super::authority::{AuthorityError, CA_SECRET};

const CA_LIFE: Duration = Duration::from_secs(3650 * 24 * 3600);

/// One CA.
pub(super) struct Ca {
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) certificate: CertificateDer<'static>,
    /// SHA-256 of its public key.
    pub(super) pin: String,
    certificate_pem: String,
    key_pem: String,
}

/// What is kept of the CA before the present one.
pub(super) struct Old {
    pub(super) ca: Ca,
    /// The present CA's key, signed by this one.
    pub(super) cross: CertificateDer<'static>,
    cross_pem: String,
}

/// All keys of a trust domain.
pub(super) struct Keys {
    pub(super) domain: TrustDomain,
    pub(super) current: Ca,
    pub(super) old: Option<Old>,
}

impl Ca {
    fn from_pem(certificate_pem: String, key_pem: String) -> Result<Self, AuthorityError> {
        let key = KeyPair::from_pem(&key_pem)?;
        let certificate = certificate_of(&certificate_pem)?;
        let pin = public_key_pin(&certificate)
            .ok_or_else(|| AuthorityError::Tls("the CA's certificate cannot be read".to_owned()))?;
        // rcgen does not compare them, and whatever such a pair signs is trusted by nobody.
        if hex(&Sha256::digest(key.subject_public_key_info())) != pin {
            return Err(AuthorityError::Tls(
                "tls.key is not the key of tls.crt".to_owned(),
            ));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
        Ok(Self {
            issuer,
            certificate,
            pin,
            certificate_pem,
            key_pem,
        })
    }

    fn generate(domain: &TrustDomain, now: Timestamp) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate()?;
        let certificate = params(domain, &key, now)?.self_signed(&key)?;
        Self::from_pem(certificate.pem(), key.serialize_pem())
    }

    /// Names the CA in records and for people.
    pub(super) fn id(&self) -> &str {
        &self.pin[..16]
    }

    /// When its certificate expires.
    pub(super) fn not_after(&self) -> Timestamp {
        let seconds = x509_parser::parse_x509_certificate(&self.certificate)
            .map_or(0, |(_, certificate)| certificate.validity().not_after.timestamp());
        Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH)
    }
}

impl Keys {
    /// A first CA.
    pub(super) fn generate(domain: &TrustDomain, now: Timestamp) -> Result<Self, AuthorityError> {
        Ok(Self {
            domain: domain.clone(),
            current: Ca::generate(domain, now)?,
            old: None,
        })
    }

    /// The present CA becomes the old one of a new CA. Only without an old one.
    pub(super) fn rotate(self, now: Timestamp) -> Result<Self, AuthorityError> {
        let next = Ca::generate(&self.domain, now)?;
        let key = KeyPair::from_pem(&next.key_pem)?;
        let cross = params(&self.domain, &key, now)?.signed_by(&key, &self.current.issuer)?;
        let old = Old {
            ca: self.current,
            cross: cross.der().clone(),
            cross_pem: cross.pem(),
        };
        Ok(Self {
            domain: self.domain,
            current: next,
            old: Some(old),
        })
    }

    /// The old CA is withdrawn.
    pub(super) fn retire(self) -> Self {
        Self { old: None, ..self }
    }

    /// Whose certificates are accepted.
    pub(super) fn roots(&self) -> impl Iterator<Item = &CertificateDer<'static>> {
        std::iter::once(&self.current.certificate).chain(self.old.iter().map(|old| &old.ca.certificate))
    }

    /// Who signs the provider's own certificate: the one that every site trusts.
    pub(super) fn serving(&self) -> &Ca {
        self.old.as_ref().map_or(&self.current, |old| &old.ca)
    }

    /// Reads them from their Secret.
    pub(super) fn from_secret(
        secret: &Secret,
        namespace: &str,
        domain: &TrustDomain,
    ) -> Result<Self, AuthorityError> {
        let damaged = |reason: String| AuthorityError::Damaged {
            namespace: namespace.to_owned(),
            reason,
        };
        let has = |key: &str| secret.data.as_ref().is_some_and(|data| data.contains_key(key));
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
        let ca = |certificate: &str, key: &str| {
            Ca::from_pem(text(certificate)?, text(key)?).map_err(|e| damaged(e.to_string()))
        };
        let old = if has("old.crt") {
            let cross_pem = text("cross.crt")?;
            Some(Old {
                ca: ca("old.crt", "old.key")?,
                cross: certificate_of(&cross_pem).map_err(|e| damaged(e.to_string()))?,
                cross_pem,
            })
        } else {
            None
        };
        Ok(Self {
            domain: domain.clone(),
            current: ca("tls.crt", "tls.key")?,
            old,
        })
    }

    /// The data of their Secret.
    pub(super) fn to_data(&self) -> BTreeMap<String, ByteString> {
        let mut all = vec![
            ("tls.crt", &self.current.certificate_pem),
            ("tls.key", &self.current.key_pem),
        ];
        if let Some(old) = &self.old {
            all.extend([
                ("old.crt", &old.ca.certificate_pem),
                ("old.key", &old.ca.key_pem),
                ("cross.crt", &old.cross_pem),
            ]);
        }
        let domain = self.domain.to_string();
        all.push(("trust-domain", &domain));
        let bytes = |(key, text): (&str, &String)| (key.to_owned(), ByteString(text.as_bytes().to_vec()));
        all.into_iter().map(bytes).collect()
    }

    /// A new Secret for them.
    pub(super) fn to_secret(&self, namespace: &str) -> Secret {
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
            data: Some(self.to_data()),
            ..Default::default()
        }
    }
}

/// What stands in a CA's certificate.
fn params(domain: &TrustDomain, key: &KeyPair, now: Timestamp) -> Result<CertificateParams, AuthorityError> {
    let now = SystemTime::from(now);
    let pin = hex(&Sha256::digest(key.subject_public_key_info()));
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "skerry");
    params.distinguished_name.push(
        DnType::CommonName,
        format!("Skerry site CA {domain} {}", &pin[..8]),
    );
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{domain}").try_into()?)];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.not_before = (now - CERTIFICATE_BACKDATE).into();
    params.not_after = (now + CA_LIFE).into();
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn certificate_of(pem: &str) -> Result<CertificateDer<'static>, AuthorityError> {
    rustls_pemfile::certs(&mut pem.as_bytes())
        .next()
        .and_then(Result::ok)
        .ok_or_else(|| AuthorityError::Tls("there is no certificate in it".to_owned()))
}
