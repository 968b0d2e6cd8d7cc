//! Fills a data directory with the metadata of thousands of pods and measures the store, for `hack/bench store`.
//!
//! `store_bench DIR PODS`: PODS pods as an API server gives them (4 KB of JSON), each with a token, and 200 ConfigMaps and
//! Secrets to which they refer. Prints Markdown rows.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use skerry_edge::store::{NewReport, Store};
use skerry_proto::link::{Kind, PodStatusReport, Upsert, change, report};
use skerry_proto::object::{ContentHash, ObjectKey, Uid, pack};

/// Changes that the link commits at one time.
const BATCH: usize = 256;
const SHARED: usize = 200;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, pods] = &args[..] else {
        panic!("store_bench DIR PODS");
    };
    let pods: usize = pods.parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(measure(Path::new(dir), pods));
}

async fn measure(dir: &Path, pods: usize) {
    let store = Store::open(dir).unwrap();
    let (mut objects, mut raw, mut packed) = (Vec::new(), 0, 0);
    for number in 0..SHARED {
        let (config, secret) = (config_map(number), secret(number));
        objects.push(upsert(Kind::ConfigMap, &config));
        objects.push(upsert(Kind::Secret, &secret));
    }
    for number in 0..pods {
        let pod = pod(number);
        raw += pod.to_string().len();
        objects.push(upsert(Kind::Pod, &pod));
        objects.push(token(number));
    }
    for object in &objects {
        packed += object.json_zstd.len();
    }
    row(
        "pods; JSON of one, average",
        &format!("{pods}; {} bytes", raw / pods),
    );
    row(
        "objects; compressed, in all",
        &format!("{}; {}", objects.len(), megabytes(packed as u64)),
    );

    let before = store.traffic();
    let began = Instant::now();
    for batch in objects.chunks(BATCH) {
        let changes = batch.iter().cloned().map(change::Change::Upsert).collect();
        store.apply(changes).await.unwrap();
    }
    let took = began.elapsed();
    let after = store.traffic();
    row("stored in batches of 256, in", &seconds(took));
    let (written, syncs) = (after.0 - before.0, after.1 - before.1);
    row("bytes written per byte, batches", &ratio(written, packed as u64));
    row("syncs, batches", &syncs.to_string());
    row("file", &megabytes(store.size_bytes()));
    row(
        "file per byte of change",
        &ratio(store.size_bytes(), packed as u64),
    );

    // One change at a time, as they come on a quiet day.
    let single = &objects[objects.len() - 200..];
    let before = store.traffic();
    let mut bytes = 0;
    for object in single.iter().filter(|o| o.kind() == Kind::Pod) {
        bytes += object.json_zstd.len() as u64;
        store
            .apply(vec![change::Change::Upsert(object.clone())])
            .await
            .unwrap();
    }
    row(
        "bytes written per byte, single changes",
        &ratio(store.traffic().0 - before.0, bytes),
    );
    let before = store.traffic();
    let mut bytes = 0;
    for number in 0..200 {
        let body = report(number);
        bytes += prost_len(&body);
        let report = NewReport {
            coalesce: Some(format!("bench/{}", number % 20)),
            observed: jiff::Timestamp::now(),
            body,
        };
        let seq = store.report(report).await.unwrap();
        store.settle_reports(vec![seq]).await.unwrap();
    }
    row(
        "bytes written per byte, single reports and their ends",
        &ratio(store.traffic().0 - before.0, bytes),
    );

    let (mut by_uid, mut by_name) = (Vec::new(), Vec::new());
    for step in 0..20_000_usize {
        let number = step * 7919 % pods;
        let key = ObjectKey {
            kind: Kind::Pod,
            uid: uid(number),
        };
        let began = Instant::now();
        assert!(store.get(&key).unwrap().is_some());
        by_uid.push(began.elapsed());
        let (namespace, name) = (namespace(number), name(number));
        let began = Instant::now();
        assert!(store.find(Kind::Pod, &namespace, &name).unwrap().is_some());
        by_name.push(began.elapsed());
    }
    row("lookup by UID, P50 / P99", &percentiles(by_uid));
    row("lookup by name, P50 / P99", &percentiles(by_name));
    let began = Instant::now();
    let mut listed = 0;
    store.each(Kind::Pod, |_| listed += 1).unwrap();
    assert_eq!(listed, pods);
    row("list of all pods", &seconds(began.elapsed()));
    let began = Instant::now();
    store
        .each(Kind::Pod, |object| {
            object.decode::<k8s_openapi::api::core::v1::Pod>().unwrap();
        })
        .unwrap();
    row("list of all pods, decoded", &seconds(began.elapsed()));
    let began = Instant::now();
    store.inventory_digest().unwrap();
    row("digest for the handshake", &seconds(began.elapsed()));
    drop(store);
    let began = Instant::now();
    let store = Store::open(dir).unwrap();
    row("opened again, every page checked, in", &seconds(began.elapsed()));
    drop(store);
}

