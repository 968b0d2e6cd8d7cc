use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The name of a Site and of its Node: a DNS label, so that it fits a node name, a host name and a SPIFFE path.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SiteName(String);

/// A string that is no site name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "{0:?} is not a site name: use 1 to 63 lower-case letters, digits or '-', starting and ending with a letter or digit"
)]
pub struct InvalidSiteName(String);

impl SiteName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SiteName {
    type Err = InvalidSiteName;

    fn from_str(text: &str) -> Result<Self, InvalidSiteName> {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        let bytes = text.as_bytes();
        let valid = (1..=63).contains(&bytes.len())
            && bytes.iter().all(|&c| inner(c) || c == b'-')
            && bytes.first().is_some_and(|&c| inner(c))
            && bytes.last().is_some_and(|&c| inner(c));
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidSiteName(text.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for SiteName {
    type Error = InvalidSiteName;

    fn try_from(text: String) -> Result<Self, InvalidSiteName> {
        text.parse()
    }
}

impl From<SiteName> for String {
    fn from(name: SiteName) -> Self {
        name.0
    }
}

impl fmt::Display for SiteName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for SiteName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dns_label_is_a_site_name() {
        for name in ["a", "harbour", "line-3", "0x", &"a".repeat(63)] {
            assert_eq!(name.parse::<SiteName>().unwrap().as_str(), name);
        }
    }

    #[test]
    fn anything_else_is_refused() {
        for name in ["", "-a", "a-", "A", "a.b", "a_b", "ä", "a/b", &"a".repeat(64)] {
            assert!(name.parse::<SiteName>().is_err(), "{name:?}");
        }
    }
}
