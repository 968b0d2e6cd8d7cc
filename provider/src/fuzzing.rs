//! The decoders of what edges send, as targets for hostile bytes. See [`skerry_proto::fuzzing`].

use std::time::Duration;

use prost::Message;
use serde_json::json;
use skerry_proto::fuzzing::{Target, parts};
use skerry_proto::link::{
    Applied, EdgeBulk, EventReport, GroupDigest, Inventory, InventoryDigest, InventoryEntry, JoinRequest,
    MirrorPodReport, NodeStatusReport, PodStatusReport, Report, TunnelFrame, edge_bulk, report, tunnel_frame,
};

use crate::cluster::Desired;
use crate::link::sync::SiteSync;
use crate::{devices, kubelet, node, pki, pods};

/// The decoders of the provider.
pub const TARGETS: [Target; 5] = [
    Target {
        name: "join_request",
        run: join_request,
        seeds: || {
            let request = JoinRequest {
                site: "harbour".to_owned(),
                token: "skerry.harbour.abc.def".to_owned(),
                csr_der: pki::sample_request().into(),
            };
            vec![request.encode_to_vec(), pki::sample_request()]
        },
    },
    Target {
        name: "tunnel_frame",
        run: tunnel_frame,
        seeds: || {
            let frame = tunnel_frame::Frame::Data(vec![1, 2, 3].into());
            vec![TunnelFrame { frame: Some(frame) }.encode_to_vec()]
        },
    },
    Target {
        name: "site_report",
        run: site_report,
        seeds: report_seeds,
    },
    Target {
        name: "site_inventory",
        run: site_inventory,
        seeds: inventory_seeds,
    },
    Target {
        name: "site_answer",
        run: kubelet::any_answer,
        seeds: || {
            let use_of =
                json!({"time": "2026-01-01T00:00:00Z", "usageNanoCores": 5, "usageCoreNanoSeconds": 9});
            let pod = json!({"podRef": {"name": "p", "namespace": "n", "uid": "u"}, "startTime": "2026-01-01T00:00:00Z",
                "containers": [{"name": "c", "startTime": "2026-01-01T00:00:00Z", "cpu": use_of}], "cpu": use_of});
            let node = json!({"nodeName": "harbour", "startTime": "2026-01-01T00:00:00Z", "cpu": use_of});
            let snapshot = json!({"summary": {"node": node, "pods": [pod]}});
            vec![
                snapshot.to_string().into_bytes(),
                json!([pod]).to_string().into_bytes(),
            ]
        },
    },
];

