//! How an API object is hashed and packed for the link.

use std::fmt;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::limits::MAX_OBJECT_BYTES;
use crate::link::Kind;

/// Level of zstd compression: the fastest that still pays on small JSON.
const ZSTD_LEVEL: i32 = 3;

/// A Kubernetes UID. Identity everywhere: the same name with another UID is another object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Uid(String);

impl Uid {
    /// The UID as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<String> for Uid {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for Uid {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names one object on the link and in the edge's store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectKey {
    /// The object's kind.
    pub kind: Kind,
    /// The object's UID.
    pub uid: Uid,
}

/// First 16 bytes of a SHA-256: enough to tell versions of one object apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentHash(pub [u8; 16]);

impl ContentHash {
    /// Hash of an object's meaning to the edge: everything but `status`, `metadata.resourceVersion` and
    /// `metadata.managedFields`.
    ///
    /// These change without any change of what the edge has to do: most of all when its own reports arrive. Of the status,
    /// that the object has ended for good (phase Succeeded or Failed) is a part: so the edge learns that the API has its
    /// last word, and, after a restore of the cluster, that it has it no more.
    pub fn of(object: &Value) -> Self {
        let mut meaning = object.clone();
        if let Some(map) = meaning.as_object_mut() {
            let ended = map
                .remove("status")
                .and_then(|mut status| status.get_mut("phase").map(Value::take))
                .filter(|phase| phase == "Succeeded" || phase == "Failed");
            if let Some(phase) = ended {
                map.insert("status".to_owned(), serde_json::json!({"phase": phase}));
            }
            if let Some(metadata) = map.get_mut("metadata").and_then(Value::as_object_mut) {
                metadata.remove("resourceVersion");
                metadata.remove("managedFields");
            }
        }
        // serde_json keeps object keys sorted, so equal objects have equal bytes.
        Self::of_bytes(meaning.to_string().as_bytes())
    }

    /// Hash of raw bytes.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        let digest = Sha256::digest(bytes);
        let mut hash = [0; 16];
        hash.copy_from_slice(&digest[..16]);
        Self(hash)
    }

    /// Reads a hash from the link; `None` when the length is wrong.
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// Why an object could not be packed or unpacked.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// It is larger than its limit, [`MAX_OBJECT_BYTES`] for an object.
    #[error("the object is too large for the link: an object may have {MAX_OBJECT_BYTES} bytes")]
    TooLarge,
    /// The compressed bytes are damaged.
    #[error("the compressed object cannot be read: {0}")]
    Zstd(#[from] std::io::Error),
    /// The bytes are not JSON.
    #[error("the object is not JSON: {0}")]
    Json(#[from] serde_json::Error),
}

/// Compresses text for the link.
pub fn compress(text: &[u8]) -> Result<Vec<u8>, PackError> {
    Ok(zstd::bulk::compress(text, ZSTD_LEVEL)?)
}

/// Reads compressed text from the link. Allocates at most `limit` bytes.
pub fn decompress(packed: &[u8], limit: usize) -> Result<Vec<u8>, PackError> {
    use std::io::Read;
    let mut text = Vec::new();
    zstd::stream::read::Decoder::new(packed)?
        .take(limit as u64 + 1)
        .read_to_end(&mut text)?;
    if text.len() > limit {
        return Err(PackError::TooLarge);
    }
    Ok(text)
}

/// Compresses an object for the link.
pub fn pack(object: &Value) -> Result<Vec<u8>, PackError> {
    let json = serde_json::to_vec(object)?;
    if json.len() > MAX_OBJECT_BYTES {
        return Err(PackError::TooLarge);
    }
    Ok(zstd::bulk::compress(&json, ZSTD_LEVEL)?)
}

/// Reads an object's JSON from the link. Allocates at most [`MAX_OBJECT_BYTES`].
pub fn unpack_bytes(json_zstd: &[u8]) -> Result<Vec<u8>, PackError> {
    decompress(json_zstd, MAX_OBJECT_BYTES)
}

/// Reads an object from the link as a typed value.
pub fn unpack<T: serde::de::DeserializeOwned>(json_zstd: &[u8]) -> Result<T, PackError> {
    Ok(serde_json::from_slice(&unpack_bytes(json_zstd)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_status_or_version_change_keeps_the_hash_and_a_spec_change_moves_it() {
        let base =
            json!({"metadata": {"name": "a", "resourceVersion": "1"}, "spec": {"x": 1}, "status": {"y": 1}});
        let mut status = base.clone();
        status["status"]["y"] = json!(2);
        status["metadata"]["resourceVersion"] = json!("2");
        status["metadata"]["managedFields"] = json!([{"manager": "m"}]);
        assert_eq!(ContentHash::of(&base), ContentHash::of(&status));
        let mut spec = base.clone();
        spec["spec"]["x"] = json!(2);
        assert_ne!(ContentHash::of(&base), ContentHash::of(&spec));
    }

    #[test]
    fn the_end_of_a_pod_moves_the_hash_once() {
        let pod = |status: Value| ContentHash::of(&json!({"metadata": {"name": "a"}, "status": status}));
        let running = pod(json!({"phase": "Running", "podIP": "10.0.0.1"}));
        assert_eq!(pod(json!({})), running);
        let ended = pod(json!({"phase": "Failed", "podIP": "10.0.0.1"}));
        assert_ne!(ended, running);
        assert_eq!(pod(json!({"phase": "Failed"})), ended);
        assert_ne!(pod(json!({"phase": "Succeeded"})), ended);
    }

    #[test]
    fn an_object_survives_packing() {
        let object = json!({"a": ["b", 1, null]});
        assert_eq!(unpack::<Value>(&pack(&object).unwrap()).unwrap(), object);
    }

    #[test]
    fn a_decompression_bomb_is_refused() {
        let bomb = zstd::bulk::compress(&vec![b' '; 64 * 1024 * 1024], 3).unwrap();
        assert!(bomb.len() < 64 * 1024);
        assert!(matches!(unpack_bytes(&bomb), Err(PackError::TooLarge)));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_unpack_to_a_value_or_an_error(bytes: Vec<u8>) {
            let _ = unpack::<Value>(&bytes);
        }
    }
}
