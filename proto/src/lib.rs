//! The contract between the Skerry provider and the edge daemon.
//!
//! * [`link`]: the gRPC messages and services, generated from `proto/skerry/link/v1/link.proto`, which is the
//!   document to read about the protocol;
//! * [`SiteName`], [`SpiffeId`], [`TrustDomain`]: the names that both sides check;
//! * [`autonomy`]: policies for the time without the cloud;
//! * [`Class`]: how much a site or a pod matters;
//! * [`static_pod`]: static pods and their mirrors;
//! * [`token`]: the join token;
//! * [`digest`]: how what a site holds is told in short;
//! * [`object`]: how an API object is hashed and packed for the link;
//! * [`device`]: the Device API as both sides read it;
//! * [`stats`]: what a node and its pods use;
//! * [`fuzzing`]: hostile bytes for the decoders of all crates;
//! * [`limits`]: sizes that both sides enforce.

pub mod autonomy;
mod class;
pub mod device;
pub mod digest;
pub mod fuzzing;
pub mod limits;
pub mod object;
mod site;
mod spiffe;
pub mod static_pod;
pub mod stats;
pub mod token;

pub use class::{CRITICAL_PRIORITY, Class, InvalidClass, POD_CLASS};
pub use site::{InvalidSiteName, SiteName};
pub use spiffe::{InvalidSpiffeId, SpiffeId, TrustDomain};

/// Messages and services of the cloud-edge link, generated from `link.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod link {
    tonic::include_proto!("skerry.link.v1");

    /// The newest protocol version that this build speaks.
    pub const PROTOCOL_MAX: u32 = 1;
    /// The oldest protocol version that this build speaks.
    pub const PROTOCOL_MIN: u32 = 1;

    /// The feature of Hello and Welcome that stands for `InventoryDigest` and digests in `Applied`.
    pub const FEATURE_DIGEST: &str = "inventory-digest";
}
