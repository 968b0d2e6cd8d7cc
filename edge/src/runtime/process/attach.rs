//! The container's end of attach: whoever connects to its socket gets the output from then on and may write to its
//! stdin. Part of the shim, so that it outlives the daemon; blocking code around one `poll`.
//!
//! Both sides send frames: one byte that says what it is, four bytes of length (big-endian), then the bytes.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags};
use nix::pty::Winsize;

/// The socket's name in the container's directory.
pub(super) const SOCKET: &str = "attach.sock";

/// What a frame is.
pub(super) mod kind {
    /// From the container: its stdout or terminal.
    pub(in super::super) const STDOUT: u8 = 1;
    /// From the container: its stderr.
    pub(in super::super) const STDERR: u8 = 2;
    /// To the container: for its stdin.
    pub(in super::super) const STDIN: u8 = 3;
    /// To the container: no more for its stdin from here.
    pub(in super::super) const STDIN_END: u8 = 4;
    /// To the container: columns and rows of the terminal, two bytes each.
    pub(in super::super) const RESIZE: u8 = 5;
    /// To the container: this client has a stdin.
    pub(in super::super) const STDIN_OPEN: u8 = 6;
}

/// Bytes before the payload.
pub(super) const HEAD: usize = 5;
/// Largest payload of a frame.
pub(super) const MAX_FRAME: usize = 64 * 1024;
/// A client that has fallen this far behind is cut off: the container does not wait for it.
const MAX_BEHIND: usize = 4 << 20;
/// With this much waiting for the container's stdin nothing more is read from clients.
const MAX_STDIN: usize = 64 * 1024;

/// A frame's bytes.
pub(super) fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + payload.len());
    bytes.push(kind);
    // Payloads are ours and at most MAX_FRAME.
    bytes.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A path to the socket that fits into a socket address, and what keeps it valid.
pub(super) fn short_path(dir: &Path) -> io::Result<(PathBuf, File)> {
    let dir = File::open(dir)?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    Ok((path.into(), dir))
}

/// Everyone who is attached, and the container's stdin.
pub(super) struct Hub {
    listener: Option<UnixListener>,
    clients: Vec<Client>,
    stdin: Option<File>,
    for_stdin: VecDeque<u8>,
    /// Stdin ends with the first client that had one.
    once: bool,
    /// It ends once `for_stdin` is written.
    ending: bool,
    tty: bool,
}

struct Client {
    stream: UnixStream,
    out: VecDeque<u8>,
    input: Vec<u8>,
    has_stdin: bool,
    gone: bool,
}

