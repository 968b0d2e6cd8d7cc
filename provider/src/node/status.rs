//! Node objects: what the site measured, merged with what only the provider knows.

use std::collections::BTreeMap;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Map, Value, json};
use skerry_proto::SiteName;
use skerry_proto::link::{Kind, NodeStatusReport};

use crate::cluster::{Mirror, Object};
use crate::link::reports::{Outcome, outcome_of};
use crate::link::sessions::Sessions;

use super::NodeWrites;
use super::writes::{Newest, holds};

/// Reason of the conditions of a Node whose site is not heard.
pub const AWAY_REASON: &str = "EdgeDisconnected";
/// Label of every Node that is a site.
pub const SITE_LABEL: &str = "edge.skerry.dev/site";

/// Annotation that metrics-server reads.
const METRICS_PATH: &str = "metrics.k8s.io/resource-metrics-path";

/// Labels that a site may assert of itself.
const OWN_LABELS: [&str; 3] = ["kubernetes.io/hostname", "kubernetes.io/os", "kubernetes.io/arch"];
/// Fields of NodeStatus that the site measures.
const MEASURED: [&str; 7] = [
    "capacity",
    "allocatable",
    "nodeInfo",
    "images",
    "runtimeHandlers",
    "features",
    "declaredFeatures",
];

/// A status that says nothing new is written again after this long, as a kubelet does every five minutes.
const HEARTBEAT: SignedDuration = SignedDuration::from_secs(270);
/// Conditions that the site reports.
const OWN_CONDITIONS: [&str; 4] = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"];

/// Where the API server reaches the kubelet endpoint of every site: this provider.
#[derive(Clone, Debug)]
pub struct KubeletAddress {
    /// Published as InternalIP.
    pub ip: std::net::IpAddr,
    /// Published as the kubelet endpoint's port.
    pub port: u16,
}

/// Takes a site's measurements to its Node, which is created when it does not exist. Writes nothing when the Node says all
/// that already, and has done so for less than [`HEARTBEAT`]: sites report at each reconnection.
pub async fn apply(
    client: &Client,
    mirror: &Mirror,
    writes: &NodeWrites,
    address: &KubeletAddress,
    site: &SiteName,
    report: &NodeStatusReport,
) -> Outcome {
    let Ok(measured) = serde_json::from_slice::<Map<String, Value>>(&report.status_json) else {
        return Outcome::Dropped("the node status is not a JSON object".to_owned());
    };
    let Some(owner) = mirror.named(Kind::Site, "", site.as_str()) else {
        return Outcome::Dropped(format!("there is no Site {site}"));
    };
    let nodes: Api<Node> = Api::all(client.clone());
    let labels = labels(site, &owner, &report.labels);
    let mut newest = writes.turn(site).await;
    let known = mirror.named(Kind::Node, "", site.as_str());
    if let Err(outcome) = register(&nodes, site, &owner, known.as_deref(), &labels).await {
        return outcome;
    }
    let current = known.as_ref().map_or(&Value::Null, |node| &node.value["status"]);
    let now = Timestamp::now();
    let patch = status_patch(&measured, current, address, now);
    let in_doubt = known.as_ref().is_none_or(|node| newest.outruns(node));
    if !in_doubt && says(current, &patch["status"], now) {
        return Outcome::Accepted;
    }
    match nodes
        .patch_status(site.as_str(), &PatchParams::default(), &Patch::Strategic(&patch))
        .await
    {
        Ok(node) => {
            newest.note(node.metadata.resource_version.as_deref());
            Outcome::Accepted
        }
        // The informer has not seen a deletion yet; the next try creates the Node.
        Err(kube::Error::Api(status)) if status.code == 404 => Outcome::Retry("the Node is gone".to_owned()),
        Err(error) => outcome_of(&error),
    }
}

