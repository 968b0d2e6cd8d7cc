//! The state directory as the daemon sees it.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use skerry_proto::object::Uid;
use uuid::Uuid;

use super::files;
use super::record::{self, ContainerRecord, ExitRecord, RunRecord, SandboxRecord};
use crate::runtime::{
    Container, ContainerId, ContainerState, Inventory, RuntimeError, Sandbox, SandboxId, SandboxState,
};

/// A new random id.
pub(super) fn new_id() -> String {
    Uuid::new_v4().simple().to_string()
}

/// Reads and changes the state directory. Remembers what cannot change any more, so that a list costs one look per
/// running container.
pub(super) struct Store {
    root: PathBuf,
    boot_id: String,
    cache: Mutex<Cache>,
    /// Held while an end is recorded that nobody saw: two lists at the same time must tell the same.
    recording: Mutex<()>,
}

#[derive(Default)]
struct Cache {
    /// Records are written once.
    containers: HashMap<String, Arc<ContainerRecord>>,
    /// So are exits.
    ended: HashMap<String, ContainerState>,
    /// Containers seen running at the last list.
    running: HashSet<String>,
    /// Notes already in the daemon's log.
    noted: HashSet<String>,
}

impl Store {
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        for part in ["sandboxes", "containers"] {
            fs::create_dir_all(root.join(part))?;
        }
        let root = root.canonicalize()?;
        Ok(Self {
            root,
            boot_id: record::boot_id(),
            cache: Mutex::default(),
            recording: Mutex::default(),
        })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn check_writable(&self) -> io::Result<()> {
        let probe = self.root.join(format!(".probe-{}", std::process::id()));
        fs::write(&probe, b"")?;
        fs::remove_file(probe)
    }

    /// Logs what a shim could not do, once per text.
    pub(super) fn note_once(&self, note: &str) {
        // Paths of single containers would make every note new.
        let kind = note.split(" /").next().unwrap_or(note).to_owned();
        if self.cache().noted.insert(kind) {
            tracing::warn!(
                note,
                "a container runs with less than was asked for; further notes alike are not logged"
            );
        }
    }

    fn sandbox_dir(&self, id: &str) -> PathBuf {
        self.root.join("sandboxes").join(id)
    }

    /// The directory of a container that exists.
    pub(super) fn container_dir(&self, id: &str) -> Result<PathBuf, RuntimeError> {
        let dir = self.root.join("containers").join(id);
        // An id is never a path.
        let plain = !id.is_empty() && id.bytes().all(|b| b.is_ascii_alphanumeric());
        if plain && dir.is_dir() {
            Ok(dir)
        } else {
            Err(RuntimeError::NotFound(format!("container {id}")))
        }
    }

    fn add<T: Serialize>(&self, dir: &Path, file: &str, value: &T) -> Result<(), RuntimeError> {
        fs::create_dir(dir)
            .and_then(|()| record::write(dir, file, value))
            .map_err(|e| RuntimeError::Failed(format!("cannot write to {}: {e}", dir.display())))
    }

    pub(super) fn add_sandbox(&self, value: &SandboxRecord) -> Result<String, RuntimeError> {
        let id = new_id();
        self.add(&self.sandbox_dir(&id), files::SANDBOX, value)?;
        Ok(id)
    }

    pub(super) fn add_container(&self, id: &str, value: &ContainerRecord) -> Result<(), RuntimeError> {
        self.add(&self.root.join("containers").join(id), files::CONTAINER, value)
    }

