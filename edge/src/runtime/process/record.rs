//! What is written down about sandboxes and containers, and how.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Written by the daemon: what the sandbox is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SandboxRecord {
    pub(super) pod_uid: String,
    pub(super) pod_name: String,
    pub(super) pod_namespace: String,
    pub(super) attempt: u32,
    pub(super) created_at: Timestamp,
    /// A sandbox of an earlier boot is not ready any more.
    pub(super) boot_id: String,
    pub(super) stopped: bool,
}

/// Written by the daemon once: what the container is and how it is run.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ContainerRecord {
    pub(super) sandbox: String,
    pub(super) pod_uid: String,
    pub(super) name: String,
    pub(super) restart_count: u32,
    pub(super) spec_hash: String,
    pub(super) created_at: Timestamp,
    pub(super) image: String,
    pub(super) image_ref: String,
    pub(super) log_path: PathBuf,
    pub(super) annotations: BTreeMap<String, String>,
    /// Name of the signal that asks it to end; empty for `SIGTERM`.
    #[serde(default)]
    pub(super) stop_signal: String,
    pub(super) launch: Launch,
}

/// How the shim starts the process.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Launch {
    pub(super) argv: Vec<String>,
    pub(super) working_dir: String,
    pub(super) env: Vec<(String, String)>,
    pub(super) mounts: Vec<MountRecord>,
    /// Root of the runtime's state, hidden from the container.
    pub(super) state_root: PathBuf,
    pub(super) stdin: bool,
    /// Stdin ends with the first client that was attached to it.
    #[serde(default)]
    pub(super) stdin_once: bool,
    pub(super) tty: bool,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) groups: Vec<u32>,
    pub(super) no_new_privileges: bool,
    pub(super) readonly_rootfs: bool,
    /// Numbers of the capabilities that stay in the bounding set; `None` keeps all.
    pub(super) capabilities: Option<Vec<u32>>,
    /// Directory below the cgroup roots.
    pub(super) cgroup: String,
    pub(super) cpu_shares: i64,
    pub(super) cpu_quota: i64,
    pub(super) cpu_period: i64,
    pub(super) memory_limit_bytes: i64,
    pub(super) oom_score_adj: i64,
}

impl Launch {
    /// As whom the process starts.
    pub(super) fn user(&self) -> crate::runtime::ContainerUser {
        crate::runtime::ContainerUser {
            uid: self.uid.unwrap_or(0).into(),
            gid: self.gid.unwrap_or(0).into(),
            groups: self.groups.iter().copied().map(i64::from).collect(),
        }
    }

    /// Takes over other cgroup values; zero leaves what there is.
    pub(super) fn resize(&mut self, resources: &crate::runtime::Resources) {
        for (own, new) in [
            (&mut self.cpu_shares, resources.cpu_shares),
            (&mut self.cpu_quota, resources.cpu_quota),
            (&mut self.cpu_period, resources.cpu_period),
            (&mut self.memory_limit_bytes, resources.memory_limit_bytes),
        ] {
            if new != 0 {
                *own = new;
            }
        }
    }

    /// What the container's cgroup may use.
    pub(super) fn limits(&self) -> crate::cgroup::Values {
        crate::cgroup::Values {
            cpu_shares: u64::try_from(self.cpu_shares).ok().filter(|shares| *shares > 0),
            cpu_quota: (self.cpu_quota != 0).then_some(self.cpu_quota),
            memory_bytes: (self.memory_limit_bytes != 0).then_some(self.memory_limit_bytes),
            die_together: true,
            ..crate::cgroup::Values::default()
        }
    }
}

/// A bind mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct MountRecord {
    pub(super) container_path: String,
    pub(super) host_path: PathBuf,
    pub(super) readonly: bool,
    /// Mounts made later on the host show up in it.
    pub(super) follow_host: bool,
}

/// Written by the shim when the process runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RunRecord {
    pub(super) shim: ProcessIdentity,
    pub(super) process: ProcessIdentity,
    pub(super) boot_id: String,
    pub(super) started_at: Timestamp,
    pub(super) user_namespace: bool,
    pub(super) mount_namespace: bool,
    pub(super) cgroups: Vec<PathBuf>,
    /// What could not be done, for the operator.
    pub(super) notes: Vec<String>,
    /// The shim opens its log anew on SIGHUP.
    #[serde(default)]
    pub(super) reopens_log: bool,
}

