//! What a node does by itself, without being asked.

use std::process::Stdio;

use serde_json::json;
use skerry_tests::kubectl::condition;
use skerry_tests::pods::{event, identity, phase, ready};
use skerry_tests::process::workspace_binary;
use skerry_tests::registry::import_image;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{IMAGE, Runtime, Site};
use skerry_tests::wait::{SOON, eventually, same};

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
        Scenario::each(
            "a pod is evicted when the node runs short, and the node says so",
            eviction,
        ),
        Scenario::each("an emptyDir that grows beyond its limit ends its pod", size_limit),
        Scenario::each(
            "pods are ended in order when the machine shuts down, not when the daemon does",
            drain,
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
    // It talks once somebody follows: what was rotated before that is not read, as with a kubelet.
    let script = format!(
        "echo begin; until [ -e /d/go ]; do sleep 0.1; done; \
         i=0; while [ $i -lt {LINES} ]; do echo line $i of many; i=$((i+1)); \
         [ $((i % 100)) = 0 ] && sleep 0.3; done; echo end; \
         until [ -e /d/more ]; do sleep 0.1; done; while :; do echo more; sleep 1; done"
    );
    let door = site.dir().join("door");
    std::fs::create_dir_all(&door).expect("the directory can be made");
    t.kubectl.apply(&site.pod(
        "talker",
        json!({
            "containers": [{
                "command": ["sh", "-c", script],
                "volumeMounts": [{"name": "d", "mountPath": "/d"}],
            }],
            "volumes": [{"name": "d", "hostPath": {"path": door}}],
        }),
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
        match line.as_str() {
            "begin" => std::fs::write(door.join("go"), "").expect("the file can be made"),
            "end" => break,
            _ => seen.push(line),
        }
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
    // Without following, the current file is read, as with a kubelet; it may have been rotated just now.
    std::fs::write(door.join("more"), "").expect("the file can be made");
    eventually(SOON, "the newest line is read", || {
        same(
            t.kubectl.attempt(&["logs", "talker", "--tail=1"])?.as_str(),
            "more\n",
        )
    });
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

fn eviction(t: &Test<'_>) {
    let mut site = t.own_site();
    let name = site.name().to_owned();
    let sleeps = || json!({"containers": [{"command": ["sleep", "1000"]}]});
    t.kubectl.apply(&site.pod("victim", sleeps()));
    ready(&t.kubectl, "victim");
    // No machine has that much.
    site.stop_edge();
    site.set_flags(&[
        "--eviction-hard=memory.available<1000Ti",
        "--eviction-monitoring-period=1s",
    ]);
    site.start_edge();
    let pod = phase(&t.kubectl, "victim", "Failed");
    assert_eq!(pod["status"]["reason"], "Evicted");
    let message = pod["status"]["message"].as_str().unwrap_or_default();
    assert!(
        message.starts_with("The node was low on resource: memory. Threshold quantity: 1000Ti, available: "),
        "{message}"
    );
    let target = condition(&pod, "DisruptionTarget");
    assert_eq!(
        (&target["status"], &target["reason"]),
        (&json!("True"), &json!("TerminationByKubelet")),
        "{pod}"
    );
    event(&t.kubectl, "victim", "Evicted");
    let default = t.kubectl.in_namespace("default");
    assert_eq!(
        event(&default, &name, "EvictionThresholdMet"),
        "Attempting to reclaim memory"
    );
    event(&default, &name, "NodeHasInsufficientMemory");
    eventually(SOON, "the node is under pressure, and tainted", || {
        let node = t.kubectl.get("node", &name)?;
        let taints = node["spec"]["taints"].to_string();
        let pressed = condition(&node, "MemoryPressure")["status"] == "True";
        if pressed && taints.contains("node.kubernetes.io/memory-pressure") {
            Ok(())
        } else {
            Err(node.to_string())
        }
    });
}

fn size_limit(t: &Test<'_>) {
    let name = t.name("limit");
    let mut site = Site::enrol(t.cluster, &name, t.runtime);
    site.set_flags(&["--eviction-monitoring-period=1s"]);
    site.start_edge();
    site.wait_ready();
    let script = "dd if=/dev/zero of=/v/fill bs=1024 count=3000 && sleep 1000";
    let pod = json!({
        "volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Mi"}}],
        "containers": [{"command": ["sh", "-c", script], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
    });
    t.kubectl.apply(&site.pod("greedy", pod));
    // The directories of pods with limits are measured every few seconds.
    let pod = phase(&t.kubectl, "greedy", "Failed");
    assert_eq!(pod["status"]["reason"], "Evicted");
    assert_eq!(
        pod["status"]["message"],
        "Usage of EmptyDir volume \"v\" exceeds the limit \"1Mi\". "
    );
}

fn drain(t: &Test<'_>) {
    let name = t.name("down");
    let mut site = Site::enrol(t.cluster, &name, t.runtime);
    site.set_flags(&[
        "--shutdown-grace-period=20s",
        "--shutdown-grace-period-critical-pods=5s",
    ]);
    site.start_edge();
    site.wait_ready();
    let shared = site.dir().join("order");
    std::fs::create_dir_all(&shared).expect("the directory can be made");
    // The ordinary one takes its time, and is first all the same.
    let spec = |name: &str, end: &str| {
        let script = format!(
            "trap 'echo told; {end}; echo {name} >> /h/order; exit 0' TERM; while :; do sleep 0.1; done"
        );
        json!({
            "terminationGracePeriodSeconds": 10,
            "volumes": [{"name": "h", "hostPath": {"path": shared}}],
            "containers": [{"command": ["sh", "-c", script], "volumeMounts": [{"name": "h", "mountPath": "/h"}]}],
        })
    };
    t.kubectl.apply(&site.pod("polite", spec("polite", "sleep 1")));
    let mut critical = spec("critical", "true");
    critical["priorityClassName"] = json!("system-node-critical");
    t.kubectl.apply(&site.pod("critical", critical));
    ready(&t.kubectl, "critical");
    let before = identity(&ready(&t.kubectl, "polite"));
    // The daemon's end is not the machine's.
    site.stop_edge();
    site.start_edge();
    site.wait_ready();
    assert_eq!(identity(&ready(&t.kubectl, "polite")), before);

    let out = std::process::Command::new(workspace_binary("skerry-edge"))
        .args(["drain", "--data-dir"])
        .arg(site.data_dir())
        .output()
        .expect("skerry-edge runs");
    assert!(out.status.success(), "{out:?}");
    let pod = phase(&t.kubectl, "polite", "Failed");
    assert_eq!(pod["status"]["reason"], "Terminated");
    assert_eq!(
        pod["status"]["message"],
        "Pod was terminated in response to imminent node shutdown."
    );
    assert_eq!(
        condition(&pod, "DisruptionTarget")["reason"],
        "TerminationByKubelet"
    );
    assert_eq!(t.kubectl.run(&["logs", "polite"]), "told\n");
    phase(&t.kubectl, "critical", "Failed");
    let order = std::fs::read_to_string(shared.join("order")).expect("the pods have written it");
    assert_eq!(order, "polite\ncritical\n");
    eventually(SOON, "the node says that it goes down", || {
        let node = t.kubectl.get("node", &name)?;
        let ready = condition(&node, "Ready");
        if ready["status"] == "False" && ready["message"] == "node is shutting down" {
            Ok(())
        } else {
            Err(ready.to_string())
        }
    });
}
