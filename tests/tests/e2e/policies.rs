//! Policies for the time without the cloud, of Sites and of Pods.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use skerry_tests::kubectl::condition;
use skerry_tests::pods::{identity, ready};
use skerry_tests::relay::Line;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{NOTICED, Site};
use skerry_tests::wait::{SOON, eventually, same, throughout};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::once(
            "a pod that may be replaced is, when its site stays away",
            replaced,
        ),
        Scenario::once(
            "pods end alone as their policies say, also over a restart, and come back with the cloud",
            limits,
        ),
        Scenario::once("a Site says what its Node shows while it is away", shown),
        Scenario::once("policies that make no sense are refused or said", nonsense),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn with_policy(t: &Test<'_>, site: &Site, policy: &str) {
    let patch = format!(r#"{{"spec": {{"autonomy": {policy}}}}}"#);
    t.kubectl
        .run(&["patch", "site", site.name(), "--type", "merge", "-p", &patch]);
}

/// A pod that moves a file of its name as long as it runs.
fn beating(t: &Test<'_>, site: &Site, dir: &Path, name: &str, annotations: Value) {
    let script = format!("while :; do date +%s%N > /h/{name}; sleep 0.2; done");
    let spec = json!({
        "containers": [{"command": ["sh", "-c", script], "volumeMounts": [{"name": "h", "mountPath": "/h"}]}],
        "volumes": [{"name": "h", "hostPath": {"path": dir}}],
    });
    let mut pod: Value = serde_json::from_str(&site.pod(name, spec)).unwrap();
    pod["metadata"]["annotations"] = annotations;
    t.kubectl.apply(&pod.to_string());
}

fn beats(dir: &Path, name: &str) -> bool {
    let read = || std::fs::read_to_string(dir.join(name)).unwrap_or_default();
    let before = read();
    std::thread::sleep(Duration::from_secs(1));
    read() != before
}

fn until(dir: &Path, name: &str, running: bool) {
    eventually(SOON, &format!("{name} runs: {running}"), || {
        same(beats(dir, name), running)
    });
}

fn limits(t: &Test<'_>) {
    let mut site = t.own_site();
    // The Site stops pods after four seconds alone; two of them know better.
    with_policy(t, &site, r#"{"maxAlone": "4s", "then": "stop"}"#);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    beating(t, &site, dir, "pausing", json!({}));
    beating(
        t,
        &site,
        dir,
        "staying",
        json!({"edge.skerry.dev/max-alone": "forever"}),
    );
    beating(
        t,
        &site,
        dir,
        "ending",
        json!({"edge.skerry.dev/then": "stop-for-good"}),
    );
    let [pausing, staying, _] = ["pausing", "staying", "ending"].map(|pod| identity(&ready(&t.kubectl, pod)));

    site.line().set(Line::Closed);
    until(dir, "pausing", false);
    until(dir, "ending", false);
    until(dir, "staying", true);
    // A restart does not let them start, for a moment even: what they would write would show.
    std::fs::remove_file(dir.join("pausing")).unwrap();
    site.kill_edge();
    site.start_edge();
    eventually(SOON, "the daemon is ready", || same(site.http("/readyz")?.0, 200));
    throughout(Duration::from_secs(4), "the pod stays stopped", || {
        same(dir.join("pausing").exists(), false)
    });

    site.line().set(Line::Up);
    site.wait_ready();
    until(dir, "pausing", true);
    let back = identity(&ready(&t.kubectl, "pausing"));
    assert_eq!(back.0, pausing.0, "it is another pod");
    assert_eq!(identity(&ready(&t.kubectl, "staying")), staying);
    eventually(SOON, "the pod has ended for good", || {
        let pod = t.kubectl.get("pod", "ending")?;
        same(pod["status"]["phase"].as_str(), Some("Failed"))?;
        same(pod["status"]["reason"].as_str(), Some("AloneTooLong"))
    });
    assert!(!beats(dir, "ending"));
    let events = t.kubectl.run(&["get", "events"]);
    assert!(events.contains("AloneTooLong"), "{events}");
}

/// Effects of the taint of sites that are away.
fn away_taints(node: &Value) -> Vec<String> {
    let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
    taints
        .iter()
        .filter(|taint| taint["key"] == "edge.skerry.dev/away")
        .filter_map(|taint| taint["effect"].as_str().map(str::to_owned))
        .collect()
}

fn shown(t: &Test<'_>) {
    let mut site = t.own_site();
    with_policy(t, &site, r#"{"node": "Ready", "taint": "PreferNoSchedule"}"#);
    let node = || t.kubectl.get("node", site.name());
    assert!(away_taints(&node().unwrap()).is_empty());
    site.line().set(Line::Closed);
    eventually(NOTICED, "the Site is Offline and the Node tainted", || {
        same(
            t.kubectl.get("site", site.name())?["status"]["state"].as_str(),
            Some("Offline"),
        )?;
        same(away_taints(&node()?), vec!["PreferNoSchedule".to_owned()])
    });
    // Longer than the control plane waits for a lease.
    throughout(Duration::from_secs(55), "the Node is shown Ready", || {
        same(condition(&node()?, "Ready")["status"].as_str(), Some("True"))
    });
    // The policy changes while the site is away.
    with_policy(t, &site, r#"{"node": "NotReady", "taint": null}"#);
    eventually(SOON, "the Node is shown as it is", || {
        same(condition(&node()?, "Ready")["status"].as_str(), Some("Unknown"))?;
        same(away_taints(&node()?), vec!["NoSchedule".to_owned()])
    });
    site.line().set(Line::Up);
    eventually(SOON, "the taint is gone", || same(away_taints(&node()?), vec![]));
    site.wait_ready();
}

fn replaced(t: &Test<'_>) {
    let site = t.own_site();
    let dir = tempfile::tempdir().unwrap();
    beating(
        t,
        &site,
        dir.path(),
        "moving",
        json!({"edge.skerry.dev/replace": "1s"}),
    );
    ready(&t.kubectl, "moving");
    site.line().set(Line::Silent);
    // The control plane takes its time to call a Node unreachable, and to taint it.
    eventually(
        Duration::from_secs(150),
        "the control plane deletes the pod",
        || {
            let pod = t.kubectl.get("pod", "moving")?;
            match pod["metadata"]["deletionTimestamp"].as_str() {
                Some(_) => Ok(()),
                None => Err(pod["spec"]["tolerations"].to_string()),
            }
        },
    );
    // It runs on until the site hears of it.
    assert!(beats(dir.path(), "moving"));
    site.line().set(Line::Up);
    skerry_tests::pods::gone(&t.kubectl, "moving");
    until(dir.path(), "moving", false);
}

fn nonsense(t: &Test<'_>) {
    let site = t.site();
    let patch = r#"{"spec": {"autonomy": {"maxAlone": "a week"}}}"#;
    let refused = t
        .kubectl
        .attempt(&["patch", "site", site.name(), "--type", "merge", "-p", patch])
        .unwrap_err();
    assert!(refused.contains("spec.autonomy.maxAlone"), "{refused}");
    let dir = tempfile::tempdir().unwrap();
    let annotations = json!({"edge.skerry.dev/max-alone": "a week", "edge.skerry.dev/class": "urgent"});
    beating(t, site, dir.path(), "odd", annotations);
    eventually(SOON, "both are said", || {
        let events = t
            .kubectl
            .run(&["get", "events", "--field-selector", "involvedObject.name=odd"]);
        let all = ["InvalidAutonomy", "InvalidClass"]
            .iter()
            .all(|reason| events.contains(reason));
        if all { Ok(()) } else { Err(events) }
    });
}
