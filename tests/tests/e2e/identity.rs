//! Certificates and clocks that went wrong while nobody looked: the site puts itself right.

use std::time::Duration;

use serde_json::json;
use skerry_tests::certificate::{expire, file, record};
use skerry_tests::kubectl::condition;
use skerry_tests::pods::{event, identity, ready};
use skerry_tests::process::{Daemon, text};
use skerry_tests::relay::Line;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{Runtime, Site};
use skerry_tests::wait::{SOON, eventually, same};

const DAY: Duration = Duration::from_secs(86_400);

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::once(
            "a certificate that expired while the site was away is renewed by proof of its key, once",
            expired_offline,
        ),
        Scenario::once(
            "a certificate that expired too long ago is refused with the remedy, which helps",
            expired_too_long,
        ),
        Scenario::once(
            "a site whose clock is dead or years ahead comes back by itself",
            wrong_clock,
        ),
        Scenario::once(
            "a clock that jumps by hours while the site runs disturbs nothing, and the Node says so",
            jumping_clock,
        ),
        Scenario::once(
            "a pod whose token expired while the line was cut starts all the same after a power cut",
            expired_token,
        ),
        Scenario::once(
            "the CA is replaced while a site is connected and another is away, and neither is lost",
            replaced_ca,
        ),
        Scenario::once(
            "a Site that wants approval takes only the machine whose key was approved",
            approved,
        ),
        Scenario::once(
            "a revoked certificate loses its session at once, and a new token lets the site in again",
            revoked,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn sleeper(t: &Test<'_>, site: &Site) -> (String, String, u64) {
    let spec = json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]});
    t.kubectl.apply(&site.pod("pod", spec));
    identity(&ready(&t.kubectl, "pod"))
}

fn says(site: &Site, words: &str) {
    eventually(SOON, &format!("the daemon says {words:?}"), || {
        let log = site.log();
        if log.contains(words) {
            Ok(())
        } else {
            Err(site.log_tail())
        }
    });
}

fn expired_offline(t: &Test<'_>) {
    let mut site = t.own_site();
    let before = sleeper(t, &site);
    let serial = record(&t.kubectl, &site).unwrap()["serial"].clone();
    site.line().set(Line::Closed);
    assert_eq!(site.stop_edge(), 0);
    expire(&t.kubectl, &site, 30 * DAY);
    let old = std::fs::read_to_string(file(&site)).unwrap();
    site.start_edge();
    says(&site, "the link is down");

    site.line().set(Line::Up);
    let renewed = eventually(SOON, "the certificate is renewed and in use", || {
        let record = record(&t.kubectl, &site)?;
        if record["serial"] != serial && record["previousSerial"].is_null() {
            Ok(record)
        } else {
            Err(format!("{record}\n{}", site.log_tail()))
        }
    });
    let told = event(
        &t.kubectl.in_namespace("default"),
        site.name(),
        "CertificateRenewedLate",
    );
    assert!(told.contains(renewed["serial"].as_str().unwrap()), "{told}");
    site.wait_ready();
    assert_eq!(identity(&ready(&t.kubectl, "pod")), before);
    let new = std::fs::read_to_string(file(&site)).unwrap();
    let key = |pem: &str| pem[..pem.find("-----BEGIN CERTIFICATE").unwrap()].to_owned();
    assert_ne!(key(&old), key(&new), "the key is the old one");

    // Who has a copy of the old disk comes too late.
    assert_eq!(site.stop_edge(), 0);
    std::fs::write(file(&site), &old).unwrap();
    site.start_edge();
    says(&site, "old copy");
    event(
        &t.kubectl.in_namespace("default"),
        site.name(),
        "CertificateReused",
    );
    assert_eq!(record(&t.kubectl, &site).unwrap()["serial"], renewed["serial"]);
    assert_eq!(site.stop_edge(), 0);
    std::fs::write(file(&site), &new).unwrap();
    site.start_edge();
    says(&site, "the link is up");
}

