//! The decoders of what comes from the network and the disk, as targets for hostile bytes.
//!
//! See [`skerry_proto::fuzzing`]. What is private to a room has its entry there; the names are those of `fuzz/`.

use jiff::Timestamp;
use prost::Message;
use serde_json::json;
use skerry_proto::device::{Defaults, DeviceSpec, normalise};
use skerry_proto::fuzzing::{Target, joined, parts};
use skerry_proto::link::{
    Change, CloudBulk, JoinResponse, OpenTunnel, StreamTarget, Synced, Upsert, Welcome, change, cloud_bulk,
    open_tunnel,
};
use skerry_proto::object::pack;

use crate::config::Settings;
use crate::runtime::cri;
use crate::{devices, identity, link, local, manifests, pods, store, streams};

/// The decoders of the edge.
pub const TARGETS: [Target; 16] = [
    Target {
        name: "cloud_bulk",
        run: cloud_bulk_messages,
        seeds: bulk_seeds,
    },
    Target {
        name: "join_answer",
        run: join_answer,
        seeds: || {
            let answer = JoinResponse {
                certificates_der: vec![vec![0x30, 0x82, 1, 0x0a, 0x30, 3, 2, 1, 1].into()],
                roots_der: vec![vec![0x30, 0].into()],
                trust_domain: "skerry.local".to_owned(),
                waiting_key: String::new(),
            };
            vec![answer.encode_to_vec()]
        },
    },
    Target {
        name: "stored_values",
        run: store::any_value,
        seeds: bulk_seeds,
    },
    Target {
        name: "pod_record",
        run: pods::any_record,
        seeds: || {
            let record = json!({"namespace": "n", "name": "p", "start_time": "2026-01-01T00:00:00Z", "sandboxes_made": 1,
                "sandbox": "s", "containers": {}, "allocated": null, "pod_actuated": null, "end": {"succeeded": true,
                "reason": "", "message": "", "disruption": null}, "released": true, "finished": false,
                "status": {"phase": "Succeeded"}});
            vec![record.to_string().into_bytes()]
        },
    },
    Target {
        name: "static_pod",
        run: static_pod,
        seeds: || {
            let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, labels: {b: c}}\nspec:\n  hostNetwork: true\n  \
                        containers:\n  - {name: c, image: 'i:1', ports: [{containerPort: 80}]}\n";
            vec![
                text.as_bytes().to_vec(),
                json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"},
                    "spec": {"containers": [{"name": "c", "image": "i"}]}})
                .to_string()
                .into_bytes(),
                b"a: &a [*a, *a, *a]".to_vec(),
            ]
        },
    },
    Target {
        name: "edge_config",
        run: config,
        seeds: || {
            vec![
                b"max-pods = 9\nruntime = 'process'\neviction-hard = 'memory.available<5%'\n".to_vec(),
                b"outbox-events-max-age = '1h'\nreserved-cpu = '250m'\nmetrics-listen = '127.0.0.1:1'\n"
                    .to_vec(),
            ]
        },
    },
    Target {
        name: "modbus_answer",
        run: devices::drivers::any_modbus_answer,
        seeds: || {
            vec![
                vec![0, 0, 0, 0, 0, 7, 1, 3, 4, 0, 241, 0, 7],
                vec![0, 0, 0, 0, 0, 3, 1, 0x83, 2],
                // An answer without any bits; it made tokio-modbus assert.
                vec![0, 0, 0, 0, 0, 7, 1, 3, 4, 0, 241, 0, 7, 0, 1, 0, 0, 0, 3, 1, 1, 0],
            ]
        },
    },
    Target {
        name: "streams",
        run: streams::any_client,
        seeds: streams::client_seeds,
    },
    Target {
        name: "tunnel_order",
        run: tunnel_order,
        seeds: || {
            let stream = StreamTarget {
                method: "GET".to_owned(),
                headers: vec![skerry_proto::link::Header {
                    name: "Sec-WebSocket-Protocol".to_owned(),
                    value: b"v5.channel.k8s.io".to_vec().into(),
                }],
                ports: vec![80],
                ..StreamTarget::default()
            };
            let order = OpenTunnel {
                id: "t".to_owned(),
                target: Some(open_tunnel::Target::Stream(stream)),
            };
            vec![order.encode_to_vec()]
        },
    },
    Target {
        name: "local_question",
        run: local_question,
        seeds: || {
            let question = local::Question::Pods {
                namespace: Some("default".to_owned()),
                name: None,
                whole: true,
            };
            serde_json::to_vec(&question).into_iter().collect()
        },
    },
    Target {
        name: "identity_files",
        run: identity_files,
        seeds: || {
            let facts = json!({"site": "harbour", "trustDomain": "skerry.local", "provider": "p:443"});
            let pem = |label: &str| format!("-----BEGIN {label}-----\nMAMCAQE=\n-----END {label}-----\n");
            let secrets = pem("PRIVATE KEY") + &pem("CERTIFICATE");
            let files = [facts.to_string(), secrets, pem("CERTIFICATE")].map(String::into_bytes);
            vec![joined(&files)]
        },
    },
    Target {
        name: "proxy_answer",
        run: identity::any_proxy_answer,
        seeds: || {
            vec![
                b"HTTP/1.1 200 Connection established\r\nA: b\r\n\r\nrest".to_vec(),
                b"HTTP/1.0 407 Authenticate\r\n\r\n".to_vec(),
                b"http://us%40er:p%3a@[::1]:3128".to_vec(),
                b"10.0.0.0/8,.example,*,host:443".to_vec(),
            ]
        },
    },
    Target {
        name: "engine_answer",
        run: cri::any_answer,
        seeds: cri::answer_seeds,
    },
    Target {
        name: "cloud_pod",
        run: pods::any_pod,
        seeds: pods::pod_seeds,
    },
    Target {
        name: "pull_secret",
        run: pods::any_pull_secret,
        seeds: pods::pull_secret_seeds,
    },
    Target {
        name: "device_object",
        run: device_object,
        seeds: || {
            let spec = json!({"protocol": "modbus", "properties": [
                {"name": "temp", "type": "float", "accessMode": "ReadOnly", "descriptor": {"scale": 0.1, "unit": "°C"}},
                {"name": "n", "type": "int", "descriptor": {"register": "input", "address": 7, "rawType": "uint32",
                    "order": "CDAB", "offset": -3, "minimum": 0, "maximum": 5, "interval": "500ms"}}]});
            vec![joined(&[
                spec.to_string().into_bytes(),
                vec![0, 241, 0, 7, 0, 0, 0, 1],
            ])]
        },
    },
];

