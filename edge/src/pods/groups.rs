//! The cgroups of pods: made before the sandbox, removed when nothing of the pod runs any more.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::object::Uid;
use tokio::sync::OnceCell;

use super::events::Level;
use super::resources;
use super::worker::{SyncError, Worker};
use crate::cgroup::{Cgroups, Driver, Kernel, PERIOD, Values};
use crate::node::{Shares, capacity, memory_capacity};
use crate::runtime::{Resources, Runtime, RuntimeError};

/// The tree, made when the runtime first says who makes cgroups; and what the machine has.
pub(super) struct Groups {
    /// What the kernel can limit.
    pub(super) kernel: Kernel,
    /// The machine's memory in bytes.
    pub(super) memory_capacity: i64,
    wanted: bool,
    shares: Shares,
    data_dir: PathBuf,
    pids: Option<u64>,
    tree: OnceCell<Cgroups>,
    /// CPU shares that the Burstable tier has.
    burstable: AtomicU64,
    complained: AtomicBool,
}

impl Groups {
    pub(super) fn new(config: &super::PodsConfig) -> Self {
        Self {
            kernel: Kernel::detect(),
            memory_capacity: memory_capacity(&config.data_dir),
            wanted: config.cgroups,
            shares: config.shares,
            data_dir: config.data_dir.clone(),
            pids: config.pod_pids_limit,
            tree: OnceCell::new(),
            burstable: AtomicU64::new(2),
            complained: AtomicBool::new(false),
        }
    }

    /// The tree, or `None` when pods shall have none.
    pub(super) async fn tree(&self, runtime: &dyn Runtime) -> Result<Option<&Cgroups>, RuntimeError> {
        if !self.wanted {
            return Ok(None);
        }
        let make = || async {
            let tree = Cgroups::new(runtime.cgroup_driver().await?);
            let all = capacity::limits(&self.shares, &self.data_dir);
            if let Err(error) = tree.prepare(&all, self.burstable.load(Ordering::Relaxed)).await {
                self.complain(&error.to_string());
            }
            Ok(tree)
        };
        self.tree.get_or_try_init(make).await.map(Some)
    }

    /// The tree, if it is there already.
    pub(super) fn known(&self) -> Option<&Cgroups> {
        self.tree.get()
    }

    /// Values of a pod's own cgroup. `pod` carries the allocation.
    pub(super) fn pod_values(&self, pod: &Pod) -> Values {
        resources::pod_values(pod, &self.kernel, self.pids)
    }

    /// The same for the runtime's ears.
    pub(super) fn runtime_values(&self, values: &Values) -> Resources {
        Resources {
            cpu_shares: values
                .cpu_shares
                .map_or(0, |s| i64::try_from(s).unwrap_or(i64::MAX)),
            cpu_quota: values.cpu_quota.unwrap_or(0),
            cpu_period: if values.cpu_quota.is_some() { PERIOD } else { 0 },
            memory_limit_bytes: values.memory_bytes.unwrap_or(0),
            ..Resources::default()
        }
    }

    /// Gives the Burstable tier what its pods request together.
    pub(super) async fn set_burstable(&self, milli: i128) {
        let shares = resources::shares(milli);
        if self.burstable.swap(shares, Ordering::Relaxed) == shares {
            return;
        }
        if let Some(tree) = self.known()
            && let Err(error) = tree.set_burstable_shares(shares).await
        {
            self.complain(&error.to_string());
        }
    }

    /// An operator is told once; on a machine where the daemon may not make cgroups that is all there is to say.
    fn complain(&self, error: &str) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                error,
                "cgroups of pods cannot be made or set: limits of whole pods are not enforced"
            );
        }
    }
}

impl Worker {
    /// Makes the pod's cgroup, or brings it up to date before a new sandbox; answers whether the sandbox may be made.
    pub(super) async fn make_cgroup(&mut self, pod: &Pod) -> Result<bool, SyncError> {
        let groups = &self.shared.groups;
        let Some(tree) = groups.tree(self.shared.runtime.as_ref()).await? else {
            return Ok(true);
        };
        let place = resources::cgroup(pod);
        let values = groups.pod_values(pod);
        let Err(error) = tree.set(&place, &values).await else {
            self.record.pod_actuated = Some(resources::effective(pod));
            return Ok(true);
        };
        if !self.shared.runtime.isolated() {
            // Processes of the host run without limits where the daemon may not set them.
            groups.complain(&error.to_string());
            return Ok(true);
        }
        let message = format!("unable to ensure pod container exists: {error}");
        self.shared
            .events
            .emit(pod, None, Level::Warning, "FailedCreatePodContainer", message)
            .await;
        self.again = self.again.min(super::worker::RETRY);
        Ok(false)
    }

    /// Parent of the cgroups of the pod's containers, in the runtime's words.
    pub(super) fn cgroup_parent(&self, pod: &Pod) -> String {
        let driver = self
            .shared
            .groups
            .known()
            .map_or(Driver::Cgroupfs, Cgroups::driver);
        resources::cgroup(pod).parent(driver)
    }

    /// Nothing of the pod runs any more: its room is for others.
    pub(super) async fn leave_ledger(&self) {
        self.shared.ledger.forget(&self.uid);
        self.shared
            .groups
            .set_burstable(self.shared.ledger.burstable_cpu())
            .await;
    }

    /// Removes the pod's cgroup and what is left in it. What the kernel does not let go yet is removed by the look at
    /// the end of the pod.
    pub(super) async fn remove_cgroup(&self, uid: &Uid) {
        let groups = &self.shared.groups;
        // A runtime that does not answer has not made anything either.
        if let Ok(Some(tree)) = groups.tree(self.shared.runtime.as_ref()).await
            && !tree.remove(uid).await
        {
            tracing::info!(%uid, "a pod's cgroup is still busy");
        }
    }
}