fn row(what: &str, value: &str) {
    println!("| {what} | {value} |");
}

fn megabytes(bytes: u64) -> String {
    #[allow(clippy::cast_precision_loss)]
    let millions = bytes as f64 / 1e6;
    format!("{millions:.1} MB")
}

fn seconds(took: Duration) -> String {
    format!("{:.3} s", took.as_secs_f64())
}

#[allow(clippy::cast_precision_loss)]
fn ratio(written: u64, bytes: u64) -> String {
    format!("{:.1}", written as f64 / bytes as f64)
}

fn percentiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e6;
    format!("{:.0} / {:.0} µs", at(50), at(99))
}

fn uid(number: usize) -> Uid {
    Uid::from(format!(
        "{number:08x}-5e12-4b7c-9a3d-{:012x}",
        number * 2_654_435_761 % (1 << 44)
    ))
}

fn namespace(number: usize) -> String {
    format!("team-{:02}", number % 40)
}

fn name(number: usize) -> String {
    format!("collector-{:05}-{:05x}", number, number * 7919 % 0xfffff)
}

fn upsert(kind: Kind, object: &Value) -> Upsert {
    let text = |key: &str| object["metadata"][key].as_str().unwrap_or_default().to_owned();
    Upsert {
        kind: kind.into(),
        uid: text("uid"),
        namespace: text("namespace"),
        name: text("name"),
        hash: ContentHash::of(object).0.to_vec().into(),
        json_zstd: pack(object).unwrap().into(),
        expires_unix: 0,
    }
}

fn config_map(number: usize) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": format!("settings-{number}"), "namespace": namespace(number), "uid": format!("c-{number}")},
        "data": {"site.yaml": format!("interval: {number}\nbroker: mqtt.{number}.example:1883\n").repeat(20)}})
}

fn secret(number: usize) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "type": "Opaque",
        "metadata": {"name": format!("login-{number}"), "namespace": namespace(number), "uid": format!("s-{number}")},
        "data": {"password": "c2VjcmV0LW51bWJlcg=="}})
}

fn token(number: usize) -> Upsert {
    // As long as a real one, and as little compressible.
    let part = |part: usize| ContentHash::of_bytes(format!("{number}/{part}").as_bytes()).0;
    let noise: String = (0..14).flat_map(part).map(|byte| format!("{byte:02x}")).collect();
    let object = json!({"token": noise});
    Upsert {
        uid: format!("{}/kube-api-access/token", uid(number)),
        expires_unix: 4_000_000_000,
        namespace: namespace(number),
        name: format!("{}.token", name(number)),
        ..upsert(Kind::ServiceAccountToken, &object)
    }
}

