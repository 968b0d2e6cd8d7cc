//! A namespace of a scenario's own.

use crate::kubectl::Kubectl;
use crate::wait::{SOON, eventually};

/// A namespace in which pods can be made. Dropping it deletes it, without waiting.
pub struct Namespace {
    name: String,
    kubectl: Kubectl,
}

impl Namespace {
    /// Makes it and waits for what a pod needs: the default ServiceAccount and the cluster's root certificate.
    pub fn create(kubectl: &Kubectl, name: &str) -> Self {
        kubectl.run(&["create", "namespace", name]);
        let this = Self {
            name: name.into(),
            kubectl: kubectl.in_namespace(name),
        };
        eventually(SOON, "the namespace is furnished", || {
            this.kubectl.get("serviceaccount", "default")?;
            this.kubectl.get("configmap", "kube-root-ca.crt")
        });
        this
    }

    /// kubectl in this namespace.
    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self
            .kubectl
            .output(&["delete", "namespace", &self.name, "--wait=false"]);
    }
}
