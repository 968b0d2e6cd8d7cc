//! preStop hooks: run before the stop signal, within the grace of the stop.
//!
//! `exec` and `sleep` run; what else a hook may ask for is named in an event by the worker.

use std::time::Duration;

use k8s_openapi::api::core::v1::{LifecycleHandler, Pod};

use super::events::{Events, Level};
use super::plan::find_container;
use crate::runtime::{Container, Runtime};

/// The preStop hook of a container.
pub(super) fn pre_stop<'a>(pod: &'a Pod, container: &str) -> Option<&'a LifecycleHandler> {
    find_container(pod, container)?
        .lifecycle
        .as_ref()?
        .pre_stop
        .as_ref()
}

/// Whether this node runs such a hook.
pub(super) fn is_supported(hook: &LifecycleHandler) -> bool {
    hook.exec.is_some() || hook.sleep.is_some()
}

/// Runs a container's preStop hook, if it has one, and then stops it; both within `grace`, of which the stop signal
/// gets at least `least`.
pub(super) async fn stop(
    runtime: &dyn Runtime,
    events: &Events,
    pod: Option<&Pod>,
    container: &Container,
    grace: Duration,
    least: Duration,
) -> Result<(), crate::runtime::RuntimeError> {
    let began = tokio::time::Instant::now();
    let running = matches!(container.state, crate::runtime::ContainerState::Running { .. });
    if let Some(pod) = pod.filter(|_| running)
        && let Some(hook) = pre_stop(pod, &container.name)
    {
        let failure = if let Some(exec) = &hook.exec {
            let command = exec.command.clone().unwrap_or_default();
            match runtime.exec_sync(&container.id, &command, grace).await {
                Ok(output) if output.code == 0 => None,
                Ok(output) => Some(format!("command exited with {}", output.code)),
                Err(error) => Some(error.to_string()),
            }
        } else {
            if let Some(sleep) = &hook.sleep {
                let wanted = Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0));
                tokio::time::sleep(wanted.min(grace)).await;
            }
            None
        };
        if let Some(why) = failure {
            tracing::info!(container = container.name, why, "a preStop hook failed");
            let message = "PreStopHook failed".to_owned();
            events
                .emit(
                    pod,
                    Some(&container.name),
                    Level::Warning,
                    "FailedPreStopHook",
                    message,
                )
                .await;
        }
    }
    let left = grace.saturating_sub(began.elapsed()).max(least.min(grace));
    runtime.stop_container(&container.id, left).await
}
