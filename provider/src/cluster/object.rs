use std::sync::OnceLock;

use bytes::Bytes;
use serde_json::Value;
use skerry_proto::link::{Kind, Upsert};
use skerry_proto::object::{ContentHash, ObjectKey, PackError, Uid, pack};

/// One API object, as watched, ready to travel.
pub struct Object {
    /// Kind and UID.
    pub key: ObjectKey,
    /// Empty for cluster-scoped kinds.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Hash of what it means to the edge.
    pub hash: ContentHash,
    /// The object without `metadata.managedFields`.
    pub value: Value,
    packed: OnceLock<Bytes>,
}

impl Object {
    /// Takes an object from the API; `None` when it has no UID or name.
    pub fn new(kind: Kind, mut value: Value) -> Option<Self> {
        let metadata = value.get_mut("metadata")?.as_object_mut()?;
        metadata.remove("managedFields");
        let text = |key: &str| {
            metadata
                .get(key)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let (uid, name, namespace) = (text("uid"), text("name"), text("namespace"));
        if uid.is_empty() || name.is_empty() {
            return None;
        }
        let hash = ContentHash::of(&value);
        Some(Self {
            key: ObjectKey {
                kind,
                uid: Uid::from(uid),
            },
            namespace,
            name,
            hash,
            value,
            packed: OnceLock::new(),
        })
    }

    /// The object as a message of the link. Compressed once, then shared.
    pub fn upsert(&self) -> Result<Upsert, PackError> {
        let json_zstd = match self.packed.get() {
            Some(bytes) => bytes.clone(),
            None => {
                let bytes = Bytes::from(pack(&self.value)?);
                self.packed.get_or_init(|| bytes).clone()
            }
        };
        Ok(Upsert {
            kind: self.key.kind.into(),
            uid: self.key.uid.to_string(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            hash: Bytes::copy_from_slice(&self.hash.0),
            json_zstd,
            expires_unix: 0,
        })
    }
}
