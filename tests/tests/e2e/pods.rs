//! What a pod spec asks for is what its containers get.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use skerry_tests::kubectl::condition;
use skerry_tests::pods::{event, gone, identity, lines, output, phase, ready, waiting};
use skerry_tests::process::is_root;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::Runtime;
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each("a running pod's status has what a kubelet reports", status),
        Scenario::each(
            "a container gets its command, arguments and environment",
            environment,
        ),
        Scenario::each(
            "a container gets environment from ConfigMaps and Secrets",
            environment_from,
        ),
        Scenario::each("ConfigMaps, Secrets and downward fields appear as files", files),
        Scenario::each(
            "a changed ConfigMap reaches the files of a running pod",
            changed_file,
        ),
        Scenario::each(
            "a pod's ServiceAccount token is accepted by the API server",
            token,
        ),
        Scenario::each("containers of a pod share an emptyDir", empty_dir),
        Scenario::each("a hostPath shows the site's own directory", host_path),
        Scenario::each(
            "init containers run one after the other before the pod",
            init_containers,
        ),
        Scenario::each(
            "a failing init container keeps the pod from starting",
            failing_init,
        ),
        Scenario::each("a container that fails again and again backs off", crash_loop),
        Scenario::each(
            "restart policies Never and OnFailure end as they should",
            restart_policies,
        ),
        Scenario::each("a deleted pod gets SIGTERM and its grace", graceful_deletion),
        Scenario::each(
            "a container that ignores SIGTERM is killed when its grace ends",
            ungraceful_deletion,
        ),
        Scenario::each(
            "a pod whose ConfigMap is missing says so and starts once it is there",
            missing_config_map,
        ),
        Scenario::each(
            "a pod whose environment needs a missing Secret says so",
            missing_secret_in_environment,
        ),
        Scenario::each(
            "a memory limit becomes the container's cgroup limit",
            memory_limit,
        ),
        Scenario::on(
            Runtime::Containerd,
            "an image that does not exist is named, and tried again",
            missing_image,
        ),
        Scenario::on(
            Runtime::Containerd,
            "an absent image with pull policy Never is not pulled",
            never_pulled,
        ),
        Scenario::each("events tell a pod's life as a kubelet's would", events),
        Scenario::each(
            "a pod with two containers is not ready while one is down",
            two_containers,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn shell(script: &str) -> Value {
    json!({"containers": [{"command": ["sh", "-c", script]}]})
}

fn once(script: &str) -> Value {
    json!({"restartPolicy": "Never", "containers": [{"command": ["sh", "-c", script]}]})
}

fn status(t: &Test<'_>) {
    t.kubectl.apply(&t.site().pod("pod", shell("sleep 1000")));
    let pod = ready(&t.kubectl, "pod");
    let status = &pod["status"];
    assert_eq!(status["phase"], "Running");
    for kind in [
        "PodScheduled",
        "PodReadyToStartContainers",
        "Initialized",
        "ContainersReady",
        "Ready",
    ] {
        assert_eq!(condition(&pod, kind)["status"], "True", "{kind}: {status}");
    }
    let scheme = if t.runtime == Runtime::Containerd {
        "containerd://"
    } else {
        "process://"
    };
    let container = &status["containerStatuses"][0];
    assert!(
        container["containerID"].as_str().unwrap().starts_with(scheme),
        "{container}"
    );
    assert!(
        container["state"]["running"]["startedAt"].is_string(),
        "{container}"
    );
    assert_eq!(
        (
            &container["ready"],
            &container["started"],
            &container["restartCount"]
        ),
        (&json!(true), &json!(true), &json!(0))
    );
    for field in ["podIP", "hostIP", "startTime"] {
        assert!(status[field].is_string(), "{field}: {status}");
    }
    assert_eq!(status["podIPs"][0]["ip"], status["podIP"]);
    assert_eq!(status["observedGeneration"], pod["metadata"]["generation"]);
}

fn environment(t: &Test<'_>) {
    let spec = json!({"restartPolicy": "Never", "containers": [{
        "command": ["sh", "-c", "echo \"$0 $1 $GREETING $NAME $NODE $MISSING $SERVICE\""],
        "args": ["$(GREETING)", "$$(GREETING)"],
        "env": [
            {"name": "GREETING", "value": "hello"},
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "MISSING", "value": "$(NOBODY)"},
            {"name": "SERVICE", "value": "$(KUBERNETES_SERVICE_HOST)"},
        ],
    }]});
    t.kubectl.apply(&t.site().pod("env", spec));
    let wanted = format!(
        "hello $(GREETING) hello env {} $(NOBODY) 10.96.0.1\n",
        t.site().name()
    );
    assert_eq!(output(&t.kubectl, "env"), wanted);
}

