//! Gets a name back that a crash in the middle of a creation has left taken.
//!
//! An engine has one sandbox per pod and attempt, and one container per sandbox, name and attempt. When the daemon or
//! the connection dies between request and answer, the next request for the same finds the name taken. The leftover
//! was never seen by anyone, so it goes, unless a container runs in it: then the caller's view is out of date.

use std::time::Duration;

use super::api;
use super::client::Client;
use super::failure::CreateError;
use super::gone_is_success;
use crate::runtime::{RuntimeError, SandboxConfig, SandboxId};

/// Whether a creation failed because of its name.
pub(super) fn is_name_taken<T>(outcome: &Result<T, CreateError>) -> bool {
    matches!(outcome, Err(CreateError::NameTaken(_)))
}

/// Removes the leftover that has the name of `config`. Answers whether there was one, so that trying again may help.
pub(super) async fn free_sandbox_name(client: &Client, config: &SandboxConfig) -> Result<bool, RuntimeError> {
    let listed = client.list_pod_sandboxes(None).await?;
    let Some(leftover) = listed.into_iter().find(|sandbox| is_sandbox(sandbox, config)) else {
        return Ok(false);
    };
    let containers = client.list_containers(None, Some(&leftover.id)).await?;
    if let Some(running) = containers.iter().find(|container| is_running(container)) {
        return Err(RuntimeError::Failed(format!(
            "sandbox {} of pod {}/{} exists and container {} runs in it",
            leftover.id, config.namespace, config.name, running.id
        )));
    }
    gone_is_success(client.stop_pod_sandbox(&leftover.id).await)?;
    gone_is_success(client.remove_pod_sandbox(&leftover.id).await)?;
    tracing::info!(
        sandbox = leftover.id,
        pod = %config.uid,
        "removed a sandbox that an interrupted creation had left"
    );
    Ok(true)
}

/// The same for a container.
pub(super) async fn free_container_name(
    client: &Client,
    sandbox: &SandboxId,
    name: &str,
    attempt: u32,
) -> Result<bool, RuntimeError> {
    let listed = client.list_containers(None, Some(&sandbox.0)).await?;
    let Some(leftover) = listed.into_iter().find(|container| {
        container
            .metadata
            .as_ref()
            .is_some_and(|metadata| metadata.name == name && metadata.attempt == attempt)
    }) else {
        return Ok(false);
    };
    if is_running(&leftover) {
        return Err(RuntimeError::Failed(format!(
            "container {name} exists and runs as {} in sandbox {}",
            leftover.id, sandbox.0
        )));
    }
    gone_is_success(client.stop_container(&leftover.id, Duration::ZERO).await)?;
    gone_is_success(client.remove_container(&leftover.id).await)?;
    tracing::info!(
        container = leftover.id,
        name,
        "removed a container that an interrupted creation had left"
    );
    Ok(true)
}

fn is_sandbox(sandbox: &api::PodSandbox, config: &SandboxConfig) -> bool {
    sandbox.metadata.as_ref().is_some_and(|metadata| {
        metadata.uid == config.uid.as_str()
            && metadata.attempt == config.attempt
            && metadata.name == config.name
            && metadata.namespace == config.namespace
    })
}

fn is_running(container: &api::Container) -> bool {
    container.state() == api::ContainerState::ContainerRunning
}
