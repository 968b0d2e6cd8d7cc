//! `/configz`: the node's settings in the words of a kubelet's configuration.

use std::net::IpAddr;

use serde_json::{Value, json};

/// Settings that differ from node to node.
#[derive(Clone, Debug, Default)]
pub struct ConfigFacts {
    /// Most pods.
    pub max_pods: u32,
    /// Name servers of the cluster.
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster.
    pub cluster_domain: String,
    /// The engine's socket, `unix://...`; empty without an engine.
    pub runtime_endpoint: String,
    /// Directory of container logs.
    pub pod_log_dir: String,
    /// Fields of a `KubeletConfiguration` that other rooms decide; they win over what stands here.
    pub more: Vec<(String, Value)>,
}

/// A `kubelet.config.k8s.io/v1beta1` `KubeletConfiguration`. Only what this node does has a field: a default of the
/// kubelet that means nothing here is left out.
pub fn kubelet_configuration(facts: &ConfigFacts) -> Value {
    let mut config = json!({
        "enableServer": true,
        "syncFrequency": "1m0s",
        "fileCheckFrequency": "20s",
        "httpCheckFrequency": "20s",
        "authentication": {
            "x509": {},
            "webhook": {"enabled": true, "cacheTTL": "2m0s"},
            "anonymous": {"enabled": false},
        },
        "authorization": {
            "mode": "Webhook",
            "webhook": {"cacheAuthorizedTTL": "5m0s", "cacheUnauthorizedTTL": "30s"},
        },
        "clusterDomain": facts.cluster_domain,
        "clusterDNS": facts.cluster_dns.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "streamingConnectionIdleTimeout": "4h0m0s",
        "nodeStatusUpdateFrequency": "10s",
        "nodeStatusReportFrequency": "5m0s",
        "nodeLeaseDurationSeconds": 40,
        "cgroupsPerQOS": true,
        "cgroupDriver": "cgroupfs",
        "maxPods": facts.max_pods,
        "podPidsLimit": -1,
        "resolvConf": "/etc/resolv.conf",
        "serializeImagePulls": false,
        "maxParallelImagePulls": 3,
        "evictionHard": {"memory.available": "100Mi"},
        "enableControllerAttachDetach": false,
        "failSwapOn": false,
        "enableDebuggingHandlers": true,
        "containerRuntimeEndpoint": facts.runtime_endpoint,
        "podLogsDir": facts.pod_log_dir,
    });
    if let Some(map) = config.as_object_mut() {
        map.extend(facts.more.iter().cloned());
    }
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_other_rooms_win() {
        let facts = ConfigFacts {
            max_pods: 7,
            cluster_dns: vec!["10.0.0.10".parse().unwrap()],
            more: vec![
                ("containerLogMaxFiles".into(), json!(3)),
                ("maxParallelImagePulls".into(), json!(9)),
            ],
            ..ConfigFacts::default()
        };
        let config = kubelet_configuration(&facts);
        assert_eq!(config["maxPods"], 7);
        assert_eq!(config["clusterDNS"][0], "10.0.0.10");
        assert_eq!(config["containerLogMaxFiles"], 3);
        assert_eq!(config["maxParallelImagePulls"], 9);
    }
}
