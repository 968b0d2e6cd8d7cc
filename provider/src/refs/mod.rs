//! What a pod refers to: the only objects that its site may see.
//!
//! In: a Pod. Out: the ConfigMaps, Secrets and ServiceAccount tokens that it names ([`PodRefs`]), and freshly minted
//! tokens ([`tokens`]). Must always hold: a site never receives an object that no pod bound to it refers to.

pub mod tokens;

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, Volume};
use skerry_proto::link::Kind;

/// Default lifetime of a projected token, as the API server fills it in.
const DEFAULT_TOKEN_SECONDS: i64 = 3600;

/// A ServiceAccount token that one of the pod's volumes projects.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TokenNeed {
    /// The projected volume.
    pub volume: String,
    /// The file within it.
    pub path: String,
    /// Audience; empty for the API server's default.
    pub audience: String,
    /// Lifetime asked for, seconds.
    pub expiration_seconds: i64,
}

/// Names, in the pod's namespace, of everything that a pod refers to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodRefs {
    /// ConfigMaps and Secrets by kind and name.
    pub objects: BTreeSet<(KindOrd, String)>,
    /// Tokens, issued for `spec.serviceAccountName`.
    pub tokens: Vec<TokenNeed>,
    /// `spec.serviceAccountName`.
    pub service_account: String,
    /// `spec.runtimeClassName`; a cluster-scoped object.
    pub runtime_class: Option<String>,
}

/// The referable kinds of a pod's namespace, ordered so that they can stand in a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KindOrd {
    /// A ConfigMap.
    ConfigMap,
    /// A Secret.
    Secret,
    /// A PersistentVolumeClaim; the volume that it is bound to comes with it.
    PersistentVolumeClaim,
}

impl From<KindOrd> for Kind {
    fn from(kind: KindOrd) -> Self {
        match kind {
            KindOrd::ConfigMap => Self::ConfigMap,
            KindOrd::Secret => Self::Secret,
            KindOrd::PersistentVolumeClaim => Self::PersistentVolumeClaim,
        }
    }
}

impl PodRefs {
    /// Reads them from a pod.
    pub fn of(pod: &Pod) -> Self {
        let mut refs = Self::default();
        let Some(spec) = &pod.spec else { return refs };
        refs.service_account = spec
            .service_account_name
            .clone()
            .unwrap_or_else(|| "default".to_owned());
        refs.runtime_class = spec.runtime_class_name.clone().filter(|n| !n.is_empty());
        let pod_name = pod.metadata.name.as_deref().unwrap_or_default();
        for secret in spec.image_pull_secrets.iter().flatten() {
            refs.add(KindOrd::Secret, &secret.name);
        }
        for volume in spec.volumes.iter().flatten() {
            refs.volume(volume, pod_name);
        }
        for container in spec.init_containers.iter().flatten().chain(&spec.containers) {
            refs.container(container);
        }
        for container in spec.ephemeral_containers.iter().flatten() {
            refs.ephemeral(container);
        }
        refs
    }

    /// Whether the pod refers to that object of its namespace.
    pub fn contains(&self, kind: Kind, name: &str) -> bool {
        let kind = match kind {
            Kind::ConfigMap => KindOrd::ConfigMap,
            Kind::Secret => KindOrd::Secret,
            Kind::PersistentVolumeClaim => KindOrd::PersistentVolumeClaim,
            _ => return false,
        };
        self.objects.iter().any(|(k, n)| *k == kind && n == name)
    }

    fn add(&mut self, kind: KindOrd, name: &str) {
        if !name.is_empty() {
            self.objects.insert((kind, name.to_owned()));
        }
    }