/// Creates the Node, or brings its labels up to date.
async fn register(
    nodes: &Api<Node>,
    site: &SiteName,
    owner: &Object,
    known: Option<&Object>,
    labels: &BTreeMap<String, String>,
) -> Result<(), Outcome> {
    if let Some(node) = known {
        if node.value["metadata"]["labels"][SITE_LABEL].as_str() != Some(site.as_str()) {
            // A machine of the same name runs a kubelet of its own; taking it over would evict its pods.
            return Err(Outcome::Dropped(format!(
                "a Node {site} exists that is not a site; give the Site another name"
            )));
        }
        let path = metrics_path(site);
        let patch = json!({"metadata": {"labels": labels, "annotations": {METRICS_PATH: path}}});
        let missing = labels
            .iter()
            .any(|(k, v)| node.value["metadata"]["labels"][k].as_str() != Some(v))
            || node.value["metadata"]["annotations"][METRICS_PATH].as_str() != Some(&path);
        if missing
            && let Err(error) = nodes
                .patch(site.as_str(), &PatchParams::default(), &Patch::Merge(&patch))
                .await
        {
            return Err(outcome_of(&error));
        }
        return Ok(());
    }
    let node: Node = match serde_json::from_value(json!({
        "metadata": {
            "name": site.as_str(),
            "labels": labels,
            "annotations": {METRICS_PATH: metrics_path(site)},
            "ownerReferences": [{
                "apiVersion": "edge.skerry.dev/v1alpha1", "kind": "Site", "name": site.as_str(),
                "uid": owner.key.uid.as_str(), "controller": true, "blockOwnerDeletion": false,
            }],
        },
        "spec": {"taints": owner.value["spec"].get("taints")},
    })) {
        Ok(node) => node,
        Err(error) => return Err(Outcome::Dropped(format!("Site {site}: {error}"))),
    };
    match nodes.create(&PostParams::default(), &node).await {
        Ok(_) => {
            tracing::info!(%site, "the Node was registered");
            Ok(())
        }
        Err(kube::Error::Api(status)) if status.code == 409 => {
            Err(Outcome::Retry("the Node exists already".to_owned()))
        }
        Err(error) => Err(outcome_of(&error)),
    }
}

/// Where metrics-server finds the Node's measurements, whatever port it asks at.
fn metrics_path(site: &SiteName) -> String {
    format!("/nodes/{site}/metrics/resource")
}

fn labels(
    site: &SiteName,
    owner: &Object,
    own: &std::collections::HashMap<String, String>,
) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> = owner.value["spec"]["labels"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect();
    let allowed = own.iter().filter(|(key, _)| OWN_LABELS.contains(&key.as_str()));
    labels.extend(allowed.map(|(key, value)| (key.clone(), value.clone())));
    labels.insert("kubernetes.io/hostname".to_owned(), site.to_string());
    labels.insert("node-role.kubernetes.io/edge".to_owned(), String::new());
    labels.insert(SITE_LABEL.to_owned(), site.to_string());
    labels
}

fn status_patch(
    measured: &Map<String, Value>,
    current: &Value,
    address: &KubeletAddress,
    now: Timestamp,
) -> Value {
    let mut status = Map::new();
    for field in MEASURED {
        if let Some(value) = measured.get(field) {
            status.insert(field.to_owned(), value.clone());
        }
    }
    let conditions = measured
        .get("conditions")
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    status.insert("conditions".to_owned(), stamped(conditions, current, now));
    status.insert(
        "addresses".to_owned(),
        json!([{"$patch": "replace"}, {"type": "InternalIP", "address": address.ip.to_string()}]),
    );
    status.insert(
        "daemonEndpoints".to_owned(),
        json!({"kubeletEndpoint": {"Port": address.port}}),
    );
    json!({"status": status})
}

/// Whether a Node's status holds all that a patch would bring, and its heartbeat is young.
fn says(current: &Value, patch: &Value, now: Timestamp) -> bool {
    let fields = patch.as_object().into_iter().flatten();
    let mut measured = fields.filter(|(field, _)| !matches!(field.as_str(), "conditions" | "addresses"));
    // The first item of the patch says that the list is replaced.
    let addresses = patch["addresses"]
        .as_array()
        .map_or(&[][..], |all| all.get(1..).unwrap_or_default());
    measured.all(|(field, value)| holds(&current[field], value))
        && holds(&current["addresses"], &Value::from(addresses))
        && patch["conditions"]
            .as_array()
            .into_iter()
            .flatten()
            .all(|condition| {
                let existing = current["conditions"].as_array().into_iter().flatten();
                let mut same = existing.filter(|c| c["type"] == condition["type"]);
                same.next().is_some_and(|c| stands(c, condition, now))
            })
}

/// Whether a condition says the same as another that would take its place, and was written not long ago.
fn stands(current: &Value, newer: &Value, now: Timestamp) -> bool {
    let heartbeat = current["lastHeartbeatTime"]
        .as_str()
        .and_then(|t| t.parse::<Timestamp>().ok());
    ["status", "reason", "message"]
        .iter()
        .all(|field| current[field] == newer[field])
        && heartbeat.is_some_and(|time| now.duration_since(time) < HEARTBEAT)
}

