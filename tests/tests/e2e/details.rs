//! Details in which people and controllers rely on a node to be exactly a kubelet.

use std::io::{Read, Write};
use std::net::TcpListener;

use serde_json::{Value, json};
use skerry_tests::kubectl::condition;
use skerry_tests::pods::{event, output, phase, ready};
use skerry_tests::process::is_root;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{Runtime, Site};
use skerry_tests::wait::{SOON, eventually, same};
use tonic_health::ServingStatus;

pub(crate) fn scenarios() -> Vec<Scenario> {
    let containerd = |name, run| Scenario::on(Runtime::Containerd, name, run);
    let process = |name, run| Scenario::on(Runtime::Process, name, run);
    [
        Scenario::each(
            "a pod is as ready as its gRPC service says, and a probe that is sent elsewhere warns",
            grpc_probe,
        ),
        Scenario::each(
            "a critical pod takes the room of an ordinary one on a full node",
            preemption,
        ),
        Scenario::once(
            "a soft threshold evicts after its grace, with the grace of the pod",
            soft_eviction,
        ),
        Scenario::once("a node short of process ids says so and evicts", pid_pressure),
        Scenario::once("a node short of inodes says so and evicts", inode_pressure),
        process("a machine that was booted anew is told on its Node", reboot),
        process("kubectl debug runs a process beside another", debug),
        process("the status says as whom a container was started", user),
        containerd(
            "a seccomp profile comes from the directory that the site names",
            seccomp,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A site of the scenario's own whose daemon has further flags.
fn site(t: &Test<'_>, flags: &[&str]) -> Site {
    let mut site = Site::enrol(t.cluster, &t.name("site"), t.runtime);
    site.set_flags(flags);
    site.start_edge();
    site.wait_ready();
    site
}

fn sleeps() -> Value {
    json!({"containers": [{"command": ["sleep", "1000"]}]})
}

fn node_events(t: &Test<'_>) -> skerry_tests::kubectl::Kubectl {
    t.kubectl.in_namespace("default")
}

/// A server on the machine that answers every request with a redirection to another host.
fn redirecting() -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let _ = stream.read(&mut [0; 1024]);
            let _ = stream.write_all(
                b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere.example/\r\nContent-Length: 5\r\n\
                  Connection: close\r\n\r\nthere",
            );
        }
    });
    port
}

fn grpc_probe(t: &Test<'_>) {
    let runtime = tokio::runtime::Runtime::new().expect("the runtime starts");
    let (reporter, service) = tonic_health::server::health_reporter();
    let say = |status| runtime.block_on(reporter.set_service_status("quay", status));
    say(ServingStatus::Serving);
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("0.0.0.0:0"))
        .expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    runtime.spawn(
        tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(incoming),
    );
    // The pod has the machine's network, so its servers are those of this test.
    let spec = json!({"hostNetwork": true, "containers": [{
        "command": ["sleep", "1000"],
        "readinessProbe": {"grpc": {"port": port, "service": "quay"}, "periodSeconds": 1, "failureThreshold": 1},
        "livenessProbe": {"httpGet": {"port": redirecting()}, "periodSeconds": 1, "failureThreshold": 1},
    }]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    ready(&t.kubectl, "pod");
    say(ServingStatus::NotServing);
    eventually(SOON, "the pod is not ready", || {
        let pod = t.kubectl.get("pod", "pod")?;
        same(condition(&pod, "Ready")["status"].as_str(), Some("False"))
    });
    assert_eq!(
        event(&t.kubectl, "pod", "Unhealthy"),
        "Readiness probe failed: service unhealthy (responded with \"NOT_SERVING\")"
    );
    say(ServingStatus::Serving);
    let pod = ready(&t.kubectl, "pod");
    // What is sent elsewhere counts as success, which is said.
    assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0);
    assert_eq!(
        event(&t.kubectl, "pod", "ProbeWarning"),
        "Liveness probe warning: Probe terminated redirects, Response body: there"
    );
}

