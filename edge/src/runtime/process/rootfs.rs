//! The file system that a container sees: the host's, with its volumes in place.
//!
//! As root, `/` is an overlay over the host's `/`, so that mount points can be made and writes stay private to the
//! container; the host's other file systems are bound into it. An ordinary user's namespace may not make that
//! overlay: there `/` is a small tmpfs into which the host's top directories are bound. Either way, a mount point that
//! does not exist below a bound directory is made by *exploding* that directory: a tmpfs takes its place and each of its
//! entries is bound into that, so nothing is ever created on the host.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, pivot_root};

use super::record::{Launch, MountRecord};

/// Symbolic links followed before a path is called a loop.
const MAX_LINKS: usize = 40;

/// Why the file system could not be set up.
#[derive(Debug, thiserror::Error)]
pub(super) enum RootError {
    /// Not even private mounts are allowed: the caller goes on without.
    #[error("mounts are not permitted here: {0}")]
    NotPermitted(Errno),
    /// One step failed.
    #[error("{what}: {source}")]
    Step {
        /// The step.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn step<E: Into<io::Error>>(what: impl FnOnce() -> String) -> impl FnOnce(E) -> RootError {
    move |error| RootError::Step {
        what: what(),
        source: error.into(),
    }
}

fn rbind(from: &Path, to: &Path) -> Result<(), RootError> {
    mount(
        Some(from),
        to,
        None::<&str>,
        MsFlags::MS_BIND | MsFlags::MS_REC,
        None::<&str>,
    )
    .map_err(step(|| {
        format!("cannot bind {} to {}", from.display(), to.display())
    }))
}

fn tmpfs(at: &Path, options: &str) -> Result<(), RootError> {
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options))
        .map_err(step(|| format!("cannot mount a tmpfs at {}", at.display())))
}

/// Makes the container's root in the calling process's own mount namespace and enters it.
///
/// `dir` is the container's state directory, `overlay` whether the caller may make overlays.
pub(super) fn enter(dir: &Path, launch: &Launch, overlay: bool) -> Result<(), RootError> {
    // Slave, not private: a mount made later on the host may show up here, never the reverse.
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_SLAVE | MsFlags::MS_REC,
        None::<&str>,
    )
    .map_err(RootError::NotPermitted)?;
    let points = host_mounts(
        &fs::read_to_string("/proc/self/mountinfo").unwrap_or_default(),
        &launch.state_root,
    );
    let root = dir.join("rootfs");
    fs::create_dir_all(&root).map_err(step(|| format!("cannot make {}", root.display())))?;
    let mut tree = Tree {
        root: root.clone(),
        own: BTreeSet::new(),
        explosions: 0,
    };
    if overlay {
        mount_overlay(dir, &root)?;
        tree.claim(&root)?;
        for point in points {
            let target = tree.ensure(&point, &point)?;
            rbind(&point, &target)?;
        }
    } else {
        tree.explode(Path::new("/"))?;
    }
    // Taking a directory's place hides what was made below it before: repeat until nothing is hidden any more.
    loop {
        let before = tree.explosions;
        for volume in &launch.mounts {
            tree.ensure(Path::new(&volume.container_path), &volume.host_path)?;
        }
        if tree.explosions == before {
            break;
        }
    }
    // The state of other containers is nobody's business; sources of volumes are still reached by the old root.
    if let Ok(hidden) = tree.resolve(&launch.state_root)
        && hidden.is_dir()
    {
        tmpfs(&hidden, "size=4k,mode=0555")?;
    }
    for volume in &launch.mounts {
        tree.volume(volume)?;
    }
    if launch.readonly_rootfs {
        remount_readonly(&root)?;
    }
    chdir(&root).map_err(step(|| format!("cannot enter {}", root.display())))?;
    // With both arguments the same, the old root is stacked below the new one and can be let go at once.
    pivot_root(".", ".").map_err(step(|| "cannot change the root".to_owned()))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step(|| "cannot let go of the host's root".to_owned()))?;
    chdir("/").map_err(step(|| "cannot enter /".to_owned()))
}

