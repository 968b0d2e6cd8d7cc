//! Heartbeat classes: what a Site's class changes, and where it shows.

use serde_json::Value;
use skerry_tests::cluster::http_get;
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
