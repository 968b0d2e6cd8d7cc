//! Declaring and enrolling a Site, and every way in which that goes wrong.

use std::time::Duration;

use serde_json::json;
use skerry_proto::token::JoinToken;
use skerry_tests::kubectl::condition;
use skerry_tests::process::{Daemon, free_port, text};
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{Runtime, Site, join};
use skerry_tests::wait::{SOON, eventually, same, throughout};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each("declaring and enrolling a Site makes its Node appear", appears),
        Scenario::once(
            "kubectl get sites shows state, last-seen, pods, version and age",
            columns,
        ),
        Scenario::once("a Site that goes takes its Node with it", goes),
        Scenario::once("a token is not made for a Site that is not declared", undeclared),
        Scenario::once("a malformed token is refused", malformed),
        Scenario::once("a token is good for one enrolment only", reused),
        Scenario::once("an expired token is refused", expired),
        Scenario::once("a token does not enrol another Site", other_site),
        Scenario::once("a certificate does not speak for another Site", other_certificate),
        Scenario::once(
            "a Site declared anew takes neither the old certificate nor an old token",
            anew,
        ),
        Scenario::once(
            "enrolling at a provider that is not there fails clearly",
            no_provider_to_join,
        ),
        Scenario::once(
            "a daemon without its provider goes on trying and is well",
            no_provider_to_run,
        ),
        Scenario::once("a daemon that is not enrolled says how to enrol it", not_enrolled),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn appears(t: &Test<'_>) {
    let node = t.cluster.kubectl().get("node", t.site().name()).unwrap();
    let labels = &node["metadata"]["labels"];
    assert_eq!(labels["kubernetes.io/hostname"], t.site().name());
    assert_eq!(labels["kubernetes.io/os"], "linux");
    assert!(labels["kubernetes.io/arch"].is_string());
    let status = &node["status"];
    for resource in ["cpu", "memory", "ephemeral-storage", "pods"] {
        for field in ["capacity", "allocatable"] {
            assert!(
                status[field][resource].is_string(),
                "{field}.{resource}: {status}"
            );
        }
    }
    let cpus = std::thread::available_parallelism().unwrap().get();
    assert_eq!(status["capacity"]["cpu"], cpus.to_string());
    for (kind, wanted) in [
        ("Ready", "True"),
        ("MemoryPressure", "False"),
        ("DiskPressure", "False"),
        ("PIDPressure", "False"),
    ] {
        assert_eq!(condition(&node, kind)["status"], wanted, "{kind}: {status}");
    }
    assert_eq!(
        status["addresses"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|a| a["type"] == "InternalIP")
            .count(),
        1
    );
    assert!(
        status["daemonEndpoints"]["kubeletEndpoint"]["Port"].is_u64(),
        "{status}"
    );
    let info = &status["nodeInfo"];
    for field in [
        "machineID",
        "bootID",
        "kernelVersion",
        "osImage",
        "operatingSystem",
        "architecture",
    ] {
        assert!(
            !info[field].as_str().unwrap_or_default().is_empty(),
            "{field}: {info}"
        );
    }
    assert!(
        info["kubeletVersion"].as_str().unwrap().starts_with("v1.36."),
        "{info}"
    );
    let scheme = if t.runtime == Runtime::Containerd {
        "containerd://"
    } else {
        "process://"
    };
    assert!(
        info["containerRuntimeVersion"]
            .as_str()
            .unwrap()
            .starts_with(scheme),
        "{info}"
    );
    let leases = t.cluster.kubectl().in_namespace("kube-node-lease");
    let renewed = |after: &str| {
        let lease = leases.get("lease", t.site().name())?;
        let time = lease["spec"]["renewTime"].as_str().unwrap_or_default().to_owned();
        if time.as_str() > after {
            Ok(time)
        } else {
            Err(time)
        }
    };
    let first = eventually(SOON, "the lease is held", || renewed(""));
    eventually(SOON, "the lease is renewed", || renewed(&first));
}

