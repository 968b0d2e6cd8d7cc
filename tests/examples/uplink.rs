//! How long heartbeats and critical statuses take on a full line, with and without what Skerry does about it. For
//! `hack/bench uplink [SECONDS]`, as root, in a network namespace of its own. Prints a Markdown table.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use skerry_tests::cluster::Cluster;
use skerry_tests::kubectl::Kubectl;
use skerry_tests::namespace::Namespace;
use skerry_tests::pods::ready;
use skerry_tests::site::{Runtime, Site};

const KILOBITS: u32 = 256;
/// One second.
const QUEUE_BYTES: u32 = 32_000;

/// One way to run it.
struct Variant {
    name: &'static str,
    /// Further settings of the daemon.
    flags: &'static [&'static str],
    /// The pod whose status is timed is critical.
    critical: bool,
    /// The line's routers heed marks.
    marks: bool,
    /// Logs and statuses fill the line.
    own: bool,
    /// What a container engine would pull, outside the link, fills it.
    foreign: bool,
}

const VARIANTS: [Variant; 5] = [
    Variant {
        name: "bare line",
        flags: &[],
        critical: true,
        marks: false,
        own: false,
        foreign: false,
    },
    Variant {
        name: "full of logs and statuses",
        flags: &[],
        critical: true,
        marks: false,
        own: true,
        foreign: false,
    },
    Variant {
        name: "the same, not paced, no critical pods",
        flags: &["--link-pacing", "off"],
        critical: false,
        marks: false,
        own: true,
        foreign: false,
    },
    Variant {
        name: "and of image data; routers heed marks",
        flags: &[],
        critical: true,
        marks: true,
        own: true,
        foreign: true,
    },
    Variant {
        name: "and of image data; routers heed nothing",
        flags: &[],
        critical: true,
        marks: false,
        own: true,
        foreign: true,
    },
];

fn main() {
    let seconds: u64 = std::env::args()
        .nth(1)
        .map_or(60, |n| n.parse().expect("a number of seconds"));
    let cluster = Cluster::start();
    let mut rows = Vec::new();
    for (number, variant) in VARIANTS.iter().enumerate() {
        eprintln!("== {}", variant.name);
        rows.push(measure(&cluster, number, variant, Duration::from_secs(seconds)));
    }
    println!(
        "| {KILOBITS} kbit/s each way, 1 s of queue, {seconds} s each | heartbeats | P50 ms | P99 ms | statuses | P50 ms | P99 ms | sessions lost |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        println!("{row}");
    }
}

fn measure(cluster: &Cluster, number: usize, variant: &Variant, time: Duration) -> String {
    let namespace = Namespace::create(cluster.kubectl(), &format!("uplink-{number}"));
    let kubectl = namespace.kubectl();
    let mut site = Site::enrol_on_uplink(cluster, &format!("uplink-{number}"), Runtime::Process);
    kubectl.run(&[
        "patch",
        "site",
        site.name(),
        "--type",
        "merge",
        "-p",
        r#"{"spec": {"class": "critical"}}"#,
    ]);
    let mut flags = vec!["--log", "info,skerry_edge::link=debug"];
    flags.extend(variant.flags);
    site.set_flags(&flags);
    site.start_edge();
    site.wait_ready();
    let dir = tempfile::tempdir().unwrap();
    pods(kubectl, &site, dir.path(), variant);
    let before = sessions(&site);

    if variant.marks {
        site.uplink().narrow_by_marks(KILOBITS, QUEUE_BYTES);
    } else {
        site.uplink().narrow(KILOBITS, QUEUE_BYTES);
    }
    let mut load: Vec<Child> = Vec::new();
    if variant.own {
        load.extend((0..3).map(|_| follower(kubectl)));
    }
    if variant.foreign {
        load.extend(pulls(&site));
    }
    // Until the queue has filled.
    std::thread::sleep(Duration::from_secs(5));
    let skipped = log(&site).len();
    let end = Instant::now() + time;
    let mut flip = false;
    while Instant::now() < end {
        flip = !flip;
        switch(dir.path(), "vital", flip);
        if variant.own {
            for noisy in 0..4 {
                switch(dir.path(), &format!("noisy-{noisy}"), flip);
            }
        }
        std::thread::sleep(Duration::from_secs(2));
    }
    let seen = log(&site)[skipped..].to_owned();
    for mut child in load {
        let _ = child.kill();
        let _ = child.wait();
    }
    let lost = sessions(&site) - before;
    let heartbeats = took(&seen, "a heartbeat was acknowledged");
    let statuses = if variant.critical {
        took(&seen, "a critical status was settled")
    } else {
        settled(&seen)
    };
    format!(
        "| {} | {} | {} | {} | {} | {} | {} | {lost} |",
        variant.name,
        heartbeats.len(),
        percentile(&heartbeats, 50),
        percentile(&heartbeats, 99),
        statuses.len(),
        percentile(&statuses, 50),
        percentile(&statuses, 99),
    )
}

