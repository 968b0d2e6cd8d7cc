//! Graceful shutdown of the machine: pods are stopped in order, each with its grace, before the machine goes down.
//!
//! The daemon's own end is another matter: `SIGTERM`, an update or a crash leave every container running. So the
//! machine's shutdown has a signal of its own: `skerry-edge drain`, which asks the running daemon over a socket in the
//! data directory and waits until it is done. `hack/systemd` has a unit that calls it when the machine shuts down, before
//! the daemon and the container engine are stopped.
//!
//! First go the ordinary pods, within `shutdown-grace-period` less `shutdown-grace-period-critical-pods`; then critical and
//! static ones within the latter. From the first moment on the Node is not Ready and new pods are refused.
//!
//! What becomes of the pods is the operator's choice ([`Fate`]): a kubelet fails them, so that their controllers replace
//! them; a site that may come up again without its cloud has nobody who would, and can keep them for the next boot.
//!
//! Source: kubelet, node shutdown manager.

mod control;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::object::Uid;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::pods::{Ending, Pods, is_critical};

pub use control::{DrainError, ask, serve};

/// Name of the control socket in the data directory.
const SOCKET: &str = "control.sock";
/// How often it is looked whether pods have ended.
const LOOK: Duration = Duration::from_millis(100);
/// Beyond the grace: for killing, and for the status to be on disk.
const SLACK: Duration = Duration::from_secs(10);

/// What becomes of pods that a shutdown stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Fate {
    /// They have failed, as with a kubelet: controllers replace them, elsewhere or here.
    #[default]
    Fail,
    /// They start again with the next boot, cloud or not.
    Restart,
}

/// How long a shutdown may take.
#[derive(Clone, Debug)]
pub struct Policy {
    /// In all.
    pub grace: Duration,
    /// Of that, for critical pods at the end.
    pub critical: Duration,
    /// What becomes of the pods.
    pub fate: Fate,
    /// Where the control socket is.
    pub data_dir: PathBuf,
}

/// The machine is going down; it shows on the Node and refuses new pods.
pub type Going = watch::Sender<bool>;

/// Stops all pods; answers how many did not end in time.
pub async fn drain(policy: &Policy, pods: &Pods, going: &Going) -> usize {
    going.send_replace(true);
    pods.shut_down(policy.fate == Fate::Restart);
    let (critical, ordinary): (Vec<_>, Vec<_>) =
        pods.active().into_iter().partition(|(_, pod)| is_critical(pod));
    tracing::warn!(
        pods = ordinary.len() + critical.len(),
        "the machine shuts down; its pods are stopped"
    );
    let first = policy.grace.saturating_sub(policy.critical);
    let late =
        stop(policy, pods, ordinary, first).await + stop(policy, pods, critical, policy.critical).await;
    tracing::info!(late, "the pods are stopped");
    late
}

async fn stop(policy: &Policy, pods: &Pods, group: Vec<(Uid, Arc<Pod>)>, most: Duration) -> usize {
    for (uid, pod) in &group {
        pods.end(uid, terminated(pod, most));
    }
    let deadline = Instant::now() + most + SLACK;
    loop {
        let left = match policy.fate {
            Fate::Fail => group.iter().filter(|(uid, _)| !pods.has_ended(uid)).count(),
            Fate::Restart => pods.running(group.iter().map(|(uid, _)| uid)).await,
        };
        if left == 0 || Instant::now() >= deadline {
            return left;
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn terminated(pod: &Pod, most: Duration) -> Ending {
    let own = pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
    let own = Duration::from_secs(own.and_then(|s| u64::try_from(s).ok()).unwrap_or(30));
    let message = "Pod was terminated in response to imminent node shutdown.".to_owned();
    Ending {
        reason: "Terminated".to_owned(),
        grace: own.min(most).max(Duration::from_secs(1)),
        disruption: Some(message.clone()),
        message,
        event: false,
    }
}
