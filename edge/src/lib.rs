//! The edge half of Skerry.
//!
//! The daemon dials the provider, keeps everything that it needs in a redb store, runs the site's pods in a
//! container runtime and talks to its field devices; it goes on doing so while the link is down.
//!
//! One room per folder; `docs/architecture.md` is the map. [`daemon::run`] wires them together.

pub mod autonomy;
pub mod cgroup;
pub mod cli;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod devices;
pub mod eviction;
pub mod fuzzing;
pub mod identity;
pub mod images;
pub mod inspect;
pub mod link;
pub mod local;
pub mod manifests;
pub mod metrics;
pub mod node;
pub mod pods;
mod readable;
pub mod readiness;
pub mod resident;
pub mod rotation;
pub mod runtime;
pub mod shutdown;
pub mod stats;
pub mod store;
pub mod streams;
