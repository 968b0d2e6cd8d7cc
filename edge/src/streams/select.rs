//! Finds the pod, sandbox, container or log file that a person means.

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use skerry_proto::link::LogsTarget;

use super::{PodLookup, StreamError};
use crate::runtime::{Container, ContainerId, ContainerState, Inventory, Sandbox, SandboxState};

/// The pod that is meant; a UID that was given must match.
pub(super) fn pod(pods: &dyn PodLookup, namespace: &str, name: &str, uid: &str) -> Result<Pod, StreamError> {
    pods.pod(namespace, name)
        .filter(|pod| uid.is_empty() || pods.has_uid(pod, uid))
        .ok_or_else(|| StreamError::not_found("pod does not exist"))
}

/// The newest instance of a container, which must be running. An empty name means the pod's only container.
pub(super) fn running<'a>(
    pod: &Pod,
    name: &str,
    inventory: &'a Inventory,
) -> Result<&'a Container, StreamError> {
    let name = match name {
        "" => only_container(pod)?,
        name => name,
    };
    instances(pod, name, inventory)
        .pop()
        .filter(|container| matches!(container.state, ContainerState::Running { .. }))
        .ok_or_else(|| StreamError::not_found(format!("container not found ({name:?}), or not running")))
}

fn only_container(pod: &Pod) -> Result<&str, StreamError> {
    match pod.spec.as_ref().map(|spec| spec.containers.as_slice()) {
        Some([only]) => Ok(&only.name),
        _ => Err(StreamError::bad_request(
            "the pod has several containers: name one",
        )),
    }
}

/// The newest sandbox of a pod, which must be ready.
pub(super) fn sandbox<'a>(pod: &Pod, inventory: &'a Inventory) -> Result<&'a Sandbox, StreamError> {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    inventory
        .sandboxes
        .iter()
        .filter(|sandbox| sandbox.pod_uid.as_str() == uid && sandbox.state == SandboxState::Ready)
        .max_by_key(|sandbox| (sandbox.attempt, sandbox.created_at))
        .ok_or_else(|| {
            StreamError::not_found(format!("the sandbox of pod {:?} is not running", pod_name(pod)))
        })
}

/// A log file to read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct LogFile {
    /// Where it is; may not exist yet.
    pub(super) path: PathBuf,
    /// The container that still writes it, when it may.
    pub(super) writer: Option<ContainerId>,
}

/// The log that is meant: the newest instance's, or with `previous` the one before.
pub(super) fn log(
    pod: &Pod,
    target: &LogsTarget,
    inventory: &Inventory,
    log_root: &Path,
) -> Result<LogFile, StreamError> {
    let name = target.container.as_str();
    if !names(pod).any(|known| known == name) {
        let message = format!("container {name:?} not found in pod {:?}", target.pod);
        return Err(StreamError::not_found(message));
    }
    let mut instances = instances(pod, name, inventory);
    let newest = instances.pop();
    let directory = match newest.and_then(|container| container.log_path.parent()) {
        Some(directory) => directory.to_owned(),
        None => log_directory(pod, name, log_root),
    };
    let newest_attempt = newest
        .map(|container| container.restart_count)
        .or_else(|| newest_file(&directory));
    if target.previous {
        return previous(pod, target, newest, newest_attempt, &instances, &directory);
    }
    match (newest, newest_attempt) {
        (Some(container), _) if container.state != ContainerState::Created => Ok(LogFile {
            path: container.log_path.clone(),
            writer: matches!(
                container.state,
                ContainerState::Running { .. } | ContainerState::Unknown
            )
            .then(|| container.id.clone()),
        }),
        (None, Some(attempt)) => Ok(LogFile {
            path: directory.join(format!("{attempt}.log")),
            writer: None,
        }),
        (created, _) => match created.and_then(|_| instances.pop()) {
            // A new instance is about to start: the last one's log is what there is.
            Some(last) => Ok(LogFile {
                path: last.log_path.clone(),
                writer: None,
            }),
            None => Err(StreamError::bad_request(format!(
                "container {name:?} in pod {:?} is waiting to start: {}",
                target.pod,
                waiting(pod, name)
            ))),
        },
    }
}