    pub(super) fn require_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        match record::read::<SandboxRecord>(&self.sandbox_dir(id), files::SANDBOX) {
            Ok(Some(sandbox)) if self.is_ready(&sandbox) => Ok(()),
            Ok(Some(_)) => Err(RuntimeError::Failed(format!("sandbox {id} is not ready"))),
            Ok(None) => Err(RuntimeError::NotFound(format!("sandbox {id}"))),
            Err(e) => Err(RuntimeError::Failed(format!("cannot read sandbox {id}: {e}"))),
        }
    }

    fn is_ready(&self, sandbox: &SandboxRecord) -> bool {
        !sandbox.stopped && sandbox.boot_id == self.boot_id
    }

    pub(super) fn mark_stopped(&self, id: &str) -> Result<(), RuntimeError> {
        let dir = self.sandbox_dir(id);
        let done = match record::read::<SandboxRecord>(&dir, files::SANDBOX) {
            Ok(Some(mut sandbox)) => {
                sandbox.stopped = true;
                record::write(&dir, files::SANDBOX, &sandbox)
            }
            Ok(None) => Ok(()),
            Err(e) => Err(e),
        };
        done.map_err(|e| RuntimeError::Failed(format!("cannot mark sandbox {id} as stopped: {e}")))
    }

    pub(super) fn remove_sandbox(&self, id: &str) -> Result<(), RuntimeError> {
        remove_dir(&self.sandbox_dir(id))
    }

    pub(super) fn remove_container(&self, id: &str) -> Result<(), RuntimeError> {
        let mut cache = self.cache();
        cache.containers.remove(id);
        cache.ended.remove(id);
        cache.running.remove(id);
        drop(cache);
        remove_dir(&self.root.join("containers").join(id))
    }

    /// Ids of a sandbox's containers.
    pub(super) fn containers_of(&self, sandbox: &str) -> Result<Vec<String>, RuntimeError> {
        let list = self.list()?;
        Ok(list
            .containers
            .into_iter()
            .filter(|c| c.sandbox.0 == sandbox)
            .map(|c| c.id.0)
            .collect())
    }

    /// Whether a container that ran at the last list does not any more.
    pub(super) fn something_ended(&self) -> bool {
        let running: Vec<String> = self.cache().running.iter().cloned().collect();
        let ended: Vec<String> = running
            .into_iter()
            .filter(|id| {
                !matches!(
                    self.state(&self.root.join("containers").join(id)),
                    ContainerState::Running { .. }
                )
            })
            .collect();
        let mut cache = self.cache();
        for id in &ended {
            cache.running.remove(id);
        }
        !ended.is_empty()
    }

    pub(super) fn list(&self) -> Result<Inventory, RuntimeError> {
        let mut inventory = Inventory::default();
        for id in self.ids("sandboxes")? {
            match record::read::<SandboxRecord>(&self.sandbox_dir(&id), files::SANDBOX) {
                Ok(Some(s)) => inventory.sandboxes.push(self.sandbox(id, s)),
                // Being made or removed at this moment.
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(sandbox = id, %error, "left out a sandbox whose state is garbled")
                }
            }
        }
        for id in self.ids("containers")? {
            if let Some(container) = self.container(id) {
                inventory.containers.push(container);
            }
        }
        let running = inventory
            .containers
            .iter()
            .filter(|c| matches!(c.state, ContainerState::Running { .. }));
        self.cache().running = running.map(|c| c.id.0.clone()).collect();
        Ok(inventory)
    }

    fn ids(&self, part: &str) -> Result<Vec<String>, RuntimeError> {
        let dir = self.root.join(part);
        let failed = |e: io::Error| RuntimeError::Failed(format!("cannot list {}: {e}", dir.display()));
        let mut ids = Vec::new();
        for entry in fs::read_dir(&dir).map_err(failed)? {
            if let Ok(name) = entry.map_err(failed)?.file_name().into_string() {
                ids.push(name);
            }
        }
        ids.sort();
        Ok(ids)
    }

    fn sandbox(&self, id: String, record: SandboxRecord) -> Sandbox {
        let state = if self.is_ready(&record) {
            SandboxState::Ready
        } else {
            SandboxState::NotReady
        };
        Sandbox {
            id: SandboxId(id),
            pod_uid: Uid::from(record.pod_uid),
            pod_name: record.pod_name,
            pod_namespace: record.pod_namespace,
            attempt: record.attempt,
            state,
            created_at: record.created_at,
            ips: Vec::new(),
            host_network: true,
        }
    }

    fn container(&self, id: String) -> Option<Container> {
        let dir = self.root.join("containers").join(&id);
        let known = self.cache().containers.get(&id).cloned();
        let record = match known {
            Some(record) => record,
            None => match record::read::<ContainerRecord>(&dir, files::CONTAINER) {
                Ok(Some(record)) => {
                    let record = Arc::new(record);
                    self.cache().containers.insert(id.clone(), record.clone());
                    record
                }
                Ok(None) => return None,
                Err(error) => {
                    tracing::warn!(container = id, %error, "left out a container whose state is garbled");
                    return None;
                }
            },
        };
        let known = self.cache().ended.get(&id).cloned();
        let state = known.unwrap_or_else(|| self.state(&dir));
        if matches!(state, ContainerState::Exited { .. }) {
            self.cache().ended.insert(id.clone(), state.clone());
        }
        Some(Container {
            id: ContainerId(id),
            sandbox: SandboxId(record.sandbox.clone()),
            pod_uid: Uid::from(record.pod_uid.as_str()),
            name: record.name.clone(),
            restart_count: record.restart_count,
            spec_hash: record.spec_hash.clone(),
            state,
            created_at: record.created_at,
            image: record.image.clone(),
            image_ref: record.image_ref.clone(),
            log_path: record.log_path.clone(),
            annotations: record.annotations.clone(),
            user: Some(record.launch.user()),
        })
    }

    fn state(&self, dir: &Path) -> ContainerState {
        let run = match record::read::<RunRecord>(dir, files::RUN) {
            Ok(run) => run,
            Err(_) if dir.join(files::EXIT).exists() => None,
            Err(_) => return ContainerState::Unknown,
        };
        // Looked at before exit.json: a process that ends in between has then written it.
        let alive = run
            .as_ref()
            .is_some_and(|r| r.boot_id == self.boot_id && (r.process.is_alive() || r.shim.is_alive()));
        match (record::read::<ExitRecord>(dir, files::EXIT), run) {
            (Ok(Some(exit)), _) => exit.into(),
            (Ok(None), None) => ContainerState::Created,
            (Ok(None), Some(run)) if alive => ContainerState::Running {
                started_at: run.started_at,
            },
            // A garbled end is an end all the same: what is known to be dead need not be stopped for ever.
            (Ok(None) | Err(_), Some(run)) if !alive => self.lost(dir, &run),
            (Ok(None) | Err(_), _) => ContainerState::Unknown,
        }
    }

    /// Records the end of a container that nobody saw end, so that its time stays the same in every list.
    fn lost(&self, dir: &Path, run: &RunRecord) -> ContainerState {
        let _recording = self.recording.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(Some(exit)) = record::read::<ExitRecord>(dir, files::EXIT) {
            return exit.into();
        }
        let message = if run.boot_id == self.boot_id {
            "its supervisor was killed: the exit code is lost"
        } else {
            "the machine restarted while it ran: the exit code is lost"
        };
        let exit = ExitRecord {
            code: 255,
            started_at: Some(run.started_at),
            finished_at: jiff::Timestamp::now(),
            reason: "Unknown".into(),
            message: message.into(),
        };
        if let Err(error) = record::write(dir, files::EXIT, &exit) {
            tracing::warn!(dir = %dir.display(), %error, "cannot record the end of a container");
        }
        exit.into()
    }
}

