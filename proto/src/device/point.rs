//! One property of a Device: its type, its place at the device, and how its value is made.

use std::time::Duration;

use super::fields::{Fields, bound, duration};
use super::normalised::{AccessMode, ModbusAddress, ModbusTable, Order, Point, Problem, RawType, ValueType};
use super::spec::DevicePropertySpec;

pub(super) fn point(
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