fn environment_from(t: &Test<'_>) {
    t.kubectl.run(&[
        "create",
        "configmap",
        "settings",
        "--from-literal=COLOUR=red",
        "--from-literal=SIZE=small",
    ]);
    t.kubectl.run(&[
        "create",
        "secret",
        "generic",
        "login",
        "--from-literal=PASSWORD=s3cret",
    ]);
    let spec = json!({"restartPolicy": "Never", "containers": [{
        "command": ["sh", "-c", "echo $COLOUR $SIZE $S_PASSWORD $ONE ${OPTIONAL-unset}"],
        "envFrom": [{"configMapRef": {"name": "settings"}}, {"prefix": "S_", "secretRef": {"name": "login"}}],
        "env": [
            {"name": "SIZE", "value": "large"},
            {"name": "ONE", "valueFrom": {"secretKeyRef": {"name": "login", "key": "PASSWORD"}}},
            {"name": "OPTIONAL", "valueFrom": {"configMapKeyRef": {"name": "absent", "key": "x", "optional": true}}},
        ],
    }]});
    t.kubectl.apply(&t.site().pod("env", spec));
    assert_eq!(output(&t.kubectl, "env"), "red large s3cret s3cret unset\n");
}

fn files(t: &Test<'_>) {
    t.kubectl.run(&[
        "create",
        "configmap",
        "settings",
        "--from-literal=colour=red",
        "--from-literal=size=small",
    ]);
    t.kubectl.run(&[
        "create",
        "secret",
        "generic",
        "login",
        "--from-literal=password=s3cret",
    ]);
    let mounts = ["c", "s", "d", "p"].map(|v| json!({"name": v, "mountPath": format!("/v/{v}")}));
    let spec = json!({"restartPolicy": "Never",
    "containers": [{
        "command": ["sh", "-c", "cd /v; cat c/colour s/password d/name p/sub/size p/labels; ls c s; stat -Lc %a s/password"],
        "volumeMounts": mounts,
    }],
    "volumes": [
        {"name": "c", "configMap": {"name": "settings"}},
        {"name": "s", "secret": {"secretName": "login", "defaultMode": 0o400}},
        {"name": "d", "downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
        {"name": "p", "projected": {"sources": [
            {"configMap": {"name": "settings", "items": [{"key": "size", "path": "sub/size"}]}},
            {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        ]}},
    ]});
    t.kubectl.apply(&t.site().pod("files", spec));
    let text = output(&t.kubectl, "files");
    assert_eq!(
        text, "reds3cretfilessmallapp=\"files\"c:\ncolour\nsize\n\ns:\npassword\n400\n",
        "{text:?}"
    );
}

fn changed_file(t: &Test<'_>) {
    t.kubectl
        .run(&["create", "configmap", "settings", "--from-literal=colour=red"]);
    let spec = json!({
        "containers": [{
            "command": ["sh", "-c", "while [ $(cat /c/colour) = red ]; do sleep 0.2; done; echo changed; sleep 1000"],
            "volumeMounts": [{"name": "c", "mountPath": "/c"}],
        }],
        "volumes": [{"name": "c", "configMap": {"name": "settings"}}],
    });
    t.kubectl.apply(&t.site().pod("pod", spec));
    ready(&t.kubectl, "pod");
    t.kubectl.run(&[
        "patch",
        "configmap",
        "settings",
        "-p",
        r#"{"data":{"colour":"blue"}}"#,
    ]);
    eventually(Duration::from_secs(100), "the pod sees the change", || {
        same(t.kubectl.attempt(&["logs", "pod"])?.trim(), "changed")
    });
}

fn token(t: &Test<'_>) {
    let dir = "/var/run/secrets/kubernetes.io/serviceaccount";
    t.kubectl.apply(&t.site().pod(
        "pod",
        once(&format!(
            "cat {dir}/token; echo; cat {dir}/namespace; echo; head -n1 {dir}/ca.crt"
        )),
    ));
    let text = output(&t.kubectl, "pod");
    let lines: Vec<_> = text.lines().collect();
    let [token, namespace, certificate] = lines[..] else {
        panic!("{text}")
    };
    assert_eq!(certificate, "-----BEGIN CERTIFICATE-----");
    let review =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
    let out = t
        .kubectl
        .output_with(&["create", "-f", "-", "-o", "json"], &review.to_string());
    let review: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(
        review["status"]["user"]["username"],
        format!("system:serviceaccount:{namespace}:default"),
        "{review}"
    );
    assert_eq!(
        review["status"]["user"]["extra"]["authentication.kubernetes.io/pod-name"][0], "pod",
        "{review}"
    );
}

fn empty_dir(t: &Test<'_>) {
    let mount = json!([{"name": "shared", "mountPath": "/shared"}]);
    let spec = json!({
        "restartPolicy": "Never",
        "containers": [
            {"name": "reader", "command": ["sh", "-c", "until [ -e /shared/word ]; do sleep 0.1; done; cat /shared/word"], "volumeMounts": mount},
            {"name": "writer", "command": ["sh", "-c", "echo ahoy > /shared/word.new && mv /shared/word.new /shared/word"], "volumeMounts": mount},
        ],
        "volumes": [{"name": "shared", "emptyDir": {}}],
    });
    t.kubectl.apply(&t.site().pod("pod", spec));
    phase(&t.kubectl, "pod", "Succeeded");
    assert_eq!(t.kubectl.run(&["logs", "pod", "-c", "reader"]), "ahoy\n");
}

fn host_path(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("in"), "from the site").unwrap();
    let spec = json!({
        "restartPolicy": "Never",
        "containers": [{"command": ["sh", "-c", "cat /h/in; echo from the pod > /h/out"], "volumeMounts": [{"name": "h", "mountPath": "/h"}]}],
        "volumes": [{"name": "h", "hostPath": {"path": dir.path(), "type": "Directory"}}],
    });
    t.kubectl.apply(&t.site().pod("pod", spec));
    assert_eq!(output(&t.kubectl, "pod"), "from the site");
    assert_eq!(
        std::fs::read_to_string(dir.path().join("out")).unwrap(),
        "from the pod\n"
    );
}

fn init_containers(t: &Test<'_>) {
    let mount = json!([{"name": "v", "mountPath": "/v"}]);
    let step = |name: &str, script: &str| json!({"name": name, "command": ["sh", "-c", script], "volumeMounts": mount});
    let spec = json!({
        "restartPolicy": "Never",
        "initContainers": [step("one", "sleep 1; echo one >> /v/log"), step("two", "echo two >> /v/log")],
        "containers": [step("main", "cat /v/log")],
        "volumes": [{"name": "v", "emptyDir": {}}],
    });
    t.kubectl.apply(&t.site().pod("pod", spec));
    assert_eq!(output(&t.kubectl, "pod"), "one\ntwo\n");
    let pod = t.kubectl.get("pod", "pod").unwrap();
    let names: Vec<_> = pod["status"]["initContainerStatuses"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| &s["name"])
        .collect();
    assert_eq!(names, ["one", "two"]);
    assert_eq!(
        pod["status"]["initContainerStatuses"][1]["state"]["terminated"]["reason"],
        "Completed"
    );
}

fn failing_init(t: &Test<'_>) {
    let spec = json!({
        "restartPolicy": "Never",
        "initContainers": [{"name": "init", "command": ["sh", "-c", "exit 3"]}],
        "containers": [{"command": ["sh", "-c", "echo never"]}],
    });
    t.kubectl.apply(&t.site().pod("pod", spec));
    let pod = phase(&t.kubectl, "pod", "Failed");
    assert_eq!(
        pod["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"],
        3
    );
    assert_eq!(condition(&pod, "Initialized")["status"], "False");
}

fn crash_loop(t: &Test<'_>) {
    t.kubectl
        .apply(&t.site().pod("pod", shell("echo going down; exit 7")));
    let status = waiting(&t.kubectl, "pod", &["CrashLoopBackOff"]);
    assert_eq!(status["lastState"]["terminated"]["exitCode"], 7, "{status}");
    assert_eq!(status["lastState"]["terminated"]["reason"], "Error", "{status}");
    assert!(
        status["state"]["waiting"]["message"]
            .as_str()
            .unwrap()
            .starts_with("back-off "),
        "{status}"
    );
    event(&t.kubectl, "pod", "BackOff");
    eventually(SOON, "it is restarted after the back-off", || {
        let pod = t.kubectl.get("pod", "pod")?;
        let count = identity(&pod).2;
        if count >= 2 {
            Ok(())
        } else {
            Err(pod["status"].to_string())
        }
    });
    assert_eq!(t.kubectl.run(&["logs", "pod", "--previous"]), "going down\n");
}

fn restart_policies(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let second_time = json!({
        "restartPolicy": "OnFailure",
        "containers": [{"command": ["sh", "-c", "[ -e /h/been ] || { touch /h/been; exit 1; }"], "volumeMounts": [{"name": "h", "mountPath": "/h"}]}],
        "volumes": [{"name": "h", "hostPath": {"path": dir.path()}}],
    });
    t.kubectl.apply(&t.site().pod("on-failure", second_time));
    t.kubectl.apply(&t.site().pod("never", once("exit 9")));
    t.kubectl.apply(&t.site().pod("completed", once("true")));
    let failed = phase(&t.kubectl, "never", "Failed");
    let terminated = &failed["status"]["containerStatuses"][0]["state"]["terminated"];
    assert_eq!(
        (&terminated["exitCode"], &terminated["reason"]),
        (&json!(9), &json!("Error"))
    );
    let completed = phase(&t.kubectl, "completed", "Succeeded");
    assert_eq!(
        completed["status"]["containerStatuses"][0]["state"]["terminated"]["reason"],
        "Completed"
    );
    assert_eq!(identity(&phase(&t.kubectl, "on-failure", "Succeeded")).2, 1);
}

fn host_dir(dir: &tempfile::TempDir, script: &str, grace: u32) -> Value {
    json!({
        "terminationGracePeriodSeconds": grace,
        "containers": [{"command": ["sh", "-c", script], "volumeMounts": [{"name": "h", "mountPath": "/h"}]}],
        "volumes": [{"name": "h", "hostPath": {"path": dir.path()}}],
    })
}

fn graceful_deletion(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let script = "trap 'echo asked; echo asked >> /h/log; sleep 1; echo done >> /h/log; exit 0' TERM; echo up >> /h/log; while :; do sleep 0.1; done";
    t.kubectl.apply(&t.site().pod("pod", host_dir(&dir, script, 30)));
    ready(&t.kubectl, "pod");
    lines(&dir.path().join("log"), 1, SOON);
    let begin = Instant::now();
    t.kubectl.run(&["delete", "pod", "pod", "--wait=false"]);
    gone(&t.kubectl, "pod");
    assert_eq!(
        std::fs::read_to_string(dir.path().join("log")).unwrap(),
        "up\nasked\ndone\n"
    );
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "it was gone after {:?}",
        begin.elapsed()
    );
    assert!(event(&t.kubectl, "pod", "Killing").starts_with("Stopping container"));
}