    fn volume(&mut self, volume: &Volume, pod_name: &str) {
        if let Some(claim) = &volume.persistent_volume_claim {
            self.add(KindOrd::PersistentVolumeClaim, &claim.claim_name);
        }
        if volume.ephemeral.is_some() {
            // The controller manager makes a claim of this name.
            self.add(
                KindOrd::PersistentVolumeClaim,
                &format!("{pod_name}-{}", volume.name),
            );
        }
        if let Some(source) = &volume.config_map {
            self.add(KindOrd::ConfigMap, &source.name);
        }
        if let Some(name) = volume.secret.as_ref().and_then(|s| s.secret_name.as_deref()) {
            self.add(KindOrd::Secret, name);
        }
        let projected = volume.projected.iter().flat_map(|p| p.sources.iter().flatten());
        for source in projected {
            if let Some(map) = &source.config_map {
                self.add(KindOrd::ConfigMap, &map.name);
            }
            if let Some(secret) = &source.secret {
                self.add(KindOrd::Secret, &secret.name);
            }
            if let Some(token) = &source.service_account_token {
                self.tokens.push(TokenNeed {
                    volume: volume.name.clone(),
                    path: token.path.clone(),
                    audience: token.audience.clone().unwrap_or_default(),
                    expiration_seconds: token.expiration_seconds.unwrap_or(DEFAULT_TOKEN_SECONDS),
                });
            }
        }
    }

    fn container(&mut self, container: &Container) {
        self.environment(container.env.as_deref(), container.env_from.as_deref());
    }

    fn ephemeral(&mut self, container: &EphemeralContainer) {
        self.environment(container.env.as_deref(), container.env_from.as_deref());
    }

    fn environment(
        &mut self,
        env: Option<&[k8s_openapi::api::core::v1::EnvVar]>,
        env_from: Option<&[k8s_openapi::api::core::v1::EnvFromSource]>,
    ) {
        for source in env.into_iter().flatten().filter_map(|e| e.value_from.as_ref()) {
            if let Some(key) = &source.config_map_key_ref {
                self.add(KindOrd::ConfigMap, &key.name);
            }
            if let Some(key) = &source.secret_key_ref {
                self.add(KindOrd::Secret, &key.name);
            }
        }
        for source in env_from.into_iter().flatten() {
            if let Some(map) = &source.config_map_ref {
                self.add(KindOrd::ConfigMap, &map.name);
            }
            if let Some(secret) = &source.secret_ref {
                self.add(KindOrd::Secret, &secret.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_place_that_can_name_an_object_is_read() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p"},
            "spec": {
                "serviceAccountName": "sa",
                "runtimeClassName": "sandboxed",
                "imagePullSecrets": [{"name": "pull"}],
                "volumes": [
                    {"name": "a", "configMap": {"name": "cm-volume"}},
                    {"name": "b", "secret": {"secretName": "secret-volume"}},
                    {"name": "d", "persistentVolumeClaim": {"claimName": "claim"}},
                    {"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}},
                    {"name": "c", "projected": {"sources": [
                        {"configMap": {"name": "cm-projected"}},
                        {"secret": {"name": "secret-projected"}},
                        {"serviceAccountToken": {"path": "token", "audience": "x", "expirationSeconds": 7200}}]}}],
                "initContainers": [{"name": "i", "envFrom": [{"configMapRef": {"name": "cm-from"}}]}],
                "containers": [{"name": "c",
                    "env": [
                        {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "cm-env", "key": "k"}}},
                        {"name": "B", "valueFrom": {"secretKeyRef": {"name": "secret-env", "key": "k"}}}],
                    "envFrom": [{"secretRef": {"name": "secret-from"}}]}],
                "ephemeralContainers": [{"name": "e",
                    "env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "secret-debug", "key": "k"}}}]}]
            }}))
        .unwrap();
        let refs = PodRefs::of(&pod);
        for name in ["cm-volume", "cm-projected", "cm-from", "cm-env"] {
            assert!(refs.contains(Kind::ConfigMap, name), "{name}");
        }
        for name in [
            "pull",
            "secret-volume",
            "secret-projected",
            "secret-env",
            "secret-from",
            "secret-debug",
        ] {
            assert!(refs.contains(Kind::Secret, name), "{name}");
        }
        assert!(refs.contains(Kind::PersistentVolumeClaim, "claim"));
        assert!(refs.contains(Kind::PersistentVolumeClaim, "p-scratch"));
        assert_eq!(refs.runtime_class.as_deref(), Some("sandboxed"));
        assert_eq!(refs.objects.len(), 12);
        assert_eq!(refs.service_account, "sa");
        assert_eq!(
            refs.tokens,
            [TokenNeed {
                volume: "c".to_owned(),
                path: "token".to_owned(),
                audience: "x".to_owned(),
                expiration_seconds: 7200
            }]
        );
    }
}
