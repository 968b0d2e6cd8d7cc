//! Drivers: one file for each field protocol.
//!
//! A driver knows one bus: it connects, reads a batch of addresses, closes. Everything else (when to read, retries,
//! scaling, quality, reports) is the room's own, so that a driver stays small. [`driver_for`] is the registry.

pub(crate) mod modbus;

pub(crate) use modbus::any_answer as any_modbus_answer;

use std::time::Duration;

use async_trait::async_trait;
use skerry_proto::device::{Endpoint, ModbusAddress, Protocol, QualityReason};

/// A batch for one device on the bus.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Modbus unit identifier.
    pub unit: u8,
    /// How long one answer may take.
    pub timeout: Duration,
    /// What to read; answers come in the same order.
    pub addresses: Vec<ModbusAddress>,
}

/// What one address holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Raw {
    /// Registers, as many as asked for.
    Words(Vec<u16>),
    /// Bits, as many as asked for.
    Bits(Vec<bool>),
}

/// One address could not be read; the bus and the device work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct PointError {
    /// For the twin.
    pub reason: QualityReason,
    /// The device's words.
    pub message: String,
}

/// The connection failed or can no longer be trusted: the caller closes it and connects again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BusError {
    /// For the twins.
    pub reason: QualityReason,
    /// What happened, naming the endpoint.
    pub message: String,
}

/// One bus of one protocol. Not shared: one request is in flight at a time.
#[async_trait]
pub trait Driver: Send {
    /// Opens the connection, replacing an older one. Not cancellation safe in the sense that a cancelled call leaves
    /// the driver closed.
    async fn connect(&mut self) -> Result<(), BusError>;

    /// Reads a batch; one result for each address, in order. After an error the connection is of no use.
    async fn read(&mut self, batch: &Batch) -> Result<Vec<Result<Raw, PointError>>, BusError>;

    /// Closes the connection, if there is one.
    async fn close(&mut self);
}

/// The driver of a protocol for one endpoint. Protocols that are not known never get here: `normalise` refuses them
/// with the reason `UnknownProtocol`.
pub fn driver_for(protocol: Protocol, endpoint: &Endpoint) -> Box<dyn Driver> {
    match protocol {
        Protocol::Modbus => Box::new(modbus::Modbus::new(endpoint.clone())),
    }
}
