//! `Device.status`. Each side fills in its own part and leaves the rest out.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What is known of a device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DeviceStatus {
    /// Generation of the spec that the edge acts on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Generation of the spec that the provider has judged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub controller_observed_generation: Option<i64>,
    /// The node that the device is bound to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// The protocol's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<String>,
    /// Whether the device answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<DeviceState>,
    /// When the device last answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_online_time: Option<Timestamp>,
    /// All values on one line: `temp=24.1 °C`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// One for each property that is read.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub twins: Vec<Twin>,
    /// By type.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

impl DeviceStatus {
    /// The condition of a type.
    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        self.conditions.iter().find(|c| c.kind == kind)
    }
}

/// Whether a device answers. Words of KubeEdge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceState {
    /// It answers.
    Online,
    /// Its bus is there, it does not answer; or it is not asked.
    Offline,
    /// Its bus cannot be reached.
    Disconnected,
    /// Not known yet.
    #[serde(other)]
    Unknown,
}

/// A property's last reported value.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Twin {
    /// The property.
    pub property_name: String,
    /// What was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reported: Option<Reported>,
}

/// A value read from a device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Reported {
    /// The value, as text of the property's type; absent when it was never read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// KubeEdge's place for time and type.
    pub metadata: ReportedMetadata,
    /// When the value was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_time: Option<Timestamp>,
    /// How far the value may be trusted.
    pub quality: Quality,
    /// Why the quality is not good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<QualityReason>,
    /// The error, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Time and type of a value, as KubeEdge spells them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReportedMetadata {
    /// When the value was read: milliseconds since the Unix epoch, as text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<String>,
    /// The property's type.
    #[serde(rename = "type")]
    pub value_type: String,
}

/// How far a value may be trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Quality {
    /// Read as asked.
    Good,
    /// Perhaps old, or out of its range.
    Uncertain,
    /// The value could not be read; what is shown is the last known one.
    #[default]
    Bad,
}

/// Why a value is not good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum QualityReason {
    /// No sample for three intervals.
    Stale,
    /// The device or its bus failed while reading.
    CommFailure,
    /// No answer in time.
    Timeout,
    /// The value lies outside minimum and maximum.
    OutOfRange,
    /// The device refuses the address or the function.
    ConfigError,
    /// The value is no number.
    SensorFailure,
    /// The bus cannot be reached.
    NotConnected,
    /// The last value from before the daemon's start.
    LastKnown,
}

/// A Kubernetes condition.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// What it is about.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// One word.
    pub reason: String,
    /// Words for a person, with the remedy when something is wrong.
    #[serde(default)]
    pub message: String,
    /// When `status` last changed.
    pub last_transition_time: Timestamp,
    /// Generation of the spec that it speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

impl Condition {
    /// A condition that has just come about; see [`Condition::since`].
    pub fn new(
        kind: &str,
        holds: Option<bool>,
        reason: &str,
        message: impl Into<String>,
        now: Timestamp,
    ) -> Self {
        let status = match holds {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        };
        Self {
            kind: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message: message.into(),
            // etcd's form of metav1.Time has whole seconds.
            last_transition_time: Timestamp::from_second(now.as_second()).unwrap_or(now),
            observed_generation: None,
        }
    }

    /// The same, for a generation of the spec.
    pub fn of_generation(mut self, generation: i64) -> Self {
        self.observed_generation = Some(generation);
        self
    }

    /// Keeps the time of `before` when the status is the same.
    pub fn since(mut self, before: &DeviceStatus) -> Self {
        if let Some(old) = before
            .condition(&self.kind)
            .filter(|old| old.status == self.status)
        {
            self.last_transition_time = old.last_transition_time;
        }
        self
    }

    /// Whether the status is `True`.
    pub fn holds(&self) -> bool {
        self.status == "True"
    }
}
