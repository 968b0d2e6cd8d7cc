//! Writes Prometheus' text format, version 0.0.4.

use std::fmt::Write;

use jiff::Timestamp;

/// The format's media type.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Text under construction. Families must not be mixed: open one, write its samples, open the next.
#[derive(Default)]
pub struct Exposition {
    text: String,
    name: &'static str,
}

impl Exposition {
    /// Begins a family.
    pub fn family(&mut self, name: &'static str, kind: &str, help: &str) -> &mut Self {
        self.name = name;
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        self
    }

    /// A sample of the family that was begun last; nothing when there is no value.
    pub fn sample(
        &mut self,
        labels: &[(&str, &str)],
        value: Option<f64>,
        at: Option<Timestamp>,
    ) -> &mut Self {
        let Some(value) = value else { return self };
        self.text.push_str(self.name);
        for (i, (label, text)) in labels.iter().enumerate() {
            self.text.push(if i == 0 { '{' } else { ',' });
            let _ = write!(self.text, "{label}=\"");
            escape(text, &mut self.text);
            self.text.push('"');
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        let _ = write!(self.text, " {value}");
        if let Some(at) = at {
            let _ = write!(self.text, " {}", at.as_millisecond());
        }
        self.text.push('\n');
        self
    }

    /// Adds text that is in the format already.
    pub fn append(&mut self, text: &str) {
        self.text.push_str(text);
    }

    /// The text.
    pub fn finish(self) -> String {
        self.text
    }
}

fn escape(value: &str, out: &mut String) {
    for c in value.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
}

/// Whole numbers as the format's floating point ones; beyond 2^53 the last digits go, as everywhere in Prometheus.
#[allow(clippy::cast_precision_loss)]
pub fn number(value: Option<u64>) -> Option<f64> {
    value.map(|n| n as f64)
}

/// Nanoseconds as seconds.
pub fn seconds(nanos: Option<u64>) -> Option<f64> {
    number(nanos).map(|n| n / 1e9)
}

/// Turns what `prometheus-client` writes, OpenMetrics, into this format: a counter's family is named as its samples
/// are, and there is no end mark.
pub fn from_openmetrics(text: &str) -> String {
    let mut counters = std::collections::HashSet::new();
    for line in text.lines() {
        if let Some((name, "counter")) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' ')) {
            counters.insert(name);
        }
    }
    let mut out = String::with_capacity(text.len());
    for line in text.lines().filter(|line| *line != "# EOF") {
        let described = ["# HELP ", "# TYPE "].iter().find_map(|mark| {
            let (name, rest) = line.strip_prefix(mark)?.split_once(' ')?;
            counters.contains(name).then_some((mark, name, rest))
        });
        // Writing to a String cannot fail.
        let _ = match described {
            Some((mark, name, rest)) => writeln!(out, "{mark}{name}_total {rest}"),
            None => writeln!(out, "{line}"),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counters_family_is_named_as_its_samples() {
        let text = "# HELP calls Calls.\n# TYPE calls counter\ncalls_total 3\n# HELP open Open.\n# TYPE open gauge\nopen 1\n# EOF\n";
        let expected = "# HELP calls_total Calls.\n# TYPE calls_total counter\ncalls_total 3\n# HELP open Open.\n# TYPE open gauge\nopen 1\n";
        assert_eq!(from_openmetrics(text), expected);
    }

    #[test]
    fn samples_have_labels_value_and_time() {
        let mut text = Exposition::default();
        let at = Timestamp::from_millisecond(1_700_000_000_123).unwrap();
        text.family("a_total", "counter", "What it is")
            .sample(&[("pod", "p\"\\\n"), ("namespace", "n")], Some(1.5), Some(at))
            .sample(&[], Some(2.0), None)
            .sample(&[], None, None);
        let expected = "# HELP a_total What it is\n# TYPE a_total counter\n\
            a_total{pod=\"p\\\"\\\\\\n\",namespace=\"n\"} 1.5 1700000000123\na_total 2\n";
        assert_eq!(text.finish(), expected);
    }
}
