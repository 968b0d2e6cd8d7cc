//! Whether this node takes a pod, asked once: before the pod's first container, and never again after it was taken.
//!
//! Reasons and texts are a kubelet's (`lifecycle.predicateAdmitHandler`), which users and controllers know.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, Taint};

use super::allocation::Allocation;
use super::events::Level;
use super::ledger::Verdict;
use super::objects::Objects;
use super::record::End;
use super::resources::is_static;
use super::worker::{Shared, SyncError, Worker};
use super::{affinity, quantity, security};
use crate::node::capacity;

/// A label that was put on the Node a moment before its pod may arrive a moment after it.
const LABELS_LAG: Duration = Duration::from_secs(5);
/// How often the labels are looked at meanwhile.
const LABELS_LOOK: Duration = Duration::from_millis(500);

/// Why a pod is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rejection {
    /// `status.reason` and the event's.
    pub(crate) reason: String,
    /// The event's message.
    pub(crate) message: String,
}

impl Rejection {
    pub(super) fn new(reason: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            message: message.into(),
        }
    }

    fn predicate(name: &str, why: &str) -> Self {
        Self::new(name, format!("Predicate {name} failed: {why}"))
    }

    /// Room could not be made.
    pub(super) fn unexpected(why: &str) -> Self {
        Self::new(
            "UnexpectedAdmissionError",
            format!("Unexpected error while attempting to recover from admission failure: {why}"),
        )
    }
}

/// Something of which the node has not enough. Processors in thousandths, everything else in whole units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shortage {
    pub(crate) resource: String,
    pub(crate) requested: i128,
    pub(crate) used: i128,
    pub(crate) capacity: i128,
}

impl Shortage {
    pub(super) fn rejection(&self) -> Rejection {
        Rejection::new(format!("OutOf{}", self.resource), self.to_string())
    }
}

impl fmt::Display for Shortage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            resource,
            requested,
            used,
            capacity,
        } = self;
        write!(
            f,
            "Node didn't have enough resource: {resource}, requested: {requested}, used: {used}, capacity: {capacity}"
        )
    }
}

/// What admission knows of the node.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeFacts {
    pub(crate) name: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) taints: Vec<Taint>,
    /// In thousandths.
    pub(crate) allocatable: BTreeMap<String, i128>,
}

impl NodeFacts {
    /// Labels and taints as the API has them, amounts as the machine has them now. Before the first Node has arrived,
    /// what the daemon says of itself.
    pub(crate) fn now(shared: &Shared) -> Self {
        let config = &shared.config;
        let own = capacity::allocatable(&config.shares, &config.data_dir);
        let mut facts = Self {
            name: config.node_name.clone(),
            labels: BTreeMap::from([
                ("kubernetes.io/hostname".to_owned(), config.node_name.clone()),
                ("kubernetes.io/os".to_owned(), "linux".to_owned()),
                (
                    "kubernetes.io/arch".to_owned(),
                    crate::node::architecture().to_owned(),
                ),
            ]),
            taints: Vec::new(),
            allocatable: own.milli(),
        };
        let Some(node) = shared.store.node() else {
            return facts;
        };
        facts.labels.extend(node.metadata.labels.unwrap_or_default());
        facts.taints = node.spec.and_then(|s| s.taints).unwrap_or_default();
        // Extended resources are put on the Node by others.
        let extended = node.status.and_then(|s| s.allocatable).unwrap_or_default();
        for (name, amount) in extended.iter().filter(|(name, _)| is_extended(name)) {
            if let Some(milli) = quantity::milli(amount) {
                facts.allocatable.insert(name.clone(), milli);
            }
        }
        facts
    }

    /// Everything but room that keeps a pod away, in a kubelet's order. `port_taken`: another pod has one of its ports.
    pub(super) fn refuses(&self, pod: &Pod, port_taken: bool) -> Vec<Rejection> {
        let mut reasons = Vec::new();
        if !affinity::matches(pod, &self.name, &self.labels) {
            reasons.push(Rejection::predicate(
                "NodeAffinity",
                "node(s) didn't match Pod's node affinity/selector",
            ));
        }
        let bound = pod
            .spec
            .as_ref()
            .and_then(|s| s.node_name.as_deref())
            .unwrap_or_default();
        if !bound.is_empty() && bound != self.name {
            reasons.push(Rejection::predicate(
                "NodeName",
                "node(s) didn't match the requested node name",
            ));
        }
        if port_taken {
            reasons.push(Rejection::predicate(
                "NodePorts",
                "node(s) didn't have free ports for the requested pod ports",
            ));
        }
        if !is_static(pod) && !affinity::tolerates(pod, &self.taints) {
            reasons.push(Rejection::predicate(
                "TaintToleration",
                "node(s) had taints that the pod didn't tolerate",
            ));
        }
        reasons
    }
}

fn is_extended(name: &str) -> bool {
    name.contains('/') && !name.contains("kubernetes.io/")
}

/// Ports of the node that a pod takes: protocol, address, number.
pub(super) fn host_ports(pod: &Pod) -> BTreeSet<(String, String, u16)> {
    super::config::container_ports(pod)
        .filter_map(|port| {
            let number = u16::try_from(port.host_port?).ok().filter(|p| *p > 0)?;
            let protocol = port.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            Some((protocol, port.host_ip.clone().unwrap_or_default(), number))
        })
        .collect()
}

