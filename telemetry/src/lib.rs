//! What both Skerry programs do alike: configuration file, logging, signals, health and Prometheus endpoints.
//!
//! * [`config`]: the configuration file;
//! * [`logging`]: one line per event, plain or JSON, level by `SKERRY_LOG` (an `EnvFilter` directive);
//! * [`shutdown`]: SIGTERM and SIGINT as a cancellation token;
//! * [`http`]: a small HTTP server for `/healthz`, `/readyz` and `/metrics`.

pub mod config;
pub mod http;
pub mod logging;
pub mod shutdown;
