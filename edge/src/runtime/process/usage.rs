//! Where the use of containers is read: their control groups, else their processes.

use std::path::{Path, PathBuf};

use super::files;
use super::record::{self, RunRecord};
use super::store::Store;
use crate::runtime::{CgroupPaths, ContainerState, ContainerUse, Inventory, RuntimeUse};

/// Everything that runs. Pods have the host's network and no images.
pub(super) fn read(store: &Store, inventory: &Inventory) -> RuntimeUse {
    let running = |state: &ContainerState| matches!(state, ContainerState::Running { .. });
    let containers = inventory.containers.iter().filter(|c| running(&c.state));
    let found = containers.filter_map(|container| {
        let dir = store.container_dir(&container.id.0).ok()?;
        let run = record::read::<RunRecord>(&dir, files::RUN).ok().flatten()?;
        Some((container.id.clone(), of(&dir, &run)))
    });
    RuntimeUse {
        containers: found.collect(),
        images: None,
        layers: None,
    }
}

fn of(dir: &Path, run: &RunRecord) -> ContainerUse {
    let upper = dir.join("upper");
    ContainerUse {
        cgroups: paths(&run.cgroups),
        network_pid: None,
        supervisor: Some(run.shim.pid),
        writable_layer: None,
        writable_dir: upper.is_dir().then_some(upper),
    }
}

/// Tells the directories apart by the files that they have.
fn paths(dirs: &[PathBuf]) -> CgroupPaths {
    let with = |file: &str| dirs.iter().find(|dir| dir.join(file).exists()).cloned();
    CgroupPaths {
        cpuacct: with("cpuacct.usage"),
        cpu: with("cpu.shares"),
        memory: with("memory.usage_in_bytes"),
        pids: with("pids.current"),
        blkio: with("blkio.throttle.io_service_bytes"),
        unified: with("cgroup.controllers"),
    }
}