fn preemption(t: &Test<'_>) {
    let site = site(t, &["--max-pods=1"]);
    t.kubectl.apply(&site.pod("ordinary", sleeps()));
    ready(&t.kubectl, "ordinary");
    // The scheduler would preempt by itself: bound by hand, the node has to.
    let mut critical = sleeps();
    critical["nodeName"] = json!(site.name());
    critical["priorityClassName"] = json!("system-node-critical");
    t.kubectl.apply(&site.pod("critical", critical));
    let pod = phase(&t.kubectl, "ordinary", "Failed");
    assert_eq!(pod["status"]["reason"], "Preempting");
    assert_eq!(
        pod["status"]["message"],
        "Preempted in order to admit critical pod"
    );
    assert_eq!(
        condition(&pod, "DisruptionTarget")["reason"],
        "TerminationByKubelet"
    );
    ready(&t.kubectl, "critical");
}

fn soft_eviction(t: &Test<'_>) {
    // No machine has that much.
    let flags = [
        "--eviction-hard=memory.available<1Mi",
        "--eviction-soft=memory.available<1000Ti",
        "--eviction-soft-grace-period=memory.available=8s",
        "--eviction-max-pod-grace-period=6",
        "--eviction-monitoring-period=1s",
    ];
    let site = site(t, &flags);
    let name = site.name();
    let config = t
        .kubectl
        .run(&["get", "--raw", &format!("/api/v1/nodes/{name}/proxy/configz")]);
    let config: Value = serde_json::from_str(&config).expect("it is JSON");
    let config = &config["kubeletconfig"];
    assert_eq!(config["evictionHard"], json!({"memory.available": "1Mi"}));
    assert_eq!(config["evictionSoft"], json!({"memory.available": "1000Ti"}));
    assert_eq!(
        config["evictionSoftGracePeriod"],
        json!({"memory.available": "8s"})
    );
    assert_eq!(config["evictionMaxPodGracePeriod"], 6);

    // It is tainted before the grace is over: only what tolerates that comes here.
    let script = "trap 'sleep 2; echo told; exit 0' TERM; while :; do sleep 0.1; done";
    let mut spec = json!({"containers": [{"command": ["sh", "-c", script], "resources": {"requests": {"memory": "1Mi"}}}],
        "terminationGracePeriodSeconds": 30});
    spec["nodeName"] = json!(name);
    spec["tolerations"] = json!([{"operator": "Exists"}]);
    t.kubectl.apply(&site.pod("pod", spec));
    let pod = phase(&t.kubectl, "pod", "Failed");
    assert_eq!(pod["status"]["reason"], "Evicted");
    let message = pod["status"]["message"].as_str().unwrap_or_default();
    assert!(
        message.starts_with("The node was low on resource: memory. Threshold quantity: 1000Ti, available: "),
        "{message}"
    );
    // Longer than the second that a hard threshold leaves.
    assert_eq!(t.kubectl.run(&["logs", "pod"]), "told\n");
}

fn pid_pressure(t: &Test<'_>) {
    pressure(
        t,
        "--eviction-hard=pid.available<100000000",
        "PIDPressure",
        "NodeHasInsufficientPID",
        "The node was low on resource: pids. Threshold quantity: 100000000, available: ",
    );
}

fn inode_pressure(t: &Test<'_>) {
    pressure(
        t,
        "--eviction-hard=nodefs.inodesFree<1000000000000",
        "DiskPressure",
        "NodeHasDiskPressure",
        "The node was low on resource: inodes. Threshold quantity: ",
    );
}

