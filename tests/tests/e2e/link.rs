//! The link's promises: what a site holds is proven, a disk that exists twice is found out, a cluster that was restored
//! starts nothing that has ended, and a report that was written and not answered for counts once.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use skerry_tests::kubectl::{Kubectl, condition};
use skerry_tests::pods::{gone, identity, lines, phase, ready};
use skerry_tests::process::Daemon;
use skerry_tests::relay::Line;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{NOTICED, Runtime, Site};
use skerry_tests::wait::{SOON, eventually, same, throughout};

pub(crate) fn scenarios() -> Vec<Scenario> {
    // Fails when the restored cluster has written more revisions before the provider's next look than it lost: the restore
    // is then not noticed (docs/link.md). It belongs to every run once that is mended.
    let restore = std::env::var_os("SKERRY_E2E_RESTORE").map(|_| {
        Scenario::once(
            "a cluster restored from an older backup starts no pod that has ended, and keeps those that run",
            restored,
        )
    });
    [
        Scenario::once(
            "a site is shown to hold what it should, and that it is not known while it is away",
            synced,
        ),
        Scenario::once(
            "a cloned disk is found out and the connected site is kept",
            cloned,
        ),
        Scenario::once(
            "what is cut off at the moment of the answer counts once",
            cut_at_the_answer,
        ),
    ]
    .into_iter()
    .chain(restore)
    .flatten()
    .collect()
}

fn site_condition(kubectl: &Kubectl, site: &str, kind: &str, status: &str) -> Value {
    eventually(NOTICED, &format!("{kind} of {site} is {status}"), || {
        let object = kubectl.get("site", site)?;
        let condition = condition(&object, kind).clone();
        same(condition["status"].as_str(), Some(status)).map_err(|e| format!("{e}: {}", object["status"]))?;
        Ok(condition)
    })
}

/// Writes a line to `name` in `dir` at each start, and ends whenever `crash` appears there.
fn counted(name: &str, dir: &Path) -> Value {
    let script = format!(
        "echo start >> /h/{name}; while [ ! -e /h/crash-{name} ]; do date > /h/alive-{name}; sleep 0.1; done; rm /h/crash-{name}; exit 3"
    );
    json!({
        "containers": [{"command": ["sh", "-c", script], "volumeMounts": [{"name": "h", "mountPath": "/h"}]}],
        "volumes": [{"name": "h", "hostPath": {"path": dir}}],
    })
}

fn crash(name: &str, dir: &Path) {
    std::fs::write(dir.join(format!("crash-{name}")), "").unwrap();
}

fn synced(t: &Test<'_>) {
    let mut site = t.own_site();
    let proven = site_condition(&t.kubectl, site.name(), "Synced", "True");
    assert_eq!(proven["reason"], "Proven");
    site.line().set(Line::Silent);
    let away = site_condition(&t.kubectl, site.name(), "Synced", "Unknown");
    assert_eq!(away["reason"], "EdgeDisconnected");
    site.line().set(Line::Up);
    site.wait_ready();
    site_condition(&t.kubectl, site.name(), "Synced", "True");
    let wide = t.kubectl.run(&["get", "site", site.name(), "-o", "wide"]);
    assert!(wide.contains("SYNCED") && wide.contains("True"), "{wide}");
    let (_, metrics) = skerry_tests::cluster::http_get(t.cluster.metrics(), "/metrics").unwrap();
    let proof = format!(
        "skerry_link_synced_timestamp_seconds{{node=\"{}\"}} ",
        site.name()
    );
    assert!(metrics.contains(&proof), "{metrics}");
}

fn cloned(t: &Test<'_>) {
    let mut site = t.own_site();
    assert_eq!(site.stop_edge(), 0);
    let (data, copy) = (site.data_dir(), site.dir().join("clone"));
    let copied = std::process::Command::new("cp")
        .arg("-a")
        .args([&data, &copy])
        .status();
    assert!(copied.unwrap().success());
    site.start_edge();
    site.wait_ready();

    // The same command line, but for the directory and the port.
    let original = site.edge_command();
    let mut command = std::process::Command::new(original.get_program());
    let mut previous = String::new();
    for argument in original.get_args() {
        let argument = argument.to_str().unwrap();
        command.arg(match previous.as_str() {
            "--data-dir" => copy.to_str().unwrap(),
            "--metrics-listen" => "127.0.0.1:0",
            _ => argument,
        });
        argument.clone_into(&mut previous);
    }
    let clone = Daemon::start("clone", command, &site.dir().join("clone.log"));
    let conflict = site_condition(&t.kubectl, site.name(), "IdentityConflict", "True");
    let message = conflict["message"].as_str().unwrap();
    assert!(
        message.contains("used twice") && message.contains("skerry-edge join"),
        "{message}"
    );
    eventually(SOON, "the clone knows why it was refused", || {
        if clone.log().contains("used twice") {
            Ok(())
        } else {
            Err(clone.log_tail())
        }
    });
    skerry_tests::pods::event(
        &t.kubectl.in_namespace("default"),
        site.name(),
        "IdentityConflict",
    );
    throughout(Duration::from_secs(3), "the connected site is kept", || {
        let node = t.kubectl.get("node", site.name())?;
        same(condition(&node, "Ready")["status"].as_str(), Some("True"))?;
        let (_, metrics) = site.http("/metrics")?;
        let up = format!("kubeedge_edge_node_status{{node=\"{}\"}} 1", site.name());
        if metrics.contains(&up) {
            Ok(())
        } else {
            Err(metrics)
        }
    });
    clone.kill();
}

