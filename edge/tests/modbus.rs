//! Devices read a real Modbus TCP server (pymodbus), through the real store, up to the outbox.
//!
//! Needs Python with pymodbus 3.16: `SKERRY_PYTHON`, or `python3`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use skerry_edge::clock::SystemClock;
use skerry_edge::devices::{Deps, Devices};
use skerry_edge::store::Store;
use skerry_proto::device::{Defaults, DeviceState, DeviceStatus, Quality, QualityReason, Twin};
use skerry_proto::link::{Kind, Upsert, change, report};
use skerry_proto::object::{ContentHash, pack};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

struct Server {
    child: Child,
    port: u16,
}

impl Server {
    async fn start(port: u16, registers: &[&str]) -> Self {
        let python = std::env::var("SKERRY_PYTHON").unwrap_or_else(|_| "python3".into());
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/peers/modbus_server.py");
        let mut child = Command::new(&python)
            .args([script, "127.0.0.1", &port.to_string()])
            .args(registers)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| {
                panic!("{python} cannot be started ({error}): install Python or set SKERRY_PYTHON")
            });
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = timeout_at(Instant::now() + Duration::from_secs(20), lines.next_line())
            .await
            .expect("the Modbus server starts within 20 s")
            .unwrap()
            .unwrap_or_else(|| {
                panic!("the Modbus server did not start, see its message above: {python} -m pip install 'pymodbus==3.16.*'")
            });
        let port = line
            .strip_prefix("ready ")
            .expect("a ready line")
            .parse()
            .unwrap();
        Self { child, port }
    }

    async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

/// A daemon's devices room over a store in a temporary folder.
struct Site {
    store: Store,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl Site {
    fn start(store: Store, endpoint: Option<String>) -> Self {
        let stop = CancellationToken::new();
        let deps = Deps {
            store: Arc::new(store.clone()),
            clock: Arc::new(SystemClock),
            defaults: Defaults { modbus: endpoint },
        };
        let task = tokio::spawn(Devices::run(deps, stop.clone()));
        Self { store, stop, task }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    async fn apply(&self, name: &str, spec: Value) {
        let object = json!({"apiVersion": "devices.kubeedge.io/v1alpha1", "kind": "Device",
            "metadata": {"name": name, "namespace": "default", "uid": name, "generation": 1}, "spec": spec});
        let upsert = Upsert {
            kind: Kind::Device.into(),
            uid: name.into(),
            namespace: "default".into(),
            name: name.into(),
            hash: ContentHash::of(&object).0.to_vec().into(),
            json_zstd: pack(&object).unwrap().into(),
            expires_unix: 0,
        };
        self.store
            .apply(vec![change::Change::Upsert(upsert)])
            .await
            .unwrap();
    }

    /// Waits for a report of the device that satisfies `wanted`.
    async fn reported(
        &self,
        name: &str,
        within: Duration,
        wanted: impl Fn(&DeviceStatus) -> bool,
    ) -> DeviceStatus {
        let deadline = Instant::now() + within;
        let mut moved = self.store.outbox_moved();
        loop {
            moved.borrow_and_update();
            let last = self.newest(name);
            if let Some(status) = last.clone().filter(&wanted) {
                return status;
            }
            if timeout_at(deadline, moved.changed()).await.is_err() {
                panic!("{name}: no such report within {within:?}; the last one: {last:#?}");
            }
        }
    }

    fn newest(&self, name: &str) -> Option<DeviceStatus> {
        let reports = self.store.waiting_reports(0, 1000).unwrap();
        reports.iter().rev().find_map(|report| match &report.report {
            Some(report::Report::DeviceStatus(status)) if status.name == name => {
                Some(serde_json::from_slice(&status.status_json).unwrap())
            }
            _ => None,
        })
    }
}

fn seed() -> Value {
    json!({"protocol": "modbus", "properties": [{"name": "temp", "type": "float", "accessMode": "ReadOnly",
        "descriptor": {"scale": 0.1, "unit": "°C"}}]})
}

fn twin<'a>(status: &'a DeviceStatus, name: &str) -> &'a skerry_proto::device::Reported {
    let named = |twin: &&Twin| twin.property_name == name;
    status
        .twins
        .iter()
        .find(named)
        .unwrap()
        .reported
        .as_ref()
        .unwrap()
}

fn quality(status: &DeviceStatus, name: &str) -> Option<Quality> {
    let found = status.twins.iter().find(|twin| twin.property_name == name)?;
    Some(found.reported.as_ref()?.quality)
}

fn reason<'a>(status: &'a DeviceStatus, kind: &str) -> Option<&'a str> {
    status.condition(kind).map(|c| c.reason.as_str())
}

const SOON: Duration = Duration::from_secs(5);

