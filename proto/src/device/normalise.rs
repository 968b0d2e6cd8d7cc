//! From what a user wrote to what is run: defaults, guesses, mistakes.

use std::collections::HashSet;
use std::time::Duration;

use serde_json::Value;

use super::MAX_PROPERTIES;
use super::fields::{Fields, duration};
use super::normalised::{Defaults, Endpoint, NormalisedDevice, Problem, Protocol, ReportPolicy};
use super::point::point;
use super::spec::DeviceSpec;

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
