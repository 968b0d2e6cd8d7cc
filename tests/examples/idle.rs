//! What an idle site with five pods sends and receives. For `hack/bench idle [MINUTES]`, as root, in a network namespace of its
//! own. Counts the payload of the site's TCP connections as its kernel does, and prints a Markdown table.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::Duration;

use serde_json::json;
use skerry_tests::cluster::Cluster;
use skerry_tests::namespace::Namespace;
use skerry_tests::pods::ready;
use skerry_tests::process::text;
use skerry_tests::site::{Runtime, Site};

const PODS: usize = 5;

fn main() {
    let minutes: u64 = std::env::args()
        .nth(1)
        .map_or(5, |n| n.parse().expect("a number of minutes"));
    let cluster = Cluster::start();
    let namespace = Namespace::create(cluster.kubectl(), "idle");
    println!(
        "| Class | heartbeats | minutes | bytes up | bytes down | a day, both ways | with the line's headers |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for class in ["standard", "best-effort", "critical"] {
        eprintln!("== {class}");
        let site = Site::start_on_uplink(&cluster, &format!("idle-{class}"), Runtime::Process);
        let patch = format!(r#"{{"spec": {{"class": "{class}"}}}}"#);
        namespace
            .kubectl()
            .run(&["patch", "site", site.name(), "--type", "merge", "-p", &patch]);
        for number in 0..PODS {
            let name = format!("{class}-{number}");
            let spec = json!({"containers": [{"command": ["sh", "-c", "sleep 100000"]}]});
            namespace.kubectl().apply(&site.pod(&name, spec));
        }
        for number in 0..PODS {
            ready(namespace.kubectl(), &format!("{class}-{number}"));
        }
        // What the starts have to tell is told.
        std::thread::sleep(Duration::from_secs(20));
        let (up, down) = payload(&site);
        let line = site.uplink().carried();
        let beats = heartbeats(&site);
        std::thread::sleep(Duration::from_secs(minutes * 60));
        let (up, down) = (payload(&site).0 - up, payload(&site).1 - down);
        let now = site.uplink().carried();
        let day = |bytes: u64| format!("{:.2} MB", (bytes * 24 * 60 / minutes) as f64 / 1e6);
        println!(
            "| {class} | {} | {minutes} | {up} | {down} | {} | {} |",
            heartbeats(&site) - beats,
            day(up + down),
            day(now.0 + now.1 - line.0 - line.1),
        );
    }
}

/// Bytes sent and received on the site's connections, without headers and repetitions.
fn payload(site: &Site) -> (u64, u64) {
    let out = site
        .uplink()
        .command("ss")
        .args([
            "-Htin",
            "state",
            "established",
            "dst",
            &site.uplink().cloud().to_string(),
        ])
        .output()
        .unwrap();
    let listing = text(&out);
    let sum = |name: &str| {
        let found = listing
            .split_whitespace()
            .filter_map(|word| word.strip_prefix(name)?.parse::<u64>().ok());
        found.sum()
    };
    (sum("bytes_acked:"), sum("bytes_received:"))
}

fn heartbeats(site: &Site) -> u64 {
    let page = site.http("/metrics").unwrap().1;
    let lines = page
        .lines()
        .filter(|line| line.starts_with("skerry_heartbeat_round_trip_seconds_count"));
    lines
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}