/// Conditions with both times: the transition time moves only with the status.
fn stamped(conditions: Vec<Value>, current: &Value, now: Timestamp) -> Value {
    let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let existing = current["conditions"].as_array().cloned().unwrap_or_default();
    let stamp = |mut condition: Value| {
        let same = existing
            .iter()
            .find(|c| c["type"] == condition["type"] && c["status"] == condition["status"]);
        let since = same
            .and_then(|c| c["lastTransitionTime"].as_str())
            .unwrap_or(&now)
            .to_owned();
        condition["lastTransitionTime"] = Value::from(since);
        condition["lastHeartbeatTime"] = Value::from(now.clone());
        condition
    };
    // A site may send anything; what is no condition is left out.
    let conditions = conditions.into_iter().filter(Value::is_object);
    Value::Array(conditions.map(stamp).collect())
}

/// Hostile bytes as the status that a site measured.
pub(crate) fn any_measured(bytes: &[u8]) {
    let Ok(measured) = serde_json::from_slice::<Map<String, Value>>(bytes) else {
        return;
    };
    let address = KubeletAddress {
        ip: std::net::Ipv4Addr::LOCALHOST.into(),
        port: 10250,
    };
    let patch = status_patch(&measured, &Value::Null, &address, Timestamp::UNIX_EPOCH);
    let current = Value::Object(measured.clone());
    let again = status_patch(&measured, &current, &address, Timestamp::UNIX_EPOCH);
    for patch in [patch, again] {
        let _ = says(&current, &patch["status"], Timestamp::UNIX_EPOCH);
    }
}

/// Keeps `lastHeartbeatTime` of a heard site's Node fresh, as often as a kubelet does: the site itself reports only changes.
pub(super) async fn refresh_heard(
    client: &Client,
    writes: &NodeWrites,
    site: &SiteName,
    node: &Object,
    now: Timestamp,
) -> Result<(), kube::Error> {
    let current = &node.value["status"];
    let conditions = current["conditions"].as_array().cloned().unwrap_or_default();
    let old = |condition: &Value| {
        let time = condition["lastHeartbeatTime"].as_str();
        let time = time.and_then(|t| t.parse::<Timestamp>().ok());
        time.is_some_and(|time| now.duration_since(time) >= HEARTBEAT)
    };
    // What others have said is theirs, and what was said while the site was away holds until the site reports.
    let own = |c: &Value| OWN_CONDITIONS.iter().any(|own| c["type"] == *own) && c["status"] != "Unknown";
    let stale: Vec<Value> = conditions.into_iter().filter(|c| own(c) && old(c)).collect();
    if stale.is_empty() {
        return Ok(());
    }
    let mut newest = writes.turn(site).await;
    if newest.outruns(node) {
        // A report was faster.
        return Ok(());
    }
    write_conditions(client, &mut newest, node, stamped(stale, current, now)).await
}

/// Writes conditions of a Node in the turn that the caller holds. A Node that is gone is fine.
async fn write_conditions(
    client: &Client,
    newest: &mut Newest,
    node: &Object,
    conditions: Value,
) -> Result<(), kube::Error> {
    let nodes: Api<Node> = Api::all(client.clone());
    let patch = json!({"status": {"conditions": conditions}});
    match nodes
        .patch_status(&node.name, &PatchParams::default(), &Patch::Strategic(&patch))
        .await
    {
        Ok(node) => {
            newest.note(node.metadata.resource_version.as_deref());
            Ok(())
        }
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        Err(error) => Err(error),
    }
}