fn pod(number: usize) -> Value {
    let (name, namespace) = (name(number), namespace(number));
    let probe = json!({"httpGet": {"path": "/healthz", "port": 8080, "scheme": "HTTP"}, "initialDelaySeconds": 100_000,
        "timeoutSeconds": 3, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3});
    let from = |key: &str| {
        json!({"name": key.to_uppercase(), "valueFrom": {"configMapKeyRef": {
        "name": format!("settings-{}", number % SHARED), "key": "site.yaml", "optional": true}}})
    };
    let owned = |field: &str| {
        json!({field: {".": {}, "f:name": {}, "f:image": {}, "f:resources": {}, "f:env": {},
        "f:terminationMessagePath": {}, "f:volumeMounts": {}}})
    };
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": name, "namespace": namespace, "uid": uid(number).as_str(), "generation": 1,
            "creationTimestamp": "2026-11-01T08:00:00Z", "resourceVersion": format!("{}", 1_000_000 + number),
            "generateName": "collector-",
            "labels": {"app.kubernetes.io/name": "collector", "app.kubernetes.io/instance": format!("line-{number}"),
                "app.kubernetes.io/managed-by": "Helm", "pod-template-hash": format!("{:x}", number * 31)},
            "annotations": {"checksum/config": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
                "prometheus.io/scrape": "true", "prometheus.io/port": "8080"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "collector", "controller": true,
                "uid": "0b3ac0f0-55b5-4e2a-9c39-6d2e5a3e8d11", "blockOwnerDeletion": true}],
            "managedFields": [{"manager": "kube-controller-manager", "operation": "Update", "apiVersion": "v1",
                "time": "2026-11-01T08:00:00Z", "fieldsType": "FieldsV1", "fieldsV1": {"f:metadata": owned("f:labels"),
                "f:spec": {"f:containers": owned("k:{\"name\":\"collector\"}"), "f:volumes": owned("k:{\"name\":\"config\"}")}}}],
        },
        "spec": {
            "nodeName": "bench", "restartPolicy": "Always", "terminationGracePeriodSeconds": 1, "dnsPolicy": "Default",
            "serviceAccountName": "default", "serviceAccount": "default", "automountServiceAccountToken": true,
            "securityContext": {}, "schedulerName": "default-scheduler", "priority": 0, "enableServiceLinks": false,
            "preemptionPolicy": "PreemptLowerPriority",
            "tolerations": [
                {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300},
                {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
            "containers": [{
                "name": "collector", "image": "registry.example/plant/collector:4.2.1", "imagePullPolicy": "IfNotPresent",
                "command": ["sh", "-c", "exec sleep 100000"],
                "env": [from("mode"), from("broker"), from("interval"), {"name": "LINE", "value": format!("line-{number}")},
                    {"name": "PASSWORD", "valueFrom": {"secretKeyRef": {"name": format!("login-{}", number % SHARED),
                        "key": "password", "optional": true}}},
                    {"name": "POD_NAME", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.name"}}}],
                "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                "resources": {"requests": {"cpu": "1m", "memory": "1Mi"}},
                "livenessProbe": probe,
                "terminationMessagePath": "/dev/termination-log", "terminationMessagePolicy": "File",
                "volumeMounts": [{"name": "config", "mountPath": "/etc/collector", "readOnly": true},
                    {"name": "login", "mountPath": "/etc/login", "readOnly": true},
                    {"name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": true}],
            }],
            "volumes": [
                {"name": "config", "configMap": {"name": format!("settings-{}", number % SHARED), "defaultMode": 420, "optional": true}},
                {"name": "login", "secret": {"secretName": format!("login-{}", number % SHARED), "defaultMode": 420, "optional": true}},
                {"name": "kube-api-access", "projected": {"defaultMode": 420, "sources": [
                    {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
                    {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}}]}}]}}],
        },
        "status": {"phase": "Pending", "qosClass": "Burstable"},
    })
}

fn report(number: usize) -> report::Report {
    let status = json!({"phase": "Running", "podIP": "10.1.2.3", "message": format!("{number}").repeat(100)});
    report::Report::PodStatus(PodStatusReport {
        uid: uid(number).to_string(),
        namespace: namespace(number),
        name: name(number),
        status_json: status.to_string().into(),
        finished: false,
        ..PodStatusReport::default()
    })
}

fn prost_len(body: &report::Report) -> u64 {
    body.encoded_len() as u64
}
