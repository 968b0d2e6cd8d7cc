//! What the controller says of one Device: accepted, bound, ready. Pure.

use jiff::Timestamp;
use kube::api::DynamicObject;
use serde_json::{Value, json};
use skerry_proto::device::{Condition, Defaults, DeviceSpec, DeviceStatus, Problem, normalise};

use super::api::{same, status_of};
use super::binding::{Binding, Nodes, bind};

/// Makes a condition of type, status, reason and message.
type MakeCondition<'a> = dyn Fn(&str, Option<bool>, &str, String) -> Condition + 'a;

/// The controller's part of a status.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Judgement {
    generation: Option<i64>,
    node_name: Option<String>,
    protocol: Option<String>,
    conditions: Vec<Condition>,
}

impl Judgement {
    /// Judges a Device by its spec, the nodes, and what its site reported.
    pub(super) fn of(device: &DynamicObject, nodes: &Nodes, now: Timestamp) -> Self {
        let status = status_of(device);
        let generation = device.metadata.generation;
        let spec = device.data.get("spec").cloned().unwrap_or_default();
        let condition = |kind: &str, holds, reason: &str, message: String| {
            let mut condition = Condition::new(kind, holds, reason, message, now);
            condition.observed_generation = generation;
            condition.since(&status)
        };
        let spec: Result<DeviceSpec, String> = serde_json::from_value(spec).map_err(|e| e.to_string());
        let (protocol, accepted, binding) = match &spec {
            Ok(spec) => {
                let name = spec
                    .protocol
                    .as_str()
                    .or_else(|| spec.protocol.get("protocolName").and_then(Value::as_str));
                let accepted = match normalise(spec, &Defaults::default()) {
                    Ok(plan) => {
                        return Self::with(
                            generation,
                            Some(plan.protocol.name().to_owned()),
                            condition("Accepted", Some(true), "Valid", String::new()),
                            bind(spec, nodes),
                            &status,
                            &condition,
                        );
                    }
                    Err(problems) => {
                        let text: Vec<_> = problems.iter().map(Problem::to_string).collect();
                        let reason = problems.first().map_or("InvalidSpec", |p| p.reason);
                        condition("Accepted", Some(false), reason, text.join("; "))
                    }
                };
                let name = name.map(|name| name.chars().take(40).collect());
                (name, accepted, bind(spec, nodes))
            }
            Err(error) => {
                let accepted = condition(
                    "Accepted",
                    Some(false),
                    "InvalidSpec",
                    format!("spec cannot be read: {error}"),
                );
                let message = "the Device is not accepted, see there".to_owned();
                (
                    None,
                    accepted,
                    Binding::Unbound {
                        reason: "NotAccepted",
                        message,
                    },
                )
            }
        };
        Self::with(generation, protocol, accepted, binding, &status, &condition)
    }

    fn with(
        generation: Option<i64>,
        protocol: Option<String>,
        accepted: Condition,
        binding: Binding,
        status: &DeviceStatus,
        condition: &MakeCondition<'_>,
    ) -> Self {
        let (node_name, bound) = match binding {
            Binding::Node(name) => (Some(name), condition("Bound", Some(true), "Bound", String::new())),
            Binding::Unbound { reason, message } => (None, condition("Bound", Some(false), reason, message)),
        };
        let reported = |kind: &str| {
            status
                .condition(kind)
                .filter(|_| node_name.is_some() && status.node_name == node_name)
        };
        let unreachable = status.condition("EdgeReachable").is_some_and(|c| !c.holds());
        let parts = [
            Some(&accepted),
            Some(&bound),
            reported("Connected"),
            reported("DataFresh"),
        ];
        let failed = parts.iter().flatten().find(|c| !c.holds());
        let ready = match failed {
            Some(failed) => condition(
                "Ready",
                Some(false),
                &failed.reason,
                format!("{} is {}", failed.kind, failed.status),
            ),
            None if parts.iter().any(Option::is_none) => condition(
                "Ready",
                None,
                "NoReport",
                "the site has not reported the device yet".into(),
            ),
            None if unreachable => condition(
                "Ready",
                None,
                "EdgeUnreachable",
                "the site's link is down; it goes on reading".into(),
            ),
            None => condition("Ready", Some(true), "Polling", String::new()),
        };
        Self {
            generation,
            node_name,
            protocol,
            conditions: vec![accepted, bound, ready],
        }
    }

