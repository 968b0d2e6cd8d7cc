//! From raw registers to the text of a value.
//!
//! Raw → byte and word order → number → × scale + offset → rounded to the decimals that scale and offset have, so that
//! 241 × 0.1 prints `24.1`. Whole numbers without scaling never pass through a float.

use skerry_proto::device::{Point, QualityReason, RawType, ValueType};

use super::drivers::{PointError, Raw};

/// A value, and whether it lies in its range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decoded {
    /// As text of the property's type.
    pub(crate) value: String,
    /// Outside of minimum or maximum: in words.
    pub(crate) out_of_range: Option<String>,
}

enum Number {
    Whole(i128),
    Float(f64),
}

/// Reads a point's value out of its registers or bits.
pub(crate) fn decode(point: &Point, raw: &Raw) -> Result<Decoded, PointError> {
    let words = match raw {
        Raw::Bits(bits) => {
            let bit = bits.first().copied().unwrap_or_default();
            return Ok(scaled(point, Number::Whole(bit.into())));
        }
        Raw::Words(words) => ordered(point, words),
    };
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_be_bytes()).collect();
    let short = || PointError {
        reason: QualityReason::CommFailure,
        message: format!("{}: {} needs more registers than came", point.name, point.raw),
    };
    let two = || bytes.first_chunk::<2>().copied().ok_or_else(short);
    let four = || bytes.first_chunk::<4>().copied().ok_or_else(short);
    let eight = || bytes.first_chunk::<8>().copied().ok_or_else(short);
    let number = match point.raw {
        RawType::Text => {
            let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
            return Ok(Decoded {
                value: String::from_utf8_lossy(text).trim_end().to_owned(),
                out_of_range: None,
            });
        }
        RawType::Bool => Number::Whole((two()? != [0, 0]).into()),
        RawType::Int16 => Number::Whole(i16::from_be_bytes(two()?).into()),
        RawType::Uint16 => Number::Whole(u16::from_be_bytes(two()?).into()),
        RawType::Int32 => Number::Whole(i32::from_be_bytes(four()?).into()),
        RawType::Uint32 => Number::Whole(u32::from_be_bytes(four()?).into()),
        RawType::Int64 => Number::Whole(i64::from_be_bytes(eight()?).into()),
        RawType::Uint64 => Number::Whole(u64::from_be_bytes(eight()?).into()),
        RawType::Float32 => {
            let float = f32::from_be_bytes(four()?);
            // Through text, so that 0.1f32 stays 0.1.
            Number::Float(float.to_string().parse().unwrap_or_else(|_| f64::from(float)))
        }
        RawType::Float64 => Number::Float(f64::from_be_bytes(eight()?)),
    };
    if let Number::Float(float) = number
        && !float.is_finite()
    {
        return Err(PointError {
            reason: QualityReason::SensorFailure,
            message: format!("{}: the device gives {float}, which is no number", point.name),
        });
    }
    Ok(scaled(point, number))
}

/// Hostile registers.
pub(crate) fn any_registers(point: &Point, words: &[u16]) {
    let needed = words.get(..usize::from(point.address.count)).unwrap_or(words);
    let _ = decode(point, &Raw::Words(needed.to_vec()));
    let _ = decode(
        point,
        &Raw::Bits(words.iter().map(|word| word & 1 == 1).collect()),
    );
}

fn ordered(point: &Point, words: &[u16]) -> Vec<u16> {
    let mut words = words.to_vec();
    if point.order.swap_bytes {
        words.iter_mut().for_each(|word| *word = word.swap_bytes());
    }
    if point.order.swap_words {
        words.reverse();
    }
    words
}

fn scaled(point: &Point, number: Number) -> Decoded {
    let plain = point.scale == 1.0 && point.offset == 0.0;
    let float = match number {
        Number::Whole(whole) => whole as f64,
        Number::Float(float) => float,
    } * point.scale
        + point.offset;
    let value = match (point.value_type, number) {
        (ValueType::Boolean, _) => (float != 0.0).to_string(),
        (_, Number::Whole(whole)) if plain && point.decimals.unwrap_or_default() == 0 => whole.to_string(),
        (ValueType::Int, _) => without_minus_zero(format!("{float:.0}")),
        (_, _) => match point.decimals {
            Some(decimals) => without_minus_zero(format!("{float:.*}", usize::from(decimals))),
            None => without_minus_zero(format!("{float}")),
        },
    };
    let below = point
        .minimum
        .filter(|low| float < *low)
        .map(|low| format!("{value} is below minimum {low}"));
    let above = point
        .maximum
        .filter(|high| float > *high)
        .map(|high| format!("{value} is above maximum {high}"));
    Decoded {
        out_of_range: below.or(above),
        value,
    }
}

