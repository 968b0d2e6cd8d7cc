//! What a Device is once every default is filled in.

use std::fmt;
use std::time::Duration;

/// What the site's configuration gives where a Device says nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defaults {
    /// `host:port` (or `host`) of the site's Modbus TCP server or gateway.
    pub modbus: Option<String>,
}

/// A mistake in a Device: which field, what is wrong, what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// One word for a condition's reason: `UnknownProtocol`, `ModelNotSupported` or `InvalidSpec`.
    pub reason: &'static str,
    /// Path of the field from the object's root.
    pub field: String,
    /// What is wrong and the remedy.
    pub message: String,
}

impl Problem {
    pub(super) fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            reason: "InvalidSpec",
            field: field.into(),
            message: message.into(),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// Protocols that this release speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Modbus TCP.
    Modbus,
}

impl Protocol {
    /// All of them.
    pub const ALL: [Self; 1] = [Self::Modbus];

    /// As written in `spec.protocol`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Modbus => "modbus",
        }
    }
}

/// Where a device is reached.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// A Device with nothing left open.
#[derive(Clone, Debug, PartialEq)]
pub struct NormalisedDevice {
    /// Which driver serves it.
    pub protocol: Protocol,
    /// `None`: neither the Device nor the site's configuration names one.
    pub endpoint: Option<Endpoint>,
    /// Modbus unit identifier.
    pub unit: u8,
    /// How long an answer may take.
    pub timeout: Duration,
    /// Do not talk to the device.
    pub suspend: bool,
    /// What is read, in the order of the spec. Properties that are only written are left out.
    pub points: Vec<Point>,
    /// When readings are reported.
    pub report: ReportPolicy,
    /// What was guessed, one sentence each.
    pub guesses: Vec<String>,
    /// Properties that a desired value is given for.
    pub desired: Vec<String>,
}

/// When readings are reported upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportPolicy {
    /// Least time between two reports when only values change.
    pub min_interval: Duration,
    /// A report comes at least this often.
    pub heartbeat: Duration,
}

/// A property that is read.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// The property's name.
    pub name: String,
    /// The property's type.
    pub value_type: ValueType,
    /// Whether it may be written too.
    pub access: AccessMode,
    /// Where it is found.
    pub address: ModbusAddress,
    /// What the registers hold.
    pub raw: RawType,
    /// How bytes and words lie in the registers.
    pub order: Order,
    /// Engineering value = raw × scale + offset.
    pub scale: f64,
    /// See `scale`.
    pub offset: f64,
    /// Decimals to round to; `None` = as the number comes.
    pub decimals: Option<u8>,
    /// Appended to the value in summaries.
    pub unit: Option<String>,
    /// Below it a value is out of range.
    pub minimum: Option<f64>,
    /// Above it a value is out of range.
    pub maximum: Option<f64>,
    /// How often it is read.
    pub interval: Duration,
}

/// A property's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    /// `true` or `false`.
    Boolean,
    /// Any whole number.
    Int,
    /// A number.
    Float,
    /// Text.
    Text,
}

impl ValueType {
    /// KubeEdge's word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Boolean => "boolean",
            Self::Int => "int",
            Self::Float => "float",
            Self::Text => "string",
        }
    }
}

/// Who may change a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessMode {
    /// Only the device.
    ReadOnly,
    /// The device and the user.
    ReadWrite,
    /// The user; it is not read.
    WriteOnly,
}

/// Modbus's four tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ModbusTable {
    /// Bits that may be written.
    Coil,
    /// Bits.
    Discrete,
    /// Registers.
    Input,
    /// Registers that may be written.
    Holding,
}

impl ModbusTable {
    /// Whether it holds bits rather than registers.
    pub fn is_bits(self) -> bool {
        matches!(self, Self::Coil | Self::Discrete)
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        match text.to_ascii_lowercase().trim_end_matches("register") {
            "coil" => Some(Self::Coil),
            "discrete" | "discreteinput" | "discreteinputs" => Some(Self::Discrete),
            "input" => Some(Self::Input),
            "holding" => Some(Self::Holding),
            _ => None,
        }
    }
}

impl fmt::Display for ModbusTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Coil => "coil",
            Self::Discrete => "discrete input",
            Self::Input => "input register",
            Self::Holding => "holding register",
        })
    }
}

/// A run of registers or bits. `address + count` never exceeds 65536.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ModbusAddress {
    /// Which table.
    pub table: ModbusTable,
    /// The first, counted from 0.
    pub address: u16,
    /// How many, at least 1.
    pub count: u16,
}

/// What registers hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawType {
    /// A bit, or a register that is not 0.
    Bool,
    /// One register, signed.
    Int16,
    /// One register.
    Uint16,
    /// Two registers, signed.
    Int32,
    /// Two registers.
    Uint32,
    /// Four registers, signed.
    Int64,
    /// Four registers.
    Uint64,
    /// Two registers, IEEE 754.
    Float32,
    /// Four registers, IEEE 754.
    Float64,
    /// Two characters to a register, ended by NUL or the last register.
    Text,
}

impl RawType {
    /// Registers it takes; `None` for text, whose length is given.
    pub fn registers(self) -> Option<u16> {
        match self {
            Self::Bool | Self::Int16 | Self::Uint16 => Some(1),
            Self::Int32 | Self::Uint32 | Self::Float32 => Some(2),
            Self::Int64 | Self::Uint64 | Self::Float64 => Some(4),
            Self::Text => None,
        }
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        Some(match text.to_ascii_lowercase().as_str() {
            "bool" | "boolean" => Self::Bool,
            "int16" => Self::Int16,
            "uint16" => Self::Uint16,
            "int32" => Self::Int32,
            "uint32" => Self::Uint32,
            "int64" => Self::Int64,
            "uint64" => Self::Uint64,
            "float32" | "float" => Self::Float32,
            "float64" | "double" => Self::Float64,
            "string" => Self::Text,
            _ => return None,
        })
    }
}

impl fmt::Display for RawType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bool => "boolean",
            Self::Int16 => "int16",
            Self::Uint16 => "uint16",
            Self::Int32 => "int32",
            Self::Uint32 => "uint32",
            Self::Int64 => "int64",
            Self::Uint64 => "uint64",
            Self::Float32 => "float32",
            Self::Float64 => "float64",
            Self::Text => "string",
        })
    }
}

/// Byte and word order: big-endian is `ABCD`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Order {
    /// The bytes within each register are swapped (`BADC`).
    pub swap_bytes: bool,
    /// The registers come last first (`CDAB`).
    pub swap_words: bool,
}

impl Order {
    pub(super) fn parse(text: &str) -> Option<(bool, bool)> {
        match text.to_ascii_lowercase().as_str() {
            "abcd" | "big" | "bigendian" => Some((false, false)),
            "cdab" => Some((false, true)),
            "badc" => Some((true, false)),
            "dcba" | "little" | "littleendian" => Some((true, true)),
            _ => None,
        }
    }
}
