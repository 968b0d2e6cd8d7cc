//! What happens between fork and exec: namespaces, identity, powers, environment. Runs in a single-threaded process.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, User, chdir, execve, getegid, geteuid, setgid, setgroups, setuid};
use serde::{Deserialize, Serialize};

use super::record::{Launch, RunRecord};
use super::rootfs;
use crate::cgroup;

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What the child found out, told to the shim over a pipe before it becomes the container's program.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct ChildReport {
    pub(super) user_namespace: bool,
    pub(super) mount_namespace: bool,
    pub(super) notes: Vec<String>,
    pub(super) error: Option<String>,
}

/// Makes the container's namespaces and enters its root.
pub(super) fn isolate(dir: &Path, launch: &Launch, report: &mut ChildReport) -> Result<(), String> {
    if launch.oom_score_adj != 0
        && let Err(error) = fs::write("/proc/self/oom_score_adj", launch.oom_score_adj.to_string())
        // Where the machine does not let anyone lower it, the inherited value stays, as with the container engines.
        && !(launch.oom_score_adj < 0 && error.kind() == std::io::ErrorKind::PermissionDenied)
    {
        report.notes.push(format!(
            "cannot set oom_score_adj to {}: {error}",
            launch.oom_score_adj
        ));
    }
    let root = geteuid().is_root();
    if root {
        unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("cannot make a mount namespace: {e}"))?;
    } else {
        let (uid, gid) = (geteuid(), getegid());
        if let Err(error) = unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS) {
            report
                .notes
                .push(skipped(&format!("user namespaces are not available ({error})")));
            return Ok(());
        }
        report.user_namespace = true;
        map_ids(launch, uid, gid).map_err(|e| format!("cannot map the user into the namespace: {e}"))?;
    }
    match rootfs::enter(dir, launch, root) {
        Ok(()) => report.mount_namespace = true,
        Err(rootfs::RootError::NotPermitted(error)) if !root => {
            report.notes.push(skipped(&format!(
                "mounts are not permitted in user namespaces ({error})"
            )));
        }
        Err(error) => return Err(error.to_string()),
    }
    Ok(())
}

fn skipped(why: &str) -> String {
    format!("{why}: volumes are not mounted; run skerry-edge as root or allow user namespaces")
}

/// Maps the one id that an ordinary user may map: itself, under the number that the pod asks for.
fn map_ids(launch: &Launch, uid: Uid, gid: Gid) -> io::Result<()> {
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write(
        "/proc/self/uid_map",
        format!("{} {uid} 1", launch.uid.unwrap_or(0)),
    )?;
    fs::write(
        "/proc/self/gid_map",
        format!("{} {gid} 1", launch.gid.unwrap_or(0)),
    )
}

/// Enters the namespaces and cgroups of a running container.
pub(super) fn enter(run: &RunRecord) -> Result<(), String> {
    let namespaces = [
        ("user", CloneFlags::CLONE_NEWUSER, run.user_namespace),
        ("mnt", CloneFlags::CLONE_NEWNS, run.mount_namespace),
    ];
    // Opened before the first is entered: afterwards /proc may look different.
    let mut opened = Vec::new();
    for (name, flag, wanted) in namespaces {
        if wanted {
            let path = format!("/proc/{}/ns/{name}", run.process.pid);
            opened.push((
                name,
                flag,
                fs::File::open(&path).map_err(|e| format!("cannot open {path}: {e}"))?,
            ));
        }
    }
    if !run.process.is_alive() {
        return Err("the container is not running".into());
    }
    let _ = cgroup::join(&run.cgroups);
    for (name, flag, file) in opened {
        setns(file, flag).map_err(|e| format!("cannot enter the container's {name} namespace: {e}"))?;
    }
    Ok(())
}

/// Takes on the container's identity and becomes `argv`. Returns only on failure.
pub(super) fn become_program(launch: &Launch, argv: &[String], mapped: bool, private: bool) -> String {
    match try_become(launch, argv, mapped, private) {
        Ok(never) => match never {},
        Err(message) => message,
    }
}

