//! Lifecycle hooks: postStart right after a container's start, preStop before its stop signal.
//!
//! A hook's own words never go into an event: they may hold what only the pod's users should read.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use k8s_openapi::api::core::v1::{self as core, LifecycleHandler, Pod};

use super::events::Level;
use super::httpget::Get;
use super::plan::find_container;
use super::worker::Shared;
use crate::runtime::{Container, ContainerId, ContainerState, RuntimeError};

/// Who asks, over HTTP.
const AGENT: &str = "kube-lifecycle/1.36";
/// A postStart hook takes as long as it takes; a deletion ends it.
pub(super) const UNLIMITED: Duration = Duration::from_secs(365 * 24 * 3600);

/// A container that is to be stopped, and how.
pub(super) struct Stop<'a> {
    /// Its pod, unless that is not known any more: then it has no hook.
    pub(super) pod: Option<&'a Pod>,
    /// The container.
    pub(super) container: &'a Container,
    /// The pod's address.
    pub(super) ip: Option<IpAddr>,
    /// For hook and stop signal together.
    pub(super) grace: Duration,
    /// What the stop signal gets of it at least.
    pub(super) least: Duration,
}

impl Stop<'_> {
    /// Runs the preStop hook, if there is one and the container runs; at most for the grace.
    pub(super) async fn pre_stop(&self, shared: &Shared) {
        let running = matches!(self.container.state, ContainerState::Running { .. });
        let Some(pod) = self.pod.filter(|_| running && !self.grace.is_zero()) else {
            return;
        };
        let name = &self.container.name;
        let Some(container) = find_container(pod, name) else {
            return;
        };
        let Some(hook) = container.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref()) else {
            return;
        };
        let ip = reached_at(shared, pod, self.ip);
        let hook = run(shared, pod, container, &self.container.id, hook, ip, self.grace);
        match tokio::time::timeout(self.grace, hook).await {
            Ok(Ok(())) => {}
            Ok(Err(why)) => {
                tracing::info!(container = name, why, "a preStop hook failed");
                let message = "PreStopHook failed".to_owned();
                shared
                    .events
                    .emit(pod, Some(name), Level::Warning, "FailedPreStopHook", message)
                    .await;
            }
            Err(_) => tracing::info!(container = name, "a preStop hook did not end within the grace"),
        }
    }

    /// Hook, then stop signal, then the end.
    pub(super) async fn run(&self, shared: &Shared) -> Result<(), RuntimeError> {
        let began = tokio::time::Instant::now();
        self.pre_stop(shared).await;
        let left = self.grace.saturating_sub(began.elapsed());
        self.signal(shared, left).await
    }

    /// The stop signal, with what is left of the grace.
    pub(super) async fn signal(&self, shared: &Shared, left: Duration) -> Result<(), RuntimeError> {
        let left = left.max(self.least.min(self.grace));
        shared.runtime.stop_container(&self.container.id, left).await
    }
}

/// Where a pod is reached: at its own address, or at the node's where it shares the node's network.
pub(super) fn reached_at(shared: &Shared, pod: &Pod, ip: Option<IpAddr>) -> IpAddr {
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    if !shared.runtime.isolated() {
        // Processes of the host listen on any of its addresses; a site's may change under them.
        return loopback;
    }
    let host_network = pod.spec.as_ref().is_some_and(|s| s.host_network == Some(true));
    ip.or(shared.config.node_ip.filter(|_| host_network))
        .unwrap_or(loopback)
}

/// Runs one handler; the error says why it failed, for the status and the log.
pub(super) async fn run(
    shared: &Shared,
    pod: &Pod,
    container: &core::Container,
    id: &ContainerId,
    handler: &LifecycleHandler,
    ip: IpAddr,
    limit: Duration,
) -> Result<(), String> {
    let full = || {
        let name = |n: &Option<String>| n.clone().unwrap_or_default();
        let meta = &pod.metadata;
        format!(
            "for Container \"{}\" in Pod \"{}_{}({})\" failed",
            container.name,
            name(&meta.name),
            name(&meta.namespace),
            name(&meta.uid)
        )
    };
    if let Some(exec) = &handler.exec {
        let command = exec.command.clone().unwrap_or_default();
        let words = command.join(" ");
        return match shared.runtime.exec_sync(id, &command, limit).await {
            Ok(output) if output.code == 0 => Ok(()),
            Ok(output) => Err(format!(
                "Exec lifecycle hook ([{words}]) {} - error: command '{words}' exited with {}: {}, message: \"{}\"",
                full(),
                output.code,
                short(&output.stderr),
                short(&[output.stdout, output.stderr.clone()].concat()),
            )),
            Err(error) => Err(format!(
                "Exec lifecycle hook ([{words}]) {} - error: {error}",
                full()
            )),
        };
    }
    if let Some(action) = &handler.http_get {
        let failed = |why: String| {
            let path = action.path.as_deref().unwrap_or_default();
            format!("HTTP lifecycle hook ({path}) {} - error: {why}", full())
        };
        let get = Get::new(action, container, &ip.to_string(), AGENT).map_err(failed)?;
        // Any answer will do, whatever its status.
        return match get.fetch(limit).await {
            Ok(_) => Ok(()),
            Err(error) if error.plain_server => {
                get.in_plain()
                    .fetch(limit)
                    .await
                    .map_err(|_| failed(error.to_string()))?;
                let message = format!(
                    "request to HTTPS lifecycle hook {} got HTTP response, retry with HTTP succeeded",
                    get.address()
                );
                shared
                    .events
                    .emit(pod, None, Level::Warning, "LifecycleHTTPFallback", message)
                    .await;
                Ok(())
            }
            Err(error) => Err(failed(error.to_string())),
        };
    }
    if let Some(sleep) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
        return Ok(());
    }
    // The API takes a tcpSocket, and says that such a hook fails when it runs.
    Err("Cannot run handler: invalid handler: use exec, httpGet or sleep".to_owned())
}

/// The beginning of a command's output.
fn short(output: &[u8]) -> String {
    String::from_utf8_lossy(&output[..output.len().min(1024)]).into_owned()
}