/// A pod is there; then the node is short of something.
fn pressure(t: &Test<'_>, threshold: &str, kind: &str, reason: &str, message: &str) {
    let mut site = site(t, &[]);
    t.kubectl.apply(&site.pod("pod", sleeps()));
    ready(&t.kubectl, "pod");
    site.stop_edge();
    site.set_flags(&[threshold, "--eviction-monitoring-period=1s"]);
    site.start_edge();
    let pod = phase(&t.kubectl, "pod", "Failed");
    assert_eq!(pod["status"]["reason"], "Evicted");
    let said = pod["status"]["message"].as_str().unwrap_or_default();
    assert!(said.starts_with(message), "{said}");
    event(&node_events(t), site.name(), reason);
    eventually(SOON, "the node says so", || {
        let node = t.kubectl.get("node", site.name())?;
        same(condition(&node, kind)["status"].as_str(), Some("True"))
    });
}

fn reboot(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    let mut site = site(t, &[]);
    let boot_id = |node: &Value| node["status"]["nodeInfo"]["bootID"].clone();
    let before = boot_id(&t.kubectl.get("node", site.name()).expect("the Node is there"));
    let new = "5ce77999-0000-4000-8000-000000000001";
    assert_ne!(before, new);
    site.stop_edge();
    site.start_edge_after_boot(new);
    eventually(SOON, "the Node has the new boot id", || {
        same(boot_id(&t.kubectl.get("node", site.name())?), json!(new))
    });
    assert_eq!(
        event(&node_events(t), site.name(), "Rebooted"),
        format!("Node {} has been rebooted, boot id: {new}", site.name())
    );
}

fn debug(t: &Test<'_>) {
    t.kubectl.apply(&t.site().pod("pod", sleeps()));
    ready(&t.kubectl, "pod");
    t.kubectl.run(&[
        "debug",
        "pod",
        "--image=none",
        "--container=look",
        "--target=c0",
        "--profile=general",
        "--",
        "sh",
        "-c",
        "echo looked; exit 4",
    ]);
    eventually(SOON, "the ephemeral container has ended", || {
        let pod = t.kubectl.get("pod", "pod")?;
        let status = &pod["status"]["ephemeralContainerStatuses"][0];
        same(status["state"]["terminated"]["exitCode"].as_i64(), Some(4))
            .map_err(|e| format!("{e}: {status}"))
    });
    assert_eq!(t.kubectl.run(&["logs", "pod", "-c", "look"]), "looked\n");
    let pod = ready(&t.kubectl, "pod");
    assert_eq!(pod["status"]["containerStatuses"][0]["restartCount"], 0);
}

fn user(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    let mut spec = sleeps();
    spec["securityContext"] =
        json!({"runAsUser": 1234, "runAsGroup": 3333, "fsGroup": 4444, "supplementalGroups": [5555]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    let pod = ready(&t.kubectl, "pod");
    assert_eq!(
        pod["status"]["containerStatuses"][0]["user"],
        json!({"linux": {"uid": 1234, "gid": 3333, "supplementalGroups": [4444, 5555]}})
    );
}

fn seccomp(t: &Test<'_>) {
    let profiles = t.cluster.dir().join(t.name("profiles"));
    std::fs::create_dir_all(profiles.join("own")).expect("the directory can be made");
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    });
    std::fs::write(profiles.join("own/no-mkdir.json"), profile.to_string()).expect("the file can be written");
    let root = format!("--seccomp-profile-root={}", profiles.display());
    let site = site(t, &[&root]);
    let spec = json!({
        "restartPolicy": "Never",
        "securityContext": {"seccompProfile": {"type": "Localhost", "localhostProfile": "own/no-mkdir.json"}},
        "containers": [{"command": ["sh", "-c", "mkdir /tmp/d 2>/dev/null || echo refused"]}],
    });
    t.kubectl.apply(&site.pod("pod", spec));
    assert_eq!(output(&t.kubectl, "pod"), "refused\n");
    // A sandbox and a container were made; what is wrong with their resolver is said once.
    event(&t.kubectl, "pod", "MissingClusterDNS");
    let selector = "involvedObject.name=pod,reason=MissingClusterDNS";
    let said = t
        .kubectl
        .list("events", &["--field-selector", selector])
        .expect("events are listed");
    assert_eq!((said.len(), &said[0]["count"]), (1, &json!(1)), "{said:?}");
}
