//! What both Skerry programs do alike: configuration file, logging, signals, health and Prometheus endpoints.
//!
//! * [`config`]: the configuration file;
//! * [`logging`]: one line per event, plain or JSON, what by `SKERRY_LOG`, say `info,skerry_edge=debug`;
//! * [`shutdown`]: SIGTERM and SIGINT as a cancellation token;
//! * [`exposition`]: Prometheus' text format, for metrics that no registry holds;
//! * [`http`]: a small HTTP server for `/healthz`, `/readyz` and `/metrics`.

pub mod config;
pub mod exposition;
pub mod http;
pub mod logging;
pub mod shutdown;
