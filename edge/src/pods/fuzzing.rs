//! Entries for hostile bytes: what a Pod and the objects around it may hold.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret, Service};
use serde_json::json;

use super::env::{self, Facts};
use super::objects::Objects;
use super::{affinity, class_of, images, network, resources, security, volumes};
use crate::cgroup::Kernel;
use crate::local;

/// Whatever is asked for, there is one.
struct Plenty;

impl Objects for Plenty {
    fn config_map(&self, _: &str, _: &str) -> Option<ConfigMap> {
        Some(ConfigMap {
            data: Some(BTreeMap::from([("key".to_owned(), "$(A) $(B".to_owned())])),
            ..ConfigMap::default()
        })
    }
    fn secret(&self, _: &str, _: &str) -> Option<Secret> {
        Some(Secret {
            data: Some(BTreeMap::from([("key".to_owned(), ByteString(vec![0xff, 0]))])),
            ..Secret::default()
        })
    }
    fn services(&self) -> Vec<Service> {
        Vec::new()
    }
    fn node(&self) -> Option<Node> {
        None
    }
    fn token(&self, _: &str) -> Option<String> {
        Some("token".to_owned())
    }
}

/// A Pod as the cloud may send it: everything that is made of it without touching the machine.
pub(crate) fn any_pod(bytes: &[u8]) {
    let Ok(pod) = serde_json::from_slice::<Pod>(bytes) else {
        return;
    };
    let ips = [IpAddr::V4(Ipv4Addr::LOCALHOST)];
    let _ = local::Row::of(&pod);
    let _ = (class_of(&pod), resources::qos(&pod), resources::effective(&pod));
    let _ = (resources::requests(&pod), resources::limits(&pod));
    let _ = resources::pod_values(&pod, &Kernel::default(), None);
    let _ = network::kernel_hostname(&pod, "cluster.local");
    let _ = network::hosts_file(&pod, &ips, "cluster.local", "");
    let _ = network::dns(
        &pod,
        &ips,
        "cluster.local",
        &network::parse_resolv_conf("search a"),
    );
    let _ = affinity::matches(
        &pod,
        "harbour",
        &BTreeMap::from([("a".to_owned(), "1".to_owned())]),
    );
    let _ = affinity::tolerates(&pod, &[]);
    let facts = Facts {
        pod: &pod,
        host_ip: Some(ips[0]),
        pod_ips: &ips,
        objects: &Plenty,
    };
    let Some(spec) = &pod.spec else { return };
    for volume in spec.volumes.iter().flatten() {
        let _ = volumes::attributes(&pod, &volume.name);
    }
    for container in spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten())
    {
        let _ = resources::container_values(&pod, container, 1 << 30, &Kernel::default());
        let _ = security::security(&pod, container, None, true, Path::new("/seccomp"));
        if let Ok(environment) = env::environment(&facts, container) {
            let known = environment.into_iter().collect();
            for word in container.command.iter().chain(&container.args).flatten() {
                let _ = (env::expand(word, &known), env::missing(word, &known));
            }
        }
    }
}

pub(crate) fn pod_seeds() -> Vec<Vec<u8>> {
    let pod = json!({
        "metadata": {"name": "p", "namespace": "n", "uid": "u", "labels": {"a": "1"}, "annotations": {"edge.skerry.dev/class": "critical"}},
        "spec": {
            "hostname": "h", "subdomain": "s", "dnsPolicy": "ClusterFirst", "priority": 2_000_000_000,
            "dnsConfig": {"searches": ["x"], "nameservers": ["1.1.1.1"], "options": [{"name": "ndots", "value": "2"}]},
            "hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}],
            "tolerations": [{"key": "k", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 3}],
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["0"]}]}]}}},
            "securityContext": {"runAsUser": 5, "fsGroup": 7, "seccompProfile": {"type": "Localhost", "localhostProfile": "a/b"}},
            "resources": {"requests": {"cpu": "1"}},
            "containers": [{
                "name": "c", "image": "i", "command": ["$(A)", "$$(B)", "$(C"],
                "env": [{"name": "A", "value": "$(X)"},
                    {"name": "M", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['a']"}}},
                    {"name": "R", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
                    {"name": "K", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "key"}}}],
                "envFrom": [{"prefix": "P_", "secretRef": {"name": "s"}}],
                "resources": {"requests": {"cpu": "100m", "memory": "1.5Gi"}, "limits": {"cpu": "1e3", "memory": "2G"}},
                "securityContext": {"runAsNonRoot": true, "capabilities": {"add": ["ALL"]}},
                "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": "$(A)"}]
            }],
            "volumes": [{"name": "v", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}]
        },
        "status": {"phase": "Running", "containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": true,
            "restartCount": 1, "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}]}
    });
    vec![pod.to_string().into_bytes()]
}

/// A pull secret's content.
pub(crate) fn any_pull_secret(bytes: &[u8]) {
    for key in [".dockerconfigjson", ".dockercfg"] {
        let secret = Secret {
            data: Some(BTreeMap::from([(key.to_owned(), ByteString(bytes.to_vec()))])),
            ..Secret::default()
        };
        let _ = images::credentials("registry.example:5000/team/image:1", &[secret]);
    }
}

pub(crate) fn pull_secret_seeds() -> Vec<Vec<u8>> {
    let auths = json!({"https://registry.example:5000/v1/": {"auth": "dTpw"}, "*.example": {"username": "u", "password": "p"}});
    vec![
        json!({"auths": auths}).to_string().into_bytes(),
        auths.to_string().into_bytes(),
    ]
}