/// How often the pod's containers were said to have started.
fn starts(kubectl: &Kubectl, pod: &str) -> Result<u64, String> {
    let events = kubectl.list(
        "events",
        &[
            "--field-selector",
            &format!("involvedObject.name={pod},reason=Started"),
        ],
    )?;
    Ok(events.iter().filter_map(|event| event["count"].as_u64()).sum())
}

fn cut_at_the_answer(t: &Test<'_>) {
    let mut site = t.own_site();
    let dir = tempfile::tempdir().unwrap();
    t.kubectl.apply(&site.pod("pod", counted("pod", dir.path())));
    let (uid, ..) = identity(&ready(&t.kubectl, "pod"));
    let is = |restarts: u64| {
        eventually(SOON, &format!("{restarts} restarts are known"), || {
            let pod = t.kubectl.get("pod", "pod")?;
            same((identity(&pod).0, identity(&pod).2), (uid.clone(), restarts))?;
            same(starts(&t.kubectl, "pod")?, restarts + 1)
        });
    };
    is(0);
    // What the site says arrives and is written; that it was written does not arrive.
    site.line().set(Line::Upwards);
    crash("pod", dir.path());
    is(1);
    site.line().set(Line::Closed);
    site.line().set(Line::Up);
    site.wait_ready();
    eventually(SOON, "the outbox is empty", || {
        let (_, metrics) = site.http("/metrics")?;
        let line = metrics
            .lines()
            .find(|line| line.starts_with("skerry_outbox_reports "));
        same(line, Some("skerry_outbox_reports 0"))
    });
    is(1);
    crash("pod", dir.path());
    is(2);
}

fn restored(t: &Test<'_>) {
    let cluster = t.cluster.another("restored");
    let kubectl = cluster.kubectl().in_namespace("default");
    let mut site = Site::start(&cluster, "harbour", Runtime::Process);
    let dir = tempfile::tempdir().unwrap();
    for name in ["kept", "deleted"] {
        kubectl.apply(&site.pod(name, counted(name, dir.path())));
        ready(&kubectl, name);
    }
    cluster.back_up();

    kubectl.apply(&site.pod("younger", counted("younger", dir.path())));
    ready(&kubectl, "younger");
    crash("kept", dir.path());
    lines(&dir.path().join("kept"), 2, SOON);
    kubectl.run(&["delete", "pod", "deleted"]);
    gone(&kubectl, "deleted");
    let before = eventually(SOON, "the restart is known", || {
        let kept = identity(&kubectl.get("pod", "kept")?);
        same(kept.2, 1)?;
        Ok(kept)
    });
    cluster.restore();

    // What was deleted is back in the cluster, and does not run.
    let deleted = phase(&kubectl, "deleted", "Failed");
    assert_eq!(deleted["status"]["reason"], "AlreadyEnded");
    gone(&kubectl, "younger");
    let kept = eventually(SOON, "the status is true again", || {
        let pod = kubectl.get("pod", "kept")?;
        same(identity(&pod), before.clone())?;
        same(condition(&pod, "Ready")["status"].as_str(), Some("True"))?;
        Ok(pod)
    });
    assert_eq!(kept["status"]["phase"], "Running");
    site.wait_ready();
    site_condition(&kubectl, site.name(), "Synced", "True");
    let started = |name: &str| {
        std::fs::read_to_string(dir.path().join(name))
            .unwrap()
            .lines()
            .count()
    };
    assert_eq!(
        (started("kept"), started("deleted"), started("younger")),
        (2, 1, 1)
    );
    // What is younger than the backup is gone from the cluster, and so from the site.
    let alive = dir.path().join("alive-younger");
    std::fs::remove_file(&alive).unwrap();
    throughout(Duration::from_secs(1), "the younger pod has stopped", || {
        if alive.exists() {
            Err("it still runs".into())
        } else {
            Ok(())
        }
    });
    // A pod that is made now runs.
    kubectl.apply(&site.pod("new", counted("new", dir.path())));
    ready(&kubectl, "new");
    kubectl.run(&["delete", "pod", "deleted", "--wait=false"]);
    gone(&kubectl, "deleted");
    drop(site);
    drop(cluster);
}
