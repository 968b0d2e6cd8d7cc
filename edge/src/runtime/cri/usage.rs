//! Where the use of containers is read: their control groups and network namespaces, and what the engine counts of disks.
//!
//! The first process of a container never changes, so each is asked for once. Everything else is one call for all
//! containers and one for the images.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use futures::{StreamExt, stream};

use super::api;
use super::client::Client;
use crate::runtime::{
    CgroupPaths, ContainerId, ContainerState, ContainerUse, DiskUse, Inventory, RuntimeError, RuntimeUse,
    SandboxState,
};
use crate::stats::cgroup;

/// Status calls under way at the same time.
const CONCURRENT_CALLS: usize = 8;

/// What holds for the life of a container or sandbox, by its id.
#[derive(Default)]
pub(super) struct Cache {
    containers: Mutex<HashMap<String, CgroupPaths>>,
    sandboxes: Mutex<HashMap<String, i32>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Only a cache, valid between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Cache {
    pub(super) async fn read(
        &self,
        client: &Client,
        inventory: &Inventory,
    ) -> Result<RuntimeUse, RuntimeError> {
        self.forget(inventory);
        self.learn(client, inventory).await;
        let (disks, images) = tokio::join!(client.container_stats(), client.image_fs_info());
        let mut layers: HashMap<String, DiskUse> = disks?.into_iter().filter_map(layer).collect();
        let mut answer = RuntimeUse::default();
        let images = images?;
        if let Some((dir, used)) = images.image_filesystems.iter().find_map(disk) {
            answer.layers = images
                .container_filesystems
                .iter()
                .find_map(disk)
                .map(|(dir, _)| dir)
                .filter(|other| *other != dir);
            answer.images = Some((dir, used));
        }
        let host: HashSet<&str> = inventory
            .sandboxes
            .iter()
            .filter(|sandbox| sandbox.host_network)
            .map(|sandbox| sandbox.id.0.as_str())
            .collect();
        for container in running(inventory) {
            let Some(cgroups) = lock(&self.containers).get(&container.id.0).cloned() else {
                continue;
            };
            let sandbox = container.sandbox.0.as_str();
            let network_pid = lock(&self.sandboxes).get(sandbox).copied();
            let found = ContainerUse {
                cgroups,
                network_pid: network_pid.filter(|pid| *pid > 0 && !host.contains(sandbox)),
                supervisor: None,
                writable_layer: layers.remove(&container.id.0),
                writable_dir: None,
            };
            answer
                .containers
                .insert(ContainerId(container.id.0.clone()), found);
        }
        Ok(answer)
    }

    fn forget(&self, inventory: &Inventory) {
        let containers: HashSet<&str> = running(inventory).map(|c| c.id.0.as_str()).collect();
        lock(&self.containers).retain(|id, _| containers.contains(id.as_str()));
        let sandboxes: HashSet<&str> = inventory.sandboxes.iter().map(|s| s.id.0.as_str()).collect();
        lock(&self.sandboxes).retain(|id, _| sandboxes.contains(id.as_str()));
    }

    /// Asks about what is not known yet. A container that ends meanwhile, or that the engine tells nothing about, stays
    /// unknown and is asked for again.
    async fn learn(&self, client: &Client, inventory: &Inventory) {
        let containers: Vec<String> = running(inventory)
            .map(|container| container.id.0.clone())
            .filter(|id| !lock(&self.containers).contains_key(id))
            .collect();
        let sandboxes: Vec<String> = inventory
            .sandboxes
            .iter()
            .filter(|sandbox| sandbox.state == SandboxState::Ready && !sandbox.host_network)
            .map(|sandbox| sandbox.id.0.clone())
            .filter(|id| !lock(&self.sandboxes).contains_key(id))
            .collect();
        stream::iter(containers)
            .for_each_concurrent(CONCURRENT_CALLS, |id| async move {
                if let Ok(pid) = client.container_pid(&id).await
                    && let Some(paths) = cgroup::paths_of(pid)
                {
                    lock(&self.containers).insert(id, paths);
                }
            })
            .await;
        stream::iter(sandboxes)
            .for_each_concurrent(CONCURRENT_CALLS, |id| async move {
                if let Ok(pid) = client.sandbox_pid(&id).await
                    && pid > 0
                {
                    lock(&self.sandboxes).insert(id, pid);
                }
            })
            .await;
    }
}

fn running(inventory: &Inventory) -> impl Iterator<Item = &crate::runtime::Container> {
    let running = |state: &ContainerState| matches!(state, ContainerState::Running { .. });
    inventory
        .containers
        .iter()
        .filter(move |container| running(&container.state))
}

pub(super) fn layer(stats: api::ContainerStats) -> Option<(String, DiskUse)> {
    Some((stats.attributes?.id, used(&stats.writable_layer?)))
}

fn used(usage: &api::FilesystemUsage) -> DiskUse {
    DiskUse {
        bytes: usage.used_bytes.as_ref().map_or(0, |value| value.value),
        inodes: usage.inodes_used.as_ref().map_or(0, |value| value.value),
    }
}

pub(super) fn disk(usage: &api::FilesystemUsage) -> Option<(PathBuf, DiskUse)> {
    let dir = PathBuf::from(&usage.fs_id.as_ref()?.mountpoint);
    Some((dir, used(usage)))
}
