//! What a pod may use is what it was given, and a node gives no more than it has.

use std::path::PathBuf;

use serde_json::{Value, json};
use skerry_tests::kubectl::condition;
use skerry_tests::pods::{event, gone, identity, phase, ready};
use skerry_tests::process::is_root;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each(
            "a pod's cgroup has the values of its quality of service and goes with the pod",
            quality_of_service,
        ),
        Scenario::each(
            "a container killed for want of memory says OOMKilled",
            out_of_memory,
        ),
        Scenario::each(
            "a pod that was bound to a full or wrong node fails with a kubelet's reason",
            refused,
        ),
        Scenario::each(
            "a running pod is resized in place, up and down, without a restart",
            resized,
        ),
        Scenario::each(
            "a resize that asks for a restart restarts that container once",
            restarted,
        ),
        Scenario::each(
            "a resize that does not fit is deferred until a pod leaves",
            deferred,
        ),
        Scenario::once(
            "a resize that this machine can never give is infeasible, and the next one is not",
            infeasible,
        ),
        Scenario::each("pod-level resources are enforced and resized", pod_level),
    ]
    .into_iter()
    .flatten()
    .collect()
}

const SLEEP: [&str; 3] = ["sh", "-c", "sleep 1000"];

fn sized(cpu: &str, memory: &str) -> Value {
    json!({"containers": [{"command": SLEEP, "resources": resources(cpu, memory)}]})
}

fn resources(cpu: &str, memory: &str) -> Value {
    json!({"requests": {"cpu": cpu, "memory": memory}, "limits": {"cpu": cpu, "memory": memory}})
}

/// Where the pod's cgroup is: the file of v1 or of v2, whichever this machine has.
fn cgroup(pod: &Value, controller: &str, v1: &str, v2: &str) -> PathBuf {
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let tier = match pod["status"]["qosClass"].as_str().unwrap() {
        "Burstable" => "kubepods/burstable",
        "BestEffort" => "kubepods/besteffort",
        _ => "kubepods",
    };
    let root = PathBuf::from("/sys/fs/cgroup");
    let old = root.join(controller);
    if old.is_dir() {
        old.join(tier).join(format!("pod{uid}")).join(v1)
    } else {
        root.join(tier).join(format!("pod{uid}")).join(v2)
    }
}

/// The first number of the file.
fn number(file: &PathBuf) -> Result<i64, String> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let first = text.split_whitespace().next().unwrap_or_default();
    first.parse().map_err(|_| format!("{}: {text}", file.display()))
}

fn memory(pod: &Value) -> PathBuf {
    cgroup(pod, "memory", "memory.limit_in_bytes", "memory.max")
}

fn quota(pod: &Value) -> PathBuf {
    cgroup(pod, "cpu", "cpu.cfs_quota_us", "cpu.max")
}

/// The memory limit of the pod's only container.
fn container_memory(pod: &Value) -> Result<i64, String> {
    let file = memory(pod);
    let id = pod["status"]["containerStatuses"][0]["containerID"]
        .as_str()
        .unwrap_or_default();
    let id = id.rsplit('/').next().unwrap_or_default();
    number(&file.parent().unwrap().join(id).join(file.file_name().unwrap()))
}

fn resize(t: &Test<'_>, pod: &str, spec: &Value) {
    let patch = json!({"spec": spec}).to_string();
    t.kubectl
        .run(&["patch", "pod", pod, "--subresource", "resize", "-p", &patch]);
}

/// Waits until no resize is under way any more and the status shows what the spec asks for.
fn settled(t: &Test<'_>, name: &str) -> Value {
    eventually(SOON, &format!("the resize of {name} is over"), || {
        let pod = t.kubectl.get("pod", name)?;
        let status = &pod["status"];
        let told = |what: &str| Err(format!("{what}: {status}"));
        if status["observedGeneration"] != pod["metadata"]["generation"] {
            return told("not seen yet");
        }
        for kind in ["PodResizePending", "PodResizeInProgress"] {
            if condition(&pod, kind)["status"] == "True" {
                return told(kind);
            }
        }
        if status["containerStatuses"][0]["resources"] != pod["spec"]["containers"][0]["resources"] {
            return told("resources");
        }
        same(condition(&pod, "Ready")["status"].as_str(), Some("True"))?;
        Ok(pod)
    })
}

