//! The daemon's end of attach: a container's streams by way of its shim's socket.

use std::io;
use std::path::Path;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};

use super::attach::{HEAD, MAX_FRAME, frame, kind, short_path};
use crate::runtime::{ExecRequest, RuntimeError, StreamedProcess};

/// Bytes that wait in one direction.
const PIPE: usize = 32 * 1024;

/// Connects to the container in `dir`; `tty`: it has a terminal. Dropping the answer detaches and ends nothing.
pub(super) async fn connect(
    id: &str,
    dir: &Path,
    tty: bool,
    request: &ExecRequest,
) -> Result<StreamedProcess, RuntimeError> {
    let connected = async {
        let (path, _dir) = short_path(dir)?;
        UnixStream::connect(path).await
    };
    let stream = connected.await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => RuntimeError::Unsupported {
            runtime: super::NAME,
            what: format!("attach to container {id}: an earlier version has started it; restart the pod"),
        },
        _ => RuntimeError::Failed(format!("cannot attach to container {id}: {error}")),
    })?;
    let (from_shim, to_shim) = stream.into_split();
    let pipe = |wanted: bool| wanted.then(|| tokio::io::duplex(PIPE)).unzip();
    let (stdout, stdout_end) = pipe(request.stdout);
    let (stderr, stderr_end) = pipe(request.stderr && !tty);
    let (stdin, stdin_end) = pipe(request.stdin);
    let (resize, sizes) = mpsc::channel(4);
    let (mut tell, exit) = oneshot::channel();
    tokio::spawn(async move {
        let both = async {
            let output = outward(from_shim, stdout_end, stderr_end);
            let input = inward(to_shim, stdin_end, sizes);
            tokio::pin!(output, input);
            tokio::select! {
                () = &mut output => {}
                // The shim is gone: what it has said is still to be read.
                () = &mut input => output.await,
            }
        };
        tokio::select! {
            () = both => drop(tell.send(0)),
            () = tell.closed() => {}
        }
    });
    Ok(StreamedProcess {
        stdin: stdin.map(|end| Box::new(end) as _),
        stdout: stdout.map(|end| Box::new(end) as _),
        stderr: stderr.map(|end| Box::new(end) as _),
        resize: tty.then_some(resize),
        exit,
    })
}

/// Until the container has ended. Output that nobody wants, or wants no more, is read and forgotten.
async fn outward(
    mut from: OwnedReadHalf,
    mut stdout: Option<DuplexStream>,
    mut stderr: Option<DuplexStream>,
) {
    let mut payload = Vec::new();
    loop {
        let mut head = [0; HEAD];
        if from.read_exact(&mut head).await.is_err() {
            return;
        }
        let [what, a, b, c, d] = head;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > MAX_FRAME {
            return;
        }
        payload.resize(length, 0);
        if from.read_exact(&mut payload).await.is_err() {
            return;
        }
        let to = match what {
            kind::STDOUT => &mut stdout,
            kind::STDERR => &mut stderr,
            _ => continue,
        };
        if let Some(pipe) = to
            && pipe.write_all(&payload).await.is_err()
        {
            *to = None;
        }
    }
}

/// Until the shim is gone.
async fn inward(
    mut to: OwnedWriteHalf,
    mut stdin: Option<DuplexStream>,
    mut sizes: mpsc::Receiver<(u16, u16)>,
) {
    if stdin.is_some() && to.write_all(&frame(kind::STDIN_OPEN, b"")).await.is_err() {
        return;
    }
    let mut buffer = vec![0; PIPE];
    let mut sized = true;
    loop {
        let message = tokio::select! {
            read = read(&mut stdin, &mut buffer) => match read {
                0 => {
                    stdin = None;
                    frame(kind::STDIN_END, b"")
                }
                count => frame(kind::STDIN, &buffer[..count]),
            },
            size = sizes.recv(), if sized => match size {
                Some((columns, rows)) => {
                    let [c1, c0] = columns.to_be_bytes();
                    let [r1, r0] = rows.to_be_bytes();
                    frame(kind::RESIZE, &[c1, c0, r1, r0])
                }
                None => {
                    sized = false;
                    continue;
                }
            },
        };
        if to.write_all(&message).await.is_err() {
            return;
        }
    }
}

/// The next piece of stdin, nothing at its end; never resolves where there is none.
async fn read(stdin: &mut Option<DuplexStream>, buffer: &mut [u8]) -> usize {
    match stdin {
        Some(pipe) => pipe.read(buffer).await.unwrap_or(0),
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::process::attach::Hub;

    fn everything() -> ExecRequest {
        ExecRequest {
            command: vec![],
            stdin: true,
            stdout: true,
            stderr: true,
            tty: false,
        }
    }

    #[tokio::test]
    async fn streams_pass_both_ways_and_end_with_the_container() {
        let dir = tempfile::tempdir().unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        let (mut hub, _) = Hub::open(dir.path(), Some(write), false, false);
        let mut attached = connect("c", dir.path(), false, &everything()).await.unwrap();
        let mut stdin = attached.stdin.take().unwrap();
        stdin.write_all(b"question").await.unwrap();
        let shim = tokio::task::spawn_blocking(move || {
            use std::io::Read;
            let mut read = std::fs::File::from(read);
            let mut text = [0; 8];
            let reader = std::thread::spawn(move || read.read_exact(&mut text).map(|()| text));
            while !reader.is_finished() {
                hub.turn();
                std::thread::yield_now();
            }
            hub.output(kind::STDOUT, b"answer");
            hub.output(kind::STDERR, b"trouble");
            hub.finish();
            reader.join().unwrap().unwrap()
        });
        assert_eq!(&shim.await.unwrap(), b"question");
        let (mut out, mut err) = (String::new(), String::new());
        attached
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut out)
            .await
            .unwrap();
        attached
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut err)
            .await
            .unwrap();
        assert_eq!((out.as_str(), err.as_str()), ("answer", "trouble"));
        assert_eq!(attached.exit.await, Ok(0));
    }

    #[tokio::test]
    async fn a_container_without_a_socket_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = connect("c", dir.path(), false, &everything())
            .await
            .err()
            .unwrap();
        assert!(error.to_string().contains("restart the pod"), "{error}");
    }
}