fn bulk_seeds() -> Vec<Vec<u8>> {
    let pod = json!({"metadata": {"name": "a", "uid": "u"}, "spec": {"containers": []}});
    let upsert = Upsert {
        kind: 1,
        uid: "u".to_owned(),
        namespace: "n".to_owned(),
        name: "a".to_owned(),
        hash: vec![7; 16].into(),
        json_zstd: pack(&pod).unwrap_or_default().into(),
        expires_unix: 5,
    };
    let change = Change {
        seq: 1,
        change: Some(change::Change::Upsert(upsert.clone())),
    };
    let message = |message| {
        CloudBulk {
            message: Some(message),
        }
        .encode_to_vec()
    };
    vec![
        message(cloud_bulk::Message::Change(change)),
        message(cloud_bulk::Message::Synced(Synced { seq: 1 })),
        upsert.encode_to_vec(),
    ]
}

/// What the provider sends on Bulk, as the session takes it.
pub fn cloud_bulk_messages(bytes: &[u8]) {
    // Two messages, so that order matters.
    let (first, second) = bytes.split_at(bytes.len() / 2);
    let decoded = [bytes, first, second]
        .into_iter()
        .filter_map(|part| CloudBulk::decode(part).ok());
    let mut holding = link::holding::Holding::new(&Welcome::default());
    let _ = holding.plan(decoded);
}

/// The provider's answer to a join.
pub fn join_answer(bytes: &[u8]) {
    if let (Ok(answer), Ok(site)) = (JoinResponse::decode(bytes), "harbour".parse()) {
        let _ = identity::check_answer(&answer, &site);
    }
    let _ = skerry_proto::SpiffeId::from_certificate_der(bytes);
}

/// The text of a static pod's file.
pub fn static_pod(bytes: &[u8]) {
    if let Ok(site) = "harbour".parse() {
        let text = String::from_utf8_lossy(bytes);
        let _ = manifests::read::parse(&text, "/m/a.yaml", &site, Timestamp::UNIX_EPOCH);
    }
}

/// The configuration file.
pub fn config(bytes: &[u8]) {
    let _ = Settings::default().resolve_text(&String::from_utf8_lossy(bytes));
}

/// An order to open a tunnel, up to the choice of a protocol.
pub fn tunnel_order(bytes: &[u8]) {
    if let Ok(order) = OpenTunnel::decode(bytes)
        && let Some(open_tunnel::Target::Stream(target)) = order.target
    {
        streams::any_target(&target);
    }
}

/// What a person's program asks on the local socket.
pub fn local_question(bytes: &[u8]) {
    let _ = serde_json::from_slice::<local::Question>(bytes);
    let _ = serde_json::from_slice::<local::Line>(bytes);
}

/// The three files of a site's identity.
pub fn identity_files(bytes: &[u8]) {
    let mut parts = parts(bytes);
    let mut next = || parts.next().unwrap_or_default();
    identity::any_files(next(), next(), next());
}

/// A Device's specification, and registers that its server answers.
pub fn device_object(bytes: &[u8]) {
    let mut parts = parts(bytes);
    let mut next = || parts.next().unwrap_or_default();
    let (spec, registers) = (next(), next());
    let Ok(spec) = serde_json::from_slice::<DeviceSpec>(spec) else {
        return;
    };
    if let Ok(device) = normalise(&spec, &Defaults::default()) {
        let registers: Vec<u16> = registers
            .chunks_exact(2)
            .map(|two| u16::from_be_bytes([two[0], two[1]]))
            .collect();
        for point in &device.points {
            devices::any_registers(point, &registers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_break_a_decoder_of_the_edge() {
        for target in &TARGETS {
            skerry_proto::fuzzing::pound(target, 2_000);
        }
    }
}
