//! What a site reports of things that are not its own.

use std::time::Duration;

use serde_json::{Value, json};
use skerry_proto::link::report::Report as Body;
use skerry_proto::link::report_result::Outcome;
use skerry_proto::link::{
    DeviceStatusReport, EventReport, MirrorPodReport, NodeStatusReport, PodStatusReport,
};
use skerry_tests::pods::{identity, ready};
use skerry_tests::runner::Test;
use skerry_tests::wait::{SOON, eventually, same, throughout};

use super::{Book, hostile, run};

/// What others have, that a hostile site might wish to speak for.
struct Loot {
    namespace: String,
    pod: String,
    device: String,
    victim: String,
    own: String,
    own_pod: String,
}

fn bytes(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn lie() -> Value {
    json!({"phase": "Failed", "reason": "Forged", "message": "forged", "podIP": "192.0.2.66"})
}

fn status(uid: &str, namespace: &str, name: &str, status: Vec<u8>, finished: bool) -> Body {
    Body::PodStatus(PodStatusReport {
        uid: uid.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        status_json: status.into(),
        finished,
        ..Default::default()
    })
}

fn event(kind: &str, namespace: &str, name: &str, uid: &str) -> EventReport {
    EventReport {
        kind: kind.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        uid: uid.to_owned(),
        r#type: "Warning".into(),
        reason: "Forged".into(),
        message: "forged".into(),
        count: 1,
        ..Default::default()
    }
}

fn mirror(namespace: &str, name: &str, pod: Option<Value>) -> Body {
    Body::MirrorPod(MirrorPodReport {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        hash: "abc".into(),
        pod_json: pod.map(|pod| bytes(&pod)).unwrap_or_default().into(),
    })
}

fn statuses(loot: &Loot) -> Vec<(&'static str, Body)> {
    let (ns, own) = (loot.namespace.as_str(), loot.own_pod.as_str());
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    vec![
        (
            "another's pod has failed",
            status(&loot.pod, ns, "victim", bytes(&lie()), false),
        ),
        (
            "another's pod has finished",
            status(&loot.pod, ns, "victim", bytes(&json!({})), true),
        ),
        (
            "a UID that is made up",
            status("made-up", ns, "victim", bytes(&lie()), true),
        ),
        ("no UID", status("", ns, "victim", bytes(&lie()), true)),
        (
            "a status that is no JSON",
            status(own, ns, "own", b"{\"phase\": ".to_vec(), false),
        ),
        (
            "a status that is a list",
            status(own, ns, "own", b"[]".to_vec(), false),
        ),
        (
            "a status 100,000 deep",
            status(own, ns, "own", deep.into_bytes(), false),
        ),
        (
            "a phase that does not exist",
            status(own, ns, "own", bytes(&json!({"phase": {"a": 1}})), false),
        ),
        (
            "a status of 3 MiB",
            status(
                own,
                ns,
                "own",
                bytes(&json!({"message": "x".repeat(3 * 1024 * 1024)})),
                false,
            ),
        ),
        ("a device of another's", {
            let lie = json!({"state": "online", "twins": [{"name": "temp", "reported": {"value": "666"}}]});
            Body::DeviceStatus(DeviceStatusReport {
                uid: loot.device.clone(),
                namespace: ns.to_owned(),
                name: "theirs".into(),
                status_json: bytes(&lie).into(),
            })
        }),
        ("a device under another UID", {
            Body::DeviceStatus(DeviceStatusReport {
                uid: "made-up".into(),
                namespace: ns.to_owned(),
                name: "theirs".into(),
                status_json: bytes(&json!({"state": "online"})).into(),
            })
        }),
        ("a device in a path", {
            Body::DeviceStatus(DeviceStatusReport {
                uid: loot.device.clone(),
                namespace: "../../api/v1".into(),
                name: "../nodes/x".into(),
                status_json: bytes(&json!({"state": "online"})).into(),
            })
        }),
        ("a Node status that is no JSON", {
            Body::NodeStatus(NodeStatusReport {
                status_json: b"]".to_vec().into(),
                ..Default::default()
            })
        }),
    ]
}

fn events(loot: &Loot) -> Vec<(&'static str, Body)> {
    let ns = loot.namespace.as_str();
    let long = "x".repeat(100_000);
    let own = event("Node", "", &loot.own, &loot.own);
    [
        ("an event of another's pod", event("Pod", ns, "victim", &loot.pod)),
        (
            "an event of another's pod under the own one's UID",
            event("Pod", ns, "victim", &loot.own_pod),
        ),
        (
            "an event of another's pod under no UID",
            event("Pod", ns, "victim", ""),
        ),
        (
            "an event of a pod that is not there",
            event("Pod", ns, "nobody", "made-up"),
        ),
        (
            "an event in kube-system",
            event("Pod", "kube-system", "nobody", "made-up"),
        ),
        (
            "an event in a namespace that is not there",
            event("Pod", "no-such-namespace", "nobody", "made-up"),
        ),
        (
            "an event of another's Node",
            event("Node", "", &loot.victim, &loot.victim),
        ),
        (
            "an event of another's Site",
            event("Site", "", &loot.victim, "made-up"),
        ),
        (
            "an event of another's Device",
            event("Device", ns, "theirs", &loot.device),
        ),
        ("an event of a Secret", event("Secret", ns, "theirs", "made-up")),
        (
            "an event with a long message",
            EventReport {
                message: long,
                ..own.clone()
            },
        ),
        (
            "an event of a type of its own",
            EventReport {
                r#type: "Evil".into(),
                ..own
            },
        ),
    ]
    .map(|(attack, event)| (attack, Body::Event(event)))
    .into()
}

fn mirrors(loot: &Loot) -> Vec<(&'static str, Body)> {
    let ns = loot.namespace.as_str();
    let named = |stem: &str| format!("{stem}-{}", loot.own);
    let with = |more: Value| {
        let mut spec = json!({"containers": [{"name": "c", "image": "i"}]});
        spec.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        Some(json!({"metadata": {}, "spec": spec}))
    };
    let secret = json!({"volumes": [{"name": "v", "secret": {"secretName": "theirs"}}]});
    let token = json!({"volumes": [{"name": "v", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]});
    vec![
        (
            "a mirror under another's pod's name",
            mirror(ns, "victim", with(json!({}))),
        ),
        (
            "a mirror named after another site",
            mirror(ns, &format!("web-{}", loot.victim), with(json!({}))),
        ),
        (
            "a mirror named after no site",
            mirror("kube-system", "kube-apiserver", with(json!({}))),
        ),
        ("a mirror of a Secret", mirror(ns, &named("a"), with(secret))),
        ("a mirror of a token", mirror(ns, &named("b"), with(token))),
        (
            "a mirror with an account",
            mirror(ns, &named("c"), with(json!({"serviceAccountName": "default"}))),
        ),
        (
            "a mirror that is no pod",
            mirror(ns, &named("d"), Some(json!({"spec": {"containers": 7}}))),
        ),
        (
            "a mirror in a path",
            mirror("../../apis", &named("e"), with(json!({}))),
        ),
        (
            "the end of a mirror that is another's pod",
            mirror(ns, "victim", None),
        ),
        (
            "a mirror in a namespace that is not there",
            mirror("no-such-namespace", &named("f"), with(json!({}))),
        ),
    ]
}

pub(super) fn forged(t: &Test<'_>) {
    let spec = json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]});
    t.kubectl.apply(&t.site().pod("victim", spec));
    let device = json!({"apiVersion": "devices.kubeedge.io/v1alpha1", "kind": "Device", "metadata": {"name": "theirs"},
        "spec": {"protocol": "modbus", "nodeName": t.site().name(), "properties": [
            {"name": "temp", "type": "float", "accessMode": "ReadOnly", "descriptor": {"scale": 0.1}}]}});
    t.kubectl.apply(&device.to_string());
    let before = identity(&ready(&t.kubectl, "victim"));
    eventually(SOON, "the device is bound", || {
        same(
            t.kubectl.get("device", "theirs")?["status"]["nodeName"].as_str(),
            Some(t.site().name()),
        )
    });
    let (site, hostile) = hostile(t);
    let own = site.name().to_owned();
    let mut book = Book::default();
    run(async {
        let mut session = hostile.session().await.empty().await;
        let node = json!({
            "conditions": [{"type": "Ready", "status": "True"}],
            "addresses": [{"type": "InternalIP", "address": "192.0.2.66"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": 6}},
            "metadata": {"labels": {"forged": "true"}}, "spec": {"taints": []},
        });
        let labels = [("node-role.kubernetes.io/control-plane", ""), ("forged", "true")];
        let node = NodeStatusReport {
            status_json: bytes(&node).into(),
            labels: labels
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
        };
        session.report(Some(Body::NodeStatus(node))).await.unwrap();
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "own"},
            "spec": {"nodeName": own, "containers": [{"name": "c", "image": "i"}]}});
        let uid = |kind: &str, name: &str| {
            Ok::<_, String>(
                t.kubectl.get(kind, name)?["metadata"]["uid"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
            )
        };
        let loot = tokio::task::block_in_place(|| {
            eventually(SOON, "the Node is there", || {
                t.kubectl.get("node", &own).map(drop)
            });
            t.kubectl.apply(&pod.to_string());
            Loot {
                namespace: t.kubectl.get("pod", "own").unwrap()["metadata"]["namespace"]
                    .as_str()
                    .unwrap()
                    .to_owned(),
                pod: uid("pod", "victim").unwrap(),
                device: uid("device", "theirs").unwrap(),
                victim: t.site().name().to_owned(),
                own: own.clone(),
                own_pod: uid("pod", "own").unwrap(),
            }
        });
        // The provider has seen the pod once it takes its status; by then nothing is refused for want of news.
        let running = || {
            status(
                &loot.own_pod,
                &loot.namespace,
                "own",
                bytes(&json!({"phase": "Running"})),
                false,
            )
        };
        loop {
            let result = session.report(Some(running())).await.unwrap();
            if result.outcome() == Outcome::Accepted {
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let attacks = [statuses(&loot), events(&loot), mirrors(&loot)];
        for (attack, body) in attacks.into_iter().flatten() {
            let result = session.report(Some(body)).await;
            book.expect(
                attack,
                match result {
                    Ok(result) if result.outcome() == Outcome::Dropped && !result.message.is_empty() => {
                        Ok(())
                    }
                    other => Err(format!("{other:?}")),
                },
            );
        }
        let result = session.report(None).await;
        book.expect(
            "a report of nothing",
            result.map(|r| assert_eq!(r.outcome(), Outcome::Dropped)),
        );
        // A pod of its own under another's name: it goes to its own pod. Finished, but nobody has deleted it.
        let disguised = status(&loot.own_pod, &loot.namespace, "victim", bytes(&lie()), true);
        let result = session.report(Some(disguised)).await;
        book.expect("the own pod's status under another's name", result.map(drop));
    });
    book.close(13 + 12 + 10 + 2);

    assert_eq!(t.kubectl.get("pod", "own").unwrap()["status"]["reason"], "Forged");
    throughout(
        Duration::from_secs(2),
        "nothing of the victim's has changed",
        || {
            let pod = t.kubectl.get("pod", "victim")?;
            same(identity(&pod), before.clone())?;
            same(pod["status"]["phase"].as_str(), Some("Running"))?;
            same(pod["status"].get("reason"), None)?;
            same(
                t.kubectl.get("device", "theirs")?["status"]["nodeName"].as_str(),
                Some(t.site().name()),
            )
        },
    );
    let events = t.kubectl.list("events", &["--all-namespaces"]).unwrap();
    let forged = events.iter().filter(|event| event["reason"] == "Forged").count();
    assert_eq!(forged, 0);
    let node = t.kubectl.get("node", &own).unwrap();
    let labels = &node["metadata"]["labels"];
    assert!(labels.get("forged").is_none() && labels.get("node-role.kubernetes.io/control-plane").is_none());
    assert!(!node["status"]["addresses"].to_string().contains("192.0.2.66"));
    assert_ne!(node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"], 6);
    let twins = t.kubectl.get("device", "theirs").unwrap()["status"]["twins"].to_string();
    assert!(!twins.contains("666"), "{twins}");
    t.kubectl
        .run(&["delete", "pod", "own", "--force", "--grace-period=0"]);
}
