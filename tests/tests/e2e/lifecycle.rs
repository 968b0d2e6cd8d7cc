//! What happens to a running container by its spec: probes, hooks, sidecars, restart rules, debugging.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};
use skerry_tests::kubectl::condition;
use skerry_tests::pods::{event, gone, identity, lines, phase, ready};
use skerry_tests::process::free_port;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::Runtime;
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each(
            "a container is ready when its readiness command passes",
            exec_readiness,
        ),
        Scenario::each(
            "a failed liveness probe restarts the container and says why",
            liveness,
        ),
        Scenario::each("a startup probe holds the others back until it passes", startup),
        Scenario::each("HTTP and TCP probes reach the pod", http_and_tcp),
        Scenario::each("readiness is asked while a pod is deleted", readiness_at_the_end),
        Scenario::each(
            "a daemon that restarts keeps a container ready without a flap",
            daemon_restart,
        ),
        Scenario::each("hooks run after the start and before the stop", hooks),
        Scenario::each(
            "a failing postStart hook keeps the container from running",
            failing_hook,
        ),
        Scenario::each(
            "sidecars start first, in order, and stop last, in reverse",
            sidecars,
        ),
        Scenario::each(
            "a restart rule restarts one container, or all of them",
            restart_rules,
        ),
        Scenario::on(
            Runtime::Containerd,
            "kubectl debug runs a container beside another and shows its output",
            debug,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A container that runs a script and sees a directory of the machine at `/h`.
fn step(name: &str, script: &str) -> Value {
    json!({"name": name, "command": ["sh", "-c", script], "volumeMounts": [{"name": "h", "mountPath": "/h"}]})
}

fn with(mut container: Value, more: Value) -> Value {
    container
        .as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    container
}

fn spec(dir: &Path, containers: Value) -> Value {
    json!({"containers": containers, "volumes": [{"name": "h", "hostPath": {"path": dir}}]})
}

fn exec(command: &str, more: Value) -> Value {
    with(
        json!({"exec": {"command": ["sh", "-c", command]}, "periodSeconds": 1}),
        more,
    )
}

/// Waits until a field of the first container's status has that value; the pod.
fn container_has(t: &Test<'_>, pod: &str, pointer: &str, wanted: &Value) -> Value {
    eventually(SOON, &format!("{pointer} of {pod} is {wanted}"), || {
        let pod = t.kubectl.get("pod", pod)?;
        let status = &pod["status"]["containerStatuses"][0];
        same(status.pointer(pointer), Some(wanted)).map_err(|e| format!("{e}: {status}"))?;
        Ok(pod)
    })
}

const LIVES: &str = "trap 'exit 0' TERM; while :; do sleep 0.1; done";

fn exec_readiness(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let probe = exec("test -e /h/ready", json!({"failureThreshold": 1}));
    let c = with(step("c", LIVES), json!({"readinessProbe": probe}));
    t.kubectl
        .apply(&t.site().pod("pod", spec(dir.path(), json!([c]))));
    let pod = container_has(t, "pod", "/started", &json!(true));
    assert_eq!(condition(&pod, "Ready")["reason"], "ContainersNotReady", "{pod}");
    assert!(event(&t.kubectl, "pod", "Unhealthy").starts_with("Readiness probe failed:"));
    std::fs::write(dir.path().join("ready"), "").unwrap();
    ready(&t.kubectl, "pod");
    std::fs::remove_file(dir.path().join("ready")).unwrap();
    let pod = container_has(t, "pod", "/ready", &json!(false));
    assert_eq!(condition(&pod, "ContainersReady")["status"], "False", "{pod}");
    assert_eq!(identity(&pod).2, 0, "unreadiness restarts nothing");
}

fn liveness(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let probe = exec(
        "echo not well; test ! -e /h/sick",
        json!({"failureThreshold": 1, "terminationGracePeriodSeconds": 1}),
    );
    // It ignores TERM: the probe's own grace ends it.
    let c = with(
        step("c", "trap '' TERM; rm -f /h/sick; while :; do sleep 0.1; done"),
        json!({"livenessProbe": probe}),
    );
    let pod = with(
        spec(dir.path(), json!([c])),
        json!({"terminationGracePeriodSeconds": 600}),
    );
    t.kubectl.apply(&t.site().pod("pod", pod));
    ready(&t.kubectl, "pod");
    std::fs::write(dir.path().join("sick"), "").unwrap();
    let pod = container_has(t, "pod", "/restartCount", &json!(1));
    ready(&t.kubectl, "pod");
    let last = &pod["status"]["containerStatuses"][0]["lastState"]["terminated"];
    assert_eq!(last["exitCode"], 137, "{last}");
    assert_eq!(
        event(&t.kubectl, "pod", "Unhealthy"),
        "Liveness probe failed: not well\n"
    );
    assert_eq!(
        event(&t.kubectl, "pod", "Killing"),
        "Container c failed liveness probe, will be restarted"
    );
    t.kubectl.run(&["delete", "pod", "pod", "--grace-period=1"]);
}

fn startup(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let c = with(
        step("c", LIVES),
        json!({
            "startupProbe": exec("echo s >> /h/log; test -e /h/up", json!({"failureThreshold": 100})),
            "readinessProbe": exec("echo r >> /h/log", json!({})),
            "livenessProbe": exec("echo l >> /h/log", json!({})),
        }),
    );
    t.kubectl
        .apply(&t.site().pod("pod", spec(dir.path(), json!([c]))));
    let log = dir.path().join("log");
    assert!(lines(&log, 3, SOON).iter().all(|l| l == "s"));
    let pod = container_has(t, "pod", "/started", &json!(false));
    assert_eq!(condition(&pod, "Ready")["status"], "False", "{pod}");
    std::fs::write(dir.path().join("up"), "").unwrap();
    let pod = ready(&t.kubectl, "pod");
    assert_eq!(pod["status"]["containerStatuses"][0]["started"], true);
    eventually(SOON, "liveness is asked, startup no more", || {
        let text = std::fs::read_to_string(&log).map_err(|e| e.to_string())?;
        let rest = text.trim_start_matches("s\n");
        if rest.contains('s') {
            panic!("the startup probe went on: {text}");
        }
        if rest.contains('l') { Ok(()) } else { Err(text) }
    });
}

fn http_and_tcp(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("index.html"), "here").unwrap();
    let port = free_port();
    let serve = format!("exec busybox httpd -f -p {port} -h /h");
    let http = |path: &str| json!({"httpGet": {"path": path, "port": "web"}, "periodSeconds": 1, "failureThreshold": 1});
    let c = with(
        step("c", &serve),
        json!({
            "ports": [{"name": "web", "containerPort": port}],
            "startupProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1, "failureThreshold": 100},
            "readinessProbe": http("/index.html"),
            "livenessProbe": {"tcpSocket": {"port": "web"}, "periodSeconds": 1},
        }),
    );
    let lost = with(
        step("lost", LIVES),
        json!({"ports": [{"name": "web", "containerPort": port}], "readinessProbe": http("/nothing")}),
    );
    t.kubectl
        .apply(&t.site().pod("pod", spec(dir.path(), json!([c, lost]))));
    let pod = container_has(t, "pod", "/ready", &json!(true));
    assert_eq!(pod["status"]["containerStatuses"][1]["ready"], false, "{pod}");
    eventually(SOON, "the answer of the server is told", || {
        let events = t
            .kubectl
            .list("events", &["--field-selector", "reason=Unhealthy"])?;
        let told = events
            .iter()
            .any(|e| e["message"] == "Readiness probe failed: HTTP probe failed with statuscode: 404");
        if told { Ok(()) } else { Err(format!("{events:?}")) }
    });
    std::fs::remove_file(dir.path().join("index.html")).unwrap();
    let pod = container_has(t, "pod", "/ready", &json!(false));
    assert_eq!(identity(&pod).2, 0);
}

