//! What an idle site with five pods sends and receives. For `hack/bench idle [MINUTES]`, as root, in a network namespace of its
//! own. Counts the payload of the site's TCP connections as its kernel does, and prints a Markdown table.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use serde_json::{Value, json};
use skerry_tests::cluster::Cluster;
use skerry_tests::kubectl::Kubectl;
use skerry_tests::namespace::Namespace;
use skerry_tests::pods::ready;
use skerry_tests::process::text;
use skerry_tests::site::{Runtime, Site};

const PODS: usize = 5;
/// A token of an hour is renewed after 80 % of it: so often a day.
const RENEWALS_A_DAY: f64 = 24.0 / 0.8;

/// A site under measurement.
struct Measured {
    name: &'static str,
    site: Site,
    before: Counts,
}

#[derive(Clone, Copy)]
struct Counts {
    up: u64,
    down: u64,
    line: u64,
    heartbeats: u64,
}

fn main() {
    let minutes: u64 = std::env::args()
        .nth(1)
        .map_or(10, |n| n.parse().expect("a number of minutes"));
    let cluster = Cluster::start();
    let namespace = Namespace::create(cluster.kubectl(), "idle");
    let kubectl = namespace.kubectl();
    let mut sites = Vec::new();
    // Tokens of ten minutes are renewed within the measurement, those of an hour are not.
    for (name, class, token_seconds) in [
        ("standard", "standard", 3607),
        ("standard-tokens", "standard", 600),
        ("best-effort", "best-effort", 3607),
        ("critical", "critical", 3607),
    ] {
        let site = start(&cluster, kubectl, name, class, token_seconds);
        sites.push((name, site));
    }
    // What the starts have to tell is told.
    std::thread::sleep(Duration::from_secs(20));
    let sites: Vec<Measured> = sites
        .into_iter()
        .map(|(name, site)| Measured {
            before: count(&site),
            name,
            site,
        })
        .collect();
    std::thread::sleep(Duration::from_secs(minutes * 60));

    let mut payloads = Vec::new();
    println!(
        "| Site | minutes | heartbeats | bytes up | bytes down | payload a day, both ways | with the line's headers |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for Measured { name, site, before } in &sites {
        let now = count(site);
        let (up, down) = (now.up - before.up, now.down - before.down);
        payloads.push(up + down);
        let day = |bytes: u64| format!("{:.2} MB", (bytes * 24 * 60 / minutes) as f64 / 1e6);
        println!(
            "| {name} | {minutes} | {} | {up} | {down} | {} | {} |",
            now.heartbeats - before.heartbeats,
            day(up + down),
            day(now.line - before.line),
        );
    }
    let renewals = payloads[1].saturating_sub(payloads[0]);
    let a_day = renewals as f64 * RENEWALS_A_DAY / 1e6;
    println!(
        "\nRenewal of {PODS} tokens: {renewals} bytes; with tokens of an hour {a_day:.2} MB a day, to be added."
    );
}

fn start(cluster: &Cluster, kubectl: &Kubectl, name: &str, class: &str, token_seconds: u64) -> Site {
    let site = Site::start_on_uplink(cluster, &format!("idle-{name}"), Runtime::Process);
    let patch = format!(r#"{{"spec": {{"class": "{class}"}}}}"#);
    kubectl.run(&["patch", "site", site.name(), "--type", "merge", "-p", &patch]);
    for number in 0..PODS {
        let spec = json!({
            "automountServiceAccountToken": false,
            "containers": [{
                "command": ["sh", "-c", "sleep 100000"],
                "volumeMounts": [{"name": "t", "mountPath": "/t"}],
            }],
            "volumes": [{"name": "t", "projected": {"sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": token_seconds}},
                {"configMap": {"name": "kube-root-ca.crt"}},
            ]}}],
        });
        let mut pod: Value = serde_json::from_str(&site.pod(&format!("{name}-{number}"), spec)).unwrap();
        pod["metadata"]["labels"] = json!({"idle": name});
        kubectl.apply(&pod.to_string());
    }
    for number in 0..PODS {
        ready(kubectl, &format!("{name}-{number}"));
    }
    site
}

fn count(site: &Site) -> Counts {
    let (up, down) = payload(site);
    let line = site.uplink().carried();
    Counts {
        up,
        down,
        line: line.0 + line.1,
        heartbeats: heartbeats(site),
    }
}

/// Bytes sent and received on the site's connections, without headers and repetitions.
fn payload(site: &Site) -> (u64, u64) {
    let cloud = site.uplink().cloud().to_string();
    let out = site
        .uplink()
        .command("ss")
        .args(["-Htin", "state", "established", "dst", &cloud])
        .output()
        .unwrap();
    let listing = text(&out);
    let sum = |name: &str| {
        let words = listing.split_whitespace();
        words
            .filter_map(|word| word.strip_prefix(name)?.parse::<u64>().ok())
            .sum()
    };
    (sum("bytes_acked:"), sum("bytes_received:"))
}

fn heartbeats(site: &Site) -> u64 {
    let page = site.http("/metrics").unwrap().1;
    let counts = page
        .lines()
        .filter(|line| line.starts_with("skerry_heartbeat_round_trip_seconds_count"));
    counts
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}