/// Written by the shim when all is over.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ExitRecord {
    pub(super) code: i32,
    pub(super) started_at: Option<Timestamp>,
    pub(super) finished_at: Timestamp,
    pub(super) reason: String,
    pub(super) message: String,
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProcessIdentity {
    pub(super) pid: i32,
    /// Clock ticks since boot, field 22 of `/proc/<pid>/stat`.
    pub(super) start_ticks: u64,
}

impl ProcessIdentity {
    /// The process that has this number now.
    pub(super) fn of(pid: i32) -> Option<Self> {
        stat(pid).map(|s| Self {
            pid,
            start_ticks: s.start_ticks,
        })
    }

    /// Whether it still runs; a zombie does not.
    pub(super) fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|s| s.start_ticks == self.start_ticks && !matches!(s.state, 'Z' | 'X'))
    }
}

/// The few fields of `/proc/<pid>/stat` that matter here.
pub(super) struct Stat {
    pub(super) state: char,
    pub(super) parent: i32,
    pub(super) start_ticks: u64,
}

/// Reads `/proc/<pid>/stat`.
pub(super) fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The command name may hold blanks and parentheses: everything after the last `)` is regular.
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        start_ticks: fields.get(19)?.parse().ok()?,
    })
}

/// Identifies this boot of the machine.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|s| s.trim().to_owned())
        .unwrap_or_default()
}

/// Writes a record so that a reader sees the old one or the new one, and a power cut loses neither.
pub(super) fn write<T: Serialize>(dir: &Path, file: &str, value: &T) -> io::Result<()> {
    // Two threads may write the same record: each into a file of its own.
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let number = WRITES.fetch_add(1, Ordering::Relaxed);
    let temporary = dir.join(format!(".{file}.{}.{number}", std::process::id()));
    let mut out = fs::File::create(&temporary)?;
    out.write_all(&serde_json::to_vec(value)?)?;
    out.sync_all()?;
    fs::rename(&temporary, dir.join(file))?;
    fs::File::open(dir)?.sync_all()
}

/// Reads a record; `None` when there is no such file.
pub(super) fn read<T: DeserializeOwned>(dir: &Path, file: &str) -> io::Result<Option<T>> {
    match fs::read(dir.join(file)) {
        Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_parentheses_does_not_confuse_the_stat_parser() {
        let text = "42 (a) b (c)) S 7 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 1 1";
        let stat = parse_stat(text).unwrap();
        assert_eq!((stat.state, stat.parent, stat.start_ticks), ('S', 7, 987_654));
    }

    #[test]
    fn a_process_with_another_start_time_is_not_the_same_process() {
        let me = ProcessIdentity::of(std::process::id() as i32).unwrap();
        assert!(me.is_alive());
        assert!(
            !ProcessIdentity {
                start_ticks: me.start_ticks + 1,
                ..me
            }
            .is_alive()
        );
    }

    #[test]
    fn records_written_at_the_same_time_are_each_whole() {
        let dir = tempfile::tempdir().unwrap();
        let exit = |length: usize| ExitRecord {
            code: 255,
            started_at: None,
            finished_at: jiff::Timestamp::UNIX_EPOCH,
            reason: "Unknown".into(),
            message: "x".repeat(length),
        };
        std::thread::scope(|scope| {
            for length in [1, 5000, 100, 20_000] {
                let dir = dir.path();
                scope.spawn(move || {
                    for _ in 0..20 {
                        write(dir, "exit.json", &exit(length)).unwrap();
                        assert!(read::<ExitRecord>(dir, "exit.json").unwrap().is_some());
                    }
                });
            }
        });
    }

    #[test]
    fn a_missing_record_is_none_and_a_garbled_one_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read::<ExitRecord>(dir.path(), "exit.json").unwrap().is_none());
        fs::write(dir.path().join("exit.json"), "{\"code\":").unwrap();
        assert!(read::<ExitRecord>(dir.path(), "exit.json").is_err());
    }
}
