//! The supervisor of one container: a process of its own, so that the daemon may die without it.
//!
//! The daemon's binary is re-executed as `<exe> shim run <dir>` or `<exe> shim exec <dir> <request>`, before any thread
//! starts. Blocking code on purpose: one shim per container has to stay small.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use jiff::Timestamp;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe2, setsid};

use super::attach::{self, Hub};
use super::child::{self, ChildReport};
use super::files;
use super::log::LineLog;
use super::record::{self, ContainerRecord, ExitRecord, ProcessIdentity, RunRecord};
use crate::cgroup;

/// What the shim says to the daemon once the program runs, or cannot.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
pub(super) struct StartAnswer {
    pub(super) error: Option<String>,
    pub(super) notes: Vec<String>,
}

/// A command for a running container.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct ExecCommand {
    pub(super) argv: Vec<String>,
    /// Standard input is a terminal, to become the controlling one.
    pub(super) tty: bool,
}

/// Entry point for the arguments that follow `shim` on the command line. Call it before any thread is started.
pub fn main(args: impl Iterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.collect();
    let outcome = match args.as_slice() {
        [verb, dir] if verb == "run" => run(Path::new(dir)),
        [verb, dir, request] if verb == "exec" => {
            Err(exec(Path::new(dir), request.to_string_lossy().as_ref()))
        }
        _ => Err("shim is started by skerry-edge itself, not by hand".to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            let _ = writeln!(io::stderr(), "{message}");
            ExitCode::from(
                if message.contains("not found") || message.contains("no such file") {
                    127
                } else {
                    126
                },
            )
        }
    }
}

fn exec(dir: &Path, request: &str) -> String {
    match prepare_exec(dir, request) {
        Ok((record, run, command)) => child::become_program(
            &record.launch,
            &command.argv,
            run.user_namespace,
            run.mount_namespace,
        ),
        Err(message) => message,
    }
}

fn prepare_exec(dir: &Path, request: &str) -> Result<(ContainerRecord, RunRecord, ExecCommand), String> {
    let command: ExecCommand = serde_json::from_str(request).map_err(|e| format!("bad exec request: {e}"))?;
    let mut record = load(dir)?;
    let run: RunRecord = record::read(dir, files::RUN)
        .ok()
        .flatten()
        .ok_or_else(|| "the container is not running".to_owned())?;
    if command.tty {
        take_terminal()?;
        record.launch.tty = true;
    }
    reset_signals();
    child::enter(&run)?;
    Ok((record, run, command))
}

fn load(dir: &Path) -> Result<ContainerRecord, String> {
    record::read(dir, files::CONTAINER)
        .map_err(|e| format!("cannot read {}: {e}", dir.display()))?
        .ok_or_else(|| format!("{} holds no container", dir.display()))
}

fn run(dir: &Path) -> Result<(), String> {
    let _ = setsid();
    let _ = nix::sys::prctl::set_child_subreaper(true);
    close_inherited();
    let record = load(dir)?;
    let mut log = open_log(&record.log_path)?;
    let (cgroups, notes) = cgroup::create(&record.launch.cgroup, &record.launch.limits());
    match start(dir, &record, &cgroups) {
        Ok(started) => {
            let answer = supervise(dir, &record, cgroups, notes, started, &mut log);
            answer.map_err(|e| e.to_string())
        }
        Err(message) => {
            cgroup::remove(&cgroups);
            let now = Timestamp::now();
            let exit = ExitRecord {
                code: 128,
                started_at: None,
                finished_at: now,
                reason: "StartError".into(),
                message: message.clone(),
            };
            record::write(dir, files::EXIT, &exit).map_err(|e| e.to_string())?;
            answer_daemon(&StartAnswer {
                error: Some(message),
                notes,
            });
            Ok(())
        }
    }
}

fn open_log(path: &Path) -> Result<File, String> {
    if let Some(parent) = path.parent() {
        let _ = fs::create_dir_all(parent);
    }
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .map_err(|e| format!("cannot open the log {}: {e}", path.display()))
}