fn quality_of_service(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    let some = json!({"containers": [{"command": SLEEP, "resources": {"requests": {"cpu": "100m"}}}]});
    t.kubectl.apply(&t.site().pod("sure", sized("50m", "64Mi")));
    t.kubectl.apply(&t.site().pod("some", some));
    t.kubectl
        .apply(&t.site().pod("best", json!({"containers": [{"command": SLEEP}]})));
    let (sure, some, best) = (
        ready(&t.kubectl, "sure"),
        ready(&t.kubectl, "some"),
        ready(&t.kubectl, "best"),
    );
    assert_eq!(number(&memory(&sure)), Ok(64 << 20));
    assert_eq!(number(&quota(&sure)), Ok(5000));
    // v2 has weights: 100m of a processor are 4, and the least share is 1.
    let shares = |pod: &Value| number(&cgroup(pod, "cpu", "cpu.shares", "cpu.weight")).unwrap();
    assert!([102, 4].contains(&shares(&some)), "{}", shares(&some));
    assert!([2, 1].contains(&shares(&best)), "{}", shares(&best));
    assert_eq!(container_memory(&sure), Ok(64 << 20));
    let status = &sure["status"];
    assert_eq!(
        status["containerStatuses"][0]["allocatedResources"],
        json!({"cpu": "50m", "memory": "64Mi"})
    );
    assert_eq!(
        status["containerStatuses"][0]["resources"],
        resources("50m", "64Mi")
    );
    assert_eq!(status["resources"], resources("50m", "64Mi"));
    t.kubectl.run(&["delete", "pod", "sure", "--wait=false"]);
    gone(&t.kubectl, "sure");
    eventually(SOON, "the pod's cgroup is gone", || {
        same(memory(&sure).parent().unwrap().exists(), false)
    });
}

