//! Real lines, narrow and half-dead: the site is in a network namespace of its own, whose queue and losses are the kernel's.

use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use skerry_tests::kubectl::{Kubectl, condition};
use skerry_tests::pods::ready;
use skerry_tests::process::is_root;
use skerry_tests::proxy::ConnectProxy;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{NOTICED, Site};
use skerry_tests::uplink::Way;
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    // Namespaces of the network need root.
    if !is_root() {
        return Vec::new();
    }
    [
        Scenario::once(
            "on a full uplink a critical site stays, its critical pods are heard, and best-effort waits",
            full_uplink,
        ),
        Scenario::once(
            "a line that carries nothing up is noticed by both sides",
            deaf_cloud,
        ),
        Scenario::once(
            "a line that carries nothing down is noticed by both sides",
            deaf_site,
        ),
        Scenario::once(
            "connections that a NAT has forgotten are replaced by new ones",
            forgotten_connections,
        ),
        Scenario::once(
            "a site behind a proxy that wants a password reaches its provider",
            through_proxy,
        ),
        Scenario::once(
            "a provider whose name moves to another address is found again",
            moved_provider,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// The critical class has the shortest deadline.
fn critical_site(t: &Test<'_>) -> Site {
    let mut site = Site::enrol_on_uplink(t.cluster, &t.name("site"), t.runtime);
    let patch = r#"{"spec": {"class": "critical"}}"#;
    t.kubectl
        .run(&["patch", "site", site.name(), "--type", "merge", "-p", patch]);
    site.start_edge();
    site.wait_ready();
    site
}

fn sessions(site: &Site) -> usize {
    let log = std::fs::read_to_string(site.dir().join("edge.log")).unwrap();
    log.matches("the link is up").count()
}

fn metric(site: &Site, name: &str) -> Result<u64, String> {
    let page = site.http("/metrics")?.1;
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    line.ok_or_else(|| format!("no {name} in {page}"))
}

fn says_ready(kubectl: &Kubectl, pod: &str, wanted: &str) -> Result<(), String> {
    let pod = kubectl.get("pod", pod)?;
    same(condition(&pod, "Ready")["status"].as_str(), Some(wanted))
}

/// Ready while the file is there.
fn switched(dir: &std::path::Path, file: &str) -> Value {
    std::fs::write(dir.join(file), "").unwrap();
    json!({
        "containers": [{
            "command": ["sh", "-c", "sleep 10000"],
            "readinessProbe": {
                "exec": {"command": ["test", "-e", format!("/h/{file}")]}, "periodSeconds": 1, "failureThreshold": 1,
            },
            "volumeMounts": [{"name": "h", "mountPath": "/h"}],
        }],
        "volumes": [{"name": "h", "hostPath": {"path": dir}}],
    })
}

fn of_class(pod: &str, class: &str) -> String {
    let mut pod: Value = serde_json::from_str(pod).unwrap();
    pod["metadata"]["annotations"] = json!({"edge.skerry.dev/class": class});
    pod.to_string()
}

/// `kubectl logs -f`, thrown away, until dropped.
struct Follower(Child);

impl Follower {
    fn start(kubectl: &Kubectl, pod: &str) -> Self {
        let mut command = kubectl.command(&["logs", "--follow", "--tail", "1", pod]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn full_uplink(t: &Test<'_>) {
    let site = critical_site(t);
    let dir = tempfile::tempdir().unwrap();
    let flood = "while :; do echo a line of a log that says the same thing over and over again, and never stops to; done";
    t.kubectl.apply(&site.pod(
        "chatty",
        json!({"containers": [{"command": ["sh", "-c", flood]}]}),
    ));
    for (name, class) in [("vital", "critical"), ("lowly", "best-effort")] {
        let pod = site.pod(name, switched(dir.path(), name));
        t.kubectl.apply(&of_class(&pod, class));
    }
    for pod in ["chatty", "vital", "lowly"] {
        ready(&t.kubectl, pod);
    }
    let before = sessions(&site);
    // A second of queue, and what does not fit is lost.
    site.uplink().narrow(256, 32_000);
    let followers: Vec<Follower> = (0..3).map(|_| Follower::start(&t.kubectl, "chatty")).collect();
    eventually(SOON, "the uplink is saturated", || {
        same(metric(&site, "skerry_uplink_saturated ")?, 1)
    });

    // Best-effort waits, and it shows.
    std::fs::remove_file(dir.path().join("lowly")).unwrap();
    eventually(
        SOON,
        "a report of the best-effort pod is held back",
        || match metric(&site, "skerry_reports_shed ")? {
            0 => Err("none".to_owned()),
            _ => Ok(()),
        },
    );
    // Critical does not.
    for round in 0..4 {
        let (file, wanted) = (
            dir.path().join("vital"),
            if round % 2 == 0 { "False" } else { "True" },
        );
        if round % 2 == 0 {
            std::fs::remove_file(&file).unwrap();
        } else {
            std::fs::write(&file, "").unwrap();
        }
        eventually(
            SOON,
            &format!("the critical pod is said to be Ready={wanted}"),
            || says_ready(&t.kubectl, "vital", wanted),
        );
        assert_eq!(
            says_ready(&t.kubectl, "lowly", "True"),
            Ok(()),
            "best-effort went before critical"
        );
        assert_eq!(
            metric(&site, "skerry_uplink_saturated "),
            Ok(1),
            "the uplink was free"
        );
    }
    let events = t.cluster.kubectl().in_namespace("default");
    drop(followers);
    eventually(SOON, "what waited is told once the uplink is free", || {
        says_ready(&t.kubectl, "lowly", "False")
    });
    eventually(SOON, "it was said in events", || {
        let found = events.run(&[
            "get",
            "events",
            "--field-selector",
            &format!("involvedObject.name={}", site.name()),
        ]);
        let all = ["UplinkSaturated", "UplinkFree"]
            .iter()
            .all(|reason| found.contains(reason));
        if all { Ok(()) } else { Err(found) }
    });
    assert_eq!(sessions(&site), before, "the site was lost: {}", site.log_tail());
}

fn half_open(t: &Test<'_>, way: Way) {
    let mut site = critical_site(t);
    let before = sessions(&site);
    site.uplink().lose(way);
    eventually(NOTICED, "the Node says that the site is away", || {
        let node = t.kubectl.get("node", site.name())?;
        same(condition(&node, "Ready")["status"].as_str(), Some("Unknown"))
    });
    eventually(NOTICED, "the daemon knows that the link is down", || {
        let up = format!("kubeedge_edge_node_status{{node=\"{}\"}} ", site.name());
        same(metric(&site, &up)?, 0)
    });
    site.uplink().carry(way);
    site.wait_ready();
    assert!(sessions(&site) > before);
}

fn deaf_cloud(t: &Test<'_>) {
    half_open(t, Way::Up);
}

fn deaf_site(t: &Test<'_>) {
    half_open(t, Way::Down);
}

fn forgotten_connections(t: &Test<'_>) {
    let mut site = critical_site(t);
    t.kubectl.apply(&site.pod(
        "pod",
        json!({"containers": [{"command": ["sh", "-c", "echo here; sleep 1000"]}]}),
    ));
    ready(&t.kubectl, "pod");
    let before = sessions(&site);
    site.uplink().forget_connections();
    eventually(NOTICED, "a new session is up", || {
        if sessions(&site) > before {
            Ok(())
        } else {
            Err(site.log_tail())
        }
    });
    site.wait_ready();
    eventually(Duration::from_secs(30), "logs come through it", || {
        same(t.kubectl.attempt(&["logs", "pod"])?.as_str(), "here\n")
    });
}

/// Allows the site no other way than to the proxy.
fn through_proxy(t: &Test<'_>) {
    let mut site = Site::enrol_on_uplink(t.cluster, &t.name("site"), t.runtime);
    let proxy = ConnectProxy::start(site.uplink().cloud().into(), Some("Basic bWU6cEBzcw=="));
    site.uplink().allow_only(proxy.address().port());
    site.set_flags(&["--proxy", &format!("http://{}", proxy.address())]);
    site.start_edge();
    eventually(SOON, "the daemon says that the proxy wants a password", || {
        let log = site.log_tail();
        if log.contains("USER:PASSWORD") {
            Ok(())
        } else {
            Err(log)
        }
    });
    assert_eq!(site.stop_edge(), 0);
    site.set_flags(&["--proxy", &format!("http://me:p%40ss@{}", proxy.address())]);
    site.start_edge();
    site.wait_ready();
    assert!(proxy.tunnels() >= 2, "{}", proxy.tunnels());
    assert!(
        !std::fs::read_to_string(site.dir().join("edge.log"))
            .unwrap()
            .contains("p%40ss")
    );
    t.kubectl.apply(&site.pod(
        "pod",
        json!({"containers": [{"command": ["sh", "-c", "echo here; sleep 1000"]}]}),
    ));
    ready(&t.kubectl, "pod");
    eventually(SOON, "logs come through it", || {
        same(t.kubectl.attempt(&["logs", "pod"])?.as_str(), "here\n")
    });
}

fn moved_provider(t: &Test<'_>) {
    let mut site = Site::enrol_on_uplink(t.cluster, &t.name("site"), t.runtime);
    let cloud = site.uplink().cloud();
    let other = site.uplink().second_cloud();
    site.name_provider("provider.test");
    // The first of the two addresses answers to nobody.
    site.set_hosts(&format!("{other} provider.test\n{cloud} provider.test\n"));
    site.start_edge();
    site.wait_ready();
    let before = sessions(&site);
    // The provider moves: the name follows, the old address answers no more.
    site.uplink().take_second_cloud();
    site.set_hosts(&format!("{other} provider.test\n"));
    site.uplink().drop_first_cloud(t.cluster.link().port());
    eventually(NOTICED, "a new session is up at the new address", || {
        if sessions(&site) > before {
            Ok(())
        } else {
            Err(site.log_tail())
        }
    });
    site.wait_ready();
}