fn previous(
    pod: &Pod,
    target: &LogsTarget,
    newest: Option<&Container>,
    newest_attempt: Option<u32>,
    earlier: &[&Container],
    directory: &Path,
) -> Result<LogFile, StreamError> {
    let file = |path: PathBuf| LogFile { path, writer: None };
    if let Some(newest) = newest.filter(|newest| is_last_state(pod, newest)) {
        return Ok(file(newest.log_path.clone()));
    }
    if let Some(last) = earlier.last() {
        return Ok(file(last.log_path.clone()));
    }
    newest_attempt
        .and_then(|attempt| attempt.checked_sub(1))
        .map(|attempt| directory.join(format!("{attempt}.log")))
        .filter(|path| path.exists())
        .map(file)
        .ok_or_else(|| {
            StreamError::bad_request(format!(
                "previous terminated container {:?} in pod {:?} not found",
                target.container, target.pod
            ))
        })
}

/// While a container waits for its restart, its status shows the newest instance as the last state.
fn is_last_state(pod: &Pod, newest: &Container) -> bool {
    let last = status(pod, &newest.name)
        .filter(|status| status.state.as_ref().is_some_and(|state| state.waiting.is_some()))
        .and_then(|status| {
            status
                .last_state
                .as_ref()?
                .terminated
                .as_ref()?
                .container_id
                .as_deref()
        });
    last.is_some_and(|id| id.split_once("://").map_or(id, |(_, id)| id) == newest.id.0)
}

fn waiting(pod: &Pod, name: &str) -> String {
    let reason = status(pod, name)
        .and_then(|status| status.state.as_ref()?.waiting.as_ref()?.reason.as_deref())
        .unwrap_or("ContainerCreating");
    match reason {
        "ErrImagePull" => "image can't be pulled",
        "ImagePullBackOff" => "trying and failing to pull image",
        other => other,
    }
    .to_owned()
}

fn status<'a>(pod: &'a Pod, name: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    [
        &status.container_statuses,
        &status.init_container_statuses,
        &status.ephemeral_container_statuses,
    ]
    .into_iter()
    .flatten()
    .flatten()
    .find(|status| status.name == name)
}

fn names(pod: &Pod) -> impl Iterator<Item = &str> {
    let spec = pod.spec.as_ref();
    let containers = spec.map(|spec| spec.containers.as_slice()).unwrap_or_default();
    let init = spec
        .and_then(|spec| spec.init_containers.as_deref())
        .unwrap_or_default();
    let ephemeral = spec
        .and_then(|spec| spec.ephemeral_containers.as_deref())
        .unwrap_or_default();
    let named = containers
        .iter()
        .chain(init)
        .map(|container| container.name.as_str());
    named.chain(ephemeral.iter().map(|container| container.name.as_str()))
}

/// All instances of a container, the newest last.
fn instances<'a>(pod: &Pod, name: &str, inventory: &'a Inventory) -> Vec<&'a Container> {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let mut found: Vec<_> = inventory
        .containers
        .iter()
        .filter(|container| container.pod_uid.as_str() == uid && container.name == name)
        .collect();
    found.sort_by_key(|container| (container.restart_count, container.created_at));
    found
}

fn log_directory(pod: &Pod, container: &str, log_root: &Path) -> PathBuf {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    log_root
        .join(format!("{namespace}_{}_{uid}", pod_name(pod)))
        .join(container)
}

/// The highest `<n>.log` in a container's log directory.
fn newest_file(directory: &Path) -> Option<u32> {
    std::fs::read_dir(directory)
        .ok()?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".log")?.parse().ok())
        .max()
}