fn without_minus_zero(text: String) -> String {
    match text.strip_prefix('-') {
        Some(rest) if rest.bytes().all(|b| b == b'0' || b == b'.') => rest.to_owned(),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use skerry_proto::device::{Defaults, normalise};

    fn point(kind: &str, descriptor: Value) -> Point {
        let spec = json!({"protocol": "modbus", "properties": [{"name": "p", "type": kind, "descriptor": descriptor}]});
        let spec = serde_json::from_value(spec).unwrap();
        normalise(&spec, &Defaults::default()).unwrap().points.remove(0)
    }

    fn read(kind: &str, descriptor: Value, words: &[u16]) -> String {
        decode(&point(kind, descriptor), &Raw::Words(words.to_vec()))
            .unwrap()
            .value
    }

    #[test]
    fn fixed_point_values_print_as_many_decimals_as_their_scale_has() {
        assert_eq!(read("float", json!({"scale": 0.1}), &[241]), "24.1");
        assert_eq!(read("float", json!({"scale": 0.1}), &[0xFFFF]), "-0.1");
        assert_eq!(
            read("float", json!({"scale": 0.01, "offset": -40}), &[4000]),
            "0.00"
        );
        assert_eq!(
            read("float", json!({"scale": 0.1, "precision": 0}), &[0xFFFF]),
            "0"
        );
        assert_eq!(read("int", json!({"scale": 10}), &[3]), "30");
        assert_eq!(read("int", json!({}), &[0xFFFE]), "-2");
    }

    #[test]
    fn orders_and_widths_are_honoured() {
        let float = |order: &str, words: &[u16]| {
            read(
                "float",
                json!({"rawType": "float32", "byteOrder": order, "register": "holding", "address": 0}),
                words,
            )
        };
        // 23.5 = 0x41BC0000
        assert_eq!(float("ABCD", &[0x41BC, 0x0000]), "23.5");
        assert_eq!(float("CDAB", &[0x0000, 0x41BC]), "23.5");
        assert_eq!(float("BADC", &[0xBC41, 0x0000]), "23.5");
        assert_eq!(float("DCBA", &[0x0000, 0xBC41]), "23.5");
        assert_eq!(read("uint64", json!({}), &[0xFFFF; 4]), u64::MAX.to_string());
        assert_eq!(read("int64", json!({}), &[0x8000, 0, 0, 0]), i64::MIN.to_string());
        assert_eq!(
            read("boolean", json!({"register": "holding", "address": 3}), &[2]),
            "true"
        );
        assert_eq!(
            read("string", json!({"count": 3}), &[0x4142, 0x4300, 0x4444]),
            "ABC"
        );
    }

    #[test]
    fn a_float_that_is_no_number_is_a_sensor_failure() {
        let point = point("float", json!({"rawType": "float32"}));
        let error = decode(&point, &Raw::Words(vec![0x7FC0, 0])).unwrap_err();
        assert_eq!(error.reason, QualityReason::SensorFailure);
    }

    proptest! {
        #[test]
        fn every_int16_scaled_by_a_tenth_prints_exactly(raw: i16) {
            let text = read("float", json!({"scale": 0.1}), &[raw as u16]);
            let digits: String = text.chars().filter(|c| *c != '.').collect();
            prop_assert_eq!(digits.parse::<i32>().unwrap(), i32::from(raw));
        }

        #[test]
        fn too_few_registers_are_an_error_never_a_panic(words in prop::collection::vec(any::<u16>(), 0..4)) {
            for kind in ["int16", "uint32", "int64", "boolean"] {
                let _ = decode(&point(kind, json!({"register": "input", "address": 0})), &Raw::Words(words.clone()));
            }
        }
    }
}
