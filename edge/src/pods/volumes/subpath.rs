//! `subPath`: one file or directory of a volume, made safe against links that lead out of it.
//!
//! The path is opened beneath the volume with `openat2(RESOLVE_BENEATH)`: whatever a container has put there, a link
//! out of the volume or a race cannot widen what is mounted. As root the open descriptor is bind-mounted to a place of
//! our own, which the runtime then mounts; without root the checked path itself is used.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstat, mkdirat};

use super::is_root;

/// What is asked for.
pub(crate) struct Subpath<'a> {
    /// Host path of the volume.
    pub(crate) volume: &'a Path,
    /// Name of the volume in the pod.
    pub(crate) name: &'a str,
    /// Name of the container.
    pub(crate) container: &'a str,
    /// Relative path in it, expanded.
    pub(crate) path: &'a str,
    /// Where to bind it: `<pod>/volume-subpaths/<volume>/<container>/<index>`.
    pub(crate) target: &'a Path,
}

/// Makes the path when it is absent and answers what to mount.
pub(crate) fn prepare(subpath: &Subpath<'_>) -> Result<PathBuf, String> {
    let relative = Path::new(subpath.path);
    if relative.is_absolute() {
        return Err(format!(
            "error SubPath `{}` must not be an absolute path",
            subpath.path
        ));
    }
    if relative.components().any(|c| matches!(c, Component::ParentDir)) {
        return Err(format!(
            "unable to provision SubPath `{}`: must not contain '..'",
            subpath.path
        ));
    }
    // Told to the operator only: an error of the host's file system is none of the pod's business.
    let words = |what: &str, error: &dyn std::fmt::Display| {
        tracing::warn!(path = subpath.path, volume = %subpath.volume.display(), "subPath: {what}: {error}");
        format!(
            "failed to prepare subPath for volumeMount \"{}\" of container \"{}\"",
            subpath.name, subpath.container
        )
    };
    let root = open(subpath.volume, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|e| words("the volume cannot be opened", &e))?;
    let mode = fstat(&root)
        .map(|s| Mode::from_bits_truncate(s.st_mode))
        .map_err(|e| words("the volume cannot be read", &e))?;
    let found =
        descend(&root, relative, mode).map_err(|e| words("it cannot be opened inside its volume", &e))?;
    let link = format!("/proc/self/fd/{}", found.as_raw_fd());
    if !is_root() {
        return std::fs::read_link(link).map_err(|e| words("it cannot be resolved", &e));
    }
    // A mount of an earlier attempt would hide a change of the path.
    let _ = nix::mount::umount2(subpath.target, nix::mount::MntFlags::MNT_DETACH);
    let is_dir = fstat(&found)
        .map(|s| SFlag::from_bits_truncate(s.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFDIR)
        .map_err(|e| words("it cannot be read", &e))?;
    let made = if is_dir {
        std::fs::create_dir_all(subpath.target)
    } else {
        let parent = subpath.target.parent().map_or(Ok(()), std::fs::create_dir_all);
        parent.and_then(|()| std::fs::write(subpath.target, b""))
    };
    made.map_err(|e| words("its mount point cannot be made", &e))?;
    mount(
        Some(link.as_str()),
        subpath.target,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .map_err(|e| words("it cannot be mounted", &e))?;
    Ok(subpath.target.to_owned())
}

/// Opens `path` beneath `root`, making missing directories one by one.
///
/// They get the mode of the volume's root, whatever the daemon's umask: a group that may write there may write here.
fn descend(root: &OwnedFd, path: &Path, mode: Mode) -> Result<OwnedFd, Errno> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH);
    let mut walked = PathBuf::new();
    let mut last = openat2(root, ".", how)?;
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        walked.push(name);
        last = match openat2(root, &walked, how) {
            Err(Errno::ENOENT) => {
                let made = match mkdirat(&last, name, Mode::from_bits_truncate(0o750)) {
                    Ok(()) => true,
                    Err(Errno::EEXIST) => false,
                    Err(error) => return Err(error),
                };
                let next = openat2(root, &walked, how)?;
                if made {
                    let place = format!("/proc/self/fd/{}", next.as_raw_fd());
                    fchmodat(AT_FDCWD, place.as_str(), mode, FchmodatFlags::FollowSymlink)?;
                }
                next
            }
            other => other?,
        };
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_path_is_made_and_a_link_that_leads_out_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let root = open(dir.path(), OFlag::O_PATH, Mode::empty()).unwrap();
        let mode = Mode::from_bits_truncate(0o770);
        descend(&root, Path::new("a/b"), mode).unwrap();
        let made = std::fs::metadata(dir.path().join("a/b")).unwrap();
        assert!(made.is_dir());
        assert_eq!(
            std::os::unix::fs::PermissionsExt::mode(&made.permissions()) & 0o777,
            0o770
        );
        std::os::unix::fs::symlink("/etc", dir.path().join("out")).unwrap();
        assert!(descend(&root, Path::new("out/passwd"), mode).is_err());
        std::os::unix::fs::symlink("a", dir.path().join("in")).unwrap();
        assert!(descend(&root, Path::new("in/b"), mode).is_ok());
    }

    #[test]
    fn a_path_that_climbs_is_refused() {
        for path in ["../x", "/x", "a/../../x"] {
            let asked = Subpath {
                volume: Path::new("/tmp"),
                name: "v",
                container: "c",
                path,
                target: Path::new("/nowhere"),
            };
            assert!(prepare(&asked).unwrap_err().contains("must not"), "{path}");
        }
    }
}
