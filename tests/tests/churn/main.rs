//! The long churn: `hack/churn`, or `cargo test -p skerry-tests --test churn -- [--minutes N] [--seed N] [--runtime R]`.
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use skerry_tests::churn::Churn;
use skerry_tests::cluster::Cluster;
use skerry_tests::namespace::Namespace;
use skerry_tests::site::{Runtime, Site};

const USAGE: &str =
    "churn [--minutes N (30)] [--seed N (random)] [--runtime containerd|process (containerd)]";

fn main() -> ExitCode {
    let (mut minutes, mut runtime) = (30.0, Runtime::Containerd);
    let mut seed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let mut args = std::env::args().skip(1);
    while let Some(flag) = args.next() {
        let value = args.next().unwrap_or_default();
        let understood = match flag.as_str() {
            "--minutes" => value.parse().map(|n: f32| minutes = n).is_ok(),
            "--seed" => value.parse().map(|n| seed = n).is_ok(),
            "--runtime" => match value.as_str() {
                "containerd" => true,
                "process" => {
                    runtime = Runtime::Process;
                    true
                }
                _ => false,
            },
            _ => false,
        };
        if !understood {
            eprintln!("{flag} {value} is not understood\n{USAGE}");
            return ExitCode::from(2);
        }
    }
    let churn = Churn {
        seed,
        period: Duration::from_secs_f32(minutes * 60.0),
    };
    println!("churn: seed {seed}, {minutes} minutes, runtime {runtime}");
    let mut cluster = Cluster::start();
    let kubectl = cluster.kubectl().clone();
    let namespace = Namespace::create(&kubectl, "churn");
    let mut site = Site::start(&cluster, "churn", runtime);
    let outcome = churn.run(&mut site, namespace.kubectl(), Some(&mut cluster));
    let log = cluster.dir().join("churn.log");
    if std::fs::write(&log, outcome.log.join("\n")).is_ok() {
        println!("what was done: {}", log.display());
    }
    print!("{outcome}");
    println!("seed {seed}: {} promises broken", outcome.broken.len());
    if outcome.broken.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