impl From<ExitRecord> for ContainerState {
    fn from(exit: ExitRecord) -> Self {
        Self::Exited {
            started_at: exit.started_at,
            finished_at: exit.finished_at,
            code: exit.code,
            reason: exit.reason,
            message: exit.message,
        }
    }
}

fn remove_dir(dir: &Path) -> Result<(), RuntimeError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(RuntimeError::Failed(format!(
            "cannot remove {}: {e}",
            dir.display()
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_lost_container_is_the_same_for_everybody_even_when_its_record_was_garbled() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let container = dir.path().join("containers/c");
        fs::create_dir(&container).unwrap();
        let run = serde_json::json!({
            "shim": {"pid": 1, "startTicks": 0}, "process": {"pid": 1, "startTicks": 0}, "bootId": "another",
            "startedAt": "2026-01-02T03:04:05Z", "userNamespace": false, "mountNamespace": true, "cgroups": [], "notes": [],
        });
        fs::write(container.join(files::RUN), run.to_string()).unwrap();
        for garbled in [None, Some("{\"code\":255}}")] {
            if let Some(text) = garbled {
                fs::write(container.join(files::EXIT), text).unwrap();
            }
            let states: Vec<ContainerState> = std::thread::scope(|scope| {
                let look = |_| scope.spawn(|| store.state(&container));
                let looks: Vec<_> = (0..8).map(look).collect();
                looks.into_iter().map(|look| look.join().unwrap()).collect()
            });
            assert!(
                matches!(states[0], ContainerState::Exited { code: 255, .. }),
                "{:?}",
                states[0]
            );
            assert!(states.iter().all(|state| *state == states[0]), "{states:?}");
            assert_eq!(store.state(&container), states[0]);
        }
    }
}
