//! Values that the tests of this room share.

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use skerry_proto::object::Uid;

use super::record::{PodRecord, View};
use crate::runtime::{Container, ContainerId, ContainerState, Sandbox, SandboxId, SandboxState};

/// UID of the pod in the tests.
pub(crate) const UID: &str = "11111111-2222-3333-4444-555555555555";

pub(crate) fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

/// A pod `default/p` with the given spec.
pub(crate) fn pod(spec: Value) -> Pod {
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "namespace": "default", "uid": UID, "generation": 1, "labels": {"app": "x"}},
        "spec": spec,
    }))
    .unwrap()
}

pub(crate) fn running(second: i64) -> ContainerState {
    ContainerState::Running {
        started_at: at(second),
    }
}

pub(crate) fn exited(second: i64, code: i32) -> ContainerState {
    ContainerState::Exited {
        started_at: Some(at(second - 1)),
        finished_at: at(second),
        code,
        reason: if code == 0 { "Completed" } else { "Error" }.to_owned(),
        message: String::new(),
    }
}

pub(crate) fn container(name: &str, id: &str, restart_count: u32, state: ContainerState) -> Container {
    Container {
        id: ContainerId(id.into()),
        sandbox: SandboxId("s".into()),
        pod_uid: Uid::from(UID),
        name: name.into(),
        restart_count,
        spec_hash: String::new(),
        state,
        created_at: at(0),
        image: "busybox".into(),
        image_ref: "sha256:1".into(),
        log_path: PathBuf::from("/nowhere"),
        annotations: BTreeMap::new(),
        user: None,
    }
}

pub(crate) fn sandbox(id: &str, attempt: u32) -> Sandbox {
    Sandbox {
        id: SandboxId(id.into()),
        pod_uid: Uid::from(UID),
        pod_name: "p".into(),
        pod_namespace: "default".into(),
        attempt,
        state: SandboxState::Ready,
        created_at: at(0),
        ips: vec!["10.0.0.5".parse().unwrap()],
        host_network: false,
    }
}

/// A record that has seen sandbox `s` and these containers, made from `pod`'s spec.
pub(crate) fn record_of(pod: &Pod, containers: Vec<Container>) -> (PodRecord, View) {
    let mut record = PodRecord::default();
    let containers = containers
        .into_iter()
        .map(|mut c| {
            c.spec_hash = super::plan::find_container(pod, &c.name)
                .map(super::plan::spec_hash)
                .unwrap_or_default();
            c
        })
        .collect();
    let view = View::new(vec![sandbox("s", 0)], containers);
    record.observe(&view, at(100), |_| String::new());
    for (name, c) in &mut record.containers {
        let _ = name;
        let up = matches!(
            c.last.as_ref().map(|l| &l.state),
            Some(super::record::State::Running(_))
        );
        c.started = up;
        c.ready = up;
    }
    (record, view)
}
