//! The harness of the end-to-end scenarios in `tests/e2e`.
//!
//! A [`cluster::Cluster`] is a real control plane with a real provider; a [`site::Site`] is a real edge daemon on a real
//! runtime, whose link goes through a [`relay::Relay`] that can drop its packets or close its sockets. Scenarios act and
//! look as a user does, with kubectl. [`runner`] runs them side by side and sums up.
//!
//! Everything here may panic: a panic is how a scenario fails, and dropping a handle ends what it started.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

pub mod certificate;
pub mod churn;
pub mod cluster;
pub mod containerd;
pub mod doorkeeper;
pub mod fleet;
pub mod hostile;
pub mod kubectl;
pub mod metrics_server;
pub mod modbus;
pub mod namespace;
pub mod pods;
pub mod process;
pub mod proxy;
pub mod registry;
pub mod relay;
pub mod runner;
pub mod site;
pub mod uplink;
pub mod wait;