fn report_seeds() -> Vec<Vec<u8>> {
    let bytes = |value: serde_json::Value| -> bytes::Bytes { value.to_string().into_bytes().into() };
    let condition = json!({"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let reports = [
        report::Report::PodStatus(PodStatusReport {
            uid: "u".to_owned(),
            status_json: bytes(
                json!({"phase": "Running", "conditions": [condition], "podIPs": [{"ip": "10.0.0.1"}]}),
            ),
            ..PodStatusReport::default()
        }),
        report::Report::NodeStatus(NodeStatusReport {
            status_json: bytes(json!({"capacity": {"cpu": "2"}, "conditions": [condition], "nodeInfo": {}})),
            ..NodeStatusReport::default()
        }),
        report::Report::MirrorPod(MirrorPodReport {
            name: "p-harbour".to_owned(),
            hash: "h".to_owned(),
            pod_json: bytes(json!({"metadata": {"labels": {"a": "b"}, "annotations": {}},
                "spec": {"containers": [{"name": "c", "image": "i"}]}})),
            ..MirrorPodReport::default()
        }),
        report::Report::Event(EventReport {
            name: "p".to_owned(),
            count: 2,
            first_unix_nanos: i64::MAX,
            ..EventReport::default()
        }),
    ];
    reports
        .map(|report| {
            Report {
                seq: 1,
                observed_unix_nanos: 2,
                report: Some(report),
            }
            .encode_to_vec()
        })
        .into()
}

fn inventory_seeds() -> Vec<Vec<u8>> {
    let group = |buckets: usize| GroupDigest {
        count: 1,
        sum: vec![1; 16].into(),
        buckets: vec![2; 8 * buckets].into(),
    };
    let digest = edge_bulk::Message::InventoryDigest(InventoryDigest {
        objects: Some(group(4)),
        tokens: Some(group(0)),
    });
    let entry = |kind, uid: &str| InventoryEntry {
        kind,
        uid: uid.to_owned(),
        hash: vec![3; 16].into(),
        expires_unix: 5,
    };
    let inventory = edge_bulk::Message::Inventory(Inventory {
        entries: vec![entry(1, "u"), entry(4, "u/v/p"), entry(99, "x")],
        last: true,
    });
    let applied = edge_bulk::Message::Applied(Applied {
        seq: 0,
        objects_sum: vec![0; 16].into(),
        tokens_sum: vec![0; 16].into(),
    });
    let one = |message: &edge_bulk::Message| {
        EdgeBulk {
            message: Some(message.clone()),
        }
        .encode_to_vec()
    };
    let told = [one(&digest), one(&inventory), one(&applied)];
    let whole = [one(&inventory), one(&applied)];
    vec![
        skerry_proto::fuzzing::joined(&told),
        skerry_proto::fuzzing::joined(&whole),
    ]
}

/// What a site reports, up to what would be written to the API.
pub fn site_report(bytes: &[u8]) {
    let Ok(site) = "harbour".parse() else { return };
    if let Ok(Report {
        report: Some(report), ..
    }) = Report::decode(bytes)
    {
        match report {
            report::Report::PodStatus(status) => pods::status::any_reported(&status.status_json),
            report::Report::NodeStatus(status) => node::status::any_measured(&status.status_json),
            report::Report::Event(event) => pods::events::any_event(&event, &site),
            report::Report::DeviceStatus(status) => devices::any_reported(&status.status_json),
            report::Report::MirrorPod(mirror) => {
                pods::mirrors::any_mirror(&mirror.pod_json, &mirror, &site);
            }
        }
    }
    // What follows is JSON, whose form is found sooner without an envelope around it.
    pods::status::any_reported(bytes);
    node::status::any_measured(bytes);
    devices::any_reported(bytes);
    pods::mirrors::any_mirror(bytes, &MirrorPodReport::default(), &site);
}

/// What a site tells about what it holds, message after message.
pub fn site_inventory(bytes: &[u8]) {
    let (mut sync, desired) = (SiteSync::new(Default::default()), Desired::default());
    for part in parts(bytes) {
        let Ok(EdgeBulk {
            message: Some(message),
        }) = EdgeBulk::decode(part)
        else {
            return;
        };
        let taken = match message {
            edge_bulk::Message::InventoryDigest(digest) => sync.take_digest(&digest, &desired).map(drop),
            edge_bulk::Message::Inventory(inventory) => sync.take_inventory(inventory),
            edge_bulk::Message::Applied(applied) => sync.take_applied(&applied, Duration::ZERO).map(drop),
            edge_bulk::Message::Hello(_) | edge_bulk::Message::Report(_) => Ok(()),
        };
        if taken.is_err() {
            return;
        }
        sync.compare(&desired, 0);
        while sync.next_message().is_some() {}
    }
}

/// A request to join: its token and its certificate request.
pub fn join_request(bytes: &[u8]) {
    if let Ok(request) = JoinRequest::decode(bytes) {
        let _ = request.token.parse::<skerry_proto::token::JoinToken>();
        let _ = request.site.parse::<skerry_proto::SiteName>();
        let _ = pki::read_request(&request.csr_der);
    }
    let _ = pki::read_request(bytes);
}

/// A frame of a tunnel, and the head of the answer that it may carry.
pub fn tunnel_frame(bytes: &[u8]) {
    if let Ok(TunnelFrame {
        frame: Some(tunnel_frame::Frame::Ready(ready)),
    }) = TunnelFrame::decode(bytes)
    {
        let _ = crate::kubelet::any_ready(&ready);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_break_a_decoder_of_the_provider() {
        for target in &TARGETS {
            skerry_proto::fuzzing::pound(target, 2_000);
        }
    }
}