/// The store of a daemon that was stopped: a write that was under way when it stopped still has it open for a moment.
async fn reopened(folder: &std::path::Path) -> Store {
    let deadline = std::time::Instant::now() + SOON;
    loop {
        match Store::open(folder) {
            Ok(store) => return store,
            Err(error) if std::time::Instant::now() > deadline => panic!("{error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

#[tokio::test]
async fn the_seed_device_reads_24_1_degrees_survives_unplugging_and_a_restart_of_the_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(0, &["input:0=241"]).await;
    let port = server.port;
    let endpoint = format!("127.0.0.1:{port}");
    let site = Site::start(Store::open(folder.path()).unwrap(), Some(endpoint.clone()));
    site.apply("sensor", seed()).await;

    let good = site
        .reported("sensor", SOON, |s| quality(s, "temp") == Some(Quality::Good))
        .await;
    assert_eq!(good.summary.as_deref(), Some("temp=24.1 °C"));
    assert_eq!(good.state, Some(DeviceState::Online));
    assert_eq!(twin(&good, "temp").value.as_deref(), Some("24.1"));
    assert!(twin(&good, "temp").source_time.is_some() && twin(&good, "temp").metadata.timestamp.is_some());
    let guess = &good.condition("ConfigDefaulted").unwrap().message;
    assert!(
        guess.contains("temp: input register 0, int16") && guess.contains(&endpoint),
        "{guess}"
    );

    server.kill().await;
    let bad = site
        .reported("sensor", SOON, |s| reason(s, "Connected") == Some("NotConnected"))
        .await;
    assert_eq!(bad.state, Some(DeviceState::Disconnected));
    assert_eq!(quality(&bad, "temp"), Some(Quality::Bad));
    assert_eq!(
        twin(&bad, "temp").value.as_deref(),
        Some("24.1"),
        "the last value stays"
    );
    assert!(bad.condition("Connected").unwrap().message.contains(&endpoint));

    // Without the server a restarted daemon shows the last value, and does not call it good.
    site.stop().await;
    let site = Site::start(reopened(folder.path()).await, Some(endpoint));
    let server = Server::start(port, &["input:0=-5"]).await;
    let back = site
        .reported("sensor", SOON * 3, |s| quality(s, "temp") == Some(Quality::Good))
        .await;
    assert_eq!(back.summary.as_deref(), Some("temp=-0.5 °C"));
    server.kill().await;
    site.stop().await;
}

#[tokio::test]
async fn an_address_that_does_not_exist_spoils_only_its_own_twin() {
    let folder = tempfile::tempdir().unwrap();
    let server = Server::start(
        0,
        &[
            "input:0=10,20",
            "holding:8=0x41BC,0",
            "discrete:0=1,0,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
        ],
    )
    .await;
    let site = Site::start(Store::open(folder.path()).unwrap(), None);
    let point = |name: &str, kind: &str, descriptor: Value| json!({"name": name, "type": kind, "descriptor": descriptor});
    site.apply(
        "press",
        json!({"protocol": "Modbus", "connection": {"host": "127.0.0.1", "port": server.port}, "desired": {"a": 4},
            "properties": [
                point("a", "int", json!({"register": "input", "address": 0})),
                point("b", "uint16", json!({"register": "input", "address": 1, "unit": "rpm"})),
                point("missing", "int16", json!({"register": "input", "address": 2})),
                point("speed", "float", json!({"register": "holding", "address": 8, "rawType": "float32"})),
                point("open", "boolean", json!({"register": "discrete", "address": 2})),
            ]}),
    )
    .await;
    let status = site
        .reported("press", SOON, |s| quality(s, "b") == Some(Quality::Good))
        .await;
    assert_eq!(
        status.summary.as_deref(),
        Some("a=10, b=20 rpm, speed=23.5, open=true")
    );
    assert_eq!(twin(&status, "missing").quality, Quality::Bad);
    assert_eq!(twin(&status, "missing").reason, Some(QualityReason::ConfigError));
    assert!(
        twin(&status, "missing")
            .message
            .as_ref()
            .unwrap()
            .contains("exception 2"),
        "{status:#?}"
    );
    assert_eq!(reason(&status, "Connected"), Some("Polling"));
    assert_eq!(reason(&status, "DataFresh"), Some("ReadFailed"));
    assert_eq!(reason(&status, "DesiredApplied"), Some("NotSupported"));
    server.kill().await;
    site.stop().await;
}

#[tokio::test]
async fn devices_that_cannot_be_read_say_why() {
    let folder = tempfile::tempdir().unwrap();
    let site = Site::start(Store::open(folder.path()).unwrap(), None);
    site.apply("nowhere", seed()).await;
    let status = site
        .reported("nowhere", SOON, |s| reason(s, "Connected").is_some())
        .await;
    assert_eq!(reason(&status, "Connected"), Some("NoEndpoint"));
    assert!(
        status
            .condition("Connected")
            .unwrap()
            .message
            .contains("spec.connection.host")
    );

    let mut unknown = seed();
    unknown["protocol"] = json!("profibus");
    site.apply("strange", unknown).await;
    let status = site
        .reported("strange", SOON, |s| reason(s, "Connected").is_some())
        .await;
    assert_eq!(reason(&status, "Connected"), Some("UnknownProtocol"));

    site.apply("broken", json!({"protocol": "modbus", "properties": 7}))
        .await;
    let status = site
        .reported("broken", SOON, |s| reason(s, "Connected").is_some())
        .await;
    assert_eq!(reason(&status, "Connected"), Some("InvalidSpec"));

    let mut resting = seed();
    resting["suspend"] = json!(true);
    site.apply("resting", resting).await;
    let status = site
        .reported("resting", SOON, |s| reason(s, "Connected").is_some())
        .await;
    assert_eq!(reason(&status, "Connected"), Some("Suspended"));
    site.stop().await;
}

#[tokio::test]
async fn a_server_that_accepts_and_never_answers_shows_as_a_timeout() {
    let folder = tempfile::tempdir().unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    let silent = tokio::spawn(async move {
        let mut kept = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            kept.push(stream);
        }
    });
    let site = Site::start(Store::open(folder.path()).unwrap(), Some(endpoint));
    site.apply("mute", seed()).await;
    let status = site
        .reported("mute", SOON, |s| reason(s, "Connected").is_some())
        .await;
    assert_eq!(reason(&status, "Connected"), Some("Timeout"));
    assert_eq!(
        (status.state, quality(&status, "temp")),
        (Some(DeviceState::Offline), Some(Quality::Bad))
    );
    silent.abort();
    site.stop().await;
}
