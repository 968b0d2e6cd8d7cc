//! Programs that the harness runs: daemons with a log file, and commands to their end.

use std::fs::{File, OpenOptions};
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate is in the workspace")
        .to_owned()
}

/// Where built and downloaded programs are (`hack/lib.sh`).
pub fn tools() -> PathBuf {
    std::env::var_os("SKERRY_BIN").map_or_else(|| repository().join("bin"), PathBuf::from)
}

/// A binary of this workspace, of the same profile as the tests.
pub fn workspace_binary(name: &str) -> PathBuf {
    let exe = std::env::current_exe().expect("the path of the running program");
    let profile = exe
        .parent()
        .and_then(Path::parent)
        .expect("target/<profile>/deps/<test>");
    profile.join(name)
}

/// Whether the tests run as root: only then is there containerd.
pub fn is_root() -> bool {
    let out = Command::new("id").arg("-u").output().expect("id");
    out.stdout.trim_ascii() == b"0"
}

/// A TCP port that was free a moment ago.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .expect("a free port")
        .port()
}

/// Runs a script of `hack/` to its end; its standard output.
///
/// # Panics
/// When it fails, with its output.
pub fn hack(script: &str, args: &[&str]) -> String {
    try_hack(script, args).unwrap_or_else(|e| panic!("hack/{script} {args:?} failed:\n{e}"))
}

/// Runs a script of `hack/` to its end; its standard output.
///
/// # Errors
/// What it printed, when it fails.
pub fn try_hack(script: &str, args: &[&str]) -> Result<String, String> {
    let out = Command::new(repository().join("hack").join(script))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| e.to_string())?;
    if out.status.success() {
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    } else {
        Err(text(&out))
    }
}

/// For `Drop`: says what went wrong and goes on, since a panic may be under way.
pub fn complain(result: Result<String, String>) {
    if let Err(message) = result {
        eprintln!("while cleaning up: {message}");
    }
}

/// Kills every process whose command line names a path below `dir`, and what those have started.
///
/// Only processes that the harness has started know such a path.
pub fn kill_below(dir: &Path) {
    complain(try_hack("kill-below", &[dir.to_str().expect("the path is text")]));
}

/// Standard output and error of a command, one after the other.
pub fn text(out: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    )
}

/// A background process. Dropping it kills it.
pub struct Daemon {
    child: Child,
    log: PathBuf,
    name: String,
    /// Length of the log when it was started.
    begin: u64,
}

impl Daemon {
    /// Starts `command` with its output appended to `log`.
    pub fn start(name: &str, mut command: Command, log: &Path) -> Self {
        let out: File = OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .expect("the log file opens");
        let begin = out.metadata().map_or(0, |m| m.len());
        let err = out.try_clone().expect("the log file opens twice");
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            // Its own group: a Ctrl-C of the tests leaves the order of the end to the harness.
            .process_group(0)
            .spawn()
            .unwrap_or_else(|e| panic!("{name} does not start: {e} ({command:?})"));
        Self {
            child,
            log: log.to_owned(),
            begin,
            name: name.to_owned(),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// Its exit status and the end of its log.
    pub fn check(&mut self) -> Result<(), String> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!("{} ended with {status}:\n{}", self.name, self.log_tail())),
            Err(e) => Err(format!("{}: {e}", self.name)),
        }
    }

    /// Everything that it has logged.
    pub fn log(&self) -> String {
        std::fs::read(&self.log)
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }

    /// What it has logged since it was started, without what an earlier one wrote to the same file.
    pub fn log_since_start(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let begin = usize::try_from(self.begin).unwrap_or(0).min(log.len());
        String::from_utf8_lossy(&log[begin..]).into_owned()
    }

    /// The last lines that it has logged.
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM; answers the exit code, or 128 + signal.
    ///
    /// # Panics
    /// When it has not ended within twenty seconds.
    pub fn terminate(mut self) -> i32 {
        let _ = Command::new("kill").arg(self.pid().to_string()).status();
        self.wait(Duration::from_secs(20))
    }

    /// Waits for its end; answers the exit code, or 128 + signal.
    ///
    /// # Panics
    /// When it has not ended within `deadline`.
    pub fn wait(&mut self, deadline: Duration) -> i32 {
        let end = Instant::now() + deadline;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
            }
            assert!(
                Instant::now() < end,
                "{} has not ended within {deadline:?}:\n{}",
                self.name,
                self.log_tail()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