fn ungraceful_deletion(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    t.kubectl.apply(&t.site().pod(
        "pod",
        host_dir(
            &dir,
            "trap '' TERM; while :; do date > /h/alive; sleep 0.1; done",
            3,
        ),
    ));
    ready(&t.kubectl, "pod");
    let alive = dir.path().join("alive");
    lines(&alive, 1, SOON);
    t.kubectl.run(&["delete", "pod", "pod", "--wait=false"]);
    gone(&t.kubectl, "pod");
    std::fs::remove_file(&alive).unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(
        !alive.exists(),
        "the container still runs although its pod is gone"
    );
}

fn missing_config_map(t: &Test<'_>) {
    let spec = json!({
        "containers": [{"command": ["sh", "-c", "echo $(cat /c/colour); sleep 1000"], "volumeMounts": [{"name": "c", "mountPath": "/c"}]}],
        "volumes": [{"name": "c", "configMap": {"name": "late"}}],
    });
    t.kubectl.apply(&t.site().pod("pod", spec));
    let message = event(&t.kubectl, "pod", "FailedMount");
    assert!(message.contains("configmap \"late\" not found"), "{message}");
    assert_eq!(
        waiting(&t.kubectl, "pod", &["ContainerCreating"])["restartCount"],
        0
    );
    t.kubectl
        .run(&["create", "configmap", "late", "--from-literal=colour=red"]);
    ready(&t.kubectl, "pod");
    eventually(SOON, "the log has the value", || {
        same(t.kubectl.attempt(&["logs", "pod"])?.as_str(), "red\n")
    });
}

