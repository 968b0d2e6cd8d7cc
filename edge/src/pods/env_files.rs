//! `fileKeyRef`: variables that an earlier container wrote into a file of one of the pod's volumes.
//!
//! The format is a strict part of a shell's: `NAME='value'`, the value between single quotes as it stands, over several
//! lines if need be; blank lines and lines that begin with `#` are skipped.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, FileKeySelector};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::Mode;

use super::env::ConfigError;

/// Largest file that is read.
const LIMIT: u64 = 1 << 20;

/// The container with its `fileKeyRef` variables replaced by what the files hold; optional ones that are not there
/// are left out.
pub(super) fn resolved<'a>(
    container: &'a Container,
    volumes: &BTreeMap<String, PathBuf>,
) -> Result<Cow<'a, Container>, ConfigError> {
    let is_file = |e: &k8s_openapi::api::core::v1::EnvVar| {
        e.value_from.as_ref().is_some_and(|f| f.file_key_ref.is_some())
    };
    if !container.env.iter().flatten().any(is_file) {
        return Ok(Cow::Borrowed(container));
    }
    let mut resolved = container.clone();
    let mut env = Vec::new();
    for mut var in resolved.env.take().into_iter().flatten() {
        if let Some(reference) = var.value_from.as_ref().and_then(|f| f.file_key_ref.as_ref()) {
            let Some(value) = value(reference, volumes)? else {
                continue;
            };
            // The value is taken as it stands: nothing in it is expanded.
            var.value = Some(value.replace('$', "$$"));
            var.value_from = None;
        }
        env.push(var);
    }
    resolved.env = Some(env);
    Ok(Cow::Owned(resolved))
}

fn value(
    reference: &FileKeySelector,
    volumes: &BTreeMap<String, PathBuf>,
) -> Result<Option<String>, ConfigError> {
    let volume = volumes.get(&reference.volume_name).ok_or_else(|| {
        ConfigError(format!(
            "cannot find the volume \"{}\" referenced by FileKeyRef",
            reference.volume_name
        ))
    })?;
    let found = read_beneath(volume, &reference.path).and_then(|text| parse(&text, &reference.key));
    let found = found.map_err(|why| {
        tracing::warn!(
            volume = reference.volume_name,
            path = reference.path,
            why,
            "an env file cannot be read"
        );
        ConfigError("couldn't parse env file".to_owned())
    })?;
    match found {
        Some(value) if !value.is_empty() => Ok(Some(value)),
        _ if reference.optional == Some(true) => Ok(None),
        _ => Err(ConfigError(format!(
            "environment variable key \"{}\" not found in file \"{}\"",
            reference.key,
            volume.join(&reference.path).display()
        ))),
    }
}

/// Reads a file of a volume. A link that leads out of the volume is not followed there.
fn read_beneath(volume: &Path, path: &str) -> Result<String, String> {
    let words = |e: nix::errno::Errno| e.to_string();
    let root = open(volume, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(words)?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = openat2(&root, path, how).map_err(words)?;
    let file = std::fs::File::from(file);
    if !file.metadata().is_ok_and(|m| m.is_file()) {
        return Err("it is not a file".to_owned());
    }
    let mut text = String::new();
    let read = file
        .take(LIMIT + 1)
        .read_to_string(&mut text)
        .map_err(|e| e.to_string())?;
    if read as u64 > LIMIT {
        return Err(format!("it has more than {LIMIT} bytes"));
    }
    Ok(text)
}

/// The value of `key`; `None` when no line names it. Lines after it are not looked at.
fn parse(text: &str, key: &str) -> Result<Option<String>, String> {
    let mut lines = text.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        let number = index + 1;
        let invalid = |what: &str| {
            Err(format!(
                "invalid environment variable format at line {number}: {what}"
            ))
        };
        let line = line.trim_start_matches([' ', '\t']);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((name, value)) = line.split_once('=') else {
            return invalid("missing '='");
        };
        if name.is_empty() {
            return invalid("empty variable name");
        }
        if name.ends_with([' ', '\t']) {
            return invalid("whitespace before '=' is not allowed");
        }
        // A shell takes `A= 'x'` for an empty A.
        if value.starts_with([' ', '\t']) {
            if name == key {
                return Ok(Some(String::new()));
            }
            continue;
        }
        let Some(rest) = value.strip_prefix('\'') else {
            return invalid("value must be enclosed in single quotes");
        };
        let mut value = String::new();
        let mut rest = rest;
        let after = loop {
            if let Some((end, after)) = rest.split_once('\'') {
                value.push_str(end);
                break after;
            }
            value.push_str(rest);
            value.push('\n');
            match lines.next() {
                Some((_, next)) => rest = next,
                None => return invalid("unclosed single quote"),
            }
        };
        let after = after.trim_start_matches([' ', '\t']);
        if !after.is_empty() && !after.starts_with('#') {
            return invalid("unexpected content after closing quote");
        }
        if name == key {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_value_stands_between_single_quotes_over_as_many_lines_as_it_needs() {
        let text = "# comment\n\n  A='one' # more\nB='two\nlines'\nC= 'x'\n";
        assert_eq!(parse(text, "A"), Ok(Some("one".into())));
        assert_eq!(parse(text, "B"), Ok(Some("two\nlines".into())));
        assert_eq!(parse(text, "C"), Ok(Some(String::new())));
        assert_eq!(parse(text, "D"), Ok(None));
    }

    #[test]
    fn what_a_shell_might_read_otherwise_is_refused() {
        for text in ["A", "='x'", "A ='x'", "A=x", "A=\"x\"", "A='x", "A='x'y"] {
            assert!(parse(text, "A").is_err(), "{text}");
        }
    }

    fn with(optional: bool, key: &str, path: &str, dir: &Path) -> Result<Option<String>, ConfigError> {
        let container: Container =
            serde_json::from_value(json!({"name": "c", "env": [{"name": "X", "valueFrom":
            {"fileKeyRef": {"volumeName": "v", "path": path, "key": key, "optional": optional}}}]}))
            .unwrap();
        let volumes = BTreeMap::from([("v".to_owned(), dir.to_owned())]);
        let env = resolved(&container, &volumes)?.env.clone().unwrap();
        Ok(env.first().and_then(|e| e.value.clone()))
    }

    #[test]
    fn a_key_comes_from_the_volume_s_file_and_never_from_outside() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("env"), "A='$(B)'\n").unwrap();
        assert_eq!(with(false, "A", "env", dir.path()), Ok(Some("$$(B)".into())));
        assert_eq!(with(true, "Z", "env", dir.path()), Ok(None));
        assert!(
            with(false, "Z", "env", dir.path())
                .unwrap_err()
                .0
                .contains("key \"Z\" not found in file")
        );
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(outside.path(), "A='secret'\n").unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("link")).unwrap();
        assert_eq!(
            with(true, "A", "link", dir.path()),
            Err(ConfigError("couldn't parse env file".into()))
        );
    }
}
