//! Termination messages: a container's last words, from its file or its log.

use std::io::Read;
use std::path::{Path, PathBuf};

use crate::runtime::{self, labels};

/// Longest termination message.
const MAX_MESSAGE: u64 = 4096;
/// Longest termination message that is taken from the log.
const MAX_LOG_MESSAGE: usize = 2048;
/// Most lines of it.
const MAX_LOG_LINES: usize = 80;

/// The host file that a container writes its last words to.
pub(super) fn message_file(pod_dir: &Path, container: &str, restart_count: u32) -> PathBuf {
    pod_dir
        .join("containers")
        .join(container)
        .join(format!("termination-{restart_count}"))
}

/// What an ended container has left as its last words.
pub(super) fn termination_message(pod_dir: &Path, container: &runtime::Container) -> String {
    let path = message_file(pod_dir, &container.name, container.restart_count);
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.take(MAX_MESSAGE).read_to_end(&mut bytes);
    }
    let failed = matches!(container.state, runtime::ContainerState::Exited { code, .. } if code != 0);
    let policy = container
        .annotations
        .get(labels::TERMINATION_MESSAGE_POLICY)
        .map(String::as_str);
    if bytes.is_empty() && failed && policy == Some("FallbackToLogsOnError") {
        return log_tail(&container.log_path);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The last lines of a log in CRI format, without times and stream names.
fn log_tail(path: &Path) -> String {
    use std::io::{Seek, SeekFrom};
    let mut bytes = Vec::new();
    if let Ok(mut file) = std::fs::File::open(path) {
        // Each line carries a prefix of some 45 bytes.
        let most = (MAX_LOG_MESSAGE + MAX_LOG_LINES * 64) as i64;
        let length = file.metadata().map_or(0, |m| m.len());
        if length > most.unsigned_abs() {
            let _ = file.seek(SeekFrom::End(-most));
        }
        let _ = file.take(most.unsigned_abs()).read_to_end(&mut bytes);
    }
    let text = String::from_utf8_lossy(&bytes);
    // Time, stream, tag, text. The tag P marks what goes on in the next entry, or ended without a newline.
    let entries: Vec<(&str, bool)> = text
        .lines()
        .filter_map(|line| {
            let mut parts = line.splitn(4, ' ').skip(2);
            let tag = parts.next()?;
            Some((parts.next()?, tag.split(':').next() != Some("P")))
        })
        .collect();
    let mut out = String::new();
    for (text, whole) in &entries[entries.len().saturating_sub(MAX_LOG_LINES)..] {
        out.push_str(text);
        if *whole {
            out.push('\n');
        }
    }
    if out.len() > MAX_LOG_MESSAGE {
        let mut start = out.len() - MAX_LOG_MESSAGE;
        while !out.is_char_boundary(start) {
            start += 1;
        }
        out.drain(..start);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{container, exited};
    use super::*;

    #[test]
    fn the_message_file_wins_and_the_log_helps_out_only_after_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("0.log");
        std::fs::write(
            &log,
            "2026-01-01T00:00:00Z stdout F one two\n2026-01-01T00:00:00Z stderr F three\n",
        )
        .unwrap();
        let mut c = container("c", "id", 0, exited(9, 1));
        c.log_path = log;
        assert_eq!(termination_message(dir.path(), &c), "");
        let policy = (
            labels::TERMINATION_MESSAGE_POLICY.to_owned(),
            "FallbackToLogsOnError".to_owned(),
        );
        c.annotations.extend([policy]);
        assert_eq!(termination_message(dir.path(), &c), "one two\nthree\n");
        std::fs::write(
            &c.log_path,
            "2026-01-01T00:00:00Z stdout P one \n2026-01-01T00:00:00Z stdout F two\n2026-01-01T00:00:00Z stdout P end\n",
        )
        .unwrap();
        assert_eq!(termination_message(dir.path(), &c), "one two\nend");
        c.state = exited(9, 0);
        assert_eq!(termination_message(dir.path(), &c), "");
        let file = message_file(dir.path(), "c", 0);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, "x".repeat(5000)).unwrap();
        assert_eq!(termination_message(dir.path(), &c).len(), 4096);
    }
}