fn out_of_memory(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    let spec = json!({"restartPolicy": "Never", "containers": [{
        "command": ["sh", "-c", "a=0123456789abcdef; while :; do a=$a$a; done"],
        "resources": {"limits": {"memory": "24Mi", "cpu": "500m"}},
    }]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    let pod = phase(&t.kubectl, "pod", "Failed");
    let ended = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(
        (&ended["reason"], &ended["exitCode"]),
        (&json!("OOMKilled"), &json!(137)),
        "{ended}"
    );
}

fn refused(t: &Test<'_>) {
    let bound = |name: &str, mut spec: Value| {
        spec["nodeName"] = json!(t.site().name());
        t.kubectl.apply(&t.site().pod(name, spec));
        let pod = phase(&t.kubectl, name, "Failed");
        let status = pod["status"].clone();
        assert!(status["containerStatuses"].is_null(), "{status}");
        let text = |field: &str| status[field].as_str().unwrap_or_default().to_owned();
        (text("reason"), text("message"))
    };
    let huge = json!({"containers": [{"command": SLEEP, "resources": {"requests": {"cpu": "1000"}}}]});
    let (reason, message) = bound("huge", huge);
    assert_eq!(reason, "OutOfcpu");
    let start = "Pod was rejected: Node didn't have enough resource: cpu, requested: 1000000, used: ";
    assert!(message.starts_with(start), "{message}");
    assert!(event(&t.kubectl, "huge", "OutOfcpu").starts_with("Node didn't have enough resource: cpu"));
    let elsewhere = json!({"containers": [{"command": SLEEP}], "affinity": {"nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [t.site().name()]}]}]}}}});
    let (reason, message) = bound("elsewhere", elsewhere);
    assert_eq!(reason, "NodeAffinity");
    assert_eq!(
        message,
        "Pod was rejected: Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector"
    );
}

fn resized(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    t.kubectl.apply(&t.site().pod("pod", sized("50m", "64Mi")));
    let before = identity(&ready(&t.kubectl, "pod"));
    for (cpu, memory_limit, microseconds, bytes) in [
        ("100m", "96Mi", 10_000, 96 << 20),
        ("40m", "48Mi", 4_000, 48 << 20),
    ] {
        resize(
            t,
            "pod",
            &json!({"containers": [{"name": "c0", "resources": resources(cpu, memory_limit)}]}),
        );
        let pod = settled(t, "pod");
        assert_eq!(identity(&pod), before);
        assert_eq!(number(&quota(&pod)), Ok(microseconds));
        assert_eq!(number(&memory(&pod)), Ok(bytes));
        assert_eq!(container_memory(&pod), Ok(bytes));
        assert_eq!(
            pod["status"]["allocatedResources"],
            json!({"cpu": cpu, "memory": memory_limit})
        );
    }
    assert!(event(&t.kubectl, "pod", "ResizeStarted").starts_with("Pod resize started: {\"containers\":"));
    assert!(
        event(&t.kubectl, "pod", "ResizeCompleted").starts_with("Pod resize completed: {\"containers\":")
    );
}

fn restarted(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    let mut spec = sized("50m", "64Mi");
    spec["containers"][0]["resizePolicy"] = json!([{"resourceName": "memory", "restartPolicy": "RestartContainer"},
        {"resourceName": "cpu", "restartPolicy": "NotRequired"}]);
    t.kubectl.apply(&t.site().pod("pod", spec));
    ready(&t.kubectl, "pod");
    resize(
        t,
        "pod",
        &json!({"containers": [{"name": "c0", "resources": resources("60m", "96Mi")}]}),
    );
    let pod = settled(t, "pod");
    assert_eq!(
        pod["status"]["containerStatuses"][0]["restartCount"], 1,
        "{}",
        pod["status"]
    );
    assert_eq!(container_memory(&pod), Ok(96 << 20));
    assert_eq!(number(&memory(&pod)), Ok(96 << 20));
}

fn deferred(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    let node = t.kubectl.get("node", t.site().name()).unwrap();
    let allocatable = node["status"]["allocatable"]["memory"].as_str().unwrap();
    let mebibytes = allocatable.strip_suffix("Ki").unwrap().parse::<u64>().unwrap() / 1024;
    let most = format!("{}Mi", mebibytes * 6 / 10);
    let requests = |memory: &str| json!({"requests": {"cpu": "10m", "memory": memory}});
    let spec = |memory: &str| json!({"containers": [{"command": SLEEP, "resources": requests(memory)}]});
    t.kubectl.apply(&t.site().pod("large", spec(&most)));
    t.kubectl.apply(&t.site().pod("small", spec("32Mi")));
    ready(&t.kubectl, "large");
    let before = identity(&ready(&t.kubectl, "small"));
    resize(
        t,
        "small",
        &json!({"containers": [{"name": "c0", "resources": requests(&most)}]}),
    );
    let pod = eventually(SOON, "the resize is deferred", || {
        let pod = t.kubectl.get("pod", "small")?;
        same(
            condition(&pod, "PodResizePending")["reason"].as_str(),
            Some("Deferred"),
        )?;
        Ok(pod)
    });
    let pending = condition(&pod, "PodResizePending");
    assert_eq!(pending["observedGeneration"], pod["metadata"]["generation"]);
    let message = pending["message"].as_str().unwrap();
    assert!(
        message.starts_with("Node didn't have enough resource: memory, requested: "),
        "{message}"
    );
    assert_eq!(
        pod["status"]["containerStatuses"][0]["allocatedResources"]["memory"],
        "32Mi"
    );
    event(&t.kubectl, "small", "ResizeDeferred");
    t.kubectl.run(&["delete", "pod", "large", "--wait=false"]);
    let pod = settled(t, "small");
    assert_eq!(identity(&pod), before);
}

fn infeasible(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    let mut site = t.own_site();
    let requests = |cpu: &str| json!({"requests": {"cpu": cpu, "memory": "16Mi"}});
    let ask = |cpu: &str| {
        resize(
            t,
            "pod",
            &json!({"containers": [{"name": "c0", "resources": requests(cpu)}]}),
        );
    };
    let spec = json!({"containers": [{"command": SLEEP, "resources": requests("10m")}]});
    t.kubectl.apply(&site.pod("pod", spec));
    let before = identity(&ready(&t.kubectl, "pod"));
    // The API server refuses what is beyond the Node as it knows it; this fits, until the machine keeps more for itself.
    site.stop_edge();
    let node = t.kubectl.get("node", site.name()).unwrap();
    let cores: u64 = node["status"]["allocatable"]["cpu"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let milli = cores * 1000 - 100;
    ask(&format!("{milli}m"));
    site.set_flags(&["--reserved-cpu=500m"]);
    site.start_edge();
    let pod = eventually(SOON, "the resize is infeasible", || {
        let pod = t.kubectl.get("pod", "pod")?;
        same(
            condition(&pod, "PodResizePending")["reason"].as_str(),
            Some("Infeasible"),
        )?;
        Ok(pod)
    });
    assert_eq!(
        condition(&pod, "PodResizePending")["message"],
        format!(
            "Node didn't have enough capacity: cpu, requested: {milli}, capacity: {}",
            cores * 1000 - 500
        )
    );
    assert_eq!(
        pod["status"]["containerStatuses"][0]["allocatedResources"]["cpu"],
        "10m"
    );
    event(&t.kubectl, "pod", "ResizeInfeasible");
    ask("20m");
    let pod = settled(t, "pod");
    assert_eq!(identity(&pod), before);
    assert_eq!(
        pod["status"]["containerStatuses"][0]["allocatedResources"]["cpu"],
        "20m"
    );
}

fn pod_level(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    let spec = json!({"resources": resources("80m", "64Mi"), "containers": [{"command": SLEEP}, {"command": SLEEP}]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    let pod = ready(&t.kubectl, "pod");
    assert_eq!(number(&memory(&pod)), Ok(64 << 20));
    assert_eq!(pod["status"]["resources"], resources("80m", "64Mi"));
    assert_eq!(container_memory(&pod), Ok(64 << 20));
    let before = identity(&pod);
    resize(t, "pod", &json!({"resources": resources("100m", "96Mi")}));
    let pod = eventually(SOON, "the pod is larger", || {
        let pod = t.kubectl.get("pod", "pod")?;
        same(&pod["status"]["resources"], &resources("100m", "96Mi"))?;
        Ok(pod)
    });
    assert_eq!(number(&memory(&pod)), Ok(96 << 20));
    assert_eq!(number(&quota(&pod)), Ok(10_000));
    assert_eq!(identity(&pod), before);
    assert_eq!(
        pod["status"]["allocatedResources"],
        json!({"cpu": "100m", "memory": "96Mi"})
    );
}