/// What keeps a pod from any node like this one.
fn never(pod: &Pod) -> Option<Rejection> {
    let label = pod
        .metadata
        .labels
        .as_ref()
        .and_then(|l| l.get("kubernetes.io/os"));
    if label.is_some_and(|os| os != "linux") {
        return Some(Rejection::new(
            "PodOSSelectorNodeLabelDoesNotMatch",
            "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label",
        ));
    }
    let os = pod.spec.as_ref().and_then(|s| s.os.as_ref());
    if os.is_some_and(|os| os.name != "linux") {
        return Some(Rejection::new(
            "PodOSNotSupported",
            "Failed to admit pod as the OS field doesn't match node OS",
        ));
    }
    None
}

/// A pod at the node's door.
pub(super) enum Admitted {
    /// It may run, with what it was given.
    Yes(Box<Pod>),
    /// It must wait: for labels, or for room that is being made.
    NotYet,
    /// It must not.
    No(End),
}

impl Worker {
    /// The pod with what it was given; at first sight it is admitted or rejected, later its resize is judged.
    pub(super) async fn admit(&mut self, pod: &Pod) -> Result<Admitted, SyncError> {
        if self.record.allocated.is_none() && !self.view.sandboxes.is_empty() {
            // Taken by a daemon that kept no record of that.
            self.record.adopt(pod);
            self.save()?;
        }
        if let Some(given) = self.record.allocated.clone() {
            self.shared.ledger.restore(&self.uid, &given.apply(pod));
            if self.shared.ledger.waits(&self.uid) {
                return Ok(Admitted::NotYet);
            }
            let given = self.judge_resize(pod, given).await?;
            return Ok(Admitted::Yes(Box::new(given.apply(pod).into_owned())));
        }
        let facts = NodeFacts::now(&self.shared);
        let refusal = security::refusal(pod, &self.features, self.shared.apparmor);
        let verdict = match refusal.or_else(|| never(pod)) {
            Some(rejection) => Verdict::Rejected(rejection),
            None => self.shared.ledger.admit(&self.uid, pod, &facts),
        };
        match verdict {
            Verdict::Rejected(rejection) if rejection.reason == "NodeAffinity" && self.labels_may_come() => {
                self.again = self.again.min(LABELS_LOOK);
                Ok(Admitted::NotYet)
            }
            Verdict::Rejected(Rejection { reason, message }) => {
                let events = &self.shared.events;
                events
                    .emit(pod, None, Level::Warning, &reason, message.clone())
                    .await;
                Ok(Admitted::No(End {
                    reason,
                    message: format!("Pod was rejected: {message}"),
                    ..End::default()
                }))
            }
            verdict => {
                self.record.allocated = Some(Allocation::of(pod));
                self.save()?;
                self.shared
                    .groups
                    .set_burstable(self.shared.ledger.burstable_cpu())
                    .await;
                Ok(match verdict {
                    Verdict::Waits => Admitted::NotYet,
                    _ => Admitted::Yes(Box::new(pod.clone())),
                })
            }
        }
    }

    fn labels_may_come(&self) -> bool {
        let clock = &self.shared.clock;
        let seen = self.record.start_time.unwrap_or_else(|| clock.now());
        clock.elapsed(seen) < LABELS_LAG
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::pod;
    use super::*;
    use serde_json::json;

    fn node() -> NodeFacts {
        NodeFacts {
            name: "n".to_owned(),
            labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
            ..NodeFacts::default()
        }
    }

    #[test]
    fn what_keeps_a_pod_away_is_said_in_a_kubelet_s_words() {
        let pod = pod(json!({"containers": [], "nodeSelector": {"a": "c"}, "nodeName": "m"}));
        let reasons = node().refuses(&pod, true);
        let names: Vec<&str> = reasons.iter().map(|r| r.reason.as_str()).collect();
        assert_eq!(names, ["NodeAffinity", "NodeName", "NodePorts"]);
        assert_eq!(
            reasons[0].message,
            "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector"
        );
    }

    #[test]
    fn a_pod_for_another_system_is_never_taken() {
        let pod = pod(json!({"containers": [], "os": {"name": "windows"}}));
        assert_eq!(never(&pod).unwrap().reason, "PodOSNotSupported");
    }

    #[test]
    fn a_shortage_names_the_resource_in_its_reason() {
        let shortage = Shortage {
            resource: "cpu".to_owned(),
            requested: 3000,
            used: 1500,
            capacity: 2000,
        };
        let Rejection { reason, message } = shortage.rejection();
        assert_eq!(reason, "OutOfcpu");
        assert_eq!(
            message,
            "Node didn't have enough resource: cpu, requested: 3000, used: 1500, capacity: 2000"
        );
    }

    #[test]
    fn only_others_resources_are_extended() {
        assert!(is_extended("example.com/gpu"));
        assert!(
            !is_extended("cpu")
                && !is_extended("hugepages-2Mi")
                && !is_extended("attachable.kubernetes.io/x")
        );
    }
}
