//! A site without its provider: pods stay, are restarted, survive the daemon and a power cut, and are the same pods
//! when the line is back.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use skerry_tests::kubectl::{Kubectl, condition};
use skerry_tests::pods::{gone, identity, lines, ready};
use skerry_tests::relay::Line;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{NOTICED, Site};
use skerry_tests::wait::{SOON, eventually, same, throughout};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each(
            "pods outlive a silent line, crashed ones are restarted, and all is reported after it",
            silent_line,
        ),
        Scenario::each("a daemon killed with -9 adopts its containers", adoption),
        Scenario::each(
            "a daemon stopped in good order leaves its containers running",
            orderly_restart,
        ),
        Scenario::each(
            "a container that ends while the daemon is down is restarted and counted",
            ended_without_daemon,
        ),
        Scenario::each(
            "pods come up from the store after a power cut without a line",
            power_cut,
        ),
        Scenario::each(
            "what was deleted and created meanwhile is caught up after the line is back",
            caught_up,
        ),
        Scenario::once(
            "pods of a site that is away are not evicted, and its Node is honest",
            no_eviction,
        ),
        Scenario::once(
            "a line that closes again and again is dialled again",
            flapping_line,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Logs each start with what it was given, and ends with code 3 whenever `crash` appears in `dir`.
fn resident(dir: &Path) -> Value {
    let script = "echo \"$COLOUR $(cat /s/password) $(wc -c < /var/run/secrets/kubernetes.io/serviceaccount/token)\" >> /h/starts
        while [ ! -e /h/crash ]; do sleep 0.1; done; rm /h/crash; exit 3";
    json!({
        "containers": [{
            "command": ["sh", "-c", script],
            "env": [{"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "colour"}}}],
            "volumeMounts": [{"name": "h", "mountPath": "/h"}, {"name": "s", "mountPath": "/s"}],
        }],
        "volumes": [{"name": "h", "hostPath": {"path": dir}}, {"name": "s", "secret": {"secretName": "login"}}],
    })
}

fn given(kubectl: &Kubectl) {
    kubectl.run(&["create", "configmap", "settings", "--from-literal=colour=red"]);
    kubectl.run(&[
        "create",
        "secret",
        "generic",
        "login",
        "--from-literal=password=s3cret",
    ]);
}

/// Waits until the Node no longer says that all is well.
fn noticed(kubectl: &Kubectl, site: &Site) {
    eventually(NOTICED, "the Node says that the site is away", || {
        let node = kubectl.get("node", site.name())?;
        match condition(&node, "Ready")["status"].as_str() {
            Some("True") => Err(node["status"]["conditions"].to_string()),
            _ => Ok(()),
        }
    });
}

fn restarted(kubectl: &Kubectl, uid: &str, count: u64) -> Value {
    eventually(SOON, &format!("the pod runs after {count} restarts"), || {
        let pod = kubectl.get("pod", "pod")?;
        same((identity(&pod).0.as_str(), identity(&pod).2), (uid, count))
            .map_err(|e| format!("{e}: {}", pod["status"]))?;
        same(condition(&pod, "Ready")["status"].as_str(), Some("True"))
            .map_err(|e| format!("{e}: {}", pod["status"]))?;
        Ok(pod)
    })
}

fn silent_line(t: &Test<'_>) {
    let mut site = t.own_site();
    let dir = tempfile::tempdir().unwrap();
    given(&t.kubectl);
    t.kubectl.apply(&site.pod("pod", resident(dir.path())));
    t.kubectl.apply(&site.pod(
        "steady",
        json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]}),
    ));
    let (uid, ..) = identity(&ready(&t.kubectl, "pod"));
    let steady = identity(&ready(&t.kubectl, "steady"));

    site.line().set(Line::Silent);
    noticed(&t.kubectl, &site);
    std::fs::write(dir.path().join("crash"), "").unwrap();
    let starts = lines(&dir.path().join("starts"), 2, SOON);
    assert_eq!(
        starts[0], starts[1],
        "the second instance was given something else"
    );

    site.line().set(Line::Up);
    site.wait_ready();
    let pod = restarted(&t.kubectl, &uid, 1);
    assert_eq!(
        pod["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"],
        3
    );
    // The Node's absence made the control plane call every pod unready: that is put right too.
    assert_eq!(identity(&ready(&t.kubectl, "steady")), steady);
    assert_eq!(t.kubectl.run(&["exec", "pod", "--", "echo", "back"]), "back\n");
}

fn adoption(t: &Test<'_>) {
    let mut site = t.own_site();
    let dir = tempfile::tempdir().unwrap();
    given(&t.kubectl);
    t.kubectl.apply(&site.pod("pod", resident(dir.path())));
    let (uid, ..) = identity(&ready(&t.kubectl, "pod"));
    std::fs::write(dir.path().join("crash"), "").unwrap();
    let before = identity(&restarted(&t.kubectl, &uid, 1));

    site.kill_edge();
    site.start_edge();
    site.wait_ready();
    throughout(Duration::from_secs(8), "the container is the same", || {
        let pod = t.kubectl.get("pod", "pod")?;
        same(identity(&pod), before.clone())?;
        same(condition(&pod, "Ready")["status"].as_str(), Some("True"))
    });
    assert_eq!(lines(&dir.path().join("starts"), 2, SOON).len(), 2);
    assert_eq!(
        t.kubectl.run(&["exec", "pod", "--", "echo", "adopted"]),
        "adopted\n"
    );
    // It is watched as before.
    std::fs::write(dir.path().join("crash"), "").unwrap();
    restarted(&t.kubectl, &uid, 2);
}

