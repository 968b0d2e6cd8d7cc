//! Free-form fields of a Device, with their aliases.

use std::time::Duration;

use serde_json::{Map, Value};

use super::normalised::Problem;
use super::parse_duration;
use super::spec::{DevicePropertySpec, DeviceSpec};

/// Free-form fields with their aliases: the Device's own first, then KubeEdge's `configData`.
pub(super) struct Fields<'a> {
    pub(super) path: &'a str,
    own: &'a Map<String, Value>,
    config_data: Option<&'a Map<String, Value>>,
}

impl<'a> Fields<'a> {
    pub(super) fn connection(spec: &'a DeviceSpec) -> Self {
        Self {
            path: "spec.connection",
            own: &spec.connection,
            config_data: spec.protocol.get("configData").and_then(Value::as_object),
        }
    }

    pub(super) fn property(path: &'a str, property: &'a DevicePropertySpec) -> Self {
        Self {
            path,
            own: &property.descriptor,
            config_data: property.visitors.get("configData").and_then(Value::as_object),
        }
    }

    pub(super) fn get(&self, names: &[&str]) -> Option<&'a Value> {
        let maps = [Some(self.own), self.config_data];
        maps.into_iter()
            .flatten()
            .find_map(|map| names.iter().find_map(|name| map.get(*name)))
            .filter(|value| !value.is_null())
    }

    pub(super) fn text(&self, names: &[&str]) -> Option<&'a str> {
        self.get(names).and_then(Value::as_str)
    }

    pub(super) fn flag(&self, name: &str) -> bool {
        self.get(&[name]).and_then(Value::as_bool).unwrap_or_default()
    }

    pub(super) fn number(&self, names: &[&str], problems: &mut Vec<Problem>) -> Option<f64> {
        bound(self.get(names), &self.field(names), problems)
    }

    /// Of the descriptor alone: KubeEdge's `offset` in `configData` is an address.
    pub(super) fn descriptor_number(&self, name: &str, problems: &mut Vec<Problem>) -> Option<f64> {
        bound(self.own.get(name), &self.field(&[name]), problems)
    }

    pub(super) fn whole(
        &self,
        names: &[&str],
        least: i64,
        greatest: i64,
        problems: &mut Vec<Problem>,
    ) -> Option<i64> {
        self.whole_of(self.get(names)?, names, least, greatest, problems)
    }

    pub(super) fn whole_of(
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

    pub(super) fn address(&self, problems: &mut Vec<Problem>) -> Option<i64> {
        let names = ["address"];
        let in_config = || self.config_data.and_then(|map| map.get("offset"));
        let value = self.get(&names).or_else(in_config)?;
        self.whole_of(value, &names, 0, 65_535, problems)
    }

    pub(super) fn duration(
        &self,
        names: &[&str],
        least: Duration,
        problems: &mut Vec<Problem>,
    ) -> Option<Duration> {
        duration(self.text(names), &self.field(names), least, problems)
    }

    pub(super) fn field(&self, names: &[&str]) -> String {
        let name = names.first().copied().unwrap_or_default();
        if self.path == "spec.connection" {
            format!("{}.{name}", self.path)
        } else {
            format!("{}.descriptor.{name}", self.path)
        }
    }
}

pub(super) fn duration(
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

pub(super) fn bound(value: Option<&Value>, field: &str, problems: &mut Vec<Problem>) -> Option<f64> {
    let found = number(value?);
    if found.is_none() {
        problems.push(Problem::invalid(field, "must be a number"));
    }
    found
}

pub(super) fn number(value: &Value) -> Option<f64> {
    let found = match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    };
    found.filter(|n| n.is_finite())
}