impl Hub {
    /// Listens in `dir`. `stdin`: the end to write to, where the container has a stdin; `tty`: it is a terminal. A
    /// container whose socket cannot be made runs all the same; the text says why.
    pub(super) fn open(dir: &Path, stdin: Option<OwnedFd>, once: bool, tty: bool) -> (Self, Option<String>) {
        let listen = || {
            let (path, _dir) = short_path(dir)?;
            let listener = UnixListener::bind(path)?;
            listener.set_nonblocking(true)?;
            Ok::<_, io::Error>(listener)
        };
        let (listener, note) = match listen() {
            Ok(listener) => (Some(listener), None),
            Err(error) => (None, Some(format!("nobody can attach to the container: {error}"))),
        };
        let stdin = stdin.and_then(|fd| {
            let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL).ok()?);
            fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).ok()?;
            Some(File::from(fd))
        });
        let hub = Self {
            listener,
            clients: Vec::new(),
            stdin,
            for_stdin: VecDeque::new(),
            once,
            ending: false,
            tty,
        };
        (hub, note)
    }

    /// What is to be waited for.
    pub(super) fn add_to<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        if let Some(listener) = &self.listener {
            fds.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        }
        for client in &self.clients {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, self.for_stdin.len() < MAX_STDIN);
            flags.set(PollFlags::POLLOUT, !client.out.is_empty());
            // With nothing to do the end of a client would wake the shim again and again.
            if !flags.is_empty() {
                fds.push(PollFd::new(client.stream.as_fd(), flags));
            }
        }
        if let Some(stdin) = self.stdin.as_ref().filter(|_| !self.for_stdin.is_empty()) {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLOUT));
        }
    }

    /// Passes output on to everyone.
    pub(super) fn output(&mut self, kind: u8, bytes: &[u8]) {
        for client in &mut self.clients {
            for piece in bytes.chunks(MAX_FRAME) {
                client.out.extend(frame(kind, piece));
            }
            client.flush();
            client.gone |= client.out.len() > MAX_BEHIND;
        }
    }

    /// Does all that can be done without waiting.
    pub(super) fn turn(&mut self) {
        while let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) {
            if stream.set_nonblocking(true).is_ok() {
                self.clients.push(Client {
                    stream,
                    out: VecDeque::new(),
                    input: Vec::new(),
                    has_stdin: false,
                    gone: false,
                });
            }
        }
        let mut clients = std::mem::take(&mut self.clients);
        for client in &mut clients {
            client.flush();
            if self.for_stdin.len() < MAX_STDIN {
                client.fill();
            }
            while let Some((kind, payload)) = client.next() {
                self.take(client, kind, &payload);
            }
        }
        let had_stdin = |client: &Client| client.gone && client.has_stdin;
        self.ending |= self.once && clients.iter().any(had_stdin);
        clients.retain(|client| !client.gone);
        self.clients = clients;
        self.feed();
    }

    fn take(&mut self, client: &mut Client, kind: u8, payload: &[u8]) {
        match kind {
            kind::STDIN_OPEN => client.has_stdin = true,
            kind::STDIN if self.stdin.is_some() && !self.ending => self.for_stdin.extend(payload),
            kind::STDIN_END if self.once && !self.tty => self.ending = true,
            kind::RESIZE => {
                if let (Some(terminal), true, [c1, c0, r1, r0]) = (&self.stdin, self.tty, payload) {
                    let (columns, rows) = (u16::from_be_bytes([*c1, *c0]), u16::from_be_bytes([*r1, *r0]));
                    apply_size(terminal, columns, rows);
                }
            }
            // A newer daemon may send what this shim does not know.
            _ => {}
        }
    }

    fn feed(&mut self) {
        let Some(stdin) = &mut self.stdin else {
            self.for_stdin.clear();
            return;
        };
        while !self.for_stdin.is_empty() {
            match stdin.write(self.for_stdin.as_slices().0) {
                Ok(count) if count > 0 => drop(self.for_stdin.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // The program has closed its stdin.
                _ => {
                    self.for_stdin.clear();
                    self.stdin = None;
                    return;
                }
            }
        }
        if self.ending && !self.tty {
            self.stdin = None;
        }
    }

    /// Gives clients the rest of the output; those that do not take it at once lose it.
    pub(super) fn finish(mut self) {
        for client in &mut self.clients {
            let limit = Some(std::time::Duration::from_secs(2));
            if client.stream.set_nonblocking(false).is_ok() && client.stream.set_write_timeout(limit).is_ok()
            {
                let (head, tail) = client.out.as_slices();
                // The client may be gone; its end shows on its own side.
                let _ = client
                    .stream
                    .write_all(head)
                    .and_then(|()| client.stream.write_all(tail));
            }
        }
    }
}

impl Client {
    fn flush(&mut self) {
        while !self.out.is_empty() && !self.gone {
            match self.stream.write(self.out.as_slices().0) {
                Ok(count) if count > 0 => drop(self.out.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => self.gone = true,
            }
        }
    }

    fn fill(&mut self) {
        let mut buffer = [0_u8; 16 * 1024];
        // What is left over of a frame is at most one frame.
        while self.input.len() <= MAX_FRAME + HEAD {
            match self.stream.read(&mut buffer) {
                Ok(count) if count > 0 => self.input.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => {
                    self.gone = true;
                    return;
                }
            }
        }
    }

    fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        let [kind, a, b, c, d] = *self.input.first_chunk::<HEAD>()?;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > MAX_FRAME {
            self.gone = true;
            self.input.clear();
            return None;
        }
        if self.input.len() < HEAD + length {
            return None;
        }
        let payload = self.input[HEAD..HEAD + length].to_vec();
        self.input.drain(..HEAD + length);
        Some((kind, payload))
    }
}