/// Closes everything but the standard streams.
fn close_inherited() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let open: Vec<i32> = entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .filter(|fd| *fd > 2)
        .collect();
    for fd in open {
        // The directory's own descriptor is in the list and already closed: an error means no more than that.
        let _ = nix::unistd::close(fd);
    }
}

/// Tells the daemon, which may be gone, and lets go of the pipe to it.
fn answer_daemon(answer: &StartAnswer) {
    let mut out = io::stdout();
    let _ = serde_json::to_writer(&mut out, answer);
    let _ = out.flush();
    if let Ok(null) = OpenOptions::new().read(true).write(true).open("/dev/null") {
        let _ = dup2_stdout(&null);
    }
}

/// A started program and the ends of its streams.
struct Started {
    pid: Pid,
    identity: ProcessIdentity,
    report: ChildReport,
    out: OwnedFd,
    err: Option<OwnedFd>,
    /// To write the program's stdin, where it has one; while it is held, that does not end.
    stdin: Option<OwnedFd>,
    signals: SignalFd,
}

#[allow(unsafe_code)]
fn start(dir: &Path, record: &ContainerRecord, cgroups: &[PathBuf]) -> Result<Started, String> {
    let text = |what: &'static str| move |e: Errno| format!("cannot make {what}: {e}");
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGHUP);
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None).map_err(text("the signal mask"))?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(text("a signal descriptor"))?;
    let (report_read, report_write) = pipe2(OFlag::O_CLOEXEC).map_err(text("a pipe"))?;
    let streams = Streams::new(record.launch.tty, record.launch.stdin)?;
    // SAFETY: the shim has a single thread, so the child may do anything that the parent might.
    match unsafe { fork() }.map_err(|e| format!("cannot fork: {e}"))? {
        ForkResult::Child => {
            drop(report_read);
            let mut pipe = File::from(report_write);
            let error = in_child(dir, record, cgroups, &streams, &mut pipe);
            let last = ChildReport {
                error: Some(error),
                ..ChildReport::default()
            };
            let _ = serde_json::to_writer(&mut pipe, &last);
            // SAFETY: ends the forked copy without running the parent's exit handlers a second time.
            unsafe { nix::libc::_exit(128) }
        }
        ForkResult::Parent { child } => {
            drop(report_write);
            let identity = ProcessIdentity::of(child.as_raw());
            let (out, err, stdin) = streams.parent_ends();
            let mut said = Vec::new();
            File::from(report_read)
                .read_to_end(&mut said)
                .map_err(|e| format!("cannot hear from the child: {e}"))?;
            let mut report = ChildReport::default();
            for part in serde_json::Deserializer::from_slice(&said)
                .into_iter::<ChildReport>()
                .flatten()
            {
                if let Some(error) = part.error {
                    let _ = waitpid(child, None);
                    return Err(error);
                }
                report = part;
            }
            let identity = identity.ok_or_else(|| "the process vanished while starting".to_owned())?;
            Ok(Started {
                pid: child,
                identity,
                report,
                out,
                err,
                stdin,
                signals,
            })
        }
    }
}

/// Runs in the forked child; returns only the reason why the program could not be started.
fn in_child(
    dir: &Path,
    record: &ContainerRecord,
    cgroups: &[PathBuf],
    streams: &Streams,
    pipe: &mut File,
) -> String {
    let mut report = ChildReport::default();
    // A shim that is killed takes its container along: nobody could tell the exit code any more.
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    let _ = setsid();
    if let Err(error) = cgroup::join(cgroups) {
        report
            .notes
            .push(format!("cannot enter the container's cgroup: {error}"));
    }
    let prepared = streams
        .attach(record.launch.tty)
        .and_then(|()| child::isolate(dir, &record.launch, &mut report));
    if let Err(error) = prepared {
        return error;
    }
    if let Err(error) = serde_json::to_writer(pipe, &report) {
        return format!("cannot report to the shim: {error}");
    }
    reset_signals();
    child::become_program(
        &record.launch,
        &record.launch.argv,
        report.user_namespace,
        report.mount_namespace,
    )
}