fn mount_overlay(dir: &Path, root: &Path) -> Result<(), RootError> {
    let attempt = |base: &Path| -> io::Result<()> {
        let (upper, work) = (base.join("upper"), base.join("work"));
        fs::create_dir_all(&upper)?;
        fs::create_dir_all(&work)?;
        let options = format!(
            "lowerdir=/,upperdir={},workdir={}",
            upper.display(),
            work.display()
        );
        Ok(mount(
            Some("overlay"),
            root,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )?)
    };
    if attempt(dir).is_ok() {
        return Ok(());
    }
    // The state directory may itself be on an overlay, which cannot hold another's upper layer.
    let memory = dir.join("memory");
    fs::create_dir_all(&memory).map_err(step(|| format!("cannot make {}", memory.display())))?;
    tmpfs(&memory, "mode=0700")?;
    attempt(&memory).map_err(step(|| {
        "cannot make an overlay over /, not even with a tmpfs: load the kernel's overlay module".to_owned()
    }))
}

/// The host's top-most mount points other than `/`, those inside the runtime's state left out.
fn host_mounts(mountinfo: &str, state_root: &Path) -> Vec<PathBuf> {
    let mut points: Vec<PathBuf> = mountinfo
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let kind = right.split(' ').next()?;
            let point = PathBuf::from(unescape(left.split(' ').nth(4)?));
            let ordinary = !matches!(kind, "overlay" | "nsfs" | "autofs" | "fuse.lxcfs");
            (ordinary && point != Path::new("/") && !point.starts_with(state_root)).then_some(point)
        })
        .collect();
    points.sort();
    points.dedup();
    let mut top: Vec<PathBuf> = Vec::new();
    for point in points {
        if top.last().is_none_or(|last| !point.starts_with(last)) && point.exists() {
            top.push(point);
        }
    }
    top
}

/// Blank, tab, line feed and backslash are written in octal there.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ")
        .replace("\\011", "\t")
        .replace("\\012", "\n")
        .replace("\\134", "\\")
}

/// A root under construction.
struct Tree {
    root: PathBuf,
    /// Devices of the file systems that belong to this container, in which directories may be made.
    own: BTreeSet<u64>,
    /// How many directories were replaced so far.
    explosions: usize,
}

impl Tree {
    fn claim(&mut self, path: &Path) -> Result<(), RootError> {
        let device = fs::metadata(path)
            .map_err(step(|| format!("cannot read {}", path.display())))?
            .dev();
        self.own.insert(device);
        Ok(())
    }

    /// Where an absolute path of the container is on the host, its links followed inside the container's root.
    fn resolve(&self, path: &Path) -> Result<PathBuf, RootError> {
        let mut todo: Vec<PathBuf> = components(path);
        let mut done = PathBuf::new();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            if part == Path::new("..") {
                done.pop();
                continue;
            }
            match fs::read_link(self.root.join(&done).join(&part)) {
                Ok(link) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(step(|| format!("cannot follow {}", path.display()))(Errno::ELOOP));
                    }
                    if link.is_absolute() {
                        done = PathBuf::new();
                    }
                    todo.extend(components(&link));
                }
                Err(_) => done.push(part),
            }
        }
        Ok(self.root.join(done))
    }

    /// Makes sure that `path` exists in the container, a directory or file like `source`; answers where it is.
    fn ensure(&mut self, path: &Path, source: &Path) -> Result<PathBuf, RootError> {
        let target = self.resolve(path)?;
        if target.exists() {
            return Ok(target);
        }
        let relative = target.strip_prefix(&self.root).unwrap_or(&target).to_owned();
        let mut at = self.root.clone();
        let count = relative.components().count();
        for (index, part) in relative.components().enumerate() {
            let next = at.join(part);
            if !next.exists() {
                let device = fs::metadata(&at)
                    .map_err(step(|| format!("cannot read {}", at.display())))?
                    .dev();
                if !self.own.contains(&device) {
                    let inside = Path::new("/").join(at.strip_prefix(&self.root).unwrap_or(&at));
                    self.explode(&inside)?;
                }
                make_like(&next, index + 1 == count && !source.is_dir())?;
            }
            at = next;
        }
        Ok(target)
    }

    /// Puts a tmpfs in the place of a directory and binds the host's entries of it into that.
    fn explode(&mut self, path: &Path) -> Result<(), RootError> {
        let place = self.root.join(path.strip_prefix("/").unwrap_or(path));
        let entries: Vec<_> = fs::read_dir(path)
            .map_err(step(|| format!("cannot list {}", path.display())))?
            .filter_map(Result::ok)
            .collect();
        tmpfs(&place, "size=1m,mode=0755")?;
        self.explosions += 1;
        self.claim(&place)?;
        for entry in entries {
            let (from, to) = (entry.path(), place.join(entry.file_name()));
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_symlink() {
                if let Ok(link) = fs::read_link(&from) {
                    let _ = symlink(link, &to);
                }
                continue;
            }
            make_like(&to, !kind.is_dir())?;
            // One entry that may not be bound (a FUSE mount of another user) must not cost the whole root.
            let _ = rbind(&from, &to);
        }
        Ok(())
    }

    fn volume(&self, volume: &MountRecord) -> Result<(), RootError> {
        let target = self.resolve(Path::new(&volume.container_path))?;
        if !target.exists() {
            // Inside an earlier volume: made there, as every runtime does.
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent).map_err(step(|| format!("cannot make {}", parent.display())))?;
            }
            make_like(&target, !volume.host_path.is_dir())?;
        }
        rbind(&volume.host_path, &target)?;
        if !volume.follow_host {
            mount(
                None::<&str>,
                &target,
                None::<&str>,
                MsFlags::MS_PRIVATE | MsFlags::MS_REC,
                None::<&str>,
            )
            .map_err(step(|| format!("cannot make {} private", volume.container_path)))?;
        }
        if volume.readonly {
            remount_readonly(&target)
        } else {
            Ok(())
        }
    }
}

