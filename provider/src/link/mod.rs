//! The gRPC server of the cloud-edge link: one session per site.
//!
//! In: TLS connections of sites, the mirror's idea of what each site must hold. Out: changes to the edge, reports to
//! the API server, streams for the kubelet endpoint. `link.proto` is the protocol's document.
//!
//! What must always hold:
//! * A session acts only for the site that its certificate names.
//! * A fenced session writes nothing more: every task of it ends with `Session::over`.
//! * Reports about one object reach the API server in the order in which the edge made them.

mod arrivals;
mod bulk;
mod class;
mod connection;
mod door;
mod gate;
pub mod lives;
pub mod names;
pub mod reports;
mod service;
pub mod sessions;
pub mod sync;
#[cfg(test)]
mod sync_tests;
mod timing;
pub mod tunnels;

pub use arrivals::Arrivals;
pub use connection::{Peer, listen, serve};
pub use service::{LinkDeps, LinkService};
pub use timing::{Timing, Timings};
