//! metrics-server beside the control plane, as its manifest sets it up, and the API that it adds.

use std::process::Command;

use serde_json::json;

use crate::cluster::{Cluster, node_address};
use crate::kubectl::Kubectl;
use crate::process::{Daemon, free_port, hack, tools};

/// A running metrics-server. Dropping it ends it and takes its API away.
pub struct MetricsServer {
    kubectl: Kubectl,
    daemon: Daemon,
}

impl MetricsServer {
    /// Builds it if need be, registers and starts it.
    ///
    /// # Panics
    /// When that fails.
    pub fn start(cluster: &Cluster) -> Self {
        hack("metrics-server/build", &[]);
        let kubectl = cluster.kubectl().in_namespace("kube-system");
        let (address, port) = (node_address().to_string(), free_port());
        kubectl.apply(&objects(&address, port));
        let dir = cluster.dir().join("metrics-server");
        std::fs::create_dir_all(&dir).expect("the directory can be made");
        let kubeconfig = dir.join("kubeconfig");
        cluster.write_kubeconfig("kube-system", "metrics-server", &kubeconfig);
        let kubeconfig = kubeconfig.to_str().expect("the path is text");
        let mut command = Command::new(tools().join("metrics-server"));
        // The flags of its manifest, but for the CA of the kubelets.
        command.args([
            "--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname",
            "--kubelet-use-node-status-port",
            "--kubelet-insecure-tls",
            "--metric-resolution=15s",
        ]);
        command.args([
            "--kubeconfig",
            kubeconfig,
            "--authentication-kubeconfig",
            kubeconfig,
        ]);
        command.args([
            "--authorization-kubeconfig",
            kubeconfig,
            "--bind-address",
            &address,
        ]);
        command
            .args(["--secure-port", &port.to_string(), "--cert-dir"])
            .arg(&dir);
        let daemon = Daemon::start("metrics-server", command, &dir.join("log"));
        Self { kubectl, daemon }
    }

    /// The last lines that it has logged.
    pub fn log_tail(&self) -> String {
        self.daemon.log_tail()
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        // An API that nobody serves would hold up the deletion of namespaces.
        let _ = self.kubectl.output(&[
            "delete",
            "apiservice",
            "v1beta1.metrics.k8s.io",
            "--ignore-not-found",
        ]);
    }
}

/// What its manifest has, with a Service that leads to `address`.
fn objects(address: &str, port: u16) -> String {
    let account = json!({"kind": "ServiceAccount", "name": "metrics-server", "namespace": "kube-system"});
    let binding = |kind: &str, name: &str, role_kind: &str, role: &str| {
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {"name": name},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": role_kind, "name": role},
            "subjects": [account]})
    };
    let items = json!([
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "metrics-server"}},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": "system:metrics-server"},
            "rules": [
                {"apiGroups": [""], "resources": ["nodes/metrics"], "verbs": ["get"]},
                {"apiGroups": [""], "resources": ["pods", "nodes"], "verbs": ["get", "list", "watch"]},
            ]},
        binding("ClusterRoleBinding", "system:metrics-server", "ClusterRole", "system:metrics-server"),
        binding("ClusterRoleBinding", "metrics-server:system:auth-delegator", "ClusterRole", "system:auth-delegator"),
        binding("RoleBinding", "metrics-server-auth-reader", "Role", "extension-apiserver-authentication-reader"),
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "metrics-server"},
            "spec": {"ports": [{"name": "https", "port": 443, "targetPort": port}]}},
        {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "metrics-server", "labels": {"kubernetes.io/service-name": "metrics-server"}},
            "addressType": "IPv4", "endpoints": [{"addresses": [address]}],
            "ports": [{"name": "https", "port": port}]},
        {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService",
            "metadata": {"name": "v1beta1.metrics.k8s.io"},
            "spec": {"group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100,
                "versionPriority": 100, "insecureSkipTLSVerify": true,
                "service": {"name": "metrics-server", "namespace": "kube-system"}}},
    ]);
    json!({"apiVersion": "v1", "kind": "List", "items": items}).to_string()
}