fn pod_name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::SandboxId;
    use jiff::Timestamp;
    use serde_json::json;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p", "namespace": "ns", "uid": "u"},
            "spec": {
                "containers": [{"name": "c"}],
                "initContainers": [{"name": "i"}],
                "ephemeralContainers": [{"name": "e"}]
            }
        }))
        .unwrap()
    }

    fn container(attempt: u32, state: ContainerState) -> Container {
        Container {
            id: ContainerId(format!("id{attempt}")),
            sandbox: SandboxId("s".into()),
            pod_uid: "u".into(),
            name: "c".into(),
            restart_count: attempt,
            spec_hash: String::new(),
            state,
            created_at: Timestamp::UNIX_EPOCH,
            image: String::new(),
            image_ref: String::new(),
            log_path: format!("/logs/ns_p_u/c/{attempt}.log").into(),
            annotations: Default::default(),
            user: None,
        }
    }

    fn running_state() -> ContainerState {
        ContainerState::Running {
            started_at: Timestamp::UNIX_EPOCH,
        }
    }

    fn exited() -> ContainerState {
        ContainerState::Exited {
            started_at: None,
            finished_at: Timestamp::UNIX_EPOCH,
            code: 1,
            reason: "Error".into(),
            message: String::new(),
        }
    }

    fn inventory(containers: Vec<Container>) -> Inventory {
        Inventory {
            sandboxes: vec![],
            containers,
        }
    }

    fn target(container: &str, previous: bool) -> LogsTarget {
        LogsTarget {
            namespace: "ns".into(),
            pod: "p".into(),
            container: container.into(),
            previous,
            ..LogsTarget::default()
        }
    }

    #[test]
    fn the_newest_attempt_is_read_and_the_one_before_is_previous() {
        let inventory = inventory(vec![container(2, running_state()), container(1, exited())]);
        let file = log(&pod(), &target("c", false), &inventory, Path::new("/none")).unwrap();
        assert_eq!(file.path, Path::new("/logs/ns_p_u/c/2.log"));
        assert_eq!(file.writer, Some(ContainerId("id2".into())));
        let file = log(&pod(), &target("c", true), &inventory, Path::new("/none")).unwrap();
        assert_eq!(
            (file.path.as_path(), file.writer),
            (Path::new("/logs/ns_p_u/c/1.log"), None)
        );
    }

    #[test]
    fn a_previous_attempt_that_the_runtime_forgot_is_found_by_its_file() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("ns_p_u/c");
        std::fs::create_dir_all(&directory).unwrap();
        for attempt in [9, 10] {
            std::fs::write(directory.join(format!("{attempt}.log")), "").unwrap();
        }
        let empty = Inventory::default();
        let newest = log(&pod(), &target("c", false), &empty, root.path()).unwrap();
        assert_eq!(newest.path, directory.join("10.log"));
        let previous = log(&pod(), &target("c", true), &empty, root.path()).unwrap();
        assert_eq!(previous.path, directory.join("9.log"));
    }

    #[test]
    fn a_container_in_back_off_has_its_newest_attempt_as_previous() {
        let mut pod = pod();
        pod.status = serde_json::from_value(json!({"containerStatuses": [{
            "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"exitCode": 1, "containerID": "process://id0"}}
        }]}))
        .unwrap();
        let inventory = inventory(vec![container(0, exited())]);
        let file = log(&pod, &target("c", true), &inventory, Path::new("/none")).unwrap();
        assert_eq!(file.path, Path::new("/logs/ns_p_u/c/0.log"));
    }

    #[test]
    fn without_an_instance_the_error_says_what_is_awaited() {
        let mut pod = pod();
        let empty = Inventory::default();
        let text = |pod: &Pod| log(pod, &target("c", false), &empty, Path::new("/none")).unwrap_err();
        assert_eq!(
            text(&pod).message,
            "container \"c\" in pod \"p\" is waiting to start: ContainerCreating"
        );
        pod.status = serde_json::from_value(json!({"containerStatuses": [{
            "name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"waiting": {"reason": "ImagePullBackOff"}}
        }]}))
        .unwrap();
        let error = text(&pod);
        assert_eq!(error.status, http::StatusCode::BAD_REQUEST);
        assert!(error.message.ends_with("trying and failing to pull image"));
        let previous = log(&pod, &target("c", true), &empty, Path::new("/none")).unwrap_err();
        assert_eq!(
            previous.message,
            "previous terminated container \"c\" in pod \"p\" not found"
        );
    }

    #[test]
    fn init_and_ephemeral_containers_are_known_and_others_are_not() {
        let empty = Inventory::default();
        for (name, status) in [("i", 400), ("e", 400), ("x", 404)] {
            let error = log(&pod(), &target(name, false), &empty, Path::new("/none")).unwrap_err();
            assert_eq!(error.status.as_u16(), status, "{name}");
        }
    }

    #[test]
    fn exec_needs_a_running_container() {
        assert!(running(&pod(), "", &inventory(vec![container(0, running_state())])).is_ok());
        assert!(running(&pod(), "c", &inventory(vec![container(0, exited())])).is_err());
    }
}
