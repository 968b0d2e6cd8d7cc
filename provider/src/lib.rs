//! The in-cluster half of Skerry: a virtual kubelet for every edge site.
//!
//! One room per folder; `docs/architecture.md` is the map. [`server::run`] wires them together.

pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod devices;
pub mod fuzzing;
pub mod kubelet;
pub mod link;
pub mod metrics;
pub mod node;
pub mod pace;
pub mod pki;
pub mod pods;
pub mod refs;
pub mod server;
pub mod sites;