/// The standard streams of a container, both ends.
struct Streams {
    child: [OwnedFd; 3],
    out: OwnedFd,
    err: Option<OwnedFd>,
    stdin: Option<OwnedFd>,
}

impl Streams {
    fn new(tty: bool, keep_stdin: bool) -> Result<Self, String> {
        let text = |e: Errno| format!("cannot make the container's streams: {e}");
        let again = |fd: &OwnedFd| {
            fd.try_clone()
                .map_err(|e| format!("cannot make the container's streams: {e}"))
        };
        if tty {
            let pty = nix::pty::openpty(None, None).map_err(text)?;
            // Both ends are made without close-on-exec; their copies have it.
            let (master, slave) = (again(&pty.master)?, again(&pty.slave)?);
            let input = if keep_stdin {
                Some(again(&pty.master)?)
            } else {
                None
            };
            return Ok(Self {
                child: [again(&slave)?, again(&slave)?, slave],
                out: master,
                err: None,
                stdin: input,
            });
        }
        let (out, child_out) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
        let (err, child_err) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
        let (child_in, stdin) = if keep_stdin {
            let (read, write) = pipe2(OFlag::O_CLOEXEC).map_err(text)?;
            (read, Some(write))
        } else {
            let null = File::open("/dev/null").map_err(|e| format!("cannot open /dev/null: {e}"))?;
            (null.into(), None)
        };
        Ok(Self {
            child: [child_in, child_out, child_err],
            out,
            err: Some(err),
            stdin,
        })
    }

    fn attach(&self, tty: bool) -> Result<(), String> {
        let text = |e: Errno| format!("cannot connect the container's streams: {e}");
        dup2_stdin(&self.child[0]).map_err(text)?;
        dup2_stdout(&self.child[1]).map_err(text)?;
        dup2_stderr(&self.child[2]).map_err(text)?;
        if tty { take_terminal() } else { Ok(()) }
    }

    fn parent_ends(self) -> (OwnedFd, Option<OwnedFd>, Option<OwnedFd>) {
        (self.out, self.err, self.stdin)
    }
}

/// Makes the terminal at standard input the controlling one of a new session.
#[allow(unsafe_code)]
fn take_terminal() -> Result<(), String> {
    let _ = setsid();
    // SAFETY: TIOCSCTTY takes a number, no pointer; nix has no wrapper for it.
    let done = unsafe { nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) };
    Errno::result(done)
        .map(drop)
        .map_err(|e| format!("cannot take the terminal: {e}"))
}

/// Gives a program the signal dispositions that it expects: Rust ignores SIGPIPE, the shim blocks SIGCHLD.
#[allow(unsafe_code)]
fn reset_signals() {
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
    // SAFETY: installs the default action, no handler of ours can run.
    let _ = unsafe { nix::sys::signal::signal(Signal::SIGPIPE, nix::sys::signal::SigHandler::SigDfl) };
}

fn supervise(
    dir: &Path,
    record: &ContainerRecord,
    cgroups: Vec<PathBuf>,
    mut notes: Vec<String>,
    mut started: Started,
    log: &mut File,
) -> io::Result<()> {
    let started_at = Timestamp::now();
    for note in &started.report.notes {
        let line = format!("{started_at:.9} stderr F skerry: {note}\n");
        let _ = log.write_all(line.as_bytes());
    }
    notes.append(&mut started.report.notes);
    let (hub, note) = Hub::open(
        dir,
        started.stdin.take(),
        record.launch.stdin_once,
        record.launch.tty,
    );
    notes.extend(note);
    let me = ProcessIdentity::of(std::process::id().cast_signed());
    let run = RunRecord {
        shim: me.unwrap_or(started.identity),
        process: started.identity,
        boot_id: record::boot_id(),
        started_at,
        user_namespace: started.report.user_namespace,
        mount_namespace: started.report.mount_namespace,
        cgroups,
        notes: notes.clone(),
        reopens_log: true,
    };
    record::write(dir, files::RUN, &run)?;
    answer_daemon(&StartAnswer { error: None, notes });
    let (code, signal) = pump(&mut started, log, &record.log_path, hub);
    let oom = signal == Some(Signal::SIGKILL) && cgroup::oom_killed(&run.cgroups);
    cgroup::remove(&run.cgroups);
    let reason = if oom {
        "OOMKilled"
    } else if code == 0 {
        "Completed"
    } else {
        "Error"
    };
    let exit = ExitRecord {
        code,
        started_at: Some(started_at),
        finished_at: Timestamp::now(),
        reason: reason.into(),
        message: String::new(),
    };
    let _ = log.sync_data();
    record::write(dir, files::EXIT, &exit)
}