    /// Whether the object's status says all of this already.
    pub(super) fn stands_in(&self, device: &DynamicObject) -> bool {
        let status = status_of(device);
        status.node_name == self.node_name
            && status.protocol == self.protocol
            && status.controller_observed_generation == self.generation
            && self.conditions.iter().all(|wanted| {
                status
                    .condition(&wanted.kind)
                    .is_some_and(|found| same(found, wanted))
            })
    }

    /// For server-side apply.
    pub(super) fn part(&self) -> Value {
        let mut part =
            json!({"conditions": self.conditions, "controllerObservedGeneration": self.generation});
        if let Some(node) = &self.node_name {
            part["nodeName"] = json!(node);
        }
        if let Some(protocol) = &self.protocol {
            part["protocol"] = json!(protocol);
        }
        part
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::status::SITE_LABEL;
    use std::collections::BTreeMap;

    fn device(spec: Value, status: Value) -> DynamicObject {
        serde_json::from_value(
            json!({"apiVersion": "devices.kubeedge.io/v1alpha1", "kind": "Device",
            "metadata": {"name": "d", "generation": 2}, "spec": spec, "status": status}),
        )
        .unwrap()
    }

    fn seed() -> Value {
        json!({"protocol": "modbus", "properties": [{"name": "temp", "type": "float"}]})
    }

    fn nodes() -> Nodes {
        [(
            "harbour".to_owned(),
            BTreeMap::from([(SITE_LABEL.to_owned(), "harbour".to_owned())]),
        )]
        .into()
    }

    fn judge(device: &DynamicObject) -> (Judgement, DynamicObject) {
        let judgement = Judgement::of(device, &nodes(), Timestamp::UNIX_EPOCH);
        let mut after = device.clone();
        let mut status = after.data.get("status").cloned().unwrap_or_default();
        let part = judgement.part();
        for (key, value) in part.as_object().unwrap() {
            if key == "conditions" && status["conditions"].is_array() {
                let mut all = status["conditions"].as_array().unwrap().clone();
                let new = value.as_array().unwrap();
                all.retain(|old| !new.iter().any(|n| n["type"] == old["type"]));
                all.extend(new.clone());
                status["conditions"] = json!(all);
            } else {
                status[key] = value.clone();
            }
        }
        after.data["status"] = status;
        (judgement, after)
    }

    fn word(judgement: &Judgement, kind: &str) -> (String, String) {
        let found = judgement.conditions.iter().find(|c| c.kind == kind).unwrap();
        (found.status.clone(), found.reason.clone())
    }

    #[test]
    fn the_seed_is_accepted_bound_and_then_left_alone() {
        let (judgement, after) = judge(&device(seed(), json!({})));
        assert_eq!(word(&judgement, "Accepted"), ("True".into(), "Valid".into()));
        assert_eq!(word(&judgement, "Ready"), ("Unknown".into(), "NoReport".into()));
        assert_eq!(judgement.node_name.as_deref(), Some("harbour"));
        let again = Judgement::of(&after, &nodes(), Timestamp::now());
        assert!(again.stands_in(&after), "{again:?}");
    }

    #[test]
    fn a_device_is_ready_when_its_site_says_so_and_unknown_when_the_link_is_down() {
        let report = |connected: &str, reachable: &str| {
            let c = |kind: &str, status: &str| json!({"type": kind, "status": status, "reason": "R", "lastTransitionTime": "2026-01-01T00:00:00Z"});
            json!({"nodeName": "harbour", "conditions": [c("Connected", connected), c("DataFresh", "True"), c("EdgeReachable", reachable)]})
        };
        let ready =
            |connected, reachable| word(&judge(&device(seed(), report(connected, reachable))).0, "Ready").0;
        assert_eq!(ready("True", "True"), "True");
        assert_eq!(ready("False", "True"), "False");
        assert_eq!(ready("True", "Unknown"), "Unknown");
    }

    #[test]
    fn mistakes_are_named_in_accepted() {
        let reason = |spec| word(&judge(&device(spec, json!({}))).0, "Accepted");
        assert_eq!(
            reason(json!({"protocol": "profibus", "properties": [{"name": "a", "type": "int"}]})).1,
            "UnknownProtocol"
        );
        assert_eq!(
            reason(json!({"protocol": "modbus", "deviceModelRef": {"name": "m"}})).1,
            "ModelNotSupported"
        );
        assert_eq!(
            reason(json!({"protocol": "modbus", "properties": 5})).1,
            "InvalidSpec"
        );
    }
}
