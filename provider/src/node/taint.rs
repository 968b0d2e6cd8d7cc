//! The taint of a Node whose site is away.

use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use skerry_proto::autonomy::AwayTaint;

use crate::cluster::Object;

/// Key of the taint. It never has the effect NoExecute: what becomes of pods is `replace`'s business.
pub(super) const AWAY_TAINT: &str = "edge.skerry.dev/away";

/// Taints the Node of a site that is away as its policy says, or takes the taint off. Does nothing when it is so already.
pub(super) async fn keep(client: &Client, node: &Object, wanted: AwayTaint) -> Result<(), kube::Error> {
    let Some(taints) = changed(&node.value, wanted) else {
        return Ok(());
    };
    // The list is one value: others' changes must not be undone, so that it must still be what we saw.
    let version = &node.value["metadata"]["resourceVersion"];
    let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}});
    let nodes: Api<Node> = Api::all(client.clone());
    match nodes
        .patch(&node.name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
    {
        Ok(_) => Ok(()),
        // Gone, or changed meanwhile: the next look does it.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error),
    }
}

/// The taints that the Node should have; `None` when it has them.
fn changed(node: &Value, wanted: AwayTaint) -> Option<Vec<Value>> {
    let current = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    let effect = match wanted {
        AwayTaint::None => None,
        AwayTaint::NoSchedule => Some("NoSchedule"),
        AwayTaint::PreferNoSchedule => Some("PreferNoSchedule"),
    };
    let (ours, mut taints): (Vec<Value>, Vec<Value>) =
        current.into_iter().partition(|taint| taint["key"] == AWAY_TAINT);
    let right = match (ours.as_slice(), effect) {
        ([], None) => true,
        ([one], Some(effect)) => one["effect"] == effect,
        _ => false,
    };
    taints.extend(effect.map(|effect| json!({"key": AWAY_TAINT, "effect": effect})));
    (!right).then_some(taints)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_taint_comes_and_goes() {
        let other = json!({"key": "dedicated", "value": "x", "effect": "NoExecute"});
        let node = |taints: Value| json!({"spec": {"taints": taints}});
        let away = json!({"key": AWAY_TAINT, "effect": "NoSchedule"});
        assert_eq!(
            changed(&node(json!([other])), AwayTaint::NoSchedule),
            Some(vec![other.clone(), away.clone()])
        );
        assert_eq!(changed(&node(json!([other, away])), AwayTaint::NoSchedule), None);
        assert_eq!(
            changed(&node(json!([away, other])), AwayTaint::PreferNoSchedule),
            Some(vec![
                other.clone(),
                json!({"key": AWAY_TAINT, "effect": "PreferNoSchedule"})
            ])
        );
        assert_eq!(
            changed(&node(json!([away, other])), AwayTaint::None),
            Some(vec![other])
        );
        assert_eq!(changed(&json!({"spec": {}}), AwayTaint::None), None);
    }
}