/// Copies the streams into the log until the program has ended and everything that it left is dead.
fn pump(started: &mut Started, log: &mut File, log_path: &Path, mut hub: Hub) -> (i32, Option<Signal>) {
    let mut sources: Vec<(File, LineLog, u8)> = Vec::new();
    if let Ok(out) = started.out.try_clone() {
        sources.push((File::from(out), LineLog::new("stdout"), attach::kind::STDOUT));
    }
    if let Some(err) = started.err.take() {
        sources.push((File::from(err), LineLog::new("stderr"), attach::kind::STDERR));
    }
    let mut ended = None;
    let mut buffer = vec![0_u8; 16 * 1024];
    while ended.is_none() || !sources.is_empty() {
        let ready: Vec<bool> = {
            let mut fds: Vec<PollFd> = sources
                .iter()
                .map(|(f, ..)| PollFd::new(f.as_fd(), PollFlags::POLLIN))
                .collect();
            fds.push(PollFd::new(started.signals.as_fd(), PollFlags::POLLIN));
            hub.add_to(&mut fds);
            // Once all are dead, whoever still holds a pipe is no child of ours: wait no longer for it.
            let timeout = if ended.is_some() {
                PollTimeout::from(200_u8)
            } else {
                PollTimeout::NONE
            };
            match poll(&mut fds, timeout) {
                Ok(0) if ended.is_some() => break,
                Ok(_) | Err(_) => fds.iter().map(|fd| fd.any().unwrap_or(false)).collect(),
            }
        };
        // Before what came is written: after the rename nothing more belongs into the old file.
        while let Ok(Some(got)) = started.signals.read_signal() {
            if got.ssi_signo == Signal::SIGHUP as u32
                && let Ok(new) = open_log(log_path)
            {
                *log = new;
            }
        }
        let mut index = 0;
        sources.retain_mut(|(file, lines, kind)| {
            index += 1;
            if !ready[index - 1] {
                return true;
            }
            match file.read(&mut buffer) {
                Ok(count) if count > 0 => {
                    let _ = lines.push(Timestamp::now(), &buffer[..count], log);
                    hub.output(*kind, &buffer[..count]);
                    true
                }
                // A terminal does not block, since its other use, for input, must not.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                    ) =>
                {
                    true
                }
                // End of file, or EIO from a terminal that nobody has open any more.
                _ => {
                    let _ = lines.finish(Timestamp::now(), log);
                    false
                }
            }
        });
        hub.turn();
        if let Some(status) = reap(started.pid)
            && ended.is_none()
        {
            ended = Some(status);
            kill_descendants();
        }
    }
    hub.finish();
    for (_, lines, _) in &mut sources {
        let _ = lines.finish(Timestamp::now(), log);
    }
    ended.unwrap_or((255, None))
}

/// Collects every dead child; answers how `main` ended if it was among them.
fn reap(main: Pid) -> Option<(i32, Option<Signal>)> {
    let mut ended = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == main => ended = Some((code, None)),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == main => {
                ended = Some((128 + signal as i32, Some(signal)))
            }
            Ok(WaitStatus::StillAlive) | Err(_) => return ended,
            Ok(_) => {}
        }
    }
}

/// Kills all that the program left behind. The shim is a subreaper: orphans become its children, wherever they went.
fn kill_descendants() {
    let me = std::process::id().cast_signed();
    loop {
        let children: Vec<i32> = fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| record::stat(*pid).is_some_and(|s| s.parent == me))
            .collect();
        if children.is_empty() {
            return;
        }
        for pid in children {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            let _ = waitpid(Pid::from_raw(pid), None);
        }
    }
}
