//! A damaged or full disk under the edge daemon's store.

use std::fs::OpenOptions;
use std::io::Read;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;
use skerry_tests::pods::ready;
use skerry_tests::process::{Daemon, is_root, text};
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::Site;
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::once(
            "a truncated store file is named, and nothing is touched",
            truncated,
        ),
        Scenario::once("a store file that is none is named", garbage),
        Scenario::once("a full disk stops nothing that runs, and is told", full),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn store_file(site: &Site) -> PathBuf {
    site.data_dir().join("store.redb")
}

/// The daemon ends with a clear error that names the store file and what to do.
fn refuses(site: &Site) {
    let log = site.dir().join("refused.log");
    let mut daemon = Daemon::start("skerry-edge", site.edge_command(), &log);
    let code = daemon.wait(SOON);
    let said = daemon.log();
    assert_eq!(code, 4, "{said}");
    assert!(
        said.contains("store.redb") && !said.contains("panicked"),
        "{said}"
    );
}

fn truncated(t: &Test<'_>) {
    let mut site = t.own_site();
    t.kubectl.apply(&site.pod(
        "pod",
        json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]}),
    ));
    ready(&t.kubectl, "pod");
    site.stop_edge();
    let file = store_file(&site);
    let whole = std::fs::read(&file).unwrap();
    OpenOptions::new()
        .write(true)
        .open(&file)
        .unwrap()
        .set_len(whole.len() as u64 / 3)
        .unwrap();
    refuses(&site);
    // Put back from a backup, all is as before.
    std::fs::write(&file, whole).unwrap();
    site.start_edge();
    site.wait_ready();
    ready(&t.kubectl, "pod");
}

fn garbage(t: &Test<'_>) {
    let site = Site::enrol(t.cluster, &t.name("site"), t.runtime);
    std::fs::write(store_file(&site), "not a database\n".repeat(1000)).unwrap();
    refuses(&site);
}

fn full(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    let mut site = Site::prepare(t.cluster, &t.name("site"), t.runtime);
    let data = site.data_dir();
    std::fs::create_dir_all(&data).unwrap();
    let out = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"])
        .arg(&data)
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", text(&out));
    t.cluster.declare(site.name());
    let out = site.join(&t.cluster.token(site.name(), &[]));
    assert!(out.status.success(), "{}", text(&out));
    site.start_edge();
    site.wait_ready();
    t.kubectl.apply(&site.pod(
        "pod",
        json!({"containers": [{"command": ["sh", "-c", "sleep 1000"]}]}),
    ));
    let before = skerry_tests::pods::identity(&ready(&t.kubectl, "pod"));

    let ballast = data.join("ballast");
    let _ = Command::new("dd")
        .args(["if=/dev/zero", "bs=64k", &format!("of={}", ballast.display())])
        .output();
    // Not applied: that would keep a second copy in an annotation.
    let large = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "large"}, "data": {"x": random_text(900_000)}});
    let out = t.kubectl.output_with(&["create", "-f", "-"], &large.to_string());
    assert!(out.status.success(), "{}", text(&out));
    let reader = json!({
        "containers": [{"command": ["sh", "-c", "wc -c < /c/x; sleep 1000"], "volumeMounts": [{"name": "c", "mountPath": "/c"}]}],
        "volumes": [{"name": "c", "configMap": {"name": "large"}}],
    });
    t.kubectl.apply(&site.pod("late", reader));
    eventually(SOON, "the daemon says that its disk is full", || {
        let log = site.log_tail();
        if log.contains("store") && (log.contains("full") || log.contains("No space left")) {
            Ok(())
        } else {
            Err(log)
        }
    });
    assert_eq!(site.http("/healthz").unwrap().0, 200);
    std::fs::remove_file(&ballast).unwrap();
    ready(&t.kubectl, "late");
    eventually(SOON, "the first pod is the same", || {
        same(
            skerry_tests::pods::identity(&t.kubectl.get("pod", "pod")?),
            before.clone(),
        )
    });
}

/// Text that does not compress.
fn random_text(length: usize) -> String {
    let mut bytes = vec![0; length];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .unwrap();
    bytes
        .iter()
        .map(|b| char::from(b'!' + b % 64))
        .map(|c| if c == '"' || c == '\\' { '_' } else { c })
        .collect()
}
