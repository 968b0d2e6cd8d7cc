//! The edge half of Skerry.
//!
//! The daemon dials the provider, keeps everything that it needs in a redb store, runs the site's pods in a
//! container runtime and talks to its field devices; it goes on doing so while the link is down.

pub mod link;
pub mod metrics;
pub mod node;
pub mod runtime;
pub mod store;
