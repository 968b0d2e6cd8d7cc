//! The line of all sites together.

use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::RawFd;
use std::sync::Arc;

use async_trait::async_trait;
use nix::sys::socket::{Shutdown, SockaddrIn, getpeername, shutdown};
use skerry_edge::identity::Dialer;
use skerry_edge::link::Dial;
use tokio::sync::watch;
use tonic::transport::Channel;

/// The line. While it is cut nobody gets through.
pub(super) struct Line {
    provider: SocketAddr,
    up: watch::Sender<bool>,
}

impl Line {
    pub(super) fn to(provider: SocketAddr) -> Arc<Self> {
        Arc::new(Self {
            provider,
            up: watch::Sender::new(true),
        })
    }

    /// Closes this process's connections to the provider; how many there were.
    ///
    /// A relay in between would do the same at the cost of two more sockets and two more copies for each connection,
    /// in the very process that is to make as much load as it can.
    pub(super) fn cut(&self) -> usize {
        self.up.send_replace(false);
        let descriptors = std::fs::read_dir("/proc/self/fd").expect("/proc is there");
        descriptors
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse::<RawFd>().ok())
            .filter(|fd| {
                let peer = getpeername::<SockaddrIn>(*fd).ok();
                peer.map(|peer| SocketAddr::V4(SocketAddrV4::from(peer))) == Some(self.provider)
            })
            .filter(|fd| shutdown(*fd, Shutdown::Both).is_ok())
            .count()
    }

    pub(super) fn restore(&self) {
        self.up.send_replace(true);
    }

    /// A dialler over this line.
    pub(super) fn over(self: &Arc<Self>, dialer: Dialer) -> Arc<dyn Dial> {
        Arc::new(Gated {
            dialer,
            line: Arc::clone(self),
        })
    }

    fn pass(&self) -> Result<(), String> {
        if *self.up.borrow() {
            Ok(())
        } else {
            Err("the line is cut".to_owned())
        }
    }
}

struct Gated {
    dialer: Dialer,
    line: Arc<Line>,
}

#[async_trait]
impl Dial for Gated {
    async fn dial(&self) -> Result<Channel, String> {
        self.line.pass()?;
        let channel = self.dialer.dial().await?;
        // One that was under way while the line was cut may have slipped through.
        self.line.pass()?;
        Ok(channel)
    }
}
