//! Options of a socket.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use skerry_proto::Class;

/// Which of a site's connections a socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Greeting, heartbeats, orders, critical status.
    Control,
    /// Everything else; paced.
    Bulk,
}

impl Lane {
    /// Differentiated services code point of its packets.
    pub fn dscp(self, class: Class) -> u8 {
        match self {
            Self::Control => class.control_dscp(),
            Self::Bulk => class.bulk_dscp(),
        }
    }
}

/// When a connection without an answer is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LifeSigns {
    /// After this long without a segment the kernel asks the peer whether it is there. It costs no payload.
    pub ask_after: Duration,
    /// After this long without an answer the connection is dead.
    pub deadline: Duration,
}

/// Marks the socket's packets. The six bits stand left of those for ECN, which are the kernel's.
pub(crate) fn mark(socket: &impl AsFd, dscp: u8) {
    let byte = i32::from(dscp) << 2;
    // A socket of one family does not have the other's option; an IPv6 socket may carry IPv4.
    let four = setsockopt(socket, sockopt::Ipv4Tos, &byte);
    let six = setsockopt(socket, sockopt::Ipv6TClass, &byte);
    if let (Err(error), Err(_)) = (four, six) {
        tracing::debug!(%error, dscp, "packets of the link cannot be marked");
    }
}

pub(crate) fn watch_over(socket: &impl AsFd, signs: LifeSigns) {
    let seconds = |d: Duration| u32::try_from(d.as_secs().max(1)).unwrap_or(u32::MAX);
    let millis = u32::try_from(signs.deadline.as_millis()).unwrap_or(u32::MAX);
    let every = signs.deadline.saturating_sub(signs.ask_after) / 4;
    let set = setsockopt(socket, sockopt::KeepAlive, &true)
        .and_then(|()| setsockopt(socket, sockopt::TcpKeepIdle, &seconds(signs.ask_after)))
        .and_then(|()| setsockopt(socket, sockopt::TcpKeepInterval, &seconds(every)))
        .and_then(|()| setsockopt(socket, sockopt::TcpKeepCount, &4))
        .and_then(|()| setsockopt(socket, sockopt::TcpUserTimeout, &millis));
    if let Err(error) = set {
        tracing::debug!(%error, "the kernel does not watch over the link's connections; heartbeats do");
    }
}

pub(crate) fn congestion(socket: &impl AsFd, algorithm: &str) {
    if let Err(error) = setsockopt(socket, sockopt::TcpCongestion, &algorithm.into()) {
        tracing::warn!(%error, algorithm, "the kernel does not have this congestion control; its default is used");
    }
}
