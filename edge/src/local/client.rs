//! The asking end: `skerry-edge pods` and `skerry-edge status`.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;

use super::table::{Output, objects, table};
use super::{LINE_BYTES, Line, Question, SiteStatus, socket};

/// How long the daemon may be silent.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why there is no answer. Exit code 1.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No daemon answers.
    #[error(
        "the daemon cannot be asked at {path}: {error}. Is it running, with this data directory, and are you root or in \
         the group skerry?"
    )]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// The system's words.
        error: std::io::Error,
    },
    /// It went away, or is another release.
    #[error("the daemon's answer breaks off: {0}")]
    BrokenOff(String),
    /// It says why.
    #[error("{0}")]
    Refused(String),
    /// There is no such pod.
    #[error("pod {namespace}/{name} is not on this site")]
    NoSuchPod {
        /// Its namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}

/// The pods as text: of all namespaces, of one, or one pod. Blocking.
pub fn pods(
    data_dir: &Path,
    namespace: Option<&str>,
    name: Option<&str>,
    output: Option<Output>,
) -> Result<String, AskError> {
    let whole = matches!(output, Some(Output::Json | Output::Yaml));
    let question = Question::Pods {
        namespace: namespace.map(str::to_owned),
        name: name.map(str::to_owned),
        whole,
    };
    let (mut rows, mut values) = (Vec::new(), Vec::new());
    ask(data_dir, &question, |line| match line {
        Line::Row(row) => rows.push(row),
        Line::Pod(value) => values.push(value),
        _ => {}
    })?;
    if rows.is_empty() && values.is_empty() {
        if let (Some(namespace), Some(name)) = (namespace, name) {
            return Err(AskError::NoSuchPod {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            });
        }
        if !whole {
            return Ok(match namespace {
                Some(namespace) => format!("No pods in namespace {namespace} on this site.\n"),
                None => "No pods on this site.\n".to_owned(),
            });
        }
    }
    match output {
        Some(output) if whole => objects(values, name.is_some(), output).map_err(AskError::BrokenOff),
        other => Ok(table(
            &rows,
            namespace.is_none(),
            other == Some(Output::Wide),
            Timestamp::now(),
        )),
    }
}

/// How the site is, as text. Blocking.
pub fn status(data_dir: &Path) -> Result<String, AskError> {
    let mut found = None;
    ask(data_dir, &Question::Status, |line| {
        if let Line::Status(status) = line {
            found = Some(*status);
        }
    })?;
    found
        .map(|status| in_words(&status))
        .ok_or_else(|| AskError::BrokenOff("it says nothing".to_owned()))
}

fn in_words(status: &SiteStatus) -> String {
    let mut text = String::new();
    let link = match (status.online, status.synced) {
        (true, true) => format!("up since {}, in step with the provider", status.since),
        (true, false) => format!("up since {}, catching up", status.since),
        (false, _) if status.last_error.is_empty() => format!("down since {}", status.since),
        (false, _) => format!("down since {}: {}", status.since, status.last_error),
    };
    let pods = match status.pods.is_empty() {
        true => "none".to_owned(),
        false => {
            let words: Vec<String> = status
                .pods
                .iter()
                .map(|(phase, count)| format!("{count} {phase}"))
                .collect();
            words.join(", ")
        }
    };
    let waiting: Vec<String> = status
        .outbox
        .iter()
        .filter(|(_, reports, _)| *reports > 0)
        .map(|(lane, reports, bytes)| format!("{reports} {lane} ({bytes} bytes)"))
        .collect();
    let waiting = if waiting.is_empty() {
        "empty".to_owned()
    } else {
        waiting.join(", ")
    };
    // Writing to a String cannot fail.
    let _ = writeln!(text, "link         {link}");
    let _ = writeln!(text, "pods         {pods}");
    if !status.runtime_error.is_empty() {
        let _ = writeln!(text, "runtime      {}", status.runtime_error);
    }
    let _ = writeln!(text, "store        {} bytes", status.store_bytes);
    let _ = writeln!(text, "outbox       {waiting}");
    for (lane, reason, count) in &status.drops {
        let _ = writeln!(text, "dropped      {count} {lane}: {reason}");
    }
    text
}

fn ask(data_dir: &Path, question: &Question, mut take: impl FnMut(Line)) -> Result<(), AskError> {
    let path = socket(data_dir);
    let broken = |error: std::io::Error| AskError::BrokenOff(error.to_string());
    let connect = || {
        let stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    };
    let mut stream = connect().map_err(|error| AskError::Unreachable {
        path: path.clone(),
        error,
    })?;
    let mut text = serde_json::to_string(question).map_err(|error| AskError::BrokenOff(error.to_string()))?;
    text.push('\n');
    stream.write_all(text.as_bytes()).map_err(broken)?;
    let mut read = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        read.by_ref()
            .take(LINE_BYTES)
            .read_until(b'\n', &mut line)
            .map_err(broken)?;
        match serde_json::from_slice(&line) {
            Ok(Line::End) => return Ok(()),
            Ok(Line::Error(reason)) => return Err(AskError::Refused(reason)),
            Ok(line) => take(line),
            Err(error) => return Err(AskError::BrokenOff(error.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_site_that_is_cut_off_says_since_when_and_why() {
        let status = SiteStatus {
            since: "2026-01-01T00:00:00Z".to_owned(),
            last_error: "no route".to_owned(),
            pods: [("Running".to_owned(), 3)].into(),
            outbox: vec![("status".to_owned(), 2, 900), ("events".to_owned(), 0, 0)],
            drops: vec![("events".to_owned(), "age".to_owned(), 7)],
            ..SiteStatus::default()
        };
        let text = in_words(&status);
        for part in [
            "link         down since 2026-01-01T00:00:00Z: no route",
            "pods         3 Running",
            "outbox       2 status (900 bytes)",
            "dropped      7 events: age",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_daemon_that_does_not_run_is_told_with_the_socket() {
        let dir = tempfile::tempdir().unwrap();
        let error = pods(dir.path(), None, None, None).unwrap_err().to_string();
        assert!(error.contains("local.sock"), "{error}");
    }
}