/// The normal components of a path, last first.
fn components(path: &Path) -> Vec<PathBuf> {
    path.components()
        .rev()
        .filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir))
        .map(|c| PathBuf::from(c.as_os_str()))
        .collect()
}

fn make_like(path: &Path, file: bool) -> Result<(), RootError> {
    let made = if file {
        fs::File::create(path).map(drop)
    } else {
        fs::create_dir(path)
    };
    made.map_err(step(|| format!("cannot make the mount point {}", path.display())))
}

/// A user namespace must keep the flags that the host set, so they are read first.
fn remount_readonly(at: &Path) -> Result<(), RootError> {
    let describe = || format!("cannot make {} read-only", at.display());
    let kept = nix::sys::statvfs::statvfs(at).map_err(step(describe))?.flags();
    let mut flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    for (have, set) in [
        (nix::sys::statvfs::FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (nix::sys::statvfs::FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (nix::sys::statvfs::FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (nix::sys::statvfs::FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (nix::sys::statvfs::FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ] {
        if kept.contains(have) {
            flags |= set;
        }
    }
    mount(None::<&str>, at, None::<&str>, flags, None::<&str>).map_err(step(describe))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_top_most_ordinary_mounts_are_bound() {
        let line = |point: &str, kind: &str| format!("1 1 0:1 / {point} rw - {kind} x rw\n");
        let text = [
            line("/", "ext4"),
            line("/proc", "proc"),
            line("/proc/sys/fs", "tmpfs"),
            line("/tmp", "overlay"),
            line("/sys/x", "nsfs"),
        ]
        .concat();
        assert_eq!(host_mounts(&text, Path::new("/state")), [PathBuf::from("/proc")]);
    }

    #[test]
    fn a_link_is_followed_inside_the_root_and_never_out_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        fs::create_dir_all(root.join("run")).unwrap();
        fs::create_dir(root.join("var")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        symlink("../../../..", root.join("up")).unwrap();
        let tree = Tree {
            root: root.clone(),
            own: BTreeSet::new(),
            explosions: 0,
        };
        assert_eq!(
            tree.resolve(Path::new("/var/run/secrets/x")).unwrap(),
            root.join("run/secrets/x")
        );
        assert_eq!(tree.resolve(Path::new("/up/etc")).unwrap(), root.join("etc"));
    }

    #[test]
    fn a_link_to_itself_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        symlink("/loop", dir.path().join("loop")).unwrap();
        let tree = Tree {
            root: dir.path().to_owned(),
            own: BTreeSet::new(),
            explosions: 0,
        };
        assert!(tree.resolve(Path::new("/loop/x")).is_err());
    }
}
