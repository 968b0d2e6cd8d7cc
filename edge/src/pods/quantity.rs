//! Kubernetes quantities as integers.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Thousandths of the quantity's unit, rounded up, at most a 64-bit number of units; `None` when the text is no quantity.
///
/// Grammar: `<sign?><digits>[.<digits>]<suffix>` with a binary (`Ki`…`Ei`), decimal (`n u m k M G T P E`) or exponent
/// (`e3`, `E-2`) suffix.
pub(crate) fn milli(quantity: &Quantity) -> Option<i128> {
    let text = quantity.0.trim();
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || whole.len() > 20 || fraction.contains('.') {
        return None;
    }
    let fraction = fraction.get(..fraction.len().min(9))?;
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (factor, divisor) = scale(suffix)?;
    // More than a 64-bit number of units is as much as that, as for the API server; sums of them stay far from overflow.
    let numerator = digits.saturating_mul(factor).saturating_mul(1000);
    let denominator = divisor.checked_mul(10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?)?;
    let rounded = numerator / denominator + i128::from(numerator % denominator != 0);
    let rounded = rounded.min(i128::from(i64::MAX) * 1000);
    Some(if negative { -rounded } else { rounded })
}

/// The quantity in whole units, rounded up.
pub(crate) fn value(quantity: &Quantity) -> Option<i64> {
    let milli = milli(quantity)?;
    i64::try_from(if milli > 0 {
        (milli + 999) / 1000
    } else {
        milli / 1000
    })
    .ok()
}

/// How a quantity is written down.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Format {
    /// With powers of 1000: processors, say.
    #[default]
    Decimal,
    /// With powers of 1024: memory, mostly.
    Binary,
}

impl Format {
    /// That of a quantity's text.
    pub(crate) fn of(quantity: &Quantity) -> Self {
        if quantity.0.ends_with('i') {
            Self::Binary
        } else {
            Self::Decimal
        }
    }
}

/// Thousandths as the quantity that the API server would print: the largest suffix that leaves a whole number.
pub(crate) fn from_milli(milli: i128, format: Format) -> Quantity {
    let whole = milli % 1000 == 0;
    let value = milli / 1000;
    let (base, suffixes): (i128, &[&str]) = match format {
        Format::Binary => (1024, &["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"]),
        Format::Decimal => (1000, &["", "k", "M", "G", "T", "P", "E"]),
    };
    if !whole {
        return Quantity(format!("{milli}m"));
    }
    // Binary suffixes begin at 1024, as the API server has it.
    let mut left = value;
    let mut at = 0;
    while left != 0 && left % base == 0 && at + 1 < suffixes.len() {
        left /= base;
        at += 1;
    }
    Quantity(format!("{left}{}", suffixes.get(at).copied().unwrap_or_default()))
}

/// A suffix as factor and divisor.
fn scale(suffix: &str) -> Option<(i128, i128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1_000),
        "k" => (1_000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_i128
                .checked_pow(exponent.unsigned_abs())
                .filter(|_| exponent.abs() <= 18)?;
            if exponent < 0 { (1, power) } else { (power, 1) }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_the_api_server_reads_them() {
        for (text, expected) in [
            ("100m", 100),
            ("1", 1000),
            ("1.5", 1500),
            ("0.1", 100),
            ("1Ki", 1_024_000),
            ("1e3", 1_000_000),
            ("1E-2", 10),
            ("100n", 1),
            ("-2", -2000),
            ("99999999999999999999P", i128::from(i64::MAX) * 1000),
        ] {
            assert_eq!(milli(&Quantity(text.into())), Some(expected), "{text}");
        }
        assert_eq!(value(&Quantity("1500m".into())), Some(2));
    }

    #[test]
    fn quantities_are_written_as_the_api_server_writes_them() {
        for (milli, format, expected) in [
            (100, Format::Decimal, "100m"),
            (1000, Format::Decimal, "1"),
            (1500, Format::Decimal, "1500m"),
            (2_000_000, Format::Decimal, "2k"),
            ((200 << 20) * 1000, Format::Binary, "200Mi"),
            ((1536 << 20) * 1000, Format::Binary, "1536Mi"),
            (1000 * 1000, Format::Binary, "1000"),
            (0, Format::Binary, "0"),
        ] {
            assert_eq!(from_milli(milli, format).0, expected);
        }
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in ["", "x", "1Zi", "1.2.3", ".", "1e99", "999999999999999999999999"] {
            assert_eq!(milli(&Quantity(text.into())), None, "{text}");
        }
    }
}
