//! Which site talks to a Device.

use std::collections::BTreeMap;

use skerry_proto::device::DeviceSpec;

use crate::node::status::SITE_LABEL;

/// Nodes by name, with their labels.
pub(super) type Nodes = BTreeMap<String, BTreeMap<String, String>>;

/// The result of looking for a Device's node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Binding {
    /// Exactly one.
    Node(String),
    /// None: reason and remedy.
    Unbound {
        /// One word.
        reason: &'static str,
        /// What to do.
        message: String,
    },
}

fn unbound(reason: &'static str, message: String) -> Binding {
    Binding::Unbound { reason, message }
}

/// Binds by name, by labels, or to the only site that there is.
pub(super) fn bind(spec: &DeviceSpec, nodes: &Nodes) -> Binding {
    let is_site = |labels: &BTreeMap<String, String>| labels.contains_key(SITE_LABEL);
    if let Some(name) = spec.node_name.as_ref().filter(|name| !name.is_empty()) {
        return match nodes.get(name) {
            Some(labels) if is_site(labels) => Binding::Node(name.clone()),
            Some(_) => unbound(
                "NoNode",
                format!(
                    "node {name} is no edge site: set spec.nodeName to a node with the label {SITE_LABEL}"
                ),
            ),
            None => unbound(
                "NoNode",
                format!("node {name} does not exist: correct spec.nodeName, or enrol the site"),
            ),
        };
    }
    let selector = spec.node_selector.as_ref().and_then(|s| s.as_object());
    let matches = |labels: &BTreeMap<String, String>| {
        selector.is_none_or(|wanted| {
            wanted
                .iter()
                .all(|(key, value)| labels.get(key).map(String::as_str) == value.as_str())
        })
    };
    let mut found = nodes
        .iter()
        .filter(|(_, labels)| is_site(labels) && matches(labels))
        .map(|(name, _)| name.clone());
    match (found.next(), found.next()) {
        (Some(name), None) => Binding::Node(name),
        (None, _) if selector.is_some() => unbound(
            "NoNode",
            "no edge site has the labels of spec.nodeSelector: correct it, or label the site's node".into(),
        ),
        (None, _) => unbound("NoNode", "there is no edge site yet: enrol one".into()),
        (Some(first), Some(second)) => {
            let more = found.count();
            let others = if more > 0 {
                format!(" and {more} more")
            } else {
                String::new()
            };
            unbound(
                "Ambiguous",
                format!(
                    "{first}, {second}{others} would do: set spec.nodeName, or a spec.nodeSelector that one site matches"
                ),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn nodes(names: &[(&str, &[(&str, &str)])]) -> Nodes {
        let labels = |list: &[(&str, &str)]| list.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        names
            .iter()
            .map(|(name, list)| ((*name).to_owned(), labels(list)))
            .collect()
    }

    fn spec(value: serde_json::Value) -> DeviceSpec {
        serde_json::from_value(value).unwrap()
    }

    fn reason(binding: Binding) -> &'static str {
        match binding {
            Binding::Unbound { reason, .. } => reason,
            Binding::Node(name) => panic!("bound to {name}"),
        }
    }

    #[test]
    fn a_device_goes_to_the_only_site_and_never_to_another_node() {
        let one = nodes(&[("worker", &[]), ("harbour", &[(SITE_LABEL, "harbour")])]);
        assert_eq!(bind(&spec(json!({})), &one), Binding::Node("harbour".into()));
        assert_eq!(
            bind(&spec(json!({"nodeName": "harbour"})), &one),
            Binding::Node("harbour".into())
        );
        assert_eq!(reason(bind(&spec(json!({"nodeName": "worker"})), &one)), "NoNode");
        assert_eq!(reason(bind(&spec(json!({"nodeName": "gone"})), &one)), "NoNode");
        assert_eq!(
            reason(bind(&spec(json!({})), &nodes(&[("worker", &[])]))),
            "NoNode"
        );
    }

    #[test]
    fn several_sites_are_ambiguous_until_a_selector_picks_one() {
        let site = |name| (SITE_LABEL, name);
        let two = nodes(&[
            ("a", &[site("a"), ("line", "1")]),
            ("b", &[site("b"), ("line", "2")]),
        ]);
        assert_eq!(reason(bind(&spec(json!({})), &two)), "Ambiguous");
        assert_eq!(
            bind(&spec(json!({"nodeSelector": {"line": "2"}})), &two),
            Binding::Node("b".into())
        );
        assert_eq!(
            reason(bind(&spec(json!({"nodeSelector": {"line": "3"}})), &two)),
            "NoNode"
        );
    }
}
