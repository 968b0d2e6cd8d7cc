//! The join token, made by the provider and taken by the edge.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::SiteName;

const PREFIX: &str = "skerry1";
const ID_LEN: usize = 12;
const SECRET_LEN: usize = 32;
const PIN_LEN: usize = 64;
const CHECKSUM_LEN: usize = 8;

/// What `skerry-provider token create` prints and `skerry-edge join` takes.
///
/// `skerry1.<site>.<id>.<secret>.<pin>.<checksum>`, all but the first two hexadecimal. The secret has 128 bits and works
/// once; the pin is the SHA-256 of the provider CA's public key, so that even the first connection is authenticated;
/// the checksum tells a typing error from a token that was used.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// The site that may enrol with it.
    pub site: SiteName,
    /// Names the token; not secret.
    pub id: String,
    /// The secret part.
    pub secret: String,
    /// SHA-256 of the CA's SubjectPublicKeyInfo, hexadecimal.
    pub pin: String,
}

/// The text is no join token.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidToken {
    /// Parts are missing or have the wrong form.
    #[error(
        "this is not a join token (skerry1.<site>.<id>.<secret>.<pin>.<checksum>); copy the whole line that `skerry-provider token create` printed"
    )]
    Form,
    /// It was mistyped or cut.
    #[error(
        "the join token is malformed: its checksum does not match; copy the whole line that `skerry-provider token create` printed"
    )]
    Checksum,
}

impl FromStr for JoinToken {
    type Err = InvalidToken;

    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let text = text.trim();
        let parts: Vec<&str> = text.split('.').collect();
        let [prefix, site, id, secret, pin, checksum] = parts.as_slice() else {
            return Err(InvalidToken::Form);
        };
        let (body, _) = text.rsplit_once('.').ok_or(InvalidToken::Form)?;
        if *prefix != PREFIX {
            return Err(InvalidToken::Form);
        }
        if *checksum != checksum_of(body) {
            return Err(InvalidToken::Checksum);
        }
        let hex = |part: &str, length| part.len() == length && part.bytes().all(|c| c.is_ascii_hexdigit());
        if !hex(id, ID_LEN) || !hex(secret, SECRET_LEN) || !hex(pin, PIN_LEN) {
            return Err(InvalidToken::Form);
        }
        Ok(Self {
            site: site.parse().map_err(|_| InvalidToken::Form)?,
            id: (*id).to_owned(),
            secret: (*secret).to_owned(),
            pin: (*pin).to_owned(),
        })
    }
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let body = format!("{PREFIX}.{}.{}.{}.{}", self.site, self.id, self.secret, self.pin);
        write!(f, "{body}.{}", checksum_of(&body))
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({}, {}, ...)", self.site, self.id)
    }
}

/// SHA-256 of a certificate's public key, hexadecimal; `None` when the certificate cannot be read.
pub fn public_key_pin(certificate_der: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate_der).ok()?;
    Some(hex(&Sha256::digest(certificate.public_key().raw)))
}

/// Lower-case hexadecimal digits of some bytes.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn checksum_of(body: &str) -> String {
    let mut text = hex(&Sha256::digest(body.as_bytes()));
    text.truncate(CHECKSUM_LEN);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken {
            site: "harbour".parse().unwrap(),
            id: "a".repeat(ID_LEN),
            secret: "b".repeat(SECRET_LEN),
            pin: "c".repeat(PIN_LEN),
        }
    }

    #[test]
    fn a_token_survives_printing_and_surrounding_space() {
        let text = format!(" {}\n", token());
        assert_eq!(text.parse::<JoinToken>().unwrap(), token());
    }

    #[test]
    fn a_changed_or_cut_token_is_malformed() {
        let text = token().to_string();
        assert_eq!(
            text.replace("harbour", "harbor").parse::<JoinToken>(),
            Err(InvalidToken::Checksum)
        );
        assert_eq!(
            text[..text.len() - 1].parse::<JoinToken>(),
            Err(InvalidToken::Checksum)
        );
        assert_eq!("nonsense".parse::<JoinToken>(), Err(InvalidToken::Form));
        assert_eq!("".parse::<JoinToken>(), Err(InvalidToken::Form));
    }

    #[test]
    fn the_secret_does_not_show_in_debug_output() {
        assert!(!format!("{:?}", token()).contains("bbbb"));
    }
}
