//! hostPath volumes: the path is checked by its type, never removed.

use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Checks a host path by its type and makes it where the type says so.
pub(super) fn check(path: &str, kind: &str) -> Result<PathBuf, String> {
    let place = plain(path)?;
    let place = place.as_path();
    let make = |result: std::io::Result<()>| result.map_err(|e| format!("hostPath {path}: {e}"));
    match kind {
        "DirectoryOrCreate" if !place.exists() => {
            make(
                std::fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o755)
                    .create(place),
            )?;
        }
        "FileOrCreate" if !place.exists() => {
            let mut options = std::fs::OpenOptions::new();
            make(
                options
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .mode(0o644)
                    .open(place)
                    .map(drop),
            )?;
        }
        // A runtime cannot bind what is not there; it makes a directory, as Docker does.
        "" if !place.exists() => make(std::fs::create_dir_all(place))?,
        _ => {}
    }
    let metadata = std::fs::metadata(place);
    let file_type = metadata.as_ref().map(|m| m.file_type());
    let fits = file_type.is_ok_and(|t| match kind {
        "" => true,
        "Directory" | "DirectoryOrCreate" => t.is_dir(),
        "File" | "FileOrCreate" => t.is_file(),
        "Socket" => t.is_socket(),
        "CharDevice" => t.is_char_device(),
        "BlockDevice" => t.is_block_device(),
        _ => false,
    });
    if fits {
        return Ok(place.to_owned());
    }
    let wanted = match kind {
        "Directory" | "DirectoryOrCreate" => "a directory",
        "File" | "FileOrCreate" => "a file",
        "Socket" => "a socket file",
        "CharDevice" => "a character device",
        "BlockDevice" => "a block device",
        other => return Err(format!("{other} is an invalid volume type")),
    };
    Err(format!("hostPath type check failed: {path} is not {wanted}"))
}

/// A path of the host that says where it leads: absolute and without "..".
pub(super) fn plain(path: &str) -> Result<PathBuf, String> {
    if !Path::new(path).is_absolute() || path.split('/').any(|part| part == "..") {
        return Err(format!("the path {path} must be absolute and without \"..\""));
    }
    Ok(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_decides_what_is_made_and_what_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
        assert!(
            check(&path("absent"), "Directory")
                .unwrap_err()
                .contains("is not a directory")
        );
        assert!(check(&path("d"), "DirectoryOrCreate").unwrap().is_dir());
        assert!(check(&path("f"), "FileOrCreate").unwrap().is_file());
        assert!(
            check(&path("f"), "Socket")
                .unwrap_err()
                .contains("is not a socket")
        );
        assert!(check(&path("d"), "Nonsense").is_err());
        assert!(check("/a/../b", "").is_err());
        assert!(check("/dev/null", "CharDevice").is_ok());
    }
}
