//! How many containers have ended, under the kubelet's metric name.

use k8s_openapi::api::core::v1::{ContainerStatus, PodStatus};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    container_type: &'static str,
    exit_code: i32,
    reason: String,
}

/// Counts ends of containers as statuses show them. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Terminations {
    ended: Family<Labels, Counter>,
}

impl Terminations {
    /// Shows the counter in `registry`.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "kubelet_terminated_containers",
            "Cumulative number of container terminations",
            self.ended.clone(),
        );
    }

    /// A pod's status changes: each container that shows its end for the first time counts.
    pub(super) fn note(&self, old: Option<&PodStatus>, new: &PodStatus) {
        type List = fn(&PodStatus) -> Option<&Vec<ContainerStatus>>;
        let lists: [(&'static str, List); 3] = [
            ("init_container", |s| s.init_container_statuses.as_ref()),
            ("container", |s| s.container_statuses.as_ref()),
            ("ephemeral_container", |s| s.ephemeral_container_statuses.as_ref()),
        ];
        for (container_type, list) in lists {
            for status in list(new).into_iter().flatten() {
                let Some(end) = status.state.as_ref().and_then(|s| s.terminated.as_ref()) else {
                    continue;
                };
                let before = old.and_then(list).into_iter().flatten();
                let known = before
                    .filter(|b| b.name == status.name)
                    .any(|b| b.state.as_ref().is_some_and(|s| s.terminated.is_some()));
                if !known {
                    let labels = Labels {
                        container_type,
                        exit_code: end.exit_code,
                        reason: end.reason.clone().unwrap_or_default(),
                    };
                    self.ended.get_or_create(&labels).inc();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_end_counts_once() {
        let status = |state: serde_json::Value| -> PodStatus {
            serde_json::from_value(
                json!({"containerStatuses": [{"name": "c", "image": "i", "imageID": "", "ready": false,
                "restartCount": 0, "state": state}]}),
            )
            .unwrap()
        };
        let ended = status(json!({"terminated": {"exitCode": 139, "reason": "Error"}}));
        let running = status(json!({"running": {}}));
        let terminations = Terminations::default();
        terminations.note(None, &running);
        terminations.note(Some(&running), &ended);
        terminations.note(Some(&ended), &ended);
        terminations.note(Some(&running), &ended);
        let mut registry = Registry::default();
        terminations.register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let line = r#"kubelet_terminated_containers_total{container_type="container",exit_code="139",reason="Error"} 2"#;
        assert!(text.lines().any(|l| l == line), "{text}");
    }
}
