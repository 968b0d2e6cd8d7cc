//! The Device API as both sides read it.
//!
//! A Device comes as JSON from the API server. [`DeviceSpec`] takes what this release understands and leaves unknown
//! fields alone; [`normalise`] turns it into a [`NormalisedDevice`] with every default filled in, every guess written
//! down, and every mistake named together with its remedy. The provider uses it for the condition `Accepted`, the edge
//! to run the device: one code, so the two cannot disagree.
//!
//! Each side writes its own part of [`DeviceStatus`]: the provider `nodeName`, `protocol`, `Accepted`, `Bound`,
//! `EdgeReachable` and `Ready`; the edge the twins, `state`, `summary` and the other conditions.

mod duration;
mod fields;
mod normalise;
mod normalised;
mod point;
mod spec;
mod status;
#[cfg(test)]
mod tests;

pub use duration::{InvalidDuration, parse_duration};
pub use normalise::normalise;
pub use normalised::{
    AccessMode, Defaults, Endpoint, ModbusAddress, ModbusTable, NormalisedDevice, Order, Point, Problem,
    Protocol, RawType, ReportPolicy, ValueType,
};
pub use spec::{DesiredValue, Device, DevicePropertySpec, DeviceSpec, ModelRef, ReportSpec, SamplingSpec};
pub use status::{
    Condition, DeviceState, DeviceStatus, Quality, QualityReason, Reported, ReportedMetadata, Twin,
};

/// API group of Device.
pub const GROUP: &str = "devices.kubeedge.io";
/// Version of Device that both sides read and write.
pub const VERSION: &str = "v1alpha1";
/// Most properties that one Device may have.
pub const MAX_PROPERTIES: usize = 256;