fn missing_secret_in_environment(t: &Test<'_>) {
    let spec = json!({"restartPolicy": "Never", "containers": [{
        "command": ["sh", "-c", "echo $X"],
        "env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "late", "key": "x"}}}],
    }]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    let status = waiting(&t.kubectl, "pod", &["CreateContainerConfigError"]);
    assert!(
        status["state"]["waiting"]["message"]
            .as_str()
            .unwrap()
            .contains("secret \"late\" not found"),
        "{status}"
    );
    t.kubectl
        .run(&["create", "secret", "generic", "late", "--from-literal=x=found"]);
    assert_eq!(output(&t.kubectl, "pod"), "found\n");
}

fn memory_limit(t: &Test<'_>) {
    if !is_root() {
        return;
    }
    // cgroup v1 as the container sees it, as the host sees it; v2 likewise.
    let script = r#"m=$(sed -n 's/^[0-9]*:memory://p' /proc/self/cgroup) u=$(sed -n 's/^0:://p' /proc/self/cgroup) c=/sys/fs/cgroup
        for f in "$c/memory$m/memory.limit_in_bytes" $c/memory/memory.limit_in_bytes "$c$u/memory.max" $c/memory.max; do
          if [ -e "$f" ]; then cat "$f"; exit; fi
        done"#;
    let mut spec = once(script);
    spec["containers"][0]["resources"] = json!({"limits": {"memory": "40Mi", "cpu": "500m"}});
    t.kubectl.apply(&t.site().pod("pod", spec));
    assert_eq!(output(&t.kubectl, "pod").trim(), (40 << 20).to_string());
    assert_eq!(
        t.kubectl.get("pod", "pod").unwrap()["status"]["qosClass"],
        "Guaranteed"
    );
}

fn missing_image(t: &Test<'_>) {
    let image = "127.0.0.1:1/no/such:1";
    t.kubectl
        .apply(&t.site().pod("pod", json!({"containers": [{"image": image}]})));
    let status = waiting(&t.kubectl, "pod", &["ErrImagePull", "ImagePullBackOff"]);
    assert!(
        status["state"]["waiting"]["message"]
            .as_str()
            .unwrap()
            .contains(image),
        "{status}"
    );
    waiting(&t.kubectl, "pod", &["ImagePullBackOff"]);
    assert!(event(&t.kubectl, "pod", "Failed").contains(image));
    assert_eq!(t.kubectl.get("pod", "pod").unwrap()["status"]["phase"], "Pending");
}

fn never_pulled(t: &Test<'_>) {
    let spec = json!({"containers": [{"image": "127.0.0.1:1/no/such:1", "imagePullPolicy": "Never"}]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    waiting(&t.kubectl, "pod", &["ErrImageNeverPull"]);
}

fn events(t: &Test<'_>) {
    t.kubectl.apply(&t.site().pod("pod", shell("sleep 1000")));
    ready(&t.kubectl, "pod");
    for (reason, text) in [
        ("Scheduled", "Successfully assigned"),
        ("Created", "Container created"),
        ("Started", "Container started"),
    ] {
        let message = event(&t.kubectl, "pod", reason);
        assert!(message.starts_with(text), "{reason}: {message}");
    }
    if t.runtime == Runtime::Containerd {
        assert!(event(&t.kubectl, "pod", "Pulled").contains("already present on machine"));
    }
    let events = t
        .kubectl
        .list("events", &["--field-selector", "reason=Started"])
        .unwrap();
    assert_eq!(events[0]["source"]["component"], "kubelet");
    assert_eq!(events[0]["source"]["host"], t.site().name());
    assert_eq!(events[0]["involvedObject"]["fieldPath"], "spec.containers{c0}");
}

fn two_containers(t: &Test<'_>) {
    let spec = json!({"containers": [
        {"name": "steady", "command": ["sh", "-c", "sleep 1000"]},
        {"name": "failing", "command": ["sh", "-c", "sleep 1; exit 1"]},
    ]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    eventually(SOON, "the pod runs but is not ready", || {
        let pod = t.kubectl.get("pod", "pod")?;
        same(pod["status"]["phase"].as_str(), Some("Running"))?;
        let condition = condition(&pod, "ContainersReady");
        same(
            condition["message"].as_str(),
            Some("containers with unready status: [failing]"),
        )
    });
}