fn readiness_at_the_end(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("ready"), "").unwrap();
    let c = with(
        step(
            "c",
            "trap 'rm /h/ready; until [ -e /h/end ]; do sleep 0.1; done; exit 0' TERM; while :; do sleep 0.1; done",
        ),
        json!({
            "readinessProbe": exec("test -e /h/ready", json!({"failureThreshold": 1})),
            "livenessProbe": exec("test -e /h/ready", json!({"failureThreshold": 1})),
        }),
    );
    let pod = with(
        spec(dir.path(), json!([c])),
        json!({"terminationGracePeriodSeconds": 60}),
    );
    t.kubectl.apply(&t.site().pod("pod", pod));
    ready(&t.kubectl, "pod");
    t.kubectl.run(&["delete", "pod", "pod", "--wait=false"]);
    let pod = container_has(t, "pod", "/ready", &json!(false));
    let status = &pod["status"]["containerStatuses"][0];
    assert!(status["state"]["running"].is_object(), "{status}");
    assert!(pod["metadata"]["deletionTimestamp"].is_string());
    std::fs::write(dir.path().join("end"), "").unwrap();
    gone(&t.kubectl, "pod");
}

fn daemon_restart(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("ready"), "").unwrap();
    let mut site = t.own_site();
    let probe = exec(
        "echo >> /h/asked; test -e /h/ready",
        json!({"failureThreshold": 1}),
    );
    let c = with(
        step("c", LIVES),
        json!({"readinessProbe": probe, "startupProbe": exec("echo >> /h/startup", json!({}))}),
    );
    t.kubectl.apply(&site.pod("pod", spec(dir.path(), json!([c]))));
    let before = ready(&t.kubectl, "pod");
    let startups = lines(&dir.path().join("startup"), 1, SOON).len();
    site.kill_edge();
    let asked = lines(&dir.path().join("asked"), 1, SOON).len();
    site.start_edge();
    site.wait_ready();
    // It is asked again, and only then may it change.
    lines(&dir.path().join("asked"), asked + 2, SOON);
    let after = ready(&t.kubectl, "pod");
    assert_eq!(
        condition(&after, "Ready")["lastTransitionTime"],
        condition(&before, "Ready")["lastTransitionTime"]
    );
    assert_eq!(lines(&dir.path().join("startup"), 1, SOON).len(), startups);
    std::fs::remove_file(dir.path().join("ready")).unwrap();
    container_has(t, "pod", "/ready", &json!(false));
}

