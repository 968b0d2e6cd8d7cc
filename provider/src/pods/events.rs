//! The edge's events, as a kubelet would emit them.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Event;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use skerry_proto::SiteName;
use skerry_proto::limits::MAX_EVENT_MESSAGE_BYTES;
use skerry_proto::link::{EventReport, Kind};
use skerry_proto::object::{ContentHash, ObjectKey, Uid};

use super::mirrors;
use crate::cluster::{Mirror, Object};
use crate::link::reports::{Outcome, outcome_of};

/// Creates the event, or raises its count when it is a repetition.
///
/// The name is derived from what the event says, so that a replay after a lost acknowledgement changes nothing.
///
/// A site speaks of its Node, its Site, its Devices and its pods, and of nothing else.
pub async fn apply(client: &Client, mirror: &Mirror, site: &SiteName, report: &EventReport) -> Outcome {
    if let Some(reason) = refusal(mirror, site, report) {
        return Outcome::Dropped(reason.to_owned());
    }
    write(client, site, report).await
}

/// Why an event is not written. It says the same of what is not there and of what is somebody else's.
fn refusal(mirror: &Mirror, site: &SiteName, report: &EventReport) -> Option<&'static str> {
    if report.message.len() > MAX_EVENT_MESSAGE_BYTES {
        return Some("the event's message is too long");
    }
    if !matches!(report.r#type.as_str(), "Normal" | "Warning") {
        return Some("an event's type is Normal or Warning");
    }
    (!is_about_own(mirror, site, report)).then_some("the event is about nothing of this site's")
}

fn is_about_own(mirror: &Mirror, site: &SiteName, report: &EventReport) -> bool {
    let uid = Uid::from(report.uid.as_str());
    let in_its_place = |object: &Object| object.namespace == report.namespace && object.name == report.name;
    match report.kind.as_str() {
        "Node" | "Site" => report.namespace.is_empty() && report.name == site.as_str(),
        "Device" => mirror
            .devices_of(site)
            .iter()
            .any(|device| device.key.uid == uid && in_its_place(device)),
        "Pod" => {
            let key = ObjectKey { kind: Kind::Pod, uid };
            if let Some(pod) = mirror.object(&key) {
                return in_its_place(&pod) && pod.value["spec"]["nodeName"] == *site.as_str();
            }
            if mirror.departed_from(&key.uid).as_ref() == Some(site) {
                return true;
            }
            // A static pod's UID is not its mirror's, and its first events come before its mirror.
            mirrors::is_own_name(site, &report.name)
                && mirror
                    .named(Kind::Pod, &report.namespace, &report.name)
                    .is_none_or(|pod| pod.value["spec"]["nodeName"] == *site.as_str())
        }
        _ => false,
    }
}

/// Writes an event that has been looked at, or is the provider's own.
pub(crate) async fn write(client: &Client, site: &SiteName, report: &EventReport) -> Outcome {
    // Events about cluster-scoped objects live in the default namespace.
    let namespace = if report.namespace.is_empty() {
        "default"
    } else {
        &report.namespace
    };
    let events: Api<Event> = Api::namespaced(client.clone(), namespace);
    let name = event_name(report);
    let event = match event(&name, namespace, site, report) {
        Ok(event) => event,
        Err(error) => return Outcome::Dropped(error.to_string()),
    };
    match events.create(&PostParams::default(), &event).await {
        Ok(_) => Outcome::Accepted,
        Err(kube::Error::Api(status)) if status.code == 409 => match raise(&events, &name, report).await {
            Ok(()) => Outcome::Accepted,
            Err(error) => outcome_of(&error),
        },
        // The namespace is going, or events may not be written at all: as a kubelet does, an event is not held on to,
        // since the reports behind it (a pod's end, which the namespace waits for) matter more.
        Err(kube::Error::Api(status)) if status.code == 403 => Outcome::Dropped(status.message.clone()),
        Err(error) => outcome_of(&error),
    }
}

/// Raises the count of an event that is there. One that was replayed, or overtaken, changes nothing.
async fn raise(events: &Api<Event>, name: &str, report: &EventReport) -> Result<(), kube::Error> {
    let existing = events.get(name).await?;
    let Some(patch) = repetition(existing.count, report) else {
        return Ok(());
    };
    events
        .patch(name, &PatchParams::default(), &Patch::Merge(&patch))
        .await
        .map(drop)
}

/// What a report adds to an event that was counted so often; `None` when the event says as much already.
fn repetition(counted: Option<i32>, report: &EventReport) -> Option<Value> {
    let counted = u32::try_from(counted.unwrap_or(0)).unwrap_or(0);
    (report.count > counted)
        .then(|| json!({"count": report.count, "lastTimestamp": time(report.last_unix_nanos)}))
}

fn event(
    name: &str,
    namespace: &str,
    site: &SiteName,
    report: &EventReport,
) -> Result<Event, serde_json::Error> {
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": namespace},
        "involvedObject": {
            "apiVersion": if report.api_version.is_empty() { "v1" } else { report.api_version.as_str() },
            "kind": report.kind,
            "namespace": report.namespace,
            "name": report.name,
            "uid": report.uid,
            "fieldPath": (!report.field_path.is_empty()).then_some(&report.field_path),
        },
        "type": report.r#type,
        "reason": report.reason,
        "message": report.message,
        "count": report.count.max(1),
        "firstTimestamp": time(report.first_unix_nanos),
        "lastTimestamp": time(report.last_unix_nanos),
        "source": {"component": "kubelet", "host": site.as_str()},
        "reportingComponent": "kubelet",
        "reportingInstance": site.as_str(),
    }))
}

