//! The reconnection storm: enrols a fleet, cuts all of it at once, lets it come back, and prints what that took.
//!
//! `hack/fleet` runs it on a control plane and a provider of its own. Prints a table in Markdown.
#![allow(clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use skerry_tests::fleet::figures::{
    added, api_server_requests, cpu_time, percentile, provider_requests, pss_bytes,
};
use skerry_tests::fleet::{Fleet, Plan, client};

/// The longest that any step may take.
const LIMIT: Duration = Duration::from_secs(900);

struct Setting {
    plan: Plan,
    metrics: SocketAddr,
    processes: Vec<(String, u32)>,
    away: Away,
}

/// How long the line stays cut.
enum Away {
    /// Until every Node is said to be away.
    Noticed,
    /// For this long.
    For(Duration),
}

fn main() {
    let setting = read();
    skerry_telemetry::logging::init("error", skerry_telemetry::logging::LogFormat::Text).expect("logging");
    let runtime = tokio::runtime::Runtime::new().expect("threads");
    runtime.block_on(storm(setting));
}

/// Settings come from the environment, as `hack/fleet` gives them.
fn read() -> Setting {
    let text =
        |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run hack/fleet"));
    let number = |name: &str| text(name).parse().unwrap_or_else(|e| panic!("{name}: {e}"));
    let address = |name: &str| text(name).parse().unwrap_or_else(|e| panic!("{name}: {e}"));
    let processes = text("FLEET_PROCESSES");
    let processes = processes.split_whitespace().map(|pair| {
        let (name, pid) = pair.split_once('=').expect("name=pid");
        (name.to_owned(), pid.parse().expect("a pid"))
    });
    let processes = processes.chain([("simulator".to_owned(), std::process::id())]);
    let away = match text("FLEET_AWAY").as_str() {
        "noticed" => Away::Noticed,
        seconds => Away::For(Duration::from_secs(
            seconds.parse().expect("FLEET_AWAY is noticed, or seconds"),
        )),
    };
    Setting {
        plan: Plan {
            sites: number("FLEET_SITES"),
            pods: number("FLEET_PODS"),
            namespace: "fleet".to_owned(),
            prefix: "fleet".to_owned(),
            dir: PathBuf::from(text("FLEET_DIR")),
            link: address("FLEET_LINK"),
            admin: PathBuf::from(text("FLEET_ADMIN")),
            provider: PathBuf::from(text("FLEET_PROVIDER")),
            program: PathBuf::from(text("FLEET_PROGRAM")),
        },
        metrics: address("FLEET_METRICS"),
        processes: processes.collect(),
        away,
    }
}

/// Counters at one moment.
struct Moment {
    at: Instant,
    cpu: Vec<Duration>,
    provider: BTreeMap<Vec<String>, u64>,
    server: BTreeMap<Vec<String>, u64>,
}

impl Moment {
    async fn now(setting: &Setting, client: &kube::Client) -> Self {
        Self {
            at: Instant::now(),
            cpu: setting.processes.iter().map(|(_, pid)| cpu_time(*pid)).collect(),
            provider: provider_requests(setting.metrics),
            server: api_server_requests(client).await,
        }
    }
}

