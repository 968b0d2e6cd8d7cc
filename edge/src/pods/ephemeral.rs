//! Ephemeral containers: started into a pod that runs (`kubectl debug`), once, and without a say in its fate.

use k8s_openapi::api::core::v1::{Container, ContainerStatus, EphemeralContainer, Pod};

use super::env::ConfigError;
use super::record::{PodRecord, State, View};
use crate::runtime::{ContainerId, ContainerState};

fn list(pod: &Pod) -> &[EphemeralContainer] {
    pod.spec
        .as_ref()
        .and_then(|s| s.ephemeral_containers.as_deref())
        .unwrap_or_default()
}

/// Whether that is the name of an ephemeral container.
pub(super) fn is_one(pod: &Pod, name: &str) -> bool {
    list(pod).iter().any(|c| c.name == name)
}

/// An ephemeral container by name, as an ordinary one.
pub(super) fn find(pod: &Pod, name: &str) -> Option<Container> {
    list(pod).iter().find(|c| c.name == name).map(ordinary)
}

/// Those that were never started. None ever starts twice, whatever became of it.
pub(super) fn wanted(pod: &Pod, record: &PodRecord) -> Vec<Container> {
    let fresh = |c: &&EphemeralContainer| match record.last(&c.name) {
        None => true,
        // Made, and then the daemon ended.
        Some(last) => last.state == State::Created && record.is_current(last),
    };
    list(pod).iter().filter(fresh).map(ordinary).collect()
}

/// Their statuses; such a container is never ready, and whether it has started is not asked.
pub(super) fn statuses(
    pod: &Pod,
    status: impl Fn(&Container) -> ContainerStatus,
) -> Option<Vec<ContainerStatus>> {
    let mut all: Vec<_> = list(pod)
        .iter()
        .map(|c| ContainerStatus {
            ready: false,
            started: None,
            ..status(&ordinary(c))
        })
        .collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    (!all.is_empty()).then_some(all)
}

/// The running container whose processes an ephemeral container is to see, when it names one.
pub(super) fn target(pod: &Pod, name: &str, view: &View) -> Result<Option<ContainerId>, ConfigError> {
    let Some(wanted) = list(pod)
        .iter()
        .find(|c| c.name == name)
        .and_then(|c| c.target_container_name.as_deref())
        .filter(|t| !t.is_empty())
    else {
        return Ok(None);
    };
    let running = |c: &&crate::runtime::Container| {
        c.name == wanted && matches!(c.state, ContainerState::Running { .. })
    };
    match view.containers.iter().find(running) {
        Some(found) => Ok(Some(found.id.clone())),
        None => Err(ConfigError(format!("unable to find target container {wanted}"))),
    }
}

/// The fields of both kinds of container bear the same names; an ephemeral one has no ports, probes or resources.
fn ordinary(c: &EphemeralContainer) -> Container {
    let own = c.clone();
    Container {
        name: own.name,
        image: own.image,
        image_pull_policy: own.image_pull_policy,
        command: own.command,
        args: own.args,
        working_dir: own.working_dir,
        env: own.env,
        env_from: own.env_from,
        volume_mounts: own.volume_mounts,
        volume_devices: own.volume_devices,
        security_context: own.security_context,
        stdin: own.stdin,
        stdin_once: own.stdin_once,
        tty: own.tty,
        termination_message_path: own.termination_message_path,
        termination_message_policy: own.termination_message_policy,
        ..Container::default()
    }
}