fn event_name(report: &EventReport) -> String {
    let identity = format!(
        "{}\0{}\0{}\0{}\0{}\0{}",
        report.uid, report.field_path, report.r#type, report.reason, report.message, report.first_unix_nanos
    );
    let ContentHash(hash) = ContentHash::of_bytes(identity.as_bytes());
    let hex: String = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    // An object's name is at most 253 characters long, and so is an event's.
    let stem: String = report.name.chars().take(253 - 1 - hex.len()).collect();
    format!("{stem}.{hex}")
}

fn time(unix_nanos: i64) -> Option<String> {
    let time = Timestamp::from_nanosecond(i128::from(unix_nanos)).ok()?;
    Some(time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())
}

/// A hostile site's event.
pub(crate) fn any_event(report: &EventReport, site: &SiteName) {
    let _ = repetition(Some(1), report);
    let _ = event(&event_name(report), "default", site, report);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replayed_event_has_the_same_name_and_a_later_one_another() {
        let report = EventReport {
            name: "p".to_owned(),
            reason: "Started".to_owned(),
            count: 1,
            ..Default::default()
        };
        let repeated = EventReport {
            count: 2,
            last_unix_nanos: 5,
            ..report.clone()
        };
        let later = EventReport {
            first_unix_nanos: 9,
            ..report.clone()
        };
        assert_eq!(event_name(&report), event_name(&repeated));
        assert_ne!(event_name(&report), event_name(&later));
    }

    #[test]
    fn a_replayed_or_overtaken_repetition_changes_nothing_and_a_later_one_raises_the_count() {
        let report = EventReport {
            count: 2,
            ..Default::default()
        };
        assert_eq!(repetition(Some(1), &report).unwrap()["count"], 2);
        assert_eq!(repetition(Some(2), &report), None);
        assert_eq!(repetition(Some(3), &report), None);
    }

    #[test]
    fn a_site_speaks_of_what_is_its_own_and_of_nothing_else() {
        let mirror = Mirror::new();
        let pod = |uid: &str, name: &str, node: &str| {
            json!({"metadata": {"uid": uid, "name": name, "namespace": "ns"},
                "spec": {"nodeName": node, "containers": []}})
        };
        mirror.apply(Kind::Pod, pod("own", "a", "harbour"));
        mirror.apply(Kind::Pod, pod("theirs", "b", "quay"));
        mirror.apply(Kind::Pod, pod("mirror", "c-harbour", "harbour"));
        mirror.apply(Kind::Pod, pod("disguise", "d-harbour", "quay"));
        let device = json!({"metadata": {"uid": "dev", "name": "d", "namespace": "ns"}, "status": {"nodeName": "quay"}});
        mirror.apply(Kind::Device, device);
        let site: SiteName = "harbour".parse().unwrap();
        let about = |kind: &str, namespace: &str, name: &str, uid: &str| {
            let report = EventReport {
                kind: kind.to_owned(),
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                uid: uid.to_owned(),
                r#type: "Normal".to_owned(),
                ..Default::default()
            };
            refusal(&mirror, &site, &report).is_none()
        };
        assert!(about("Pod", "ns", "a", "own"));
        assert!(about("Node", "", "harbour", "harbour"));
        assert!(about("Pod", "ns", "c-harbour", "static"));
        assert!(about("Pod", "ns", "new-harbour", "static"));
        for (kind, namespace, name, uid) in [
            ("Pod", "ns", "b", "theirs"),
            ("Pod", "ns", "b", "own"),
            ("Pod", "elsewhere", "a", "own"),
            ("Pod", "ns", "b", "made-up"),
            ("Pod", "ns", "d-harbour", "static"),
            ("Pod", "ns", "-harbour", "static"),
            ("Node", "", "quay", "quay"),
            ("Node", "kube-system", "harbour", "harbour"),
            ("Site", "", "quay", "quay"),
            ("Device", "ns", "d", "dev"),
            ("Secret", "ns", "a", "own"),
        ] {
            assert!(
                !about(kind, namespace, name, uid),
                "{kind} {namespace}/{name} {uid}"
            );
        }
        mirror.delete(Kind::Pod, &Uid::from("own"));
        mirror.delete(Kind::Pod, &Uid::from("theirs"));
        assert!(about("Pod", "ns", "a", "own"));
        assert!(!about("Pod", "ns", "b", "theirs"));
    }

    #[test]
    fn an_event_names_its_site_and_object() {
        let report = EventReport {
            kind: "Pod".to_owned(),
            namespace: "ns".to_owned(),
            name: "p".to_owned(),
            r#type: "Normal".to_owned(),
            first_unix_nanos: 1_500_000_000,
            ..Default::default()
        };
        let event = event("n", "ns", &"harbour".parse().unwrap(), &report).unwrap();
        assert_eq!(event.source.unwrap().host.as_deref(), Some("harbour"));
        assert_eq!(event.involved_object.name.as_deref(), Some("p"));
        assert_eq!(event.count, Some(1));
    }
}
