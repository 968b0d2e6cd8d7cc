//! Waiting for a descriptor of the kernel's to become readable.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::sys::inotify::Inotify;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What owns its descriptor and keeps it open for as long as it lives.
pub(crate) trait OwnsFd: AsRawFd {}

impl OwnsFd for File {}
impl OwnsFd for Notices {}

/// The kernel's notices of changed files, in the shape that the reactor wants.
pub(crate) struct Notices(pub(crate) Inotify);

impl AsRawFd for Notices {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsFd::as_fd(&self.0).as_raw_fd()
    }
}

/// Registers a non-blocking descriptor with the reactor. Must be called in a tokio runtime.
#[allow(unsafe_code)]
pub(crate) fn readable<T: OwnsFd>(inner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: `OwnsFd` says that the descriptor is valid and the same until `inner` is dropped, which `AsyncFd` does
    // after it has deregistered it.
    unsafe { AsyncFd::register_with_interest(inner, Interest::READABLE) }
        .map_err(|error| error.into_parts().1)
}
