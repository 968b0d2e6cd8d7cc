//! Settings of what a site that is alone remembers to tell.

use clap::Args;
use serde::Deserialize;

use super::ConfigError;
use super::duties::{bytes, period, settings};
use crate::store::{LaneLimits, Retention};

settings! {
    /// What the outbox keeps, as flags, environment variables and the file give it.
    OutboxSettings {
        /// Most bytes of reports that wait for the provider; beyond it the oldest of the least important lane is dropped
        /// [default: 40Mi]
        #[arg(long, env = "SKERRY_OUTBOX_MAX_SIZE", value_name = "QUANTITY")]
        outbox_max_size: String,
        /// Of that, for the status of the Node and of critical pods [default: 8Mi]
        #[arg(long, env = "SKERRY_OUTBOX_CRITICAL_STATUS_MAX_SIZE", value_name = "QUANTITY")]
        outbox_critical_status_max_size: String,
        /// Statuses of critical pods older than this are dropped; 0s = never [default: 0s]
        #[arg(long, env = "SKERRY_OUTBOX_CRITICAL_STATUS_MAX_AGE", value_name = "DURATION")]
        outbox_critical_status_max_age: String,
        /// Of that, for the status of other pods [default: 32Mi]
        #[arg(long, env = "SKERRY_OUTBOX_STATUS_MAX_SIZE", value_name = "QUANTITY")]
        outbox_status_max_size: String,
        /// Statuses of other pods older than this are dropped; 0s = never [default: 0s]
        #[arg(long, env = "SKERRY_OUTBOX_STATUS_MAX_AGE", value_name = "DURATION")]
        outbox_status_max_age: String,
        /// Of that, for events [default: 1Mi]
        #[arg(long, env = "SKERRY_OUTBOX_EVENTS_MAX_SIZE", value_name = "QUANTITY")]
        outbox_events_max_size: String,
        /// Events older than this are dropped; 0s = never [default: 24h]
        #[arg(long, env = "SKERRY_OUTBOX_EVENTS_MAX_AGE", value_name = "DURATION")]
        outbox_events_max_age: String,
        /// Of that, for what devices report [default: 8Mi]
        #[arg(long, env = "SKERRY_OUTBOX_TELEMETRY_MAX_SIZE", value_name = "QUANTITY")]
        outbox_telemetry_max_size: String,
        /// What devices reported longer ago than this is dropped; 0s = never [default: 24h]
        #[arg(long, env = "SKERRY_OUTBOX_TELEMETRY_MAX_AGE", value_name = "DURATION")]
        outbox_telemetry_max_age: String,
    }
}

impl OutboxSettings {
    pub(super) fn complete(self) -> Result<Retention, ConfigError> {
        let defaults = Retention::default();
        let given = [
            (
                "outbox-critical-status",
                self.outbox_critical_status_max_size,
                self.outbox_critical_status_max_age,
            ),
            (
                "outbox-status",
                self.outbox_status_max_size,
                self.outbox_status_max_age,
            ),
            (
                "outbox-events",
                self.outbox_events_max_size,
                self.outbox_events_max_age,
            ),
            (
                "outbox-telemetry",
                self.outbox_telemetry_max_size,
                self.outbox_telemetry_max_age,
            ),
        ];
        let mut lanes = defaults.lanes;
        for (lane, (name, size, age)) in lanes.iter_mut().zip(given) {
            let age = period(&format!("{name}-max-age"), age, lane.max_age.unwrap_or_default())?;
            *lane = LaneLimits {
                max_age: (!age.is_zero()).then_some(age),
                max_bytes: bytes(&format!("{name}-max-size"), size, lane.max_bytes)?,
            };
        }
        Ok(Retention {
            lanes,
            max_bytes: bytes("outbox-max-size", self.outbox_max_size, defaults.max_bytes)?,
        })
    }
}
