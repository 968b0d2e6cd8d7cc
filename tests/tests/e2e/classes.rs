//! Heartbeat classes: what a Site's class changes, and where it shows.

use serde_json::{Value, json};
use skerry_tests::cluster::http_get;
use skerry_tests::kubectl::condition;
use skerry_tests::pods::ready;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::Site;
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::once(
            "another class of a Site takes effect in its session and shows everywhere",
            class_changes,
        ),
        Scenario::once("a class that does not exist is refused by name", unknown_class),
        Scenario::once(
            "a link whose budget is used up lets all wait that can, and says so",
            used_up,
        ),
        Scenario::once("a Node that was deleted comes back by itself", deleted_node),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The classes that a `/metrics` page names for a node.
fn shown(page: &str, site: &str) -> Vec<String> {
    let of_site = format!("node=\"{site}\"");
    page.lines()
        .filter(|line| line.starts_with("skerry_site_info{") && line.contains(&of_site))
        .filter_map(|line| {
            line.split("class=\"")
                .nth(1)?
                .split('"')
                .next()
                .map(str::to_owned)
        })
        .collect()
}

fn sessions(site: &Site) -> usize {
    let log = std::fs::read_to_string(site.dir().join("edge.log")).unwrap();
    log.matches("the link is up").count()
}

fn class_changes(t: &Test<'_>) {
    let site = t.own_site();
    let name = site.name();
    let before = sessions(&site);
    let column = |t: &Test<'_>| {
        let out = t.kubectl.run(&["get", "sites", name, "-o", "wide"]);
        out.lines().nth(1).unwrap_or_default().to_owned()
    };
    assert!(column(t).contains("standard"), "{}", column(t));
    for class in ["critical", "best-effort"] {
        let patch = format!(r#"{{"spec": {{"class": "{class}"}}}}"#);
        t.kubectl
            .run(&["patch", "site", name, "--type", "merge", "-p", &patch]);
        eventually(SOON, &format!("{class} shows everywhere"), || {
            let object = t.kubectl.get("site", name)?;
            same(&object["status"]["class"], &Value::from(class))?;
            same(shown(&site.http("/metrics")?.1, name), vec![class.to_owned()])?;
            same(
                shown(&http_get(t.cluster.metrics(), "/metrics")?.1, name),
                vec![class.to_owned()],
            )
        });
        assert!(column(t).contains(class), "{}", column(t));
        // A heartbeat is sent at once, and its round trip is told with the next one.
        eventually(SOON, "the round trip is counted by class", || {
            let page = site.http("/metrics")?.1;
            let counted = format!("skerry_heartbeat_round_trip_seconds_count{{class=\"{class}\"}}");
            page.lines()
                .find(|l| l.starts_with(&counted))
                .map(drop)
                .ok_or(page.clone())
        });
    }
    assert_eq!(sessions(&site), before, "{}", site.log_tail());
}

fn unknown_class(t: &Test<'_>) {
    let name = t.name("odd");
    let object = format!(
        r#"{{"apiVersion": "edge.skerry.dev/v1alpha1", "kind": "Site", "metadata": {{"name": "{name}"}}, "spec": {{"class": "urgent"}}}}"#
    );
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), object).unwrap();
    let refused = t
        .kubectl
        .attempt(&["create", "-f", file.path().to_str().unwrap()])
        .unwrap_err();
    assert!(
        refused.contains("spec.class") && refused.contains("best-effort"),
        "{refused}"
    );
}

fn used_up(t: &Test<'_>) {
    let site = t.own_site();
    let dir = tempfile::tempdir().unwrap();
    for (name, class) in [("vital", "critical"), ("usual", "standard")] {
        std::fs::write(dir.path().join(name), "").unwrap();
        let spec = json!({
            "containers": [{
                "command": ["sh", "-c", "echo here; sleep 10000"],
                "readinessProbe": {
                    "exec": {"command": ["test", "-e", format!("/h/{name}")]}, "periodSeconds": 1, "failureThreshold": 1,
                },
                "volumeMounts": [{"name": "h", "mountPath": "/h"}],
            }],
            "volumes": [{"name": "h", "hostPath": {"path": dir.path()}}],
        });
        let mut pod: Value = serde_json::from_str(&site.pod(name, spec)).unwrap();
        pod["metadata"]["annotations"] = json!({"edge.skerry.dev/class": class});
        t.kubectl.apply(&pod.to_string());
    }
    for pod in ["vital", "usual"] {
        ready(&t.kubectl, pod);
    }
    let budget = |budget: &str| {
        let patch = format!(r#"{{"spec": {{"link": {{"dailyBudget": {budget}}}}}}}"#);
        t.kubectl
            .run(&["patch", "site", site.name(), "--type", "merge", "-p", &patch]);
    };
    budget("\"1\"");
    eventually(SOON, "the Site says so", || {
        let link = &t.kubectl.get("site", site.name())?["status"]["link"];
        same(link["deferring"].as_str(), Some("Budget"))?;
        if link["usedToday"].as_u64() > Some(1) {
            Ok(())
        } else {
            Err(link.to_string())
        }
    });
    let is_ready = |pod: &str, wanted: &str| {
        let pod = t.kubectl.get("pod", pod)?;
        same(condition(&pod, "Ready")["status"].as_str(), Some(wanted))
    };
    std::fs::remove_file(dir.path().join("usual")).unwrap();
    std::fs::remove_file(dir.path().join("vital")).unwrap();
    eventually(SOON, "what is critical passes", || is_ready("vital", "False"));
    assert_eq!(is_ready("usual", "True"), Ok(()), "what can wait went first");
    let refused = t.kubectl.attempt(&["logs", "usual"]).unwrap_err();
    assert!(refused.contains("budget"), "{refused}");
    assert_eq!(t.kubectl.attempt(&["logs", "vital"]).as_deref(), Ok("here\n"));
    budget("null");
    eventually(SOON, "what waited goes out", || is_ready("usual", "False"));
    eventually(SOON, "the Site says so", || {
        let link = &t.kubectl.get("site", site.name())?["status"]["link"];
        same(&link["deferring"], &Value::Null)
    });
}

fn deleted_node(t: &Test<'_>) {
    let mut site = t.own_site();
    let before = t.kubectl.get("node", site.name()).unwrap();
    t.kubectl.run(&["delete", "node", site.name()]);
    eventually(SOON, "another Node is there", || {
        let node = t.kubectl.get("node", site.name())?;
        if node["metadata"]["uid"] == before["metadata"]["uid"] {
            return Err("it is the same".to_owned());
        }
        Ok(())
    });
    site.wait_ready();
}