fn try_become(
    launch: &Launch,
    argv: &[String],
    mapped: bool,
    private: bool,
) -> Result<std::convert::Infallible, String> {
    drop_capabilities(launch)?;
    if !mapped && geteuid().is_root() {
        let uid = launch.uid.unwrap_or(0);
        let gid = launch.gid.unwrap_or_else(|| primary_group(uid));
        let groups: Vec<Gid> = launch.groups.iter().map(|g| Gid::from_raw(*g)).collect();
        setgroups(&groups).map_err(|e| format!("cannot set the supplemental groups: {e}"))?;
        setgid(Gid::from_raw(gid)).map_err(|e| format!("cannot become group {gid}: {e}"))?;
        setuid(Uid::from_raw(uid)).map_err(|e| format!("cannot become user {uid}: {e}"))?;
    }
    if launch.no_new_privileges {
        nix::sys::prctl::set_no_new_privs().map_err(|e| format!("cannot set no_new_privs: {e}"))?;
    }
    let cwd = if launch.working_dir.is_empty() {
        "/"
    } else {
        &launch.working_dir
    };
    if private && !Path::new(cwd).exists() {
        let _ = fs::create_dir_all(cwd);
    }
    chdir(cwd).map_err(|e| format!("cannot enter the working directory {cwd}: {e}"))?;
    let env = environment(launch, geteuid().as_raw());
    let search = env
        .iter()
        .find(|(k, _)| k == "PATH")
        .map_or(DEFAULT_PATH, |(_, v)| v.as_str());
    let name = argv.first().map_or("", String::as_str);
    let program = find_program(name, search)?;
    let bad = |_| "an argument or variable holds a NUL byte".to_owned();
    let path = CString::new(program.as_os_str().as_bytes()).map_err(bad)?;
    let args = argv
        .iter()
        .map(|a| CString::new(a.as_str()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(bad)?;
    let vars = env
        .iter()
        .map(|(k, v)| CString::new(format!("{k}={v}")))
        .collect::<Result<Vec<_>, _>>()
        .map_err(bad)?;
    execve(&path, &args, &vars).map_err(|e| match e {
        Errno::ENOEXEC => format!("exec: {name:?}: exec format error"),
        e => format!("exec: {name:?}: {e}"),
    })
}

/// The group that a user of the host has.
pub(super) fn primary_group(uid: u32) -> u32 {
    // A user that the host does not know gets the group of the same number: group 0 would give away root's files.
    User::from_uid(Uid::from_raw(uid))
        .ok()
        .flatten()
        .map_or(uid, |u| u.gid.as_raw())
}

fn environment(launch: &Launch, uid: u32) -> Vec<(String, String)> {
    let mut env: Vec<(String, String)> = Vec::with_capacity(launch.env.len() + 3);
    for (key, value) in &launch.env {
        match env.iter_mut().find(|(k, _)| k == key) {
            Some(known) => known.1.clone_from(value),
            None => env.push((key.clone(), value.clone())),
        }
    }
    let hostname = || {
        fs::read_to_string("/proc/sys/kernel/hostname")
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let home = || {
        if uid == 0 {
            "/root".to_owned()
        } else {
            "/".to_owned()
        }
    };
    let mut default = |key: &str, value: &dyn Fn() -> String| {
        if !env.iter().any(|(k, _)| k == key) {
            env.push((key.to_owned(), value()));
        }
    };
    default("PATH", &|| DEFAULT_PATH.to_owned());
    default("HOSTNAME", &hostname);
    default("HOME", &home);
    if launch.tty {
        default("TERM", &|| "xterm".to_owned());
    }
    env
}

fn find_program(name: &str, search: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        return match fs::metadata(name) {
            Err(_) => Err(format!("exec: {name:?}: stat {name}: no such file or directory")),
            Ok(meta) if meta.is_dir() => Err(format!("exec: {name:?}: is a directory")),
            Ok(meta) if meta.permissions().mode() & 0o111 == 0 => {
                Err(format!("exec: {name:?}: permission denied"))
            }
            Ok(_) => Ok(PathBuf::from(name)),
        };
    }
    search
        .split(':')
        .filter(|dir| !dir.is_empty() && !name.is_empty())
        .map(|dir| Path::new(dir).join(name))
        .find(|path| fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0))
        .ok_or_else(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

/// Takes everything not granted out of the bounding set, so that no exec, as root or not, can have it.
fn drop_capabilities(launch: &Launch) -> Result<(), String> {
    let Some(keep) = &launch.capabilities else {
        return Ok(());
    };
    let last: u32 = fs::read_to_string("/proc/sys/kernel/cap_last_cap")
        .ok()
        .and_then(|s| s.trim().parse().ok())
        .unwrap_or(40);
    for capability in (0..=last).filter(|c| !keep.contains(c)) {
        match drop_from_bounding_set(capability) {
            Ok(()) => {}
            // Without CAP_SETPCAP there is nothing to drop: an ordinary user has no capabilities.
            Err(Errno::EPERM) if !geteuid().is_root() => return Ok(()),
            Err(error) => return Err(format!("cannot drop capability {capability}: {error}")),
        }
    }
    Ok(())
}

#[allow(unsafe_code)]
fn drop_from_bounding_set(capability: u32) -> Result<(), Errno> {
    // SAFETY: PR_CAPBSET_DROP takes one number and touches no memory; nix has no wrapper for it.
    let done = unsafe {
        nix::libc::prctl(
            nix::libc::PR_CAPBSET_DROP,
            nix::libc::c_ulong::from(capability),
            0,
            0,
            0,
        )
    };
    Errno::result(done).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_is_nowhere_reads_like_runc_says_it() {
        assert_eq!(
            find_program("no-such-thing", DEFAULT_PATH).unwrap_err(),
            "exec: \"no-such-thing\": executable file not found in $PATH"
        );
        assert!(
            find_program("/no/such", "")
                .unwrap_err()
                .contains("no such file or directory")
        );
    }

    #[test]
    fn a_command_is_found_in_the_search_path() {
        assert!(find_program("sh", "/nowhere:/bin").unwrap().ends_with("bin/sh"));
    }
}
