//! A person at the site, without a cloud: `skerry-edge pods`, `status` and `store`.

use std::process::{Command, Output};

use serde_json::{Value, json};
use skerry_tests::pods::ready;
use skerry_tests::process::{text, workspace_binary};
use skerry_tests::relay::Line;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::Site;
use skerry_tests::wait::{SOON, eventually};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each(
            "a person at a site that is cut off sees its pods and how it is",
            without_a_cloud,
        ),
        Scenario::once(
            "the store is looked after while the daemon does not run",
            looked_after,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// `skerry-edge WORDS --data-dir …`.
fn edge(site: &Site, words: &[&str]) -> Output {
    Command::new(workspace_binary("skerry-edge"))
        .args(words)
        .arg("--data-dir")
        .arg(site.data_dir())
        .output()
        .unwrap()
}

fn says(site: &Site, words: &[&str]) -> String {
    let out = edge(site, words);
    assert!(out.status.success(), "{words:?}: {}", text(&out));
    String::from_utf8(out.stdout).unwrap()
}

fn without_a_cloud(t: &Test<'_>) {
    let mut site = t.own_site();
    let long = json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]});
    t.kubectl.apply(&site.pod("steady", long));
    let pod = ready(&t.kubectl, "steady");
    let namespace = pod["metadata"]["namespace"].as_str().unwrap();
    let of_namespace = ["pods", "-n", namespace];

    site.line().set(Line::Silent);
    // What happens from here on no cloud knows.
    site.power_cut();
    site.start_edge();
    eventually(SOON, "the table shows the restarted pod", || {
        let asked = edge(&site, &of_namespace);
        // The daemon has only just been started.
        if !asked.status.success() {
            return Err(text(&asked));
        }
        let table = text(&asked);
        let mut lines = table.lines();
        let head: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
        let cells: Vec<&str> = lines.next().unwrap_or_default().split_whitespace().collect();
        let fits = head == ["NAME", "READY", "STATUS", "RESTARTS", "AGE"]
            && cells.get(..4) == Some(&["steady", "1/1", "Running", "1"][..]);
        if fits { Ok(()) } else { Err(table) }
    });
    let wide = says(&site, &["pods", "-A", "-o", "wide"]);
    assert!(
        wide.starts_with("NAMESPACE") && wide.contains(site.name()),
        "{wide}"
    );
    let whole: Value =
        serde_json::from_str(&says(&site, &["pods", "-n", namespace, "steady", "-o", "json"])).unwrap();
    assert_eq!(whole["metadata"]["uid"], pod["metadata"]["uid"]);
    assert_eq!(whole["status"]["containerStatuses"][0]["restartCount"], 1);
    let yaml = says(&site, &["pods", "-n", namespace, "-o", "yaml"]);
    assert!(
        yaml.contains("kind: List") && yaml.contains("name: steady"),
        "{yaml}"
    );
    let missing = edge(&site, &["pods", "-n", namespace, "nobody"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing).contains("nobody"), "{}", text(&missing));

    let status = says(&site, &["status"]);
    for part in ["link         down since", "1 Running", "status (", "certificate"] {
        assert!(status.contains(part), "{part}: {status}");
    }
    site.line().set(Line::Up);
    site.wait_ready();
    eventually(SOON, "the outbox is empty and the link up", || {
        let status = says(&site, &["status"]);
        if status.contains("outbox       empty") && status.contains("in step with the provider") {
            Ok(())
        } else {
            Err(status)
        }
    });
}

fn looked_after(t: &Test<'_>) {
    let mut site = t.own_site();
    t.kubectl.apply(&site.pod(
        "steady",
        json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]}),
    ));
    let before = skerry_tests::pods::identity(&ready(&t.kubectl, "steady"));
    let busy = edge(&site, &["store", "check"]);
    assert_eq!(busy.status.code(), Some(4));
    assert!(text(&busy).contains("in use"), "{}", text(&busy));
    assert_eq!(site.stop_edge(), 0);
    let asked = edge(&site, &["pods"]);
    assert!(text(&asked).contains("local.sock"), "{}", text(&asked));
    assert!(says(&site, &["store", "check"]).contains("sound"));
    assert!(says(&site, &["store", "stats"]).contains("objects"));
    assert!(says(&site, &["store", "compact"]).contains("bytes now"));
    assert!(says(&site, &["store", "check"]).contains("sound"));
    site.start_edge();
    site.wait_ready();
    assert_eq!(skerry_tests::pods::identity(&ready(&t.kubectl, "steady")), before);
}
