//! A TCP connection that is marked, watched over, counted and, for bulk, paced.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use skerry_proto::Class;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use crate::TcpInfo;
use crate::pace::{self, Pacer};
use crate::socket::{self, Lane, LifeSigns};

/// Noes of the pacer that follow each other within so many milliseconds are one time of want.
const ROW: u64 = 1_000;

/// A TCP connection of the link.
pub struct Stream {
    io: Arc<TcpStream>,
    shared: Arc<Shared>,
    pacer: Pacer,
    /// The pacer said no until then.
    pause: Option<Pin<Box<Sleep>>>,
}

struct Shared {
    /// Fixed by the first thing that is said on it.
    paced: AtomicBool,
    /// Never paced, whatever is said.
    unpaced: AtomicBool,
    read: AtomicU64,
    written: AtomicU64,
    born: Instant,
    /// When the pacer said no for the first time and the last time of a row without a pause of [`ROW`]: milliseconds after
    /// `born`; 0: never.
    first_no: AtomicU64,
    last_no: AtomicU64,
}

/// Reaches a [`Stream`] that TLS has swallowed. Does not keep it open.
#[derive(Clone)]
pub struct Handle {
    io: Weak<TcpStream>,
    shared: Arc<Shared>,
}

impl Stream {
    /// Takes a connection over.
    pub fn new(io: TcpStream) -> io::Result<Self> {
        io.set_nodelay(true)?;
        Ok(Self {
            io: Arc::new(io),
            shared: Arc::new(Shared {
                paced: AtomicBool::new(false),
                unpaced: AtomicBool::new(false),
                read: AtomicU64::new(0),
                written: AtomicU64::new(0),
                born: Instant::now(),
                first_no: AtomicU64::new(0),
                last_no: AtomicU64::new(0),
            }),
            pacer: Pacer::default(),
            pause: None,
        })
    }

    /// A handle for later.
    pub fn handle(&self) -> Handle {
        Handle {
            io: Arc::downgrade(&self.io),
            shared: Arc::clone(&self.shared),
        }
    }

    /// The peer's address.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.io.peer_addr()
    }

    /// How much may be written now; registers the task when it is nothing.
    fn allowance(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<usize> {
        if !self.shared.paced.load(Ordering::Relaxed) {
            return Poll::Ready(wanted);
        }
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            let Some(info) = TcpInfo::read(&self.io) else {
                return Poll::Ready(wanted);
            };
            let now = Instant::now();
            let room = usize::try_from(self.pacer.admit(&info, now)).unwrap_or(usize::MAX);
            // A few bytes at a time would cost a packet each.
            let least = wanted.min(info.segment as usize);
            if room >= least {
                return Poll::Ready(room.min(wanted));
            }
            self.shared.note_no(now);
            self.pause = Some(Box::pin(tokio::time::sleep(pace::pause(&info))));
        }
    }
}

impl Shared {
    fn note_no(&self, now: Instant) {
        let now = self.millis(now);
        if now.saturating_sub(self.last_no.swap(now, Ordering::Relaxed)) > ROW {
            self.first_no.store(now, Ordering::Relaxed);
        }
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.duration_since(self.born).as_millis())
            .unwrap_or(u64::MAX)
            .max(1)
    }
}

impl Handle {
    /// Makes the connection what its lane and class ask for; may be said again.
    pub fn set(&self, lane: Lane, class: Class, signs: LifeSigns) {
        let paced = lane == Lane::Bulk && !self.shared.unpaced.load(Ordering::Relaxed);
        self.shared.paced.store(paced, Ordering::Relaxed);
        if let Some(io) = self.io.upgrade() {
            socket::mark(&io, lane.dscp(class));
            socket::watch_over(&io, signs);
        }
    }

    /// Sends whatever comes at once, as TCP alone does, whatever its lane.
    pub fn set_unpaced(&self) {
        self.shared.unpaced.store(true, Ordering::Relaxed);
        self.shared.paced.store(false, Ordering::Relaxed);
    }

    /// Chooses the kernel's congestion control; its default stays where it does not have that one.
    pub fn set_congestion(&self, algorithm: &str) {
        if let Some(io) = self.io.upgrade() {
            socket::congestion(&io, algorithm);
        }
    }

    /// Since how long there has always been more to write than the pacer allowed.
    pub fn held_back(&self) -> Duration {
        let now = self.shared.millis(Instant::now());
        let load = |time: &AtomicU64| time.load(Ordering::Relaxed);
        match load(&self.shared.last_no) {
            0 => Duration::ZERO,
            last if now.saturating_sub(last) > ROW => Duration::ZERO,
            _ => Duration::from_millis(now.saturating_sub(load(&self.shared.first_no)).max(1)),
        }
    }