nix::ioctl_write_ptr_bad!(
    /// Sets a terminal's size.
    set_size,
    nix::libc::TIOCSWINSZ,
    Winsize
);

#[allow(unsafe_code)]
fn apply_size(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the descriptor is open and the kernel only reads the structure. A failure leaves the old size.
    let _ = unsafe { set_size(terminal.as_raw_fd(), &raw const size) };
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Setup {
        dir: tempfile::TempDir,
        hub: Hub,
        stdin: File,
    }

    fn setup(once: bool) -> Setup {
        let dir = tempfile::tempdir().unwrap();
        let (read, write) = nix::unistd::pipe().unwrap();
        let (hub, note) = Hub::open(dir.path(), Some(write), once, false);
        assert_eq!(note, None);
        Setup {
            dir,
            hub,
            stdin: read.into(),
        }
    }

    fn connect(setup: &Setup) -> UnixStream {
        let (path, _dir) = short_path(setup.dir.path()).unwrap();
        UnixStream::connect(path).unwrap()
    }

    #[test]
    fn everyone_attached_gets_the_output_from_then_on() {
        let mut s = setup(false);
        s.hub.output(kind::STDOUT, b"before");
        let (mut one, mut two) = (connect(&s), connect(&s));
        s.hub.turn();
        s.hub.output(kind::STDOUT, b"now");
        s.hub.output(kind::STDERR, b"oh");
        s.hub.finish();
        for client in [&mut one, &mut two] {
            let mut all = Vec::new();
            client.read_to_end(&mut all).unwrap();
            let expected = [frame(kind::STDOUT, b"now"), frame(kind::STDERR, b"oh")].concat();
            assert_eq!(all, expected);
        }
    }

    #[test]
    fn a_clients_input_reaches_the_program_and_its_going_leaves_stdin_open() {
        let mut s = setup(false);
        let mut client = connect(&s);
        client.write_all(&frame(kind::STDIN_OPEN, b"")).unwrap();
        client.write_all(&frame(kind::STDIN, b"hello")).unwrap();
        drop(client);
        s.hub.turn();
        let mut text = [0; 5];
        s.stdin.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"hello");
        assert!(s.hub.stdin.is_some());
    }

    #[test]
    fn with_stdin_once_the_first_client_ends_it() {
        let mut s = setup(true);
        let watcher = connect(&s);
        let mut client = connect(&s);
        client.write_all(&frame(kind::STDIN_OPEN, b"")).unwrap();
        client.write_all(&frame(kind::STDIN, b"bye")).unwrap();
        s.hub.turn();
        drop(watcher);
        s.hub.turn();
        assert!(s.hub.stdin.is_some(), "who only watches ends nothing");
        drop(client);
        s.hub.turn();
        let mut text = String::new();
        s.stdin.read_to_string(&mut text).unwrap();
        assert_eq!(text, "bye");
    }

    #[test]
    fn a_client_that_does_not_read_is_cut_off_and_blocks_nobody() {
        let mut s = setup(false);
        let _lazy = connect(&s);
        s.hub.turn();
        let piece = vec![7; MAX_FRAME];
        for _ in 0..=(MAX_BEHIND / MAX_FRAME) + 10 {
            s.hub.output(kind::STDOUT, &piece);
        }
        s.hub.turn();
        assert!(s.hub.clients.is_empty());
    }

    #[test]
    fn a_frame_beyond_its_limit_ends_the_client() {
        let mut s = setup(false);
        let mut client = connect(&s);
        client.write_all(&[kind::STDIN, 0xff, 0xff, 0xff, 0xff]).unwrap();
        s.hub.turn();
        assert!(s.hub.clients.is_empty());
    }
}