fn expired_too_long(t: &Test<'_>) {
    let mut site = t.own_site();
    let before = sleeper(t, &site);
    assert_eq!(site.stop_edge(), 0);
    expire(&t.kubectl, &site, 181 * DAY);
    site.start_edge();
    says(&site, "skerry-edge join --force");
    event(
        &t.kubectl.in_namespace("default"),
        site.name(),
        "CertificateExpired",
    );
    assert_eq!(site.stop_edge(), 0);
    let out = site.rejoin(&t.cluster.token(site.name(), &[]));
    assert!(out.status.success(), "{}", text(&out));
    site.start_edge();
    says(&site, "the link is up");
    site.wait_ready();
    assert_eq!(identity(&ready(&t.kubectl, "pod")), before);
}

fn wrong_clock(t: &Test<'_>) {
    let mut site = Site::enrol(t.cluster, &t.name("site"), Runtime::Process);
    site.set_clock(0);
    site.start_edge();
    site.wait_ready();
    let before = sleeper(t, &site);
    let year = 365 * 86_400;
    // 1970, and longer ahead than any certificate lives.
    let now = i64::try_from(
        std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs(),
    )
    .unwrap();
    for offset in [120 - now, 3 * year] {
        let serial = record(&t.kubectl, &site).unwrap()["serial"].clone();
        assert_eq!(site.stop_edge(), 0);
        site.set_clock(offset);
        site.start_edge();
        says(&site, "the CA has proven the time");
        says(&site, "the link is up");
        eventually(SOON, "the new certificate is in use", || {
            let record = record(&t.kubectl, &site)?;
            if record["serial"] != serial && record["previousSerial"].is_null() {
                Ok(())
            } else {
                Err(record.to_string())
            }
        });
        site.wait_ready();
        assert_eq!(identity(&ready(&t.kubectl, "pod")), before, "{offset}");
    }
    same(site.http("/readyz").unwrap().0, 200).unwrap();
}

/// A pod whose deadline is an hour away, one that is probed every second and counts how often, and one in back-off.
fn jumping_clock(t: &Test<'_>) {
    let mut site = Site::enrol(t.cluster, &t.name("site"), Runtime::Process);
    site.set_clock(0);
    site.start_edge();
    site.wait_ready();
    let dir = tempfile::tempdir().unwrap();
    let hour = json!({
        "activeDeadlineSeconds": 3_600,
        "containers": [{"command": ["sh", "-c", "sleep 1000"]}],
    });
    t.kubectl.apply(&site.pod("hour", hour));
    let probed = json!({
        "containers": [{
            "command": ["sh", "-c", "sleep 1000"],
            "livenessProbe": {"exec": {"command": ["sh", "-c", "echo x >> /h/probes"]}, "periodSeconds": 1},
            "volumeMounts": [{"name": "h", "mountPath": "/h"}],
        }],
        "volumes": [{"name": "h", "hostPath": {"path": dir.path()}}],
    });
    t.kubectl.apply(&site.pod("probed", probed));
    let crashing = json!({
        "containers": [{
            "command": ["sh", "-c", "echo x >> /h/starts; exit 1"],
            "volumeMounts": [{"name": "h", "mountPath": "/h"}],
        }],
        "volumes": [{"name": "h", "hostPath": {"path": dir.path()}}],
    });
    t.kubectl.apply(&site.pod("crashing", crashing));
    let before = ["hour", "probed"].map(|pod| identity(&ready(&t.kubectl, pod)));
    let session = count(&site.log(), "the link is up");
    let lines = |file: &str| {
        count(
            &std::fs::read_to_string(dir.path().join(file)).unwrap_or_default(),
            "x",
        )
    };

    for (offset, reason) in [
        (5 * 3_600, "ClockAhead"),
        (-5 * 3_600, "ClockBehind"),
        (0, "ClockInStep"),
    ] {
        let (probes, starts, begun) = (lines("probes"), lines("starts"), std::time::Instant::now());
        site.set_clock(offset);
        eventually(SOON, &format!("the Node says {reason}"), || {
            let node = t.kubectl.get("node", site.name())?;
            same(condition(&node, "ClockSkew")["reason"].as_str(), Some(reason))
        });
        // The back-off goes on: neither is it cut short, nor does it wait for the clock to come back.
        eventually(
            Duration::from_secs(120),
            "the crashing container is started again",
            || {
                if lines("starts") > starts {
                    Ok(())
                } else {
                    Err(format!("{starts} starts"))
                }
            },
        );
        let passed = begun.elapsed().as_secs();
        let probes = (lines("probes") - probes) as u64;
        assert!(
            (passed / 3..=passed + 3).contains(&probes),
            "{probes} probes in {passed} s at {offset}"
        );
        assert!(
            lines("starts") - starts <= 2,
            "{} starts at {offset}",
            lines("starts") - starts
        );
        for (pod, was) in ["hour", "probed"].iter().zip(&before) {
            assert_eq!(&identity(&ready(&t.kubectl, pod)), was, "{offset}");
        }
    }
    let metrics = site.http("/metrics").unwrap().1;
    let skew = metrics
        .lines()
        .find_map(|line| line.strip_prefix("skerry_clock_skew_seconds "))
        .unwrap();
    assert!(skew.parse::<f64>().unwrap().abs() < 30.0, "{skew}");
    assert_eq!(count(&site.log(), "the link is up"), session, "the link was lost");
}

