use std::fmt;
use std::str::FromStr;

use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::SiteName;

/// The trust domain of a Skerry installation: the authority part of every SPIFFE ID in it.
///
/// Lower-case letters, digits, `.`, `-` and `_`, at most 255 bytes (SPIFFE-ID §2.1).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TrustDomain(String);

/// Who a certificate speaks for.
///
/// Source: the SPIFFE-ID and X509-SVID standards. An X509-SVID carries exactly one URI SAN.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SpiffeId {
    /// `spiffe://<trust-domain>/site/<name>`: an edge site.
    Site(TrustDomain, SiteName),
    /// `spiffe://<trust-domain>/provider`: the provider.
    Provider(TrustDomain),
}

/// Why a text or a certificate names no identity that Skerry knows.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidSpiffeId {
    /// The text is not one of the forms that [`SpiffeId`] lists.
    #[error(
        "{0:?} is not a Skerry SPIFFE ID (spiffe://<trust-domain>/site/<name> or spiffe://<trust-domain>/provider)"
    )]
    Form(String),
    /// The trust domain holds a character that SPIFFE does not allow, or is too long.
    #[error("{0:?} is not a trust domain: use 1 to 255 of a-z, 0-9, '.', '-', '_'")]
    TrustDomain(String),
    /// The certificate could not be parsed.
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    /// The certificate has no URI SAN, or more than one.
    #[error("the certificate carries {0} URI names, a SPIFFE certificate carries exactly one")]
    UriNames(usize),
}

impl TrustDomain {
    /// The trust domain as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TrustDomain {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, InvalidSpiffeId> {
        let allowed = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, b'.' | b'-' | b'_');
        if (1..=255).contains(&text.len()) && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidSpiffeId::TrustDomain(text.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl SpiffeId {
    /// The identity that a certificate (DER) carries in its single URI SAN.
    ///
    /// Does not verify the certificate: call it on one whose chain has been checked.
    pub fn from_certificate_der(der: &[u8]) -> Result<Self, InvalidSpiffeId> {
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|e| InvalidSpiffeId::Certificate(e.to_string()))?;
        let uris: Vec<&str> = certificate
            .extensions()
            .iter()
            .filter_map(|extension| match extension.parsed_extension() {
                ParsedExtension::SubjectAlternativeName(san) => Some(&san.general_names),
                _ => None,
            })
            .flatten()
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .collect();
        match uris.as_slice() {
            [uri] => uri.parse(),
            more => Err(InvalidSpiffeId::UriNames(more.len())),
        }
    }

    /// The trust domain of this identity.
    pub fn trust_domain(&self) -> &TrustDomain {
        match self {
            Self::Site(domain, _) | Self::Provider(domain) => domain,
        }
    }
}

impl FromStr for SpiffeId {
    type Err = InvalidSpiffeId;

    fn from_str(text: &str) -> Result<Self, InvalidSpiffeId> {
        let form = || InvalidSpiffeId::Form(text.chars().take(200).collect());
        let rest = text.strip_prefix("spiffe://").ok_or_else(form)?;
        let (domain, path) = rest.split_once('/').ok_or_else(form)?;
        let domain: TrustDomain = domain.parse()?;
        match path.split_once('/') {
            Some(("site", name)) => Ok(Self::Site(domain, name.parse().map_err(|_| form())?)),
            None if path == "provider" => Ok(Self::Provider(domain)),
            _ => Err(form()),
        }
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Site(domain, name) => write!(f, "spiffe://{domain}/site/{name}"),
            Self::Provider(domain) => write!(f, "spiffe://{domain}/provider"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_survive_a_round_trip() {
        for text in ["spiffe://skerry.local/site/harbour", "spiffe://a_b.c-d/provider"] {
            assert_eq!(text.parse::<SpiffeId>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://x",
            "spiffe://x/site",
            "spiffe://x/site/",
            "spiffe://x/site/A",
            "spiffe://x/site/a/b",
            "spiffe://X/site/a",
            "spiffe:///site/a",
            "https://x/site/a",
            "spiffe://x/provider/",
            "spiffe://x/other",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_identity_is_read_from_a_certificate() {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI(
            "spiffe://skerry.local/site/harbour".try_into().unwrap(),
        )];
        let certificate = params.self_signed(&key).unwrap();
        let id = SpiffeId::from_certificate_der(certificate.der()).unwrap();
        assert_eq!(id.to_string(), "spiffe://skerry.local/site/harbour");
    }

    #[test]
    fn a_certificate_with_two_uris_or_none_is_refused() {
        let key = rcgen::KeyPair::generate().unwrap();
        let uri = || rcgen::SanType::URI("spiffe://skerry.local/site/harbour".try_into().unwrap());
        for (names, count) in [(vec![], 0), (vec![uri(), uri()], 2)] {
            let mut params = rcgen::CertificateParams::default();
            params.subject_alt_names = names;
            let certificate = params.self_signed(&key).unwrap();
            assert_eq!(
                SpiffeId::from_certificate_der(certificate.der()),
                Err(InvalidSpiffeId::UriNames(count))
            );
        }
    }
}
