//! What a node does by itself, without being asked.

use std::process::Stdio;

use serde_json::json;
use skerry_tests::pods::{event, ready};
use skerry_tests::process::hack;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{IMAGE, Runtime, Site};
use skerry_tests::wait::{SOON, eventually};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each(
            "logs are rotated, and one who follows misses no line",
            log_rotation,
        ),
        Scenario::on(
            Runtime::Containerd,
            "images that nothing needs go when the disk is full, those of stored pods stay",
            image_collection,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A site of the scenario's own whose daemon has further flags.
fn site(t: &Test<'_>, name: &str, flags: &[&str]) -> Site {
    let mut site = Site::enrol(t.cluster, &format!("{name}-{}", t.runtime), t.runtime);
    site.set_flags(flags);
    site.start_edge();
    site.wait_ready();
    site
}

fn log_rotation(t: &Test<'_>) {
    const LINES: usize = 1500;
    let flags = [
        "--container-log-max-size=10Ki",
        "--container-log-max-files=30",
        "--container-log-monitor-interval=500ms",
    ];
    let site = site(t, "rotation", &flags);
    let script = format!(
        "i=0; while [ $i -lt {LINES} ]; do echo line $i of many; i=$((i+1)); \
         [ $((i % 100)) = 0 ] && sleep 0.3; done; echo end; sleep 1000"
    );
    t.kubectl.apply(&site.pod(
        "talker",
        json!({"containers": [{"command": ["sh", "-c", script]}]}),
    ));
    ready(&t.kubectl, "talker");
    let mut follower = t
        .kubectl
        .command(&["logs", "-f", "talker"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl runs");
    let out = std::io::BufReader::new(follower.stdout.take().expect("stdout is piped"));
    let mut seen = Vec::new();
    for line in std::io::BufRead::lines(out) {
        let line = line.expect("kubectl prints text");
        if line == "end" {
            break;
        }
        seen.push(line);
    }
    let _ = follower.kill();
    let _ = follower.wait();
    let wanted: Vec<String> = (0..LINES).map(|n| format!("line {n} of many")).collect();
    assert_eq!(seen.len(), wanted.len(), "lines were lost or repeated");
    assert_eq!(seen, wanted);

    eventually(SOON, "rotated logs are compressed but for the newest", || {
        let mut names = Vec::new();
        for pod in std::fs::read_dir(site.dir().join("pod-logs")).map_err(|e| e.to_string())? {
            let directory = pod.map_err(|e| e.to_string())?.path().join("c0");
            for file in std::fs::read_dir(directory).map_err(|e| e.to_string())? {
                names.push(
                    file.map_err(|e| e.to_string())?
                        .file_name()
                        .into_string()
                        .unwrap(),
                );
            }
        }
        names.sort();
        let packed = names.iter().filter(|name| name.ends_with(".gz")).count();
        let plain = names
            .iter()
            .filter(|name| name.starts_with("0.log.") && !name.ends_with(".gz"))
            .count();
        if packed >= 2 && plain == 1 && names.iter().any(|name| name == "0.log") {
            Ok(())
        } else {
            Err(format!("{names:?}"))
        }
    });
    // Without following, the current file is read, as with a kubelet.
    let now = t.kubectl.run(&["logs", "talker", "--tail=1"]);
    assert_eq!(now, "end\n");
}

/// Imports an image that no other has into the site's containerd.
fn import_image(site: &Site, name: &str) {
    let tar = site.dir().join("image.tar");
    let path = |p: &std::path::Path| p.to_str().expect("the path is text").to_owned();
    hack("image", &[&path(&tar), name, "sh", "-c", name]);
    let out = std::process::Command::new("ctr")
        .args(["--namespace", "k8s.io", "--address"])
        .arg(site.dir().join("containerd/containerd.sock"))
        .args(["images", "import"])
        .arg(&tar)
        .output()
        .expect("ctr runs");
    assert!(out.status.success(), "{out:?}");
}

fn image_collection(t: &Test<'_>) {
    let mut site = t.own_site();
    import_image(&site, "docker.io/library/unneeded:1");
    // Stored, but never started: its image can be had nowhere.
    let waits = json!({"containers": [{"command": ["sleep", "1000"], "envFrom": [{"configMapRef": {"name": "missing"}}]}]});
    t.kubectl.apply(&site.pod("waits", waits));
    event(&t.kubectl, "waits", "Failed");
    let images = || -> Result<Vec<String>, String> {
        let node = t.kubectl.get("node", site.name())?;
        let images = node["status"]["images"].as_array().cloned().unwrap_or_default();
        let names = |image: &serde_json::Value| image["names"].as_array().cloned().unwrap_or_default();
        let names = images.iter().flat_map(names);
        Ok(names
            .filter_map(|name| name.as_str().map(str::to_owned))
            .collect())
    };
    let has = |images: &[String], part: &str| images.iter().any(|name| name.contains(part));
    eventually(SOON, "the node has three images", || {
        let images = images()?;
        let all = has(&images, "unneeded:1") && has(&images, IMAGE) && has(&images, "pause");
        if all { Ok(()) } else { Err(format!("{images:?}")) }
    });
    let name = site.name().to_owned();
    site.stop_edge();
    site.set_flags(&[
        "--image-gc-high-threshold-percent=1",
        "--image-gc-low-threshold-percent=0",
        "--image-minimum-gc-age=0s",
        "--image-gc-period=1s",
    ]);
    site.start_edge();
    let left = eventually(SOON, "the unneeded image is gone", || {
        let node = t.kubectl.get("node", &name)?.to_string();
        if node.contains("unneeded:1") {
            Err(node)
        } else {
            Ok(node)
        }
    });
    assert!(left.contains(IMAGE) && left.contains("pause"), "{left}");
    // An empty disk cannot be had by removing images: that is said.
    let default = t.kubectl.in_namespace("default");
    let said = event(&default, &name, "FreeDiskSpaceFailed");
    assert!(said.contains("Insufficient free disk space"), "{said}");
    event(&default, &name, "ImageGCFailed");
    // Many rounds later the pod can still be started from what is there.
    t.kubectl
        .apply("{apiVersion: v1, kind: ConfigMap, metadata: {name: missing}, data: {a: b}}");
    ready(&t.kubectl, "waits");
}