fn expired_token(t: &Test<'_>) {
    let mut site = Site::enrol(t.cluster, &t.name("site"), Runtime::Process);
    site.set_clock(0);
    site.start_edge();
    site.wait_ready();
    let dir = tempfile::tempdir().unwrap();
    let spec = json!({
        "containers": [{
            "command": ["sh", "-c", "wc -c < /t/token >> /h/starts; sleep 1000"],
            "volumeMounts": [{"name": "t", "mountPath": "/t"}, {"name": "h", "mountPath": "/h"}],
        }],
        "volumes": [
            {"name": "h", "hostPath": {"path": dir.path()}},
            {"name": "t", "projected": {"sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}},
            ]}},
        ],
    });
    t.kubectl.apply(&site.pod("pod", spec));
    let (uid, ..) = identity(&ready(&t.kubectl, "pod"));
    site.line().set(Line::Closed);
    site.power_cut();
    // Twelve lives of the token.
    site.set_clock(7_200);
    site.start_edge();
    let starts = skerry_tests::pods::lines(&dir.path().join("starts"), 2, SOON);
    assert_eq!(starts[0], starts[1]);
    assert_ne!(starts[1].trim(), "0");
    site.set_clock(0);
    site.line().set(Line::Up);
    site.wait_ready();
    eventually(SOON, "the pod is ready again", || {
        let pod = t.kubectl.get("pod", "pod")?;
        same(identity(&pod).2, 1)?;
        same(condition(&pod, "Ready")["status"].as_str(), Some("True"))
    });
    assert_eq!(identity(&t.kubectl.get("pod", "pod").unwrap()).0, uid);
}

/// The CA is everybody's: other scenarios go on meanwhile, and must not notice.
fn replaced_ca(t: &Test<'_>) {
    let present = t.own_site();
    let before = sleeper(t, &present);
    let sessions = count(&present.log(), "the link is up");
    let mut away = Site::start(t.cluster, &t.name("away"), Runtime::Process);
    assert_eq!(away.stop_edge(), 0);
    let ca = |args: &[&str]| t.cluster.provider_command(&[&["ca"], args].concat());
    let done = |args: &[&str]| {
        let out = ca(args);
        assert!(out.status.success(), "{args:?}: {}", text(&out));
        text(&out)
    };
    let refused = |args: &[&str], why: &str| {
        let out = ca(args);
        assert!(
            !out.status.success() && text(&out).contains(why),
            "{}",
            text(&out)
        );
    };
    refused(&["retire"], "no old CA");
    done(&["rotate"]);
    refused(&["rotate"], "already");
    let needs = |site: &Site| done(&["status"]).lines().any(|line| line.trim() == site.name());
    eventually(
        Duration::from_secs(120),
        "the connected site has moved to the new CA",
        || {
            if needs(&present) {
                Err(done(&["status"]))
            } else {
                Ok(())
            }
        },
    );
    assert_eq!(
        count(&present.log(), "the link is up"),
        sessions,
        "{}",
        present.log_tail()
    );
    assert_eq!(identity(&ready(&t.kubectl, "pod")), before);
    assert!(needs(&away));
    refused(&["retire"], "still need the old CA");
    away.start_edge();
    eventually(Duration::from_secs(120), "the other site has moved, too", || {
        if needs(&away) {
            Err(done(&["status"]))
        } else {
            Ok(())
        }
    });
}

