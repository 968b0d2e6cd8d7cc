//! From what a user wrote to what is run: defaults, guesses, mistakes.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value};

use super::spec::{DevicePropertySpec, DeviceSpec};
use super::{MAX_PROPERTIES, parse_duration};

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
    fn invalid(field: impl Into<String>, message: impl Into<String>) -> Self {
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

    fn parse(text: &str) -> Option<Self> {
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

    fn parse(text: &str) -> Option<Self> {
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
    fn parse(text: &str) -> Option<(bool, bool)> {
        match text.to_ascii_lowercase().as_str() {
            "abcd" | "big" | "bigendian" => Some((false, false)),
            "cdab" => Some((false, true)),
            "badc" => Some((true, false)),
            "dcba" | "little" | "littleendian" => Some((true, true)),
            _ => None,
        }
    }
}

/// Fills in defaults and finds mistakes. Never both: a device with a mistake is not run.
pub fn normalise(spec: &DeviceSpec, defaults: &Defaults) -> Result<NormalisedDevice, Vec<Problem>> {
    let mut problems = Vec::new();
    let mut guesses = Vec::new();

    if let Some(model) = &spec.device_model_ref {
        problems.push(Problem {
            reason: "ModelNotSupported",
            field: "spec.deviceModelRef".into(),
            message: format!(
                "DeviceModel {:?}: this release does not read models; list the properties in the Device and remove deviceModelRef",
                model.name
            ),
        });
    } else if spec.properties.is_empty() {
        problems.push(Problem::invalid(
            "spec.properties",
            "is empty: list at least one property with name and type",
        ));
    }
    if spec.properties.len() > MAX_PROPERTIES {
        problems.push(Problem::invalid(
            "spec.properties",
            format!(
                "has {} entries, at most {MAX_PROPERTIES} are allowed: split the device",
                spec.properties.len()
            ),
        ));
    }
    let protocol = protocol_of(spec, &mut problems);
    let connection = Fields::connection(spec);
    let (endpoint, unit, timeout) = modbus_connection(&connection, defaults, &mut problems, &mut guesses);

    let mut points = Vec::new();
    let mut names = HashSet::new();
    for (index, property) in spec.properties.iter().take(MAX_PROPERTIES).enumerate() {
        let field = format!("spec.properties[{index}]");
        if property.name.is_empty() || property.name.len() > 63 {
            problems.push(Problem::invalid(
                format!("{field}.name"),
                "must have 1 to 63 characters",
            ));
        }
        if !names.insert(property.name.as_str()) {
            problems.push(Problem::invalid(
                format!("{field}.name"),
                format!("{:?} is given twice: rename one of the properties", property.name),
            ));
        }
        if let Some(point) = point(index, &field, property, &mut problems, &mut guesses) {
            points.push(point);
        }
    }
    let report = report_policy(spec, &mut problems);
    let Some(protocol) = protocol.filter(|_| problems.is_empty()) else {
        return Err(problems);
    };
    Ok(NormalisedDevice {
        protocol,
        endpoint,
        unit,
        timeout,
        suspend: spec.suspend,
        points,
        report,
        guesses,
        desired: desired_names(spec),
    })
}

fn desired_names(spec: &DeviceSpec) -> Vec<String> {
    let in_properties = spec
        .properties
        .iter()
        .filter(|p| p.desired.is_some())
        .map(|p| &p.name);
    let mut names: Vec<String> = spec.desired.keys().chain(in_properties).cloned().collect();
    names.sort();
    names.dedup();
    names
}

fn protocol_of(spec: &DeviceSpec, problems: &mut Vec<Problem>) -> Option<Protocol> {
    let name = spec
        .protocol
        .as_str()
        .or_else(|| spec.protocol.get("protocolName").and_then(Value::as_str));
    let Some(name) = name else {
        problems.push(Problem::invalid(
            "spec.protocol",
            "must be a protocol's name, for example modbus, or {protocolName, configData}",
        ));
        return None;
    };
    let found = Protocol::ALL
        .into_iter()
        .find(|p| name.eq_ignore_ascii_case(p.name()));
    if found.is_none() {
        let known: Vec<_> = Protocol::ALL.iter().map(|p| p.name()).collect();
        let shown: String = name.chars().take(40).collect();
        problems.push(Problem {
            reason: "UnknownProtocol",
            field: "spec.protocol".into(),
            message: format!("{shown:?} is not known here: use one of {}", known.join(", ")),
        });
    }
    found
}

fn modbus_connection(
    connection: &Fields<'_>,
    defaults: &Defaults,
    problems: &mut Vec<Problem>,
    guesses: &mut Vec<String>,
) -> (Option<Endpoint>, u8, Duration) {
    if let Some(transport) = connection
        .text(&["transport"])
        .filter(|t| !t.eq_ignore_ascii_case("tcp"))
    {
        problems.push(Problem::invalid(
            "spec.connection.transport",
            format!("{transport:?} is not supported in this release: use tcp"),
        ));
    }
    let port = connection.whole(&["port"], 1, 65_535, problems);
    let endpoint = match connection.text(&["host", "ip", "url"]) {
        Some(host) => endpoint(host, port, "spec.connection.host", problems),
        None => {
            let given = defaults.modbus.as_deref();
            let endpoint = given
                .and_then(|text| endpoint(text, port, "the site's default endpoint for modbus", problems));
            if let Some(endpoint) = &endpoint {
                guesses.push(format!(
                    "connection: {endpoint}, from the site's default endpoint for modbus"
                ));
            }
            endpoint
        }
    };
    let unit = connection.whole(&["unitId", "slaveID", "slaveId"], 0, 255, problems);
    let timeout = connection.duration(&["timeout"], Duration::from_millis(10), problems);
    (
        endpoint,
        unit.and_then(|u| u8::try_from(u).ok()).unwrap_or(1),
        timeout.unwrap_or(Duration::from_secs(1)),
    )
}

fn endpoint(text: &str, port: Option<i64>, field: &str, problems: &mut Vec<Problem>) -> Option<Endpoint> {
    let rest = text.strip_prefix("tcp://").unwrap_or(text).trim_end_matches('/');
    let (host, own_port) = if let Some(v6) = rest.strip_prefix('[') {
        let (host, after) = v6.split_once(']').unwrap_or((v6, ""));
        (host, after.strip_prefix(':'))
    } else if rest.matches(':').count() == 1 {
        rest.split_once(':')
            .map_or((rest, None), |(host, port)| (host, Some(port)))
    } else {
        (rest, None)
    };
    let own_port = own_port.map(str::parse::<u16>).transpose();
    match own_port {
        Ok(own) if !host.is_empty() && host.len() <= 253 => Some(Endpoint {
            host: host.to_owned(),
            port: port.and_then(|p| u16::try_from(p).ok()).or(own).unwrap_or(502),
        }),
        _ => {
            let shown: String = text.chars().take(80).collect();
            problems.push(Problem::invalid(
                field,
                format!("{shown:?} is no host or host:port"),
            ));
            None
        }
    }
}

fn report_policy(spec: &DeviceSpec, problems: &mut Vec<Problem>) -> ReportPolicy {
    let mut policy = ReportPolicy {
        min_interval: Duration::MAX,
        heartbeat: Duration::MAX,
    };
    let second = Duration::from_secs(1);
    for (index, property) in spec.properties.iter().enumerate() {
        let field = format!("spec.properties[{index}].report");
        let min = duration(
            property.report.min_interval.as_deref(),
            &format!("{field}.minInterval"),
            second,
            problems,
        )
        .or(property
            .report_cycle
            .map(|ms| Duration::from_millis(ms).max(second)))
        .unwrap_or(Duration::from_secs(10));
        let heartbeat = duration(
            property.report.heartbeat.as_deref(),
            &format!("{field}.heartbeat"),
            second,
            problems,
        )
        .unwrap_or(Duration::from_secs(300));
        policy.min_interval = policy.min_interval.min(min);
        policy.heartbeat = policy.heartbeat.min(heartbeat);
    }
    policy
}

fn duration(
    text: Option<&str>,
    field: &str,
    least: Duration,
    problems: &mut Vec<Problem>,
) -> Option<Duration> {
    match parse_duration(text?) {
        Ok(found) if found >= least => Some(found),
        Ok(_) => {
            problems.push(Problem::invalid(field, format!("must be at least {least:?}")));
            None
        }
        Err(error) => {
            problems.push(Problem::invalid(field, error.to_string()));
            None
        }
    }
}

fn point(
    index: usize,
    field: &str,
    property: &DevicePropertySpec,
    problems: &mut Vec<Problem>,
    guesses: &mut Vec<String>,
) -> Option<Point> {
    let before = problems.len();
    let access = match property
        .access_mode
        .as_deref()
        .map(str::to_ascii_lowercase)
        .as_deref()
    {
        None | Some("" | "readonly") => AccessMode::ReadOnly,
        Some("readwrite") => AccessMode::ReadWrite,
        Some("writeonly") => AccessMode::WriteOnly,
        Some(_) => {
            problems.push(Problem::invalid(
                format!("{field}.accessMode"),
                "must be ReadOnly, ReadWrite or WriteOnly",
            ));
            AccessMode::ReadOnly
        }
    };
    let Some((value_type, sized)) = value_type(&property.value_type) else {
        let shown: String = property.value_type.chars().take(40).collect();
        problems.push(Problem::invalid(
            format!("{field}.type"),
            format!(
                "{shown:?} is not a type that can be read: use boolean, int, int16 to uint64, float, double or string"
            ),
        ));
        return None;
    };
    let fields = Fields::property(field, property);
    let scale = fields.number(&["scale"], problems).unwrap_or(1.0);
    if scale == 0.0 {
        problems.push(Problem::invalid(
            format!("{field}.descriptor.scale"),
            "is 0, which makes every value 0: use the factor from raw to engineering units, for example 0.1",
        ));
    }
    let offset = fields.descriptor_number("offset", problems).unwrap_or(0.0);
    let minimum = bound(property.minimum.as_ref(), &format!("{field}.minimum"), problems);
    let maximum = bound(property.maximum.as_ref(), &format!("{field}.maximum"), problems);
    if let (Some(low), Some(high)) = (minimum, maximum)
        && low > high
    {
        problems.push(Problem::invalid(
            format!("{field}.minimum"),
            format!("{low} is greater than maximum {high}: swap them"),
        ));
    }
    let precision = fields.whole(&["precision"], 0, 15, problems);
    let interval = duration(
        property.sampling.interval.as_deref(),
        &format!("{field}.sampling.interval"),
        Duration::from_millis(10),
        problems,
    )
    .or(property.collect_cycle.map(|ms| Duration::from_millis(ms.max(10))))
    .unwrap_or(Duration::from_secs(1));
    let place = place(
        index,
        field,
        property,
        &fields,
        (value_type, sized, access),
        problems,
        guesses,
    );
    let order = order(&fields, problems);
    let (address, raw) = place?;
    if access == AccessMode::WriteOnly || problems.len() > before {
        return None;
    }
    Some(Point {
        name: property.name.clone(),
        value_type,
        access,
        address,
        raw,
        order,
        scale,
        offset,
        decimals: precision
            .and_then(|p| u8::try_from(p).ok())
            .or_else(|| decimals_of(scale, offset, raw)),
        unit: fields
            .text(&["unit"])
            .filter(|u| !u.is_empty())
            .map(str::to_owned),
        minimum,
        maximum,
        interval,
    })
}

/// Where the property is found and what it holds there.
fn place(
    index: usize,
    field: &str,
    property: &DevicePropertySpec,
    fields: &Fields<'_>,
    (value_type, sized, access): (ValueType, Option<RawType>, AccessMode),
    problems: &mut Vec<Problem>,
    guesses: &mut Vec<String>,
) -> Option<(ModbusAddress, RawType)> {
    let table = match fields.text(&["register", "registerType"]) {
        Some(text) => {
            let found = ModbusTable::parse(text);
            if found.is_none() {
                problems.push(Problem::invalid(
                    format!("{field}.descriptor.register"),
                    "must be coil, discrete, input or holding",
                ));
            }
            found
        }
        None => None,
    };
    let address = fields.address(problems);
    if address.is_none() && access != AccessMode::ReadOnly {
        problems.push(Problem::invalid(
            format!("{field}.descriptor.address"),
            "is missing: an address is never guessed for a property that may be written",
        ));
        return None;
    }
    let count = fields.whole(&["count", "limit", "quantity"], 1, 125, problems);
    let raw_given = match fields.text(&["rawType", "dataType"]) {
        Some(text) => {
            let found = RawType::parse(text);
            if found.is_none() {
                problems.push(Problem::invalid(
                    format!("{field}.descriptor.rawType"),
                    "must be boolean, int16, uint16, int32, uint32, int64, uint64, float32, float64 or string",
                ));
            }
            found
        }
        None => None,
    };
    let guessed_table = match (value_type, access) {
        (ValueType::Boolean, AccessMode::ReadOnly) => ModbusTable::Discrete,
        (ValueType::Boolean, _) => ModbusTable::Coil,
        (_, AccessMode::ReadOnly) => ModbusTable::Input,
        _ => ModbusTable::Holding,
    };
    let found_table = table.unwrap_or(guessed_table);
    let raw = if found_table.is_bits() {
        RawType::Bool
    } else {
        raw_given.or(sized).unwrap_or(match (value_type, count) {
            (ValueType::Text, _) => RawType::Text,
            (ValueType::Boolean, _) => RawType::Bool,
            (ValueType::Float, Some(2)) => RawType::Float32,
            (ValueType::Float, Some(4)) => RawType::Float64,
            (_, Some(2)) => RawType::Int32,
            (_, Some(4)) => RawType::Int64,
            _ => RawType::Int16,
        })
    };
    let count = match (raw.registers(), count) {
        (Some(needed), Some(given)) if i64::from(needed) != given => {
            problems.push(Problem::invalid(
                format!("{field}.descriptor.count"),
                format!("is {given}, but {raw} takes {needed}: leave count out"),
            ));
            return None;
        }
        (Some(needed), _) => needed,
        (None, Some(given)) => u16::try_from(given).unwrap_or(1),
        (None, None) => {
            problems.push(Problem::invalid(
                format!("{field}.descriptor.count"),
                "is missing: a string needs its length in registers of two characters",
            ));
            return None;
        }
    };
    let start = address.unwrap_or(index as i64);
    let Some(start) = u16::try_from(start)
        .ok()
        .filter(|s| u32::from(*s) + u32::from(count) <= 65_536)
    else {
        problems.push(Problem::invalid(
            format!("{field}.descriptor.address"),
            "must end within 65535",
        ));
        return None;
    };
    let raw_open = raw_given.is_none() && sized.is_none() && !found_table.is_bits() && raw != RawType::Bool;
    if table.is_none() || address.is_none() || raw_open {
        guesses.push(format!("{}: {found_table} {start}, {raw}", property.name));
    }
    Some((
        ModbusAddress {
            table: found_table,
            address: start,
            count,
        },
        raw,
    ))
}

fn value_type(text: &str) -> Option<(ValueType, Option<RawType>)> {
    Some(match text.to_ascii_lowercase().as_str() {
        "boolean" | "bool" => (ValueType::Boolean, None),
        "int" => (ValueType::Int, None),
        "int8" | "int16" => (ValueType::Int, Some(RawType::Int16)),
        "uint8" | "uint16" => (ValueType::Int, Some(RawType::Uint16)),
        "int32" => (ValueType::Int, Some(RawType::Int32)),
        "uint32" => (ValueType::Int, Some(RawType::Uint32)),
        "int64" => (ValueType::Int, Some(RawType::Int64)),
        "uint64" => (ValueType::Int, Some(RawType::Uint64)),
        "float" | "double" => (ValueType::Float, None),
        "string" => (ValueType::Text, None),
        _ => return None,
    })
}

fn order(fields: &Fields<'_>, problems: &mut Vec<Problem>) -> Order {
    let mut order = Order {
        swap_bytes: fields.flag("isSwap"),
        swap_words: fields.flag("isRegisterSwap"),
    };
    for (name, words) in [("byteOrder", false), ("wordOrder", true)] {
        let Some(text) = fields.text(&[name]) else {
            continue;
        };
        match Order::parse(text) {
            // A full name such as CDAB speaks of both; big and little of the field's own.
            Some((swap_bytes, swap_words)) if text.len() == 4 => {
                order = Order {
                    swap_bytes,
                    swap_words,
                }
            }
            Some((swap, _)) if words => order.swap_words = swap,
            Some((swap, _)) => order.swap_bytes = swap,
            None => problems.push(Problem::invalid(
                format!("{}.descriptor.{name}", fields.path),
                "must be ABCD, CDAB, BADC, DCBA, big or little",
            )),
        }
    }
    order
}

fn bound(value: Option<&Value>, field: &str, problems: &mut Vec<Problem>) -> Option<f64> {
    let found = number(value?);
    if found.is_none() {
        problems.push(Problem::invalid(field, "must be a number"));
    }
    found
}

fn number(value: &Value) -> Option<f64> {
    let found = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    found.filter(|n| n.is_finite())
}

/// Decimals that a fixed-point value can have; `None` for floats that are not scaled.
fn decimals_of(scale: f64, offset: f64, raw: RawType) -> Option<u8> {
    if matches!(raw, RawType::Float32 | RawType::Float64) {
        return None;
    }
    let of = |number: f64| {
        let text = format!("{number}");
        text.split_once('.').map_or(0, |(_, decimals)| decimals.len())
    };
    u8::try_from(of(scale).max(of(offset))).ok().filter(|d| *d <= 15)
}

/// Free-form fields with their aliases: the Device's own first, then KubeEdge's `configData`.
struct Fields<'a> {
    path: &'a str,
    own: &'a Map<String, Value>,
    config_data: Option<&'a Map<String, Value>>,
}

impl<'a> Fields<'a> {
    fn connection(spec: &'a DeviceSpec) -> Self {
        Self {
            path: "spec.connection",
            own: &spec.connection,
            config_data: spec.protocol.get("configData").and_then(Value::as_object),
        }
    }

    fn property(path: &'a str, property: &'a DevicePropertySpec) -> Self {
        Self {
            path,
            own: &property.descriptor,
            config_data: property.visitors.get("configData").and_then(Value::as_object),
        }
    }

    fn get(&self, names: &[&str]) -> Option<&'a Value> {
        let maps = [Some(self.own), self.config_data];
        maps.into_iter()
            .flatten()
            .find_map(|map| names.iter().find_map(|name| map.get(*name)))
            .filter(|value| !value.is_null())
    }

    fn text(&self, names: &[&str]) -> Option<&'a str> {
        self.get(names).and_then(Value::as_str)
    }

    fn flag(&self, name: &str) -> bool {
        self.get(&[name]).and_then(Value::as_bool).unwrap_or_default()
    }

    fn number(&self, names: &[&str], problems: &mut Vec<Problem>) -> Option<f64> {
        bound(self.get(names), &self.field(names), problems)
    }

    /// Of the descriptor alone: KubeEdge's `offset` in `configData` is an address.
    fn descriptor_number(&self, name: &str, problems: &mut Vec<Problem>) -> Option<f64> {
        bound(self.own.get(name), &self.field(&[name]), problems)
    }

    fn whole(&self, names: &[&str], least: i64, greatest: i64, problems: &mut Vec<Problem>) -> Option<i64> {
        self.whole_of(self.get(names)?, names, least, greatest, problems)
    }

    fn whole_of(
        &self,
        value: &Value,
        names: &[&str],
        least: i64,
        greatest: i64,
        problems: &mut Vec<Problem>,
    ) -> Option<i64> {
        let found = number(value)
            .filter(|n| n.fract() == 0.0)
            .map(|n| n as i64)
            .filter(|n| (least..=greatest).contains(n));
        if found.is_none() {
            problems.push(Problem::invalid(
                self.field(names),
                format!("must be a whole number from {least} to {greatest}"),
            ));
        }
        found
    }

    fn address(&self, problems: &mut Vec<Problem>) -> Option<i64> {
        let names = ["address"];
        let in_config = || self.config_data.and_then(|map| map.get("offset"));
        let value = self.get(&names).or_else(in_config)?;
        self.whole_of(value, &names, 0, 65_535, problems)
    }

    fn duration(&self, names: &[&str], least: Duration, problems: &mut Vec<Problem>) -> Option<Duration> {
        duration(self.text(names), &self.field(names), least, problems)
    }

    fn field(&self, names: &[&str]) -> String {
        let name = names.first().copied().unwrap_or_default();
        if self.path == "spec.connection" {
            format!("{}.{name}", self.path)
        } else {
            format!("{}.descriptor.{name}", self.path)
        }
    }
}
