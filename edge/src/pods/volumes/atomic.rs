//! The atomic writer: a volume's files change all at once.
//!
//! Files live in a directory `..<timestamp>`; the symlink `..data` points to it and is renamed over; the names at the
//! top are symlinks through `..data`. A reader sees either the old set or the new. (The layout of a kubelet.)

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

/// One file to project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Projected {
    /// Its bytes.
    pub(crate) data: Vec<u8>,
    /// Its mode.
    pub(crate) mode: u32,
    /// The user that it belongs to, where that is not the daemon's.
    pub(crate) owner: Option<u32>,
}

/// Files by relative path.
pub(crate) type Payload = BTreeMap<PathBuf, Projected>;

/// Writes `payload` into `target`, which exists; nothing happens when it is there already. Answers whether it wrote.
///
/// `prepare` sees the new directory before it becomes visible (ownership). `keep` are places beside the files that are
/// not the writer's: mount points of other volumes.
pub(crate) fn write(
    target: &Path,
    payload: &Payload,
    keep: &BTreeSet<PathBuf>,
    prepare: impl FnOnce(&Path) -> io::Result<()>,
) -> io::Result<bool> {
    for path in payload.keys() {
        check(path)?;
    }
    let data = target.join("..data");
    let old = std::fs::read_link(&data).ok().map(|name| target.join(name));
    if let Some(old) = &old
        && same(old, payload)
    {
        link_names(target, payload)?;
        return Ok(false);
    }
    let now = jiff::Timestamp::now();
    let name = format!(
        "..{}.{:09}",
        now.strftime("%Y_%m_%d_%H_%M_%S"),
        now.subsec_nanosecond()
    );
    let fresh = target.join(&name);
    std::fs::create_dir(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o755))?;
    for (path, file) in payload {
        let place = fresh.join(path);
        if let Some(parent) = place.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::write(&place, &file.data)?;
        std::fs::set_permissions(&place, std::fs::Permissions::from_mode(file.mode))?;
    }
    prepare(&fresh)?;
    let staged = target.join("..data_tmp");
    let _ = std::fs::remove_file(&staged);
    symlink(&name, &staged)?;
    std::fs::rename(&staged, &data)?;
    link_names(target, payload)?;
    remove_stale(target, payload, keep, &name)?;
    Ok(true)
}

/// A path that stays inside and hides nothing of the writer's own.
fn check(path: &Path) -> io::Result<()> {
    let plain = path.components().all(|c| matches!(c, Component::Normal(_)));
    let own = path
        .components()
        .next()
        .is_some_and(|c| c.as_os_str().to_string_lossy().starts_with(".."));
    if path.as_os_str().is_empty() || !plain || own {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("invalid path {}", path.display()),
        ));
    }
    Ok(())
}

fn same(directory: &Path, payload: &Payload) -> bool {
    let mut found = 0;
    let mut stack = vec![directory.to_owned()];
    while let Some(next) = stack.pop() {
        let Ok(entries) = std::fs::read_dir(&next) else {
            return false;
        };
        for entry in entries.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                stack.push(entry.path());
            } else {
                found += 1;
            }
        }
    }
    found == payload.len()
        && payload.iter().all(|(path, file)| {
            let place = directory.join(path);
            let mode = std::fs::metadata(&place).map(|m| m.permissions().mode() & 0o777);
            mode.is_ok_and(|m| m & 0o700 == file.mode & 0o700)
                && std::fs::read(place).is_ok_and(|bytes| bytes == file.data)
        })
}

/// The names that stand at the top.
fn tops(payload: &Payload) -> BTreeSet<&std::ffi::OsStr> {
    payload
        .keys()
        .filter_map(|p| p.components().next())
        .map(|c| c.as_os_str())
        .collect()
}

fn link_names(target: &Path, payload: &Payload) -> io::Result<()> {
    for top in tops(payload) {
        let link = target.join(top);
        if std::fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(top), link)?;
        }
    }
    Ok(())
}

fn remove_stale(target: &Path, payload: &Payload, keep: &BTreeSet<PathBuf>, current: &str) -> io::Result<()> {
    let mut names = tops(payload);
    names.extend(
        keep.iter()
            .filter_map(|p| p.components().next())
            .map(|c| c.as_os_str()),
    );
    for entry in std::fs::read_dir(target)?.flatten() {
        let name = entry.file_name();
        if name == "..data" || name.to_string_lossy() == current || names.contains(name.as_os_str()) {
            continue;
        }
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(files: &[(&str, &str)]) -> Payload {
        files
            .iter()
            .map(|(path, text)| {
                (
                    PathBuf::from(path),
                    Projected {
                        data: text.as_bytes().to_vec(),
                        mode: 0o644,
                        owner: None,
                    },
                )
            })
            .collect()
    }

    #[test]
    fn a_change_replaces_every_file_and_drops_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path();
        assert!(
            write(
                target,
                &payload(&[("a", "1"), ("d/b", "2")]),
                &BTreeSet::new(),
                |_| Ok(())
            )
            .unwrap()
        );
        assert_eq!(std::fs::read_to_string(target.join("d/b")).unwrap(), "2");
        let before = std::fs::read_link(target.join("..data")).unwrap();
        assert!(write(target, &payload(&[("a", "3")]), &BTreeSet::new(), |_| Ok(())).unwrap());
        assert_eq!(std::fs::read_to_string(target.join("a")).unwrap(), "3");
        assert!(!target.join("d").exists());
        assert!(!target.join(before).exists());
    }

    #[test]
    fn the_same_content_is_not_written_again() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &payload(&[("a", "1")]), &BTreeSet::new(), |_| Ok(())).unwrap();
        assert!(!write(dir.path(), &payload(&[("a", "1")]), &BTreeSet::new(), |_| Ok(())).unwrap());
    }

    #[test]
    fn a_path_that_leads_out_is_refused_and_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["../x", "/x", "a/../../x", "..data", ""] {
            assert!(
                write(dir.path(), &payload(&[(path, "1")]), &BTreeSet::new(), |_| Ok(())).is_err(),
                "{path}"
            );
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
