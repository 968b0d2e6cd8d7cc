//! Whether a node is one that a pod may run on: selector, required affinity, taints. Pure functions.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{NodeSelectorRequirement, NodeSelectorTerm, Pod, Taint, Toleration};

/// The node's labels and name satisfy the pod's selector and required affinity.
pub(crate) fn matches(pod: &Pod, name: &str, labels: &BTreeMap<String, String>) -> bool {
    let Some(spec) = &pod.spec else { return true };
    let selected = spec
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| labels.get(key) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|a| a.node_affinity.as_ref())
        .and_then(|a| a.required_during_scheduling_ignored_during_execution.as_ref());
    selected
        && required.is_none_or(|r| {
            r.node_selector_terms
                .iter()
                .any(|term| term_matches(term, name, labels))
        })
}

/// A term without requirements matches nothing.
fn term_matches(term: &NodeSelectorTerm, name: &str, labels: &BTreeMap<String, String>) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    if expressions.is_empty() && fields.is_empty() {
        return false;
    }
    let by_name = |r: &NodeSelectorRequirement| r.key == "metadata.name" && holds(r, Some(name));
    expressions
        .iter()
        .all(|r| holds(r, labels.get(&r.key).map(String::as_str)))
        && fields.iter().all(by_name)
}

fn holds(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let values = requirement.values.as_deref().unwrap_or_default();
    let listed = |value: &str| values.iter().any(|v| v == value);
    let compare = |order: std::cmp::Ordering| {
        let wanted = values.first().and_then(|v| v.parse::<i64>().ok());
        let own = value.and_then(|v| v.parse::<i64>().ok());
        matches!((own, wanted), (Some(own), Some(wanted)) if own.cmp(&wanted) == order)
    };
    match requirement.operator.as_str() {
        "In" => value.is_some_and(listed),
        "NotIn" => !value.is_some_and(listed),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(std::cmp::Ordering::Greater),
        "Lt" => compare(std::cmp::Ordering::Less),
        _ => false,
    }
}

/// The pod tolerates every taint that would drive it away.
pub(crate) fn tolerates(pod: &Pod, taints: &[Taint]) -> bool {
    let tolerations: Vec<&Toleration> = pod
        .spec
        .iter()
        .flat_map(|s| s.tolerations.iter().flatten())
        .collect();
    taints
        .iter()
        .filter(|taint| taint.effect == "NoExecute")
        .all(|taint| tolerations.iter().any(|t| tolerated(t, taint)))
}

fn tolerated(toleration: &Toleration, taint: &Taint) -> bool {
    let empty_or =
        |own: &Option<String>, other: &str| own.as_deref().is_none_or(|o| o.is_empty() || o == other);
    if !empty_or(&toleration.effect, &taint.effect) || !empty_or(&toleration.key, &taint.key) {
        return false;
    }
    match toleration.operator.as_deref() {
        Some("Exists") => true,
        None | Some("" | "Equal") => {
            toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default()
        }
        Some(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::pod;
    use super::*;
    use serde_json::{Value, json};

    fn fits(spec: Value) -> bool {
        let labels = BTreeMap::from([
            ("zone".to_owned(), "a".to_owned()),
            ("size".to_owned(), "5".to_owned()),
        ]);
        matches(&pod(spec), "n1", &labels)
    }

    fn affinity(terms: Value) -> Value {
        json!({"containers": [], "affinity": {"nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}}})
    }

    #[test]
    fn a_selector_needs_every_label() {
        assert!(fits(json!({"containers": [], "nodeSelector": {"zone": "a"}})));
        assert!(!fits(
            json!({"containers": [], "nodeSelector": {"zone": "a", "other": "x"}})
        ));
    }

    #[test]
    fn one_term_of_an_affinity_is_enough_and_all_of_its_requirements_are_needed() {
        let is = |key: &str, op: &str, values: Value| json!({"key": key, "operator": op, "values": values});
        let one = |r: Value| affinity(json!([{"matchExpressions": [r]}]));
        assert!(fits(one(is("zone", "In", json!(["a", "b"])))));
        assert!(!fits(one(is("zone", "NotIn", json!(["a"])))));
        assert!(fits(one(is("none", "NotIn", json!(["a"])))));
        assert!(fits(one(is("size", "Gt", json!(["4"])))) && !fits(one(is("size", "Lt", json!(["4"])))));
        assert!(fits(affinity(
            json!([{"matchExpressions": [is("zone", "DoesNotExist", json!([]))]},
            {"matchFields": [is("metadata.name", "In", json!(["n1"]))]}])
        )));
        assert!(!fits(affinity(json!([{}]))));
        assert!(!fits(affinity(
            json!([{"matchExpressions": [is("zone", "Exists", json!([])),
            is("other", "Exists", json!([]))]}])
        )));
    }

    #[test]
    fn only_a_taint_that_drives_away_needs_a_toleration() {
        let taints: Vec<Taint> = serde_json::from_value(json!([
            {"key": "a", "effect": "NoSchedule"}, {"key": "b", "value": "v", "effect": "NoExecute"}]))
        .unwrap();
        let with = |tolerations: Value| {
            tolerates(
                &pod(json!({"containers": [], "tolerations": tolerations})),
                &taints,
            )
        };
        assert!(!with(json!([])));
        assert!(with(json!([{"operator": "Exists"}])));
        assert!(with(json!([{"key": "b", "value": "v", "effect": "NoExecute"}])));
        assert!(!with(json!([{"key": "b", "value": "w"}])));
    }
}