fn approved(t: &Test<'_>) {
    let site = Site::prepare(t.cluster, &t.name("site"), Runtime::Process);
    t.kubectl.apply(
        &json!({
            "apiVersion": "edge.skerry.dev/v1alpha1", "kind": "Site", "metadata": {"name": site.name()},
            "spec": {"enrolment": {"approval": "Manual"}},
        })
        .to_string(),
    );
    let approve = |key: &str| t.cluster.provider_command(&["approve", site.name(), key]);
    assert!(text(&approve("0123456789")).contains("no machine waits"));
    let token = t.cluster.token(site.name(), &[]);
    let log = site.dir().join("join.log");
    let mut joining = Daemon::start("skerry-edge join", site.join_command(&token), &log);
    let key = eventually(SOON, "the machine shows its key", || {
        joining.check().map_err(|e| e.to_string())?;
        let log = joining.log();
        let word = log
            .split("Its key is ")
            .nth(1)
            .and_then(|rest| rest.split('.').next());
        word.map(str::to_owned).ok_or(log)
    });
    let shown = t.kubectl.get("site", site.name()).unwrap()["status"]["enrolment"]["waitingKey"].clone();
    assert_eq!(shown, key.as_str());
    let wrong = approve(&"0".repeat(64));
    assert!(
        !wrong.status.success() && text(&wrong).contains(&key),
        "{}",
        text(&wrong)
    );
    let right = approve(&key[..8]);
    assert!(right.status.success(), "{}", text(&right));
    assert_eq!(joining.wait(SOON), 0, "{}", joining.log());
    let status = &t.kubectl.get("site", site.name()).unwrap()["status"];
    assert!(status["enrolment"].is_null(), "{status}");
    // The approval is for that key alone.
    let other = site.dir().join("other");
    let token = t.cluster.token(site.name(), &[]);
    let mut thief = Daemon::start("skerry-edge join", site.join_command_to(&token, &other), &log);
    eventually(SOON, "another machine waits", || {
        let log = thief.log_since_start();
        if log.contains("Its key is ") {
            Ok(())
        } else {
            Err(log)
        }
    });
    assert!(!other.join("identity/identity.pem").exists());
    thief.check().unwrap();
}

fn revoked(t: &Test<'_>) {
    let mut site = t.own_site();
    let before = sleeper(t, &site);
    let serial = record(&t.kubectl, &site).unwrap()["serial"]
        .as_str()
        .unwrap()
        .to_owned();
    let revoke = |args: &[&str]| {
        let out = t
            .cluster
            .provider_command(&[&["revoke", site.name()], args].concat());
        assert!(out.status.success(), "{}", text(&out));
    };
    revoke(&["--serial", "00"]);
    assert!(!site.log().contains("revoked"), "{}", site.log_tail());
    revoke(&["--serial", &serial]);
    says(&site, "was revoked");
    assert_eq!(site.stop_edge(), 0);
    site.start_edge();
    says(&site, &format!("with serial {serial} was revoked"));

    let rejoin = |site: &mut Site| {
        if site.running() {
            assert_eq!(site.stop_edge(), 0);
        }
        let out = site.rejoin(&t.cluster.token(site.name(), &[]));
        assert!(out.status.success(), "{}", text(&out));
        site.start_edge();
        says(site, "the link is up");
        site.wait_ready();
        assert_eq!(identity(&ready(&t.kubectl, "pod")), before);
    };
    rejoin(&mut site);
    let out = t.cluster.provider_command(&["revoke", site.name()]);
    assert!(out.status.success(), "{}", text(&out));
    says(&site, "was revoked");
    rejoin(&mut site);
}

fn count(text: &str, word: &str) -> usize {
    text.matches(word).count()
}
