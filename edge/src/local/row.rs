//! A pod as one row of a table, in the words of `kubectl get pods`.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStateTerminated, ContainerStatus, Pod, PodStatus};
use serde::{Deserialize, Serialize};

/// A pod in short.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Row {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Ready containers.
    pub ready: usize,
    /// Containers that should be.
    pub containers: usize,
    /// Phase, or the reason that says more.
    pub status: String,
    /// Restarts of its containers.
    pub restarts: i32,
    /// When the last of them was, seconds since 1970; absent when there was none.
    pub restarted: Option<i64>,
    /// When the pod was made, seconds since 1970.
    pub created: Option<i64>,
    /// Its address, empty when it has none.
    pub ip: String,
    /// The node that it is bound to.
    pub node: String,
}

impl Row {
    /// The row of a pod with the status that the site knows.
    pub fn of(pod: &Pod) -> Self {
        let none = PodStatus::default();
        let status = pod.status.as_ref().unwrap_or(&none);
        let spec = pod.spec.as_ref();
        let inits = spec
            .and_then(|s| s.init_containers.as_deref())
            .unwrap_or_default();
        let sidecars: Vec<&str> = inits
            .iter()
            .filter(|c| c.restart_policy.as_deref() == Some("Always"))
            .map(|c| c.name.as_str())
            .collect();
        let regular = status.container_statuses.as_deref().unwrap_or_default();
        let initial = status.init_container_statuses.as_deref().unwrap_or_default();
        let is_sidecar = |c: &&ContainerStatus| sidecars.contains(&c.name.as_str());
        let lasting = || regular.iter().chain(initial.iter().filter(is_sidecar));
        let starting = starting(initial, &sidecars, inits.len());
        let counted: Vec<&ContainerStatus> = match starting {
            Some(_) => initial.iter().collect(),
            None => lasting().collect(),
        };
        Self {
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            name: pod.metadata.name.clone().unwrap_or_default(),
            ready: lasting().filter(|c| c.ready && runs(c)).count(),
            containers: spec.map_or(0, |s| s.containers.len()) + sidecars.len(),
            status: word(pod, status, starting, regular),
            restarts: counted.iter().map(|c| c.restart_count).sum(),
            restarted: counted.iter().filter_map(|c| last_end(c)).max(),
            created: pod.metadata.creation_timestamp.as_ref().map(|t| t.0.as_second()),
            ip: status.pod_ip.clone().unwrap_or_default(),
            node: spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        }
    }
}

fn runs(container: &ContainerStatus) -> bool {
    container.state.as_ref().is_some_and(|s| s.running.is_some())
}

fn last_end(container: &ContainerStatus) -> Option<i64> {
    let ended = container.last_state.as_ref()?.terminated.as_ref()?;
    ended
        .finished_at
        .as_ref()
        .map(|t: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Time| t.0.as_second())
}

/// What holds up the start, if something does.
fn starting(initial: &[ContainerStatus], sidecars: &[&str], all: usize) -> Option<String> {
    for (index, container) in initial.iter().enumerate() {
        let empty = ContainerState::default();
        let state = container.state.as_ref().unwrap_or(&empty);
        if state.terminated.as_ref().is_some_and(|t| t.exit_code == 0) {
            continue;
        }
        if sidecars.contains(&container.name.as_str()) && container.started == Some(true) {
            continue;
        }
        if let Some(ended) = &state.terminated {
            return Some(format!("Init:{}", end_word(ended)));
        }
        let waiting = state.waiting.as_ref().and_then(|w| w.reason.as_deref());
        return Some(match waiting {
            Some(reason) if !reason.is_empty() && reason != "PodInitializing" => format!("Init:{reason}"),
            _ => format!("Init:{index}/{all}"),
        });
    }
    None
}

fn end_word(ended: &ContainerStateTerminated) -> String {
    match (&ended.reason, ended.signal) {
        (Some(reason), _) if !reason.is_empty() => reason.clone(),
        (_, Some(signal)) if signal != 0 => format!("Signal:{signal}"),
        _ => format!("ExitCode:{}", ended.exit_code),
    }
}