    /// Bytes read and written so far: TLS included, what TCP adds not.
    pub fn bytes(&self) -> (u64, u64) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (load(&self.shared.read), load(&self.shared.written))
    }

    /// What the kernel knows of it, while it is open.
    pub fn info(&self) -> Option<TcpInfo> {
        TcpInfo::read(&self.io.upgrade()?)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.io.poll_read_ready(cx))?;
            match self.io.try_read(buffer.initialize_unfilled()) {
                Ok(count) => {
                    buffer.advance(count);
                    self.shared.read.fetch_add(count as u64, Ordering::Relaxed);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let allowed = ready!(self.allowance(cx, bytes.len()));
        loop {
            ready!(self.io.poll_write_ready(cx))?;
            match self.io.try_write(&bytes[..allowed]) {
                Ok(count) => {
                    self.shared.written.fetch_add(count as u64, Ordering::Relaxed);
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        use std::os::fd::AsRawFd;
        let ended = nix::sys::socket::shutdown(self.io.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        match ended {
            // The peer was faster.
            Ok(()) | Err(nix::Error::ENOTCONN) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn pair() -> (Stream, TcpStream) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (Stream::new(near).unwrap(), listener.accept().await.unwrap().0)
    }

    const SIGNS: LifeSigns = LifeSigns {
        ask_after: Duration::from_secs(20),
        deadline: Duration::from_secs(60),
    };

    #[tokio::test]
    async fn bulk_arrives_whole_and_is_counted_and_its_end_is_seen() {
        let (mut near, mut far) = pair().await;
        let handle = near.handle();
        handle.set(Lane::Bulk, Class::Standard, SIGNS);
        let sent: Vec<u8> = (0..1_000_000_u32).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        let write = async {
            near.write_all(&sent).await.unwrap();
            near.shutdown().await.unwrap();
        };
        let read = async {
            let mut got = Vec::new();
            far.read_to_end(&mut got).await.unwrap();
            got
        };
        let ((), got) = tokio::join!(write, read);
        assert_eq!(got, expected);
        assert_eq!(handle.bytes(), (0, 1_000_000));
    }

    #[tokio::test]
    async fn a_handle_marks_the_socket_and_does_not_keep_it_open() {
        let (near, mut far) = pair().await;
        let handle = near.handle();
        for (lane, class, byte) in [
            (Lane::Control, Class::Critical, 46 << 2),
            (Lane::Bulk, Class::BestEffort, 1 << 2),
        ] {
            handle.set(lane, class, SIGNS);
            let found = nix::sys::socket::getsockopt(&near.io, nix::sys::socket::sockopt::Ipv4Tos).unwrap();
            assert_eq!(found, byte);
        }
        assert!(handle.info().is_some());
        drop(near);
        assert_eq!(far.read(&mut [0; 8]).await.unwrap(), 0);
        assert!(handle.info().is_none());
    }

    #[tokio::test]
    async fn a_peer_that_reads_nothing_holds_bulk_back() {
        let (mut near, mut far) = pair().await;
        let handle = near.handle();
        handle.set(Lane::Bulk, Class::Standard, SIGNS);
        let flood = vec![0; 64 * 1024 * 1024];
        let writing = tokio::spawn(async move { near.write_all(&flood).await });
        // Until something was held back; the test's own limit is the runner's.
        while handle.held_back().is_zero() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let mut buffer = vec![0; 1 << 20];
        let mut left = 64 * 1024 * 1024;
        while left > 0 {
            left -= far.read(&mut buffer).await.unwrap();
        }
        writing.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn want_lasts_as_long_as_the_pacer_says_no_now_and_then() {
        let (near, _far) = pair().await;
        let handle = near.handle();
        assert_eq!(handle.held_back(), Duration::ZERO);
        for _ in 0..10 {
            tokio::time::advance(Duration::from_millis(400)).await;
            near.shared.note_no(Instant::now());
        }
        assert!(
            handle.held_back() >= Duration::from_millis(3_600),
            "{:?}",
            handle.held_back()
        );
        tokio::time::advance(Duration::from_millis(1_100)).await;
        assert_eq!(handle.held_back(), Duration::ZERO);
        near.shared.note_no(Instant::now());
        assert!(handle.held_back() < Duration::from_millis(100));
    }
}
