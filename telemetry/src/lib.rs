//! Logging, health and Prometheus endpoints shared by both Skerry programs.
//!
//! * [`logging`]: one line per event, plain or JSON, level by `SKERRY_LOG` (an `EnvFilter` directive);
//! * [`shutdown`]: SIGTERM and SIGINT as a cancellation token;
//! * [`http`]: a small HTTP server for `/healthz`, `/readyz` and `/metrics`.

pub mod http;
pub mod logging;
pub mod shutdown;
