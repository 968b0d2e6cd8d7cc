use std::time::Duration;

use super::*;
use serde_json::{Value, json};

fn spec(value: Value) -> DeviceSpec {
    serde_json::from_value(value).unwrap()
}

fn seed() -> Value {
    json!({"protocol": "modbus", "properties": [{"name": "temp", "type": "float", "accessMode": "ReadOnly",
        "descriptor": {"scale": 0.1, "unit": "°C"}}]})
}

fn site() -> Defaults {
    Defaults {
        modbus: Some("127.0.0.1:5020".into()),
    }
}

fn problems(value: Value) -> Vec<Problem> {
    normalise(&spec(value), &site()).unwrap_err()
}

#[test]
fn the_seed_reads_input_register_0_as_int16_and_says_what_was_guessed() {
    let device = normalise(&spec(seed()), &site()).unwrap();
    assert_eq!(device.endpoint.as_ref().unwrap().to_string(), "127.0.0.1:5020");
    assert_eq!((device.unit, device.timeout), (1, Duration::from_secs(1)));
    assert_eq!(device.report.min_interval, Duration::from_secs(10));
    assert_eq!(
        device.guesses,
        [
            "connection: 127.0.0.1:5020, from the site's default endpoint for modbus",
            "temp: input register 0, int16"
        ]
    );
    let point = &device.points[0];
    assert_eq!(
        point.address,
        ModbusAddress {
            table: ModbusTable::Input,
            address: 0,
            count: 1
        }
    );
    assert_eq!(
        (point.raw, point.decimals, point.interval),
        (RawType::Int16, Some(1), Duration::from_secs(1))
    );
}

#[test]
fn kubeedges_spelling_gives_the_same_point_without_guesses() {
    let device = normalise(
        &spec(json!({
            "protocol": {"protocolName": "modbus", "configData": {"ip": "10.0.0.7", "port": 5021, "slaveID": 3}},
            "properties": [{"name": "temp", "type": "FLOAT", "collectCycle": 1000, "reportCycle": 10000,
                "visitors": {"protocolName": "modbus", "configData":
                    {"register": "InputRegister", "offset": 0, "limit": 1, "scale": 0.1, "dataType": "int16"}},
                "descriptor": {"unit": "°C"}}]})),
        &Defaults::default(),
    )
    .unwrap();
    assert_eq!(device.points, normalise(&spec(seed()), &site()).unwrap().points);
    assert_eq!(
        (device.endpoint.unwrap().to_string().as_str(), device.unit),
        ("10.0.0.7:5021", 3)
    );
    assert!(device.guesses.is_empty(), "{:?}", device.guesses);
}

#[test]
fn a_device_without_endpoint_is_accepted_and_has_none() {
    let device = normalise(&spec(seed()), &Defaults::default()).unwrap();
    assert_eq!(device.endpoint, None);
}

#[test]
fn each_mistake_names_its_field_and_reason() {
    let with = |field: &str, value: Value| {
        let mut all = seed();
        *all.pointer_mut(field).unwrap() = value;
        all
    };
    let mut range = seed();
    range["properties"][0]["minimum"] = json!(5);
    range["properties"][0]["maximum"] = json!("4");
    let mut twice = seed();
    let first = twice["properties"][0].clone();
    twice["properties"].as_array_mut().unwrap().push(first);
    let mut model = seed();
    model["deviceModelRef"] = json!({"name": "m"});
    let mut fast = seed();
    fast["properties"][0]["sampling"] = json!({"interval": "1ms"});
    let mut writable = seed();
    writable["properties"][0]["accessMode"] = json!("ReadWrite");
    for (value, reason, field) in [
        (
            with("/protocol", json!("profibus")),
            "UnknownProtocol",
            "spec.protocol",
        ),
        (with("/protocol", json!(7)), "InvalidSpec", "spec.protocol"),
        (with("/properties", json!([])), "InvalidSpec", "spec.properties"),
        (
            with("/properties/0/type", json!("temperature")),
            "InvalidSpec",
            "spec.properties[0].type",
        ),
        (
            with("/properties/0/descriptor/scale", json!(0)),
            "InvalidSpec",
            "spec.properties[0].descriptor.scale",
        ),
        (range, "InvalidSpec", "spec.properties[0].minimum"),
        (twice, "InvalidSpec", "spec.properties[1].name"),
        (model, "ModelNotSupported", "spec.deviceModelRef"),
        (fast, "InvalidSpec", "spec.properties[0].sampling.interval"),
        (writable, "InvalidSpec", "spec.properties[0].descriptor.address"),
    ] {
        let found = problems(value);
        assert_eq!(
            (found[0].reason, found[0].field.as_str()),
            (reason, field),
            "{found:?}"
        );
    }
}

#[test]
fn desired_values_are_found_in_both_places() {
    let device = normalise(
        &spec(json!({"protocol": "modbus", "desired": {"a": 1}, "properties": [
            {"name": "a", "type": "int", "accessMode": "ReadWrite", "descriptor": {"address": 1}},
            {"name": "b", "type": "int", "accessMode": "WriteOnly", "descriptor": {"address": 2}, "desired": {"value": "5"}}]})),
        &site(),
    )
    .unwrap();
    assert_eq!(device.desired, ["a", "b"]);
    assert_eq!(device.points.len(), 1);
}

#[test]
fn durations_have_units_and_no_fractions() {
    for (text, ms) in [
        ("500ms", 500),
        ("1s", 1_000),
        ("1m30s", 90_000),
        ("2h", 7_200_000),
    ] {
        assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)));
    }
    for text in [
        "",
        "1",
        "s",
        "1.5s",
        "-1s",
        "1d",
        "99999999999999999999s",
        "99999999999999999h",
    ] {
        assert!(parse_duration(text).is_err(), "{text}");
    }
}

proptest::proptest! {
    #[test]
    fn any_descriptor_gives_a_device_or_problems(
        text in ".{0,12}", number in proptest::num::f64::ANY, whole: i64, key in "(register|address|count|rawType|byteOrder|wordOrder|scale|offset|precision|unit)"
    ) {
        for value in [json!(text), json!(number), json!(whole), json!([1]), json!(null)] {
            let mut all = seed();
            all["properties"][0]["descriptor"][key.as_str()] = value;
            let _ = normalise(&spec(all), &site());
        }
        let _ = parse_duration(&text);
    }
}
