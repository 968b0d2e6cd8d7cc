//! What the kernel knows of a connection.

use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::socket::getsockopt;
use nix::{getsockopt_impl, libc, sockopt_impl};

/// The head of the kernel's `struct tcp_info` (include/uapi/linux/tcp.h), as every Linux since 4.9 has it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
#[allow(unreachable_pub)]
pub struct Raw {
    _states: [u8; 8],
    _timeouts: [u32; 2],
    snd_mss: u32,
    _rcv_mss: u32,
    unacked: u32,
    _counters: [u32; 4],
    _ages: [u32; 4],
    _sizes: [u32; 2],
    rtt: u32,
    _more: [u32; 8],
    _rates: [u64; 2],
    bytes_acked: u64,
    bytes_received: u64,
    _segments: [u32; 2],
    notsent_bytes: u32,
    min_rtt: u32,
    _data_segments: [u32; 2],
    _delivery_rate: u64,
}

sockopt_impl!(
    /// `TCP_INFO`.
    RawInfo,
    GetOnly,
    libc::IPPROTO_TCP,
    libc::TCP_INFO,
    Raw
);

/// What the kernel knows of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// Smoothed round trip of its segments, queues included.
    pub rtt: Duration,
    /// The shortest round trip of late: the bare line.
    pub min_rtt: Duration,
    /// Bytes of a full segment.
    pub segment: u32,
    /// Bytes written and not acknowledged yet, those included that the kernel has not sent.
    pub under_way: u64,
    /// Bytes that the peer has acknowledged.
    pub acknowledged: u64,
}

impl TcpInfo {
    /// Reads it; `None` where the kernel does not tell.
    pub fn read(socket: &impl AsFd) -> Option<Self> {
        if !told() {
            return None;
        }
        let raw = getsockopt(socket, RawInfo).ok()?;
        let micros = |n: u32| Duration::from_micros(n.into());
        Some(Self {
            rtt: micros(raw.rtt),
            // The kernel says `!0` before it has measured.
            min_rtt: micros(if raw.min_rtt == u32::MAX {
                raw.rtt
            } else {
                raw.min_rtt
            }),
            segment: raw.snd_mss,
            under_way: u64::from(raw.unacked) * u64::from(raw.snd_mss) + u64::from(raw.notsent_bytes),
            acknowledged: raw.bytes_acked,
        })
    }
}

/// Whether the kernel's structure is long enough: Linux 4.9.
fn told() -> bool {
    static TOLD: OnceLock<bool> = OnceLock::new();
    *TOLD.get_or_init(|| {
        let release = nix::sys::utsname::uname().ok();
        let release = release
            .as_ref()
            .and_then(|u| u.release().to_str())
            .unwrap_or_default();
        let told = is_new_enough(release);
        if !told {
            tracing::warn!(
                release,
                "this kernel does not tell how long its queues are: bulk data is not paced"
            );
        }
        told
    })
}

fn is_new_enough(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (4, 9)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        assert!(is_new_enough("6.18.44-x"));
        assert!(is_new_enough("4.9.0"));
        assert!(is_new_enough("4.14"));
        assert!(!is_new_enough("4.4.302"));
        assert!(!is_new_enough("3.18"));
        assert!(!is_new_enough(""));
    }

    #[test]
    fn the_kernel_tells_what_was_acknowledged() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        near.write_all(&[7; 1000]).unwrap();
        far.read_exact(&mut [0; 1000]).unwrap();
        far.write_all(b"x").unwrap();
        near.read_exact(&mut [0; 1]).unwrap();
        let info = TcpInfo::read(&near).unwrap();
        // The handshake counts for one.
        assert_eq!(info.acknowledged, 1001);
        assert_eq!(info.under_way, 0);
        assert!(info.segment >= 536 && info.min_rtt > Duration::ZERO && info.min_rtt <= info.rtt * 2);
    }
}
