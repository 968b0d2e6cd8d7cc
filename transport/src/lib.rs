//! The sockets of the cloud-edge link, the same for both sides.
//!
//! A site has two TCP connections. This crate is what lies between them and TLS: a [`Stream`] that marks its packets by the
//! site's [`Class`](skerry_proto::Class), notices a dead peer within the class's deadline, counts its bytes, and, for bulk, keeps
//! so little under way that heartbeats beside it are not delayed ([`pace`]). A [`Handle`] reaches a stream after TLS and HTTP/2
//! have swallowed it; it does not keep the connection open.
//!
//! What must always hold:
//! * An option that the kernel does not have costs the option, never the connection.
//! * Control is never paced.

mod info;
mod lines;
pub mod pace;
mod socket;
mod stream;

pub use info::TcpInfo;
pub use lines::Lines;
pub use socket::{Lane, LifeSigns};
pub use stream::{Handle, Stream};