/// Says of a Node that its site is not heard since then. Does nothing when it says so already, or when the site is heard
/// by now.
pub(super) async fn mark_away(
    client: &Client,
    writes: &NodeWrites,
    sessions: &Sessions,
    site: &SiteName,
    node: &Object,
    now: Timestamp,
) -> Result<(), kube::Error> {
    let mut newest = writes.turn(site).await;
    let link = sessions.watch(site).borrow().clone();
    if link.online {
        return Ok(());
    }
    let last_heard = link.last_heard;
    let current = &node.value["status"];
    let conditions = current["conditions"].as_array().cloned().unwrap_or_default();
    let since = last_heard.map_or_else(
        || "since this provider started".to_owned(),
        |time| format!("since {}", time.strftime("%Y-%m-%dT%H:%M:%SZ")),
    );
    let message = format!("The site has not been heard {since}. Its pods keep running there.");
    let away: Vec<Value> = conditions
        .iter()
        .filter(|c| c["status"] != "Unknown")
        .map(|c| json!({"type": c["type"], "status": "Unknown", "reason": AWAY_REASON, "message": message}))
        .collect();
    if away.is_empty() {
        return Ok(());
    }
    write_conditions(client, &mut newest, node, stamped(away, current, now)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site_object(spec: Value) -> Object {
        Object::new(
            Kind::Site,
            json!({"metadata": {"name": "harbour", "uid": "u"}, "spec": spec}),
        )
        .unwrap()
    }

    #[test]
    fn a_site_may_assert_only_harmless_labels_and_the_site_object_the_rest() {
        let own = [
            ("kubernetes.io/arch", "arm64"),
            ("node-role.kubernetes.io/control-plane", ""),
        ]
        .map(|(k, v)| (k.to_owned(), v.to_owned()));
        let labels = labels(
            &"harbour".parse().unwrap(),
            &site_object(json!({"labels": {"zone": "north"}})),
            &own.into(),
        );
        assert_eq!(labels["kubernetes.io/arch"], "arm64");
        assert_eq!(labels["kubernetes.io/hostname"], "harbour");
        assert_eq!(labels["zone"], "north");
        assert!(!labels.contains_key("node-role.kubernetes.io/control-plane"));
    }

    #[test]
    fn the_transition_time_moves_only_with_the_status() {
        let now: Timestamp = "2026-02-02T00:00:00Z".parse().unwrap();
        let current = json!({"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        let same = stamped(vec![json!({"type": "Ready", "status": "True"})], &current, now);
        assert_eq!(same[0]["lastTransitionTime"], "2026-01-01T00:00:00Z");
        assert_eq!(same[0]["lastHeartbeatTime"], "2026-02-02T00:00:00Z");
        let other = stamped(vec![json!({"type": "Ready", "status": "False"})], &current, now);
        assert_eq!(other[0]["lastTransitionTime"], "2026-02-02T00:00:00Z");
    }

    #[test]
    fn a_status_that_says_nothing_new_is_written_again_only_when_its_heartbeat_is_old() {
        let measured = json!({"capacity": {"cpu": "2"}, "images": [], "conditions": [
            {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "m"}]});
        let address = KubeletAddress {
            ip: "10.9.8.7".parse().unwrap(),
            port: 10250,
        };
        let now: Timestamp = "2026-02-02T00:00:00Z".parse().unwrap();
        let patch = |current: &Value, at| {
            status_patch(measured.as_object().unwrap(), current, &address, at)["status"].clone()
        };
        let first = patch(&Value::Null, now);
        let mut written = first.clone();
        // As the API shows it: without the directive and without the empty list, and with a field of another's.
        written["addresses"].as_array_mut().unwrap().remove(0);
        written.as_object_mut().unwrap().remove("images");
        written["capacity"]["example.com/gpu"] = json!("1");
        let later = now + SignedDuration::from_secs(60);
        assert!(says(&written, &patch(&written, later), later));
        let late = now + SignedDuration::from_secs(300);
        assert!(!says(&written, &patch(&written, late), late));
        let mut away = written.clone();
        away["conditions"][0]["status"] = json!("Unknown");
        assert!(!says(&away, &patch(&away, later), later));
        let mut elsewhere = written;
        elsewhere["addresses"][0]["address"] = json!("10.0.0.1");
        assert!(!says(&elsewhere, &patch(&elsewhere, later), later));
    }

    #[test]
    fn the_provider_alone_publishes_the_address() {
        let address = KubeletAddress {
            ip: "10.9.8.7".parse().unwrap(),
            port: 10250,
        };
        let measured =
            json!({"addresses": [{"type": "InternalIP", "address": "6.6.6.6"}], "capacity": {"cpu": "2"}});
        let patch = status_patch(
            measured.as_object().unwrap(),
            &Value::Null,
            &address,
            Timestamp::UNIX_EPOCH,
        );
        assert_eq!(patch["status"]["addresses"][1]["address"], "10.9.8.7");
        assert_eq!(patch["status"]["capacity"]["cpu"], "2");
        assert_eq!(
            patch["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"],
            10250
        );
    }
}
