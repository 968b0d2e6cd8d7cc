//! The two programs as programs: flags, configuration, health, metrics, signals.

use std::process::{Command, Output};

use skerry_tests::cluster::http_get;
use skerry_tests::process::{text, workspace_binary};
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::once("both programs explain themselves", help),
        Scenario::once("an unknown flag or a bad value ends with exit code 2", flags),
        Scenario::once(
            "an unknown configuration key ends with exit code 2 and is named",
            config_keys,
        ),
        Scenario::once("the edge daemon serves health and metrics", edge_metrics),
        Scenario::once("the provider serves health and metrics", provider_metrics),
        Scenario::once("the edge daemon ends with 0 on SIGTERM", sigterm),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const PROGRAMS: [&str; 2] = ["skerry-edge", "skerry-provider"];

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(workspace_binary(program))
        .args(args)
        .output()
        .expect("the program runs")
}

fn help(_: &Test<'_>) {
    for program in PROGRAMS {
        let out = run(program, &["--help"]);
        assert!(out.status.success(), "{}", text(&out));
        assert!(text(&out).contains("run"), "{}", text(&out));
        let out = run(program, &["run", "--help"]);
        assert!(
            text(&out).contains("--config") && text(&out).contains("SKERRY_"),
            "{}",
            text(&out)
        );
        let out = run(program, &["--version"]);
        assert!(text(&out).contains(env!("CARGO_PKG_VERSION")), "{}", text(&out));
    }
}

fn flags(_: &Test<'_>) {
    for program in PROGRAMS {
        for args in [
            ["run", "--no-such-flag", "1"],
            ["run", "--metrics-listen", "nonsense"],
        ] {
            let out = run(program, &args);
            assert_eq!(out.status.code(), Some(2), "{program} {args:?}: {}", text(&out));
            assert!(text(&out).contains(args[1]), "{program}: {}", text(&out));
        }
    }
}

fn config_keys(_: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    let path = file.to_str().unwrap();
    for program in PROGRAMS {
        for (content, word) in [("no-such-key = 1\n", "no-such-key"), ("this is not TOML", "TOML")] {
            std::fs::write(&file, content).unwrap();
            let out = run(program, &["run", "--config", path]);
            assert_eq!(out.status.code(), Some(2), "{program}: {}", text(&out));
            assert!(
                text(&out).contains(path) && text(&out).contains(word),
                "{program}: {}",
                text(&out)
            );
        }
        let out = run(program, &["run", "--config", "/no/such/file.toml"]);
        assert_eq!(out.status.code(), Some(2), "{program}: {}", text(&out));
        assert!(
            text(&out).contains("/no/such/file.toml"),
            "{program}: {}",
            text(&out)
        );
    }
}

fn names(metrics: &str, wanted: &[&str]) -> Result<(), String> {
    let missing: Vec<_> = wanted.iter().filter(|name| !metrics.contains(**name)).collect();
    if missing.is_empty() {
        Ok(())
    } else {
        Err(format!("{missing:?} are missing in:\n{metrics}"))
    }
}

fn edge_metrics(t: &Test<'_>) {
    assert_eq!(t.site().http("/healthz").unwrap().0, 200);
    eventually(SOON, "the site is ready", || {
        same(t.site().http("/readyz")?.0, 200)
    });
    let metrics = t.site().http("/metrics").unwrap().1;
    names(
        &metrics,
        &["kubeedge_edge_node_status", "kubeedge_certificate_expiry_days"],
    )
    .unwrap();
}

fn provider_metrics(t: &Test<'_>) {
    t.site();
    let get = |path| http_get(t.cluster.metrics(), path);
    assert_eq!(get("/healthz").unwrap().0, 200);
    assert_eq!(get("/readyz").unwrap().0, 200);
    let bucket = "kubeedge_api_request_duration_seconds_bucket{";
    let metrics = get("/metrics").unwrap().1;
    names(
        &metrics,
        &[
            "kubeedge_edge_node_status",
            "kubeedge_certificate_expiry_days",
            bucket,
        ],
    )
    .unwrap();
    assert!(
        metrics
            .lines()
            .any(|l| l.starts_with(bucket) && l.contains("le=\"0.2\"")),
        "{metrics}"
    );
}

fn sigterm(t: &Test<'_>) {
    let mut site = t.own_site();
    assert_eq!(site.stop_edge(), 0);
}