fn hooks(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let c = with(
        step(
            "c",
            "trap 'echo term >> /h/log; exit 0' TERM; while :; do sleep 0.1; done",
        ),
        json!({"lifecycle": {
            "postStart": {"exec": {"command": ["sh", "-c", "echo started >> /h/log"]}},
            "preStop": {"exec": {"command": ["sh", "-c", "sleep 1; echo stopping >> /h/log"]}},
        }}),
    );
    let sleeper = with(
        step(
            "d",
            "trap 'echo slept >> /h/log; exit 0' TERM; while :; do sleep 0.1; done",
        ),
        json!({"lifecycle": {"preStop": {"sleep": {"seconds": 3}}, "postStart": {"sleep": {"seconds": 0}}}}),
    );
    let pod = with(
        spec(dir.path(), json!([c, sleeper])),
        json!({"terminationGracePeriodSeconds": 30}),
    );
    t.kubectl.apply(&t.site().pod("pod", pod));
    ready(&t.kubectl, "pod");
    assert_eq!(lines(&log, 1, SOON), ["started"]);
    t.kubectl.run(&["delete", "pod", "pod"]);
    assert_eq!(lines(&log, 4, SOON), ["started", "stopping", "term", "slept"]);
}

fn failing_hook(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let c = with(
        step("c", LIVES),
        json!({"lifecycle": {"postStart": {"exec": {"command": ["sh", "-c", "echo >> /h/log; exit 3"]}}}}),
    );
    t.kubectl
        .apply(&t.site().pod("pod", spec(dir.path(), json!([c]))));
    lines(&dir.path().join("log"), 2, SOON);
    assert_eq!(
        event(&t.kubectl, "pod", "FailedPostStartHook"),
        "PostStartHook failed"
    );
    let pod = container_has(t, "pod", "/state/waiting/reason", &json!("CrashLoopBackOff"));
    assert_eq!(condition(&pod, "Ready")["status"], "False");
}

fn sidecars(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let says = |name: &str, after: &str| {
        let script = format!(
            "trap 'echo {name} stopped >> /h/log; {after} exit 0' TERM; echo {name} up >> /h/log; touch /h/{name}; \
             while :; do sleep 0.1; done"
        );
        step(name, &script)
    };
    let sidecar = |name: &str| {
        let startup = exec(&format!("test -e /h/{name}"), json!({"failureThreshold": 100}));
        with(
            says(name, ""),
            json!({"restartPolicy": "Always", "startupProbe": startup}),
        )
    };
    let mut pod = spec(dir.path(), json!([says("main", "sleep 0.5;")]));
    pod["initContainers"] = json!([
        sidecar("one"),
        sidecar("two"),
        step("init", "echo init >> /h/log")
    ]);
    pod["terminationGracePeriodSeconds"] = json!(30);
    t.kubectl.apply(&t.site().pod("pod", pod));
    let pod = ready(&t.kubectl, "pod");
    assert_eq!(lines(&log, 4, SOON), ["one up", "two up", "init", "main up"]);
    let inits = &pod["status"]["initContainerStatuses"];
    assert_eq!(
        (&inits[0]["started"], &inits[1]["ready"]),
        (&json!(true), &json!(true)),
        "{inits}"
    );
    t.kubectl.run(&["delete", "pod", "pod"]);
    assert_eq!(
        lines(&log, 7, SOON)[4..],
        ["main stopped", "two stopped", "one stopped"]
    );
}

