//! The in-cluster half of Skerry: a virtual kubelet for every edge site.

pub mod cluster;
pub mod link;
pub mod metrics;
pub mod node;
pub mod pki;
pub mod pods;
pub mod refs;
pub mod sites;
