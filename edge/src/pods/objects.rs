//! The API objects that pods refer to, as the store holds them.

use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolume, PersistentVolumeClaim, Secret, Service};
use k8s_openapi::api::node::v1::RuntimeClass;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use skerry_proto::link::Kind;
use skerry_proto::object::{ObjectKey, Uid};

use crate::store::Store;

/// Looks up what a pod refers to. An object that is missing and one that cannot be read are the same to a pod; the
/// latter is logged.
pub(crate) trait Objects: Send + Sync {
    /// A ConfigMap by name.
    fn config_map(&self, namespace: &str, name: &str) -> Option<ConfigMap>;
    /// A Secret by name.
    fn secret(&self, namespace: &str, name: &str) -> Option<Secret>;
    /// Every Service that the site was sent.
    fn services(&self) -> Vec<Service>;
    /// The site's own Node.
    fn node(&self) -> Option<Node>;
    /// A RuntimeClass by name.
    fn runtime_class(&self, _name: &str) -> Option<RuntimeClass> {
        None
    }
    /// A PersistentVolumeClaim by name.
    fn claim(&self, _namespace: &str, _name: &str) -> Option<PersistentVolumeClaim> {
        None
    }
    /// A PersistentVolume by name.
    fn persistent_volume(&self, _name: &str) -> Option<PersistentVolume> {
        None
    }
    /// A bound token, by `<pod UID>/<volume>/<path>`.
    fn token(&self, key: &str) -> Option<String>;
}

/// A token as the provider sends it.
#[derive(Deserialize)]
struct Token {
    token: String,
}

fn decoded<T: DeserializeOwned>(
    found: Result<Option<crate::store::StoredObject>, crate::store::StoreError>,
    what: &str,
) -> Option<T> {
    match found {
        Ok(Some(object)) => object
            .decode()
            .inspect_err(|error| tracing::error!(object = what, %error, "a stored object cannot be read"))
            .ok(),
        Ok(None) => None,
        Err(error) => {
            tracing::error!(object = what, %error, "a stored object cannot be read");
            None
        }
    }
}

impl Objects for Store {
    fn config_map(&self, namespace: &str, name: &str) -> Option<ConfigMap> {
        decoded(self.find(Kind::ConfigMap, namespace, name), name)
    }

    fn secret(&self, namespace: &str, name: &str) -> Option<Secret> {
        decoded(self.find(Kind::Secret, namespace, name), name)
    }

    fn services(&self) -> Vec<Service> {
        let objects = self.list(Kind::Service).unwrap_or_else(|error| {
            tracing::error!(%error, "the stored Services cannot be read");
            Vec::new()
        });
        objects.iter().filter_map(|o| o.decode().ok()).collect()
    }

    fn node(&self) -> Option<Node> {
        let objects = self.list(Kind::Node).ok()?;
        objects.iter().find_map(|o| o.decode().ok())
    }

    fn runtime_class(&self, name: &str) -> Option<RuntimeClass> {
        decoded(self.find(Kind::RuntimeClass, "", name), name)
    }

    fn claim(&self, namespace: &str, name: &str) -> Option<PersistentVolumeClaim> {
        decoded(self.find(Kind::PersistentVolumeClaim, namespace, name), name)
    }

    fn persistent_volume(&self, name: &str) -> Option<PersistentVolume> {
        decoded(self.find(Kind::PersistentVolume, "", name), name)
    }

    fn token(&self, key: &str) -> Option<String> {
        let key = ObjectKey {
            kind: Kind::ServiceAccountToken,
            uid: Uid::from(key),
        };
        decoded::<Token>(self.get(&key), key.uid.as_str()).map(|t| t.token)
    }
}