fn restart_rules(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let rule = |action: &str, code: u32| {
        json!({"restartPolicy": "Never", "restartPolicyRules": [
            {"action": action, "exitCodes": {"operator": "In", "values": [code]}},
        ]})
    };
    let once = with(
        step("c", "echo c >> /h/c; [ $(wc -l < /h/c) -gt 1 ] || exit 42"),
        rule("Restart", 42),
    );
    let mut one = spec(dir.path(), json!([once]));
    one["restartPolicy"] = json!("Never");
    t.kubectl.apply(&t.site().pod("one", one));
    let pod = phase(&t.kubectl, "one", "Succeeded");
    assert_eq!(identity(&pod).2, 1);

    let source = with(
        step("a", "echo a >> /h/a; [ $(wc -l < /h/a) -gt 1 ] || exit 43"),
        rule("RestartAllContainers", 43),
    );
    let mut all = spec(
        dir.path(),
        json!([
            source,
            step(
                "b",
                "echo b >> /h/b; until [ $(wc -l < /h/a) -gt 1 ]; do sleep 0.1; done"
            )
        ]),
    );
    all["restartPolicy"] = json!("Never");
    all["initContainers"] = json!([step("init", "echo init >> /h/init")]);
    t.kubectl.apply(&t.site().pod("all", all));
    let pod = phase(&t.kubectl, "all", "Succeeded");
    for (file, status) in [("init", "initContainerStatuses"), ("a", "containerStatuses")] {
        assert_eq!(lines(&dir.path().join(file), 2, SOON).len(), 2, "{file}");
        assert_eq!(pod["status"][status][0]["restartCount"], 1, "{pod}");
    }
    let b = &pod["status"]["containerStatuses"][1];
    assert_eq!(
        b["lastState"]["terminated"]["reason"], "RestartingAllContainers",
        "{b}"
    );
    assert_eq!(
        condition(&pod, "AllContainersRestarting")["status"],
        "False",
        "{pod}"
    );
}

fn debug(t: &Test<'_>) {
    let mut pod = json!({"containers": [{"command": ["sh", "-c", LIVES]}]});
    pod["restartPolicy"] = json!("Never");
    t.kubectl.apply(&t.site().pod("pod", pod));
    let before = ready(&t.kubectl, "pod");
    let image = before["spec"]["containers"][0]["image"]
        .as_str()
        .unwrap()
        .to_owned();
    let target = before["spec"]["containers"][0]["name"]
        .as_str()
        .unwrap()
        .to_owned();
    // The first process that it sees is the target's.
    t.kubectl.run(&[
        "debug",
        "pod",
        "--image",
        &image,
        "--image-pull-policy=Never",
        "--container=look",
        &format!("--target={target}"),
        "--",
        "sh",
        "-c",
        "cat /proc/1/cmdline; echo; exit 4",
    ]);
    let pod = eventually(SOON, "the ephemeral container has ended", || {
        let pod = t.kubectl.get("pod", "pod")?;
        let status = &pod["status"]["ephemeralContainerStatuses"][0];
        same(status["state"]["terminated"]["exitCode"].as_i64(), Some(4))
            .map_err(|e| format!("{e}: {status}"))?;
        Ok(pod)
    });
    assert!(t.kubectl.run(&["logs", "pod", "-c", "look"]).contains("trap"));
    assert_eq!(condition(&pod, "Ready")["status"], "True", "{pod}");
    assert_eq!(
        (&pod["status"]["phase"], &identity(&pod)),
        (&json!("Running"), &identity(&before))
    );
    // Interactively: what is typed goes in, what it says comes out. The input stays open meanwhile: at its end containerd
    // lets go of the output too, unless the container says stdinOnce, which kubectl debug never does.
    let mut debug = t
        .kubectl
        .command(&[
            "debug",
            "-i",
            "pod",
            "--image",
            &image,
            "--image-pull-policy=Never",
            "--container=talk",
            "--quiet",
            "--",
            "sh",
            "-c",
            "read word; echo got $word",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("kubectl runs");
    let mut typed = debug.stdin.take().expect("stdin is piped");
    typed.write_all(b"ahoy\n").expect("kubectl reads");
    let mut said = String::new();
    let mut out = debug.stdout.take().expect("stdout is piped");
    // Ends with the container.
    out.read_to_string(&mut said).expect("kubectl prints text");
    drop(typed);
    let _ = debug.wait();
    assert!(said.contains("got ahoy"), "{said}");
}