/// A pod that talks without end, one whose status is timed, and four that change theirs all the time.
fn pods(kubectl: &Kubectl, site: &Site, dir: &Path, variant: &Variant) {
    let flood = "while :; do echo a line of a log that says the same thing over and over again, and never stops to; done";
    kubectl.apply(&site.pod(
        "chatty",
        json!({"containers": [{"command": ["sh", "-c", flood]}]}),
    ));
    let mut names = vec!["chatty".to_owned(), "vital".to_owned()];
    names.extend((0..4).map(|n| format!("noisy-{n}")));
    for name in &names[1..] {
        switch(dir, name, true);
        let spec = json!({
            "containers": [{
                "command": ["sh", "-c", "sleep 10000"],
                "readinessProbe": {
                    "exec": {"command": ["test", "-e", format!("/h/{name}")]}, "periodSeconds": 1, "failureThreshold": 1,
                },
                "volumeMounts": [{"name": "h", "mountPath": "/h"}],
            }],
            "volumes": [{"name": "h", "hostPath": {"path": dir}}],
        });
        let mut pod: Value = serde_json::from_str(&site.pod(name, spec)).unwrap();
        let class = if name == "vital" && variant.critical {
            "critical"
        } else {
            "standard"
        };
        pod["metadata"]["annotations"] = json!({"edge.skerry.dev/class": class});
        kubectl.apply(&pod.to_string());
    }
    for name in &names {
        ready(kubectl, name);
    }
}

fn switch(dir: &Path, name: &str, on: bool) {
    let file = dir.join(name);
    if on {
        std::fs::write(file, "").unwrap();
    } else {
        let _ = std::fs::remove_file(file);
    }
}

fn follower(kubectl: &Kubectl) -> Child {
    let mut command = kubectl.command(&["logs", "--follow", "--tail", "1", "chatty"]);
    quiet(&mut command).spawn().unwrap()
}

/// Two connections that carry as much as they can to the site, as pulls of images do, unmarked; and their acknowledgements.
fn pulls(site: &Site) -> Vec<Child> {
    let listener = TcpListener::bind((site.uplink().cloud(), 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || flood(client));
        }
    });
    (0..2)
        .map(|_| {
            let mut command = site.uplink().command("bash");
            command.args([
                "-c",
                &format!("exec cat </dev/tcp/{}/{}", address.ip(), address.port()),
            ]);
            quiet(&mut command).spawn().unwrap()
        })
        .collect()
}

fn flood(mut client: TcpStream) {
    let bytes = [0; 16 * 1024];
    let _ = client.set_read_timeout(Some(Duration::from_millis(1)));
    while client.write_all(&bytes).is_ok() {
        let _ = client.read(&mut [0; 1]);
    }
}

fn quiet(command: &mut Command) -> &mut Command {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
}

fn log(site: &Site) -> String {
    std::fs::read_to_string(site.dir().join("edge.log")).unwrap()
}

fn sessions(site: &Site) -> usize {
    log(site).matches("the link is up").count()
}

/// Milliseconds that lines with that message tell, sorted.
fn took(log: &str, message: &str) -> Vec<u64> {
    let lines = log.lines().filter(|line| line.contains(message));
    let micros = lines.filter_map(|line| {
        line.split("micros=")
            .nth(1)?
            .split(' ')
            .next()?
            .parse::<u64>()
            .ok()
    });
    let mut all: Vec<u64> = micros.map(|micros| micros / 1000).collect();
    all.sort_unstable();
    all
}

/// Milliseconds from "goes out" to "settled" of the reports on Bulk, sorted.
fn settled(log: &str) -> Vec<u64> {
    let event = |line: &str| {
        let seq: u64 = line.split("seq=").nth(1)?.split(' ').next()?.parse().ok()?;
        // 2026-11-25T04:36:32.416654Z
        let clock = line.split('T').nth(1)?.split('Z').next()?;
        let mut parts = clock.split(':');
        let mut next = || parts.next()?.parse::<f64>().ok();
        let seconds = next()? * 3600.0 + next()? * 60.0 + next()?;
        Some((seq, (seconds * 1000.0) as u64))
    };
    let mut out = BTreeMap::new();
    let mut all = Vec::new();
    for line in log.lines() {
        let Some((seq, at)) = event(line) else { continue };
        if line.contains("a report goes out") {
            out.insert(seq, at);
        } else if line.contains("a report was settled")
            && let Some(began) = out.remove(&seq)
        {
            all.push(at.saturating_sub(began));
        }
    }
    all.sort_unstable();
    all
}

/// By nearest rank; a dash when there are none.
fn percentile(sorted: &[u64], percent: usize) -> String {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).map_or("-".to_owned(), u64::to_string)
}