async fn storm(setting: Setting) {
    let client = client(&setting.plan.admin).await;
    let (sites, pods) = (setting.plan.sites, setting.plan.pods);
    let pid = |name: &str| {
        setting
            .processes
            .iter()
            .find(|(n, _)| n == name)
            .expect("a known process")
            .1
    };
    let provider = pid("provider");
    let empty = pss_bytes(provider);
    row(&[&format!("{sites} sites, {pods} pods each"), ""]);
    row(&["---", "---"]);

    let begun = Instant::now();
    let mut fleet = Fleet::enrol(setting.plan.clone()).await;
    row(&[
        "enrolled: declared, a token each, joined",
        &seconds(begun.elapsed()),
    ]);
    let own = pss_bytes(std::process::id());
    let begun = Instant::now();
    fleet.start(LIMIT).await;
    row(&[
        "started one after another, all Nodes Ready",
        &seconds(begun.elapsed()),
    ]);
    let begun = Instant::now();
    fleet.fill(LIMIT).await;
    fleet.quiet(LIMIT).await;
    row(&["all pods created and Running", &seconds(begun.elapsed())]);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let full = pss_bytes(provider);
    row(&[
        "provider's PSS, no site and all",
        &format!("{}, {}", mebibytes(empty), mebibytes(full)),
    ]);
    row(&[
        "provider's memory for a site",
        &kibibytes(full.saturating_sub(empty) / sites as u64),
    ]);
    row(&[
        "simulator's memory for a site",
        &kibibytes(pss_bytes(std::process::id()).saturating_sub(own) / sites as u64),
    ]);

    let calm = Moment::now(&setting, &client).await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    report(
        "30 s of calm",
        &setting,
        &calm,
        &Moment::now(&setting, &client).await,
    );

    let cut = Moment::now(&setting, &client).await;
    let closed = fleet.cut();
    row(&["connections cut", &closed.to_string()]);
    match setting.away {
        Away::Noticed => fleet.away(LIMIT).await,
        Away::For(time) => tokio::time::sleep(time).await,
    }
    // What the outage itself costs ends here.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let back = Moment::now(&setting, &client).await;
    report("the outage", &setting, &cut, &back);

    let restored = Instant::now();
    fleet.restore();
    let watch = async {
        let mut online = None;
        loop {
            if online.is_none() && fleet.online() == sites {
                online = Some(restored.elapsed());
                return online;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let (online, ()) = tokio::join!(watch, fleet.ready(LIMIT));
    let ready = restored.elapsed();
    fleet.quiet(LIMIT).await;
    let quiet = restored.elapsed();
    row(&[
        "line back to all sessions up",
        &seconds(online.unwrap_or_default()),
    ]);
    let mut times: Vec<Duration> = fleet
        .nodes()
        .values()
        .map(|(_, at)| at.saturating_duration_since(restored))
        .collect();
    let (half, most) = (percentile(&mut times, 50), percentile(&mut times, 99));
    row(&[
        "line back to Node Ready, P50 and P99",
        &format!("{}, {}", seconds(half), seconds(most)),
    ]);
    row(&[
        "**line back to all Nodes Ready**",
        &format!("**{}**", seconds(ready)),
    ]);
    row(&["line back to all synced, every outbox empty", &seconds(quiet)]);
    tokio::time::sleep(Duration::from_secs(5)).await;
    report(
        "the storm",
        &setting,
        &back,
        &Moment::now(&setting, &client).await,
    );
    row(&["provider's PSS after it", &mebibytes(pss_bytes(provider))]);
    for (count, why) in fleet.complaints().into_iter().take(5) {
        row(&[&format!("last complaint: {why}"), &count.to_string()]);
    }
    println!("{}", shed(setting.metrics));
}

/// What the provider counted of connections that it put off.
fn shed(metrics: SocketAddr) -> String {
    let (_, text) = skerry_tests::cluster::http_get(metrics, "/metrics").expect("the provider's metrics");
    let lines = text.lines().filter(|line| line.starts_with("skerry_link_"));
    lines
        .map(|line| format!("| {} |\n", line.replace(' ', " | ")))
        .collect()
}

fn report(what: &str, setting: &Setting, before: &Moment, after: &Moment) {
    let took = after.at - before.at;
    let cpu: Vec<String> = setting
        .processes
        .iter()
        .zip(before.cpu.iter().zip(&after.cpu))
        .map(|((name, _), (before, after))| format!("{name} {}", seconds(*after - *before)))
        .collect();
    row(&[
        &format!("{what} ({}): processor time", seconds(took)),
        &cpu.join(", "),
    ]);
    #[allow(clippy::cast_precision_loss)]
    let each = |count: u64| count as f64 / setting.plan.sites as f64;
    let own = added(&before.provider, &after.provider);
    let total: u64 = own.iter().map(|(count, _)| count).sum();
    row(&[
        &format!("{what}: the provider's API requests, all and per site"),
        &format!("{total} ({}), {:.2}", list(&own, 6), each(total)),
    ]);
    let all = added(&before.server, &after.server);
    let total: u64 = all.iter().map(|(count, _)| count).sum();
    row(&[
        &format!("{what}: all that the API server was asked"),
        &format!("{total} ({})", list(&all, 9)),
    ]);
}

fn list(counts: &[(u64, String)], most: usize) -> String {
    let some: Vec<String> = counts
        .iter()
        .take(most)
        .map(|(count, what)| format!("{count} {what}"))
        .collect();
    some.join(", ")
}

fn row(cells: &[&str]) {
    println!("| {} |", cells.join(" | "));
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}

fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes / 1024 / 1024)
}

fn kibibytes(bytes: u64) -> String {
    format!("{} KiB", bytes / 1024)
}
