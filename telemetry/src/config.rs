//! The configuration file, and what can be wrong with settings.

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

/// Settings that cannot be used. Exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("the configuration file {file} cannot be read: {source}")]
    Read {
        /// Which.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not understood.
    #[error("the configuration file {file} is wrong: {reason}")]
    Parse {
        /// Which.
        file: PathBuf,
        /// Where and why.
        reason: String,
    },
    /// A value is missing or cannot be used.
    #[error("{0}")]
    Value(String),
}

/// Largest configuration file that is read.
const MAX_BYTES: u64 = 1024 * 1024;

/// Settings from a TOML file: the one that the user named, which must exist, else `default` if it exists.
pub fn read<T: DeserializeOwned + Default>(named: Option<&Path>, default: &Path) -> Result<T, ConfigError> {
    let file = named.unwrap_or(default);
    match text(file) {
        Ok(text) => parse(&text, file),
        Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => Ok(T::default()),
        Err(source) => Err(ConfigError::Read {
            file: file.to_owned(),
            source,
        }),
    }
}

/// Settings from the text of a file, which is named in errors.
pub fn parse<T: DeserializeOwned>(text: &str, file: &Path) -> Result<T, ConfigError> {
    toml::from_str(text).map_err(|e| ConfigError::Parse {
        file: file.to_owned(),
        reason: e.to_string(),
    })
}

fn text(file: &Path) -> std::io::Result<String> {
    use std::io::{Error, ErrorKind, Read};
    let mut text = String::new();
    std::fs::File::open(file)?
        .take(MAX_BYTES + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        let words = format!("it is larger than {MAX_BYTES} bytes");
        return Err(Error::new(ErrorKind::InvalidData, words));
    }
    Ok(text)
}