fn columns(t: &Test<'_>) {
    let table = eventually(SOON, "the Site is up to date", || {
        let table = t.kubectl.attempt(&["get", "sites", t.site().name()])?;
        if table.contains("<none>") || table.contains("<unknown>") {
            Err(table)
        } else {
            Ok(table)
        }
    });
    let header: Vec<_> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(header, ["NAME", "STATE", "LAST-SEEN", "PODS", "VERSION", "AGE"]);
    assert!(table.contains(env!("CARGO_PKG_VERSION")), "{table}");
    assert_eq!(
        t.kubectl
            .run(&["get", "site", t.site().name(), "--no-headers"])
            .split_whitespace()
            .next(),
        Some(t.site().name())
    );
}

fn goes(t: &Test<'_>) {
    let site = t.own_site();
    t.kubectl
        .run(&["delete", "site", site.name(), "--timeout", "30s"]);
    node_goes(t, &site);
}

fn node_goes(t: &Test<'_>, site: &Site) {
    eventually(SOON, "the Node is gone", || {
        match t.kubectl.attempt(&["get", "node", site.name()]) {
            Err(e) if e.contains("NotFound") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

fn undeclared(t: &Test<'_>) {
    let out = t.cluster.token_output(&t.name("nowhere"), &[]);
    assert!(!out.status.success());
    assert!(text(&out).contains(&t.name("nowhere")), "{}", text(&out));
}

/// Declares a Site and makes its machine, without enrolling it.
fn declared(t: &Test<'_>) -> Site {
    let site = Site::prepare(t.cluster, &t.name("site"), Runtime::Process);
    t.cluster.declare(site.name());
    site
}

/// Enrolment fails, says something about the token, and has no node made.
fn refused(t: &Test<'_>, site: &Site, token: &str) -> String {
    let out = site.join(token);
    let message = text(&out);
    assert!(!out.status.success(), "{message}");
    assert!(
        message.contains("token") && !message.contains("panicked"),
        "{message}"
    );
    let node = t.kubectl.output(&["get", "node", site.name()]);
    assert!(!node.status.success());
    message
}

fn malformed(t: &Test<'_>) {
    let site = declared(t);
    let token = t.cluster.token(site.name(), &[]);
    for wrong in [
        "",
        "nonsense",
        &token[..token.len() - 4],
        &format!("{token}x"),
        "a.b.c",
        &"x".repeat(10_000),
    ] {
        refused(t, &site, wrong);
    }
    // The failures have not used it up.
    let out = site.join(&token);
    assert!(out.status.success(), "{}", text(&out));
}

fn reused(t: &Test<'_>) {
    let site = declared(t);
    let token = t.cluster.token(site.name(), &[]);
    let first = join(&t.cluster.link().to_string(), &token, &site.dir().join("first"));
    assert!(first.status.success(), "{}", text(&first));
    refused(t, &site, &token);
}

fn expired(t: &Test<'_>) {
    let site = declared(t);
    let token = t.cluster.token(site.name(), &["--ttl", "1s"]);
    std::thread::sleep(Duration::from_millis(2500));
    refused(t, &site, &token);
}

fn other_site(t: &Test<'_>) {
    let site = declared(t);
    let other = t.name("other");
    t.cluster.declare(&other);
    let token: JoinToken = t.cluster.token(&other, &[]).parse().unwrap();
    // Written anew, so that the checksum is right: only the provider can tell.
    let stolen = JoinToken {
        site: site.name().parse().unwrap(),
        ..token.clone()
    };
    refused(t, &site, &stolen.to_string());
    let guessed = JoinToken {
        secret: "0".repeat(token.secret.len()),
        ..token
    };
    let out = join(
        &t.cluster.link().to_string(),
        &guessed.to_string(),
        &site.dir().join("guessed"),
    );
    assert!(
        !out.status.success() && text(&out).contains("token"),
        "{}",
        text(&out)
    );
    t.kubectl.run(&["delete", "site", &other]);
}

fn other_certificate(t: &Test<'_>) {
    // Enrolled as itself, this site claims to be the shared one.
    let site = declared(t);
    let out = site.join(&t.cluster.token(site.name(), &[]));
    assert!(out.status.success(), "{}", text(&out));
    let identity = site.data_dir().join("identity").join("identity.json");
    let honest = std::fs::read_to_string(&identity).unwrap();
    let forged = honest.replace(site.name(), t.site().name());
    assert_ne!(forged, honest);
    std::fs::write(&identity, forged).unwrap();
    let mut daemon = Daemon::start("skerry-edge", site.edge_command(), &site.dir().join("edge.log"));
    eventually(SOON, "the daemon says why it is refused", || {
        let log = daemon.log();
        // The provider's words: the daemon believes what its file says.
        if log.contains("the certificate is for site") && log.contains(site.name()) {
            Ok(())
        } else {
            Err(daemon.log_tail())
        }
    });
    assert!(
        daemon.check().is_ok() || daemon.wait(SOON) != 101,
        "{}",
        daemon.log_tail()
    );
    // Its victim has lost nothing.
    t.kubectl.apply(&t.site().pod(
        "pod",
        json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]}),
    ));
    skerry_tests::pods::ready(&t.kubectl, "pod");
}

fn anew(t: &Test<'_>) {
    let mut site = t.own_site();
    let old_token = t.cluster.token(site.name(), &[]);
    t.kubectl
        .run(&["delete", "site", site.name(), "--timeout", "30s"]);
    t.cluster.declare(site.name());
    let out = join(
        &t.cluster.link().to_string(),
        &old_token,
        &site.dir().join("old-token"),
    );
    let seen = text(&out);
    assert!(!out.status.success() && seen.contains("earlier Site"), "{seen}");
    // What was connected is told: of the deletion, or of both, by what the provider has seen first.
    eventually(SOON, "the daemon says why it is refused", || {
        let log = site.log_tail();
        let told = ["earlier Site", "declared anew", "the Site was deleted"];
        if told.iter().any(|words| log.contains(words)) {
            Ok(())
        } else {
            Err(log)
        }
    });
    site.kill_edge();
    site.start_edge();
    eventually(SOON, "the old certificate is refused", || {
        let log = site.log_tail();
        if log.contains("earlier Site") {
            Ok(())
        } else {
            Err(log)
        }
    });
    node_goes(t, &site);
    // A new token makes it a site of the cluster again, on the same disk.
    assert_eq!(site.stop_edge(), 0);
    let out = site.rejoin(&t.cluster.token(site.name(), &[]));
    assert!(out.status.success(), "{}", text(&out));
    site.start_edge();
    site.wait_ready();
}

fn no_provider_to_join(t: &Test<'_>) {
    let site = declared(t);
    let token = t.cluster.token(site.name(), &[]);
    let nowhere = format!("127.0.0.1:{}", free_port());
    let out = join(&nowhere, &token, &site.data_dir());
    assert!(!out.status.success());
    assert!(text(&out).contains(&nowhere), "{}", text(&out));
    for address in ["no-port", "no-such-host.invalid:7443"] {
        let out = join(address, &token, &site.data_dir());
        assert!(!out.status.success());
        assert!(
            text(&out).contains(address.split(':').next().unwrap()),
            "{}",
            text(&out)
        );
    }
    let out = site.join(&token);
    assert!(out.status.success(), "the token is still good: {}", text(&out));
}

fn no_provider_to_run(t: &Test<'_>) {
    let mut site = Site::enrol(t.cluster, &t.name("site"), Runtime::Process);
    site.line().set(skerry_tests::relay::Line::Closed);
    site.start_edge();
    eventually(SOON, "the daemon is alive", || {
        same(site.http("/healthz")?.0, 200)
    });
    throughout(Duration::from_secs(5), "it stays alive", || {
        same(site.http("/healthz")?.0, 200)
    });
    site.line().set(skerry_tests::relay::Line::Up);
    site.wait_ready();
}

fn not_enrolled(t: &Test<'_>) {
    let site = Site::prepare(t.cluster, &t.name("site"), Runtime::Process);
    let mut daemon = Daemon::start("skerry-edge", site.edge_command(), &site.dir().join("edge.log"));
    let code = daemon.wait(SOON);
    assert!(code != 0 && code != 101, "{code}: {}", daemon.log());
    assert!(daemon.log().contains("skerry-edge join"), "{}", daemon.log());
}