fn orderly_restart(t: &Test<'_>) {
    let mut site = t.own_site();
    t.kubectl.apply(&site.pod(
        "pod",
        json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]}),
    ));
    let before = identity(&ready(&t.kubectl, "pod"));
    assert_eq!(site.stop_edge(), 0, "exit code after SIGTERM");
    site.start_edge();
    site.wait_ready();
    assert_eq!(identity(&ready(&t.kubectl, "pod")), before);
}

fn ended_without_daemon(t: &Test<'_>) {
    let mut site = t.own_site();
    let dir = tempfile::tempdir().unwrap();
    given(&t.kubectl);
    t.kubectl.apply(&site.pod("pod", resident(dir.path())));
    let (uid, ..) = identity(&ready(&t.kubectl, "pod"));
    site.kill_edge();
    let crash = dir.path().join("crash");
    std::fs::write(&crash, "").unwrap();
    eventually(SOON, "the container has ended", || {
        if crash.exists() {
            Err("not yet".into())
        } else {
            Ok(())
        }
    });
    site.start_edge();
    let pod = restarted(&t.kubectl, &uid, 1);
    assert_eq!(
        pod["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"],
        3
    );
    assert_eq!(lines(&dir.path().join("starts"), 2, SOON).len(), 2);
}

fn power_cut(t: &Test<'_>) {
    let mut site = t.own_site();
    let dir = tempfile::tempdir().unwrap();
    given(&t.kubectl);
    t.kubectl.apply(&site.pod("pod", resident(dir.path())));
    let once = json!({"restartPolicy": "Never", "containers": [{"command": ["sh", "-c", "echo ran once"]}]});
    t.kubectl.apply(&site.pod("once", once));
    let (uid, old_container, _) = identity(&ready(&t.kubectl, "pod"));
    skerry_tests::pods::phase(&t.kubectl, "once", "Succeeded");

    site.line().set(Line::Closed);
    site.power_cut();
    site.start_edge();
    let starts = lines(&dir.path().join("starts"), 2, SOON);
    assert_eq!(
        starts[0], starts[1],
        "after the power cut the container was given something else"
    );
    assert!(
        starts[1].starts_with("red s3cret ") && !starts[1].ends_with(" 0"),
        "{starts:?}"
    );

    site.line().set(Line::Up);
    site.wait_ready();
    let pod = restarted(&t.kubectl, &uid, 1);
    assert_ne!(identity(&pod).1, old_container);
    assert_eq!(
        t.kubectl.get("pod", "once").unwrap()["status"]["phase"],
        "Succeeded"
    );
    assert_eq!(lines(&dir.path().join("starts"), 2, SOON).len(), 2);
}

fn caught_up(t: &Test<'_>) {
    let site = t.own_site();
    let dir = tempfile::tempdir().unwrap();
    let script = "while :; do date > /h/alive; sleep 0.1; done";
    let beating = json!({
        "containers": [{"command": ["sh", "-c", script], "volumeMounts": [{"name": "h", "mountPath": "/h"}]}],
        "volumes": [{"name": "h", "hostPath": {"path": dir.path()}}],
    });
    t.kubectl.apply(&site.pod("old", beating));
    ready(&t.kubectl, "old");

    site.line().set(Line::Silent);
    t.kubectl.run(&["delete", "pod", "old", "--wait=false"]);
    t.kubectl.apply(&site.pod(
        "new",
        json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]}),
    ));
    // Until the site has confirmed it, a deleted pod is still there.
    throughout(
        Duration::from_secs(5),
        "the deleted pod waits for its site",
        || t.kubectl.get("pod", "old").map(drop),
    );

    site.line().set(Line::Up);
    gone(&t.kubectl, "old");
    let alive = dir.path().join("alive");
    std::fs::remove_file(&alive).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(!alive.exists(), "the container of the deleted pod still runs");
    ready(&t.kubectl, "new");
}

fn no_eviction(t: &Test<'_>) {
    let mut site = t.own_site();
    let mut spec = json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]});
    // The most impatient pod that there can be.
    spec["tolerations"] = json!(["not-ready", "unreachable"].map(|key| json!({
        "key": format!("node.kubernetes.io/{key}"), "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1,
    })));
    t.kubectl.apply(&site.pod("pod", spec));
    let before = identity(&ready(&t.kubectl, "pod"));
    site.line().set(Line::Silent);
    noticed(&t.kubectl, &site);
    // Longer than the control plane's own grace (50 s) and its pace of tainting (one node in 10 s).
    throughout(Duration::from_secs(80), "the pod is not evicted", || {
        let pod = t.kubectl.get("pod", "pod")?;
        same(&pod["metadata"]["deletionTimestamp"], &Value::Null)
    });
    site.line().set(Line::Up);
    site.wait_ready();
    assert_eq!(identity(&ready(&t.kubectl, "pod")), before);
}

fn flapping_line(t: &Test<'_>) {
    let mut site = t.own_site();
    t.kubectl.apply(&site.pod(
        "pod",
        json!({"containers": [{"command": ["sh", "-c", "echo here; sleep 1000"]}]}),
    ));
    let before = identity(&ready(&t.kubectl, "pod"));
    for round in 0..3 {
        site.line().set(Line::Closed);
        std::thread::sleep(Duration::from_millis(700));
        site.line().set(Line::Up);
        let begin = Instant::now();
        eventually(SOON, "logs come through the new connection", || {
            same(t.kubectl.attempt(&["logs", "pod"])?.as_str(), "here\n")
        });
        assert!(
            begin.elapsed() < Duration::from_secs(45),
            "round {round} took {:?}",
            begin.elapsed()
        );
    }
    site.wait_ready();
    assert_eq!(identity(&ready(&t.kubectl, "pod")), before);
}
