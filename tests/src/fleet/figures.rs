//! What processes use, and what they are asked.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use crate::cluster::http_get;

/// Proportional set size of a process, bytes: its own memory, and its share of what it shares.
///
/// # Panics
/// When there is no such process.
pub fn pss_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("the process runs");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .expect("a line Pss");
    let number = line.trim().trim_end_matches(" kB").trim();
    number.parse::<u64>().expect("a number") * 1024
}

/// Processor time of a process so far, in user and kernel mode.
///
/// # Panics
/// When there is no such process.
pub fn cpu_time(pid: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process runs");
    let (_, fields) = text.rsplit_once(')').expect("a name in brackets");
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<u64>().expect("a number");
    // A tick is 10 ms on every Linux that this runs on (`getconf CLK_TCK`).
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}

/// A sum over the series of a metric, by the values of some of its labels.
pub fn sum_by(exposition: &str, metric: &str, labels: &[&str]) -> BTreeMap<Vec<String>, u64> {
    let mut sums = BTreeMap::new();
    for line in exposition.lines() {
        let Some(rest) = line.strip_prefix(metric).and_then(|rest| rest.strip_prefix('{')) else {
            continue;
        };
        let Some((set, value)) = rest.rsplit_once("} ") else {
            continue;
        };
        let key = labels
            .iter()
            .map(|label| value_of(set, label).to_owned())
            .collect();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let value = value
            .split(' ')
            .next()
            .and_then(|v| v.parse::<f64>().ok())
            .unwrap_or(0.0) as u64;
        *sums.entry(key).or_default() += value;
    }
    sums
}

fn value_of<'t>(set: &'t str, label: &str) -> &'t str {
    set.split("\",")
        .find_map(|pair| pair.strip_prefix(label)?.strip_prefix("=\""))
        .map_or("", |value| value.trim_end_matches('"'))
}

/// What the provider has asked of the API server, by method, watches among the GETs.
///
/// # Panics
/// When its metrics cannot be read.
pub fn provider_requests(metrics: SocketAddr) -> BTreeMap<Vec<String>, u64> {
    let (_, text) = http_get(metrics, "/metrics").expect("the provider's metrics");
    sum_by(&text, "kubeedge_api_request_duration_seconds_count", &["method"])
}

/// What the API server was asked, by verb and resource.
///
/// # Panics
/// When its metrics cannot be read.
pub async fn api_server_requests(client: &kube::Client) -> BTreeMap<Vec<String>, u64> {
    let request = http::Request::get("/metrics")
        .body(Vec::new())
        .expect("a request");
    let text = client
        .request_text(request)
        .await
        .expect("the API server's metrics");
    sum_by(
        &text,
        "apiserver_request_total",
        &["verb", "resource", "subresource"],
    )
}

/// What was added between two counts, without what stayed the same, the largest first.
pub fn added(before: &BTreeMap<Vec<String>, u64>, after: &BTreeMap<Vec<String>, u64>) -> Vec<(u64, String)> {
    let mut added: Vec<_> = after
        .iter()
        .map(|(key, count)| {
            (
                count - before.get(key).copied().unwrap_or(0),
                key.join(" ").trim().to_owned(),
            )
        })
        .filter(|(count, _)| *count > 0)
        .collect();
    added.sort_unstable_by(|a, b| b.cmp(a));
    added
}

/// The value below which `percent` of the times are, by nearest rank.
pub fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    let rank = (times.len() * percent).div_ceil(100).max(1);
    times.get(rank - 1).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_by_the_labels_that_were_asked_for() {
        let text = "# TYPE m counter\nm{a=\"x\",b=\"1\"} 2\nm{a=\"x\",b=\"2\"} 3\nm{a=\"y\",b=\"1\"} 1e1\nmore{a=\"x\"} 9\n";
        let sums = sum_by(text, "m", &["a"]);
        assert_eq!(
            sums,
            [(vec!["x".to_owned()], 5), (vec!["y".to_owned()], 10)].into()
        );
        assert_eq!(
            added(&[(vec!["x".to_owned()], 5)].into(), &sums),
            [(10, "y".to_owned())]
        );
    }

    #[test]
    fn a_percentile_is_the_nearest_rank() {
        let mut times: Vec<_> = (1..=10).rev().map(Duration::from_secs).collect();
        assert_eq!(percentile(&mut times, 50), Duration::from_secs(5));
        assert_eq!(percentile(&mut times, 99), Duration::from_secs(10));
    }
}
