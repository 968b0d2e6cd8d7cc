//! A Device becomes a value in the cluster, whatever happens to the line or to the device.

use std::time::Duration;

use serde_json::{Value, json};
use skerry_tests::kubectl::{Kubectl, condition};
use skerry_tests::modbus::Modbus;
use skerry_tests::process::repository;
use skerry_tests::relay::Line;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::Site;
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::once("the shortest Device reads a Modbus server", shortest),
        Scenario::once(
            "a Device that is unplugged says so within seconds, and recovers",
            unplugged,
        ),
        Scenario::once(
            "a Device is read on while the line is down, and the newest value follows",
            line_down,
        ),
        Scenario::once("a Device may name its own endpoint and register", explicit),
        Scenario::once(
            "a Device is read from the store after a restart without a line",
            restart_without_line,
        ),
        Scenario::once(
            "a Device without an endpoint says which field is missing",
            no_endpoint,
        ),
        Scenario::once("a Device with an unknown protocol says so", unknown_protocol),
        Scenario::once("a Device with a bad type says which field it is", bad_type),
        Scenario::once("a deleted Device is no longer read", deleted),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// How soon a new value may be expected to show: the reporting interval and some.
const SHOWN: Duration = Duration::from_secs(30);

fn site_with(t: &Test<'_>, modbus: &Modbus) -> Site {
    let mut site = Site::enrol(t.cluster, &t.name("site"), t.runtime);
    site.set_modbus(modbus.address());
    site.start_edge();
    site.wait_ready();
    site
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// The example of the repository, bound to the scenario's site: there are several.
fn example(site: &Site) -> String {
    let yaml =
        std::fs::read_to_string(repository().join("manifests/examples/temperature-sensor.yaml")).unwrap();
    format!("{yaml}\n  nodeName: {}\n", site.name())
}

fn device(t: &Test<'_>, site: &Site, spec: Value) {
    let mut spec = spec;
    spec["nodeName"] = json!(site.name());
    let object = json!({"apiVersion": "devices.kubeedge.io/v1alpha1", "kind": "Device", "metadata": {"name": "temperature-sensor"}, "spec": spec});
    t.kubectl.apply(&object.to_string());
}

fn get(kubectl: &Kubectl) -> Result<Value, String> {
    kubectl.get("device", "temperature-sensor")
}

fn shows(kubectl: &Kubectl, row: &str) {
    eventually(SHOWN, &format!("kubectl get devices shows {row}"), || {
        let table = kubectl.attempt(&["get", "devices"])?;
        if table.contains(row) {
            Ok(())
        } else {
            Err(format!("{table}\n{}", get(kubectl)?["status"]))
        }
    });
}

fn says(kubectl: &Kubectl, kind: &str, status: &str) -> Value {
    eventually(SHOWN, &format!("condition {kind}={status}"), || {
        let device = get(kubectl)?;
        let condition = condition(&device, kind);
        same(condition["status"].as_str(), Some(status)).map_err(|e| format!("{e}: {}", device["status"]))?;
        Ok(condition.clone())
    })
}

fn shortest(t: &Test<'_>) {
    let dir = directory();
    let modbus = Modbus::start(dir.path(), 241);
    let site = site_with(t, &modbus);
    t.kubectl.apply(&example(&site));
    shows(&t.kubectl, "temp=24.1 °C");
    let table = t.kubectl.run(&["get", "devices"]);
    assert!(table.contains("modbus") && table.contains(site.name()), "{table}");
    let device = get(&t.kubectl).unwrap();
    let twin = &device["status"]["twins"][0];
    assert_eq!(twin["propertyName"], "temp", "{device}");
    assert_eq!(twin["reported"]["value"], "24.1", "{twin}");
    assert_eq!(twin["reported"]["quality"], "Good", "{twin}");
    assert!(
        twin["reported"]["metadata"]["timestamp"].is_string() || twin["reported"]["sourceTime"].is_string(),
        "{twin}"
    );
    let guessed = says(&t.kubectl, "ConfigDefaulted", "True");
    assert!(guessed["message"].as_str().unwrap().contains("temp"), "{guessed}");
    modbus.set(305);
    shows(&t.kubectl, "temp=30.5 °C");
}

fn unplugged(t: &Test<'_>) {
    let dir = directory();
    let mut modbus = Modbus::start(dir.path(), 241);
    let site = site_with(t, &modbus);
    t.kubectl.apply(&example(&site));
    shows(&t.kubectl, "temp=24.1 °C");
    modbus.unplug();
    eventually(Duration::from_secs(15), "the Device is not connected", || {
        let device = get(&t.kubectl)?;
        same(condition(&device, "Connected")["status"].as_str(), Some("False"))
            .map_err(|e| format!("{e}: {}", device["status"]))?;
        let reported = &device["status"]["twins"][0]["reported"];
        if reported["quality"] == "Good" {
            Err(reported.to_string())
        } else {
            Ok(())
        }
    });
    modbus.set(198);
    modbus.plug();
    says(&t.kubectl, "Connected", "True");
    shows(&t.kubectl, "temp=19.8 °C");
}

fn line_down(t: &Test<'_>) {
    let dir = directory();
    let modbus = Modbus::start(dir.path(), 241);
    let mut site = site_with(t, &modbus);
    t.kubectl.apply(&example(&site));
    shows(&t.kubectl, "temp=24.1 °C");
    site.line().set(Line::Silent);
    modbus.set(250);
    std::thread::sleep(Duration::from_secs(3));
    modbus.set(199);
    std::thread::sleep(Duration::from_secs(3));
    assert!(t.kubectl.run(&["get", "devices"]).contains("temp=24.1 °C"));
    site.line().set(Line::Up);
    site.wait_ready();
    shows(&t.kubectl, "temp=19.9 °C");
}

fn explicit(t: &Test<'_>) {
    let dir = directory();
    let modbus = Modbus::start(dir.path(), 1);
    // The site's own configuration names no endpoint.
    let site = t.own_site();
    device(
        t,
        &site,
        json!({
            "protocol": "modbus",
            "connection": {"host": "127.0.0.1", "port": modbus.address().port(), "unitId": 7},
            "properties": [{"name": "door", "type": "boolean", "descriptor": {"register": "holding", "address": 0}}],
        }),
    );
    shows(&t.kubectl, "door=true");
    modbus.set(0);
    shows(&t.kubectl, "door=false");
}

fn restart_without_line(t: &Test<'_>) {
    let dir = directory();
    let modbus = Modbus::start(dir.path(), 241);
    let mut site = site_with(t, &modbus);
    t.kubectl.apply(&example(&site));
    shows(&t.kubectl, "temp=24.1 °C");
    site.line().set(Line::Closed);
    site.kill_edge();
    modbus.set(170);
    site.start_edge();
    std::thread::sleep(Duration::from_secs(4));
    site.line().set(Line::Up);
    shows(&t.kubectl, "temp=17 °C");
}

fn no_endpoint(t: &Test<'_>) {
    let site = t.own_site();
    t.kubectl.apply(&example(&site));
    let connected = says(&t.kubectl, "Connected", "False");
    assert_eq!(connected["reason"], "NoEndpoint", "{connected}");
    assert!(
        connected["message"].as_str().unwrap().contains("host"),
        "{connected}"
    );
}

fn unknown_protocol(t: &Test<'_>) {
    let site = t.own_site();
    device(
        t,
        &site,
        json!({"protocol": "morse", "properties": [{"name": "temp", "type": "float"}]}),
    );
    let accepted = says(&t.kubectl, "Accepted", "False");
    let message = accepted["message"].as_str().unwrap();
    assert!(
        message.contains("morse") && message.contains("modbus"),
        "{accepted}"
    );
}

fn bad_type(t: &Test<'_>) {
    let dir = directory();
    let modbus = Modbus::start(dir.path(), 241);
    let site = site_with(t, &modbus);
    device(
        t,
        &site,
        json!({"protocol": "modbus", "properties": [
            {"name": "temp", "type": "float", "descriptor": {"scale": 0.1}},
            {"name": "odd", "type": "temperature"},
        ]}),
    );
    let accepted = says(&t.kubectl, "Accepted", "False");
    let message = accepted["message"].as_str().unwrap();
    assert!(
        message.contains("properties[1].type") && message.contains("temperature"),
        "{accepted}"
    );
}

fn deleted(t: &Test<'_>) {
    let dir = directory();
    let modbus = Modbus::start(dir.path(), 241);
    let site = site_with(t, &modbus);
    t.kubectl.apply(&example(&site));
    shows(&t.kubectl, "temp=24.1 °C");
    t.kubectl
        .run(&["delete", "device", "temperature-sensor", "--timeout", "30s"]);
    t.kubectl.apply(&example(&site));
    modbus.set(222);
    shows(&t.kubectl, "temp=22.2 °C");
    eventually(SOON, "the new Device has a status of its own", || {
        let device = get(&t.kubectl)?;
        same(device["status"]["nodeName"].as_str(), Some(site.name()))
    });
}
