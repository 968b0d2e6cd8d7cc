//! Commands in running containers, as the daemon drives them.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::pin::Pin;
use std::process::{ExitStatus, Stdio};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::Winsize;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, oneshot};

use crate::runtime::{ExecOutput, ExecRequest, RuntimeError, StreamedProcess};

/// Exit code of a process that SIGKILL has ended.
const KILLED: i32 = 137;

/// Output beyond this is read and thrown away.
const MAX_OUTPUT: u64 = 16 * 1024 * 1024;

fn failed(what: &str) -> impl Fn(io::Error) -> RuntimeError {
    move |e| RuntimeError::Failed(format!("cannot {what}: {e}"))
}

/// Runs to the end, at most for `limit`.
pub(super) async fn to_the_end(mut command: Command, limit: Duration) -> Result<ExecOutput, RuntimeError> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(failed("start the exec helper"))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let all = async {
        let (stdout, stderr) = tokio::join!(collect(out), collect(err));
        let status = child.wait().await;
        (stdout, stderr, status)
    };
    let (stdout, stderr, status) = tokio::time::timeout(limit, all)
        .await
        .map_err(|_| RuntimeError::Timeout("exec".into()))?;
    let status = status.map_err(failed("wait for the command"))?;
    Ok(ExecOutput {
        stdout: stdout?,
        stderr: stderr?,
        code: code(status),
    })
}

async fn collect(source: Option<impl AsyncRead + Unpin>) -> Result<Vec<u8>, RuntimeError> {
    let mut kept = Vec::new();
    if let Some(mut source) = source {
        (&mut source)
            .take(MAX_OUTPUT)
            .read_to_end(&mut kept)
            .await
            .map_err(failed("read the command's output"))?;
        tokio::io::copy(&mut source, &mut tokio::io::sink())
            .await
            .map_err(failed("read the command's output"))?;
    }
    Ok(kept)
}

fn code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Starts a command whose streams the caller connects. It ends with `container`, as in a process namespace.
pub(super) fn streamed(
    mut command: Command,
    request: &ExecRequest,
    container: impl Future<Output = ()> + Send + 'static,
) -> Result<StreamedProcess, RuntimeError> {
    command.kill_on_drop(true);
    if request.tty {
        return on_terminal(command, request, container);
    }
    let pipe = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
    command
        .stdin(pipe(request.stdin))
        .stdout(pipe(request.stdout))
        .stderr(pipe(request.stderr));
    let mut child = command.spawn().map_err(failed("start the exec helper"))?;
    Ok(StreamedProcess {
        stdin: child.stdin.take().map(|s| Box::new(s) as _),
        stdout: child.stdout.take().map(|s| Box::new(s) as _),
        stderr: child.stderr.take().map(|s| Box::new(s) as _),
        resize: None,
        exit: watch_exit(child, container),
    })
}

/// Waits for the end of the process; kills it when its container has ended, or when nobody wants to know its exit code any
/// more.
fn watch_exit(
    mut child: Child,
    container: impl Future<Output = ()> + Send + 'static,
) -> oneshot::Receiver<i32> {
    let (mut tell, exit) = oneshot::channel();
    tokio::spawn(async move {
        let ended = tokio::select! {
            status = child.wait() => Some(status.map_or(255, code)),
            () = tell.closed() => None,
            () = container => {
                // Killed, as everything in the container was.
                let _ = child.kill().await;
                Some(KILLED)
            }
        };
        match ended {
            Some(code) => {
                let _ = tell.send(code);
            }
            None => {
                let _ = child.kill().await;
            }
        }
    });
    exit
}

fn on_terminal(
    mut command: Command,
    request: &ExecRequest,
    container: impl Future<Output = ()> + Send + 'static,
) -> Result<StreamedProcess, RuntimeError> {
    let no_terminal = |e: nix::Error| RuntimeError::Failed(format!("cannot make a terminal: {e}"));
    let pty = nix::pty::openpty(None, None).map_err(no_terminal)?;
    // Copies are close-on-exec: another exec must not hold this terminal open.
    let again = |fd: &OwnedFd| fd.try_clone().map_err(failed("make a terminal"));
    let (master, slave) = (again(&pty.master)?, again(&pty.slave)?);
    drop(pty);
    command.stdin(again(&slave)?).stdout(again(&slave)?).stderr(slave);
    let child = command.spawn().map_err(failed("start the exec helper"))?;
    // The command keeps its copies of the terminal until it is dropped.
    drop(command);
    let (writer, sizes) = (again(&master)?, again(&master)?);
    let open = |fd: OwnedFd| Terminal::new(fd).map_err(failed("use the terminal"));
    Ok(StreamedProcess {
        stdin: if request.stdin {
            Some(Box::new(open(writer)?))
        } else {
            None
        },
        stdout: Some(Box::new(open(master)?)),
        stderr: None,
        resize: Some(follow_size(sizes)),
        exit: watch_exit(child, container),
    })
}

nix::ioctl_write_ptr_bad!(
    /// Sets a terminal's size.
    set_size,
    nix::libc::TIOCSWINSZ,
    Winsize
);

fn follow_size(terminal: OwnedFd) -> mpsc::Sender<(u16, u16)> {
    let (sender, mut sizes) = mpsc::channel(4);
    tokio::spawn(async move {
        while let Some((columns, rows)) = sizes.recv().await {
            let size = Winsize {
                ws_row: rows,
                ws_col: columns,
                ws_xpixel: 0,
                ws_ypixel: 0,
            };
            apply_size(&terminal, &size);
        }
    });
    sender
}

#[allow(unsafe_code)]
fn apply_size(terminal: &OwnedFd, size: &Winsize) {
    // SAFETY: the descriptor is open and the kernel only reads the structure. A failure leaves the old size.
    let _ = unsafe { set_size(terminal.as_raw_fd(), size) };
}

/// The master side of a terminal.
struct Terminal(AsyncFd<OwnedFd>);

impl Terminal {
    fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        register(fd).map(Self)
    }
}

#[allow(unsafe_code)]
fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd always answers the same descriptor and keeps it open until it is dropped.
    Ok(unsafe { AsyncFd::register(fd) }?)
}

impl AsyncRead for Terminal {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let read = guard.try_io(|fd| Ok(nix::unistd::read(fd.get_ref(), buffer.initialize_unfilled())?));
            match read {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                // The last process has closed the terminal: its way to say end of file.
                Ok(Err(error)) if error.raw_os_error() == Some(nix::libc::EIO) => return Poll::Ready(Ok(())),
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Terminal {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            if let Ok(done) = guard.try_io(|fd| Ok(nix::unistd::write(fd.get_ref(), bytes)?)) {
                return Poll::Ready(done);
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