fn word(pod: &Pod, status: &PodStatus, starting: Option<String>, regular: &[ContainerStatus]) -> String {
    let phase = status.phase.as_deref().unwrap_or("Pending");
    let given = status.reason.as_deref().filter(|reason| !reason.is_empty());
    let mut word = given.unwrap_or(phase).to_owned();
    match starting {
        Some(reason) => word = reason,
        None => {
            // The first container's trouble wins.
            for container in regular.iter().rev() {
                let Some(state) = &container.state else { continue };
                let waiting = state.waiting.as_ref().and_then(|w| w.reason.clone());
                if let Some(reason) = waiting.filter(|reason| !reason.is_empty()) {
                    word = reason;
                } else if let Some(ended) = &state.terminated {
                    word = end_word(ended);
                }
            }
            if word == "Completed" && regular.iter().any(|c| c.ready && runs(c)) {
                let ready = status
                    .conditions
                    .iter()
                    .flatten()
                    .any(|c| c.type_ == "Ready" && c.status == "True");
                word = if ready { "Running" } else { "NotReady" }.to_owned();
            }
        }
    }
    let ended = matches!(phase, "Succeeded" | "Failed");
    if pod.metadata.deletion_timestamp.is_some() && !ended {
        word = "Terminating".to_owned();
    }
    word
}

/// Seconds between a moment and now; 0 for one to come.
pub(super) fn age(then: i64, now: Timestamp) -> u64 {
    u64::try_from(now.as_second() - then).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn word_of(spec: Value, status: Value) -> (String, usize, usize, i32) {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "n"}, "spec": spec, "status": status,
        }))
        .unwrap();
        let row = Row::of(&pod);
        (row.status, row.ready, row.containers, row.restarts)
    }

    #[test]
    fn a_pod_is_told_in_kubectls_words() {
        let one = json!({"containers": [{"name": "a"}]});
        let running = json!({"name": "a", "ready": true, "restartCount": 2, "image": "", "imageID": "",
            "state": {"running": {}}});
        let status = json!({"phase": "Running", "containerStatuses": [running]});
        assert_eq!(word_of(one.clone(), status), ("Running".to_owned(), 1, 1, 2));
        let crashed = json!({"name": "a", "ready": false, "restartCount": 3, "image": "", "imageID": "",
            "state": {"waiting": {"reason": "CrashLoopBackOff"}}});
        let status = json!({"phase": "Running", "containerStatuses": [crashed]});
        assert_eq!(
            word_of(one.clone(), status),
            ("CrashLoopBackOff".to_owned(), 0, 1, 3)
        );
        let ended = json!({"name": "a", "ready": false, "restartCount": 0, "image": "", "imageID": "",
            "state": {"terminated": {"exitCode": 3}}});
        let status = json!({"phase": "Failed", "containerStatuses": [ended]});
        assert_eq!(word_of(one.clone(), status), ("ExitCode:3".to_owned(), 0, 1, 0));
        assert_eq!(
            word_of(one.clone(), json!({"phase": "Failed", "reason": "OutOfpods"})).0,
            "OutOfpods"
        );
        assert_eq!(word_of(one, Value::Null).0, "Pending");
    }

    #[test]
    fn what_holds_up_the_start_is_told() {
        let spec = json!({"containers": [{"name": "a"}],
            "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}, {"name": "j"}]});
        let init = |name: &str, state: Value, started: bool| {
            json!({"name": name, "ready": started, "restartCount": 1, "image": "", "imageID": "", "state": state,
                "started": started})
        };
        let inits = [
            init("i", json!({"terminated": {"exitCode": 0}}), false),
            init("s", json!({"running": {}}), true),
            init("j", json!({"waiting": {"reason": "PodInitializing"}}), false),
        ];
        let status = json!({"phase": "Pending", "initContainerStatuses": inits});
        assert_eq!(word_of(spec, status), ("Init:2/3".to_owned(), 1, 2, 3));
    }

    #[test]
    fn a_pod_under_deletion_is_terminating_until_it_has_ended() {
        let pod = |phase: &str| -> Pod {
            serde_json::from_value(json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"},
                "spec": {"containers": []}, "status": {"phase": phase}}))
            .unwrap()
        };
        assert_eq!(Row::of(&pod("Running")).status, "Terminating");
        assert_eq!(Row::of(&pod("Failed")).status, "Failed");
    }
}
