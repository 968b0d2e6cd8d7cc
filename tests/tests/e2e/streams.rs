//! kubectl logs and kubectl exec, through the API server and the provider's kubelet endpoint.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use serde_json::json;
use skerry_tests::kubectl::condition;
use skerry_tests::pods::{phase, ready};
use skerry_tests::process::text;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::wait::{SOON, eventually};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each(
            "kubectl logs shows all, the tail, recent lines, with timestamps",
            logs,
        ),
        Scenario::each("kubectl logs -f follows a container to its end", follow),
        Scenario::each("kubectl logs --previous shows the instance before", previous),
        Scenario::each("kubectl logs of one container of several", container),
        Scenario::each(
            "kubectl logs of a pod that has not started says why there are none",
            not_started,
        ),
        Scenario::each("kubectl exec passes output, errors and the exit code", exec),
        Scenario::each("kubectl exec -i passes standard input", exec_stdin),
        Scenario::each("kubectl exec -it has a terminal with the user's size", exec_tty),
        Scenario::each(
            "kubectl exec of a program that is not there fails clearly",
            exec_missing,
        ),
        Scenario::each(
            "kubectl attach shows output from then on and passes standard input",
            attach,
        ),
        Scenario::each("kubectl attach -it has the container's terminal", attach_tty),
        Scenario::each("kubectl run --rm -i runs a command and leaves no pod", run_rm),
        Scenario::each(
            "kubectl port-forward reaches a port of the pod, and a closed one says so",
            port_forward,
        ),
        Scenario::each("kubectl cp copies a directory there and back", copy),
        Scenario::once("the kubelet endpoint turns strangers away", strangers),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn start(t: &Test<'_>, script: &str) {
    t.kubectl.apply(
        &t.site()
            .pod("pod", json!({"containers": [{"command": ["sh", "-c", script]}]})),
    );
    ready(&t.kubectl, "pod");
}

fn logs(t: &Test<'_>) {
    start(
        t,
        "for i in 1 2 3 4 5; do echo line $i; done; echo error >&2; sleep 1000",
    );
    eventually(SOON, "all lines are there", || {
        let text = t.kubectl.attempt(&["logs", "pod"])?;
        let mut lines: Vec<_> = text.lines().collect();
        lines.sort_unstable();
        skerry_tests::wait::same(
            lines,
            vec!["error", "line 1", "line 2", "line 3", "line 4", "line 5"],
        )
    });
    assert_eq!(t.kubectl.run(&["logs", "pod", "--tail", "2"]).lines().count(), 2);
    assert_eq!(t.kubectl.run(&["logs", "pod", "--tail", "0"]), "");
    assert_eq!(
        t.kubectl.run(&["logs", "pod", "--since", "1h"]).lines().count(),
        6
    );
    assert_eq!(
        t.kubectl
            .run(&["logs", "pod", "--since-time", "2099-01-01T00:00:00Z"]),
        ""
    );
    assert_eq!(t.kubectl.run(&["logs", "pod", "--limit-bytes", "4"]).len(), 4);
    for line in t.kubectl.run(&["logs", "pod", "--timestamps"]).lines() {
        let (time, _) = line.split_once(' ').unwrap();
        assert!(
            time.starts_with("20") && time.contains('T') && time.len() >= 20,
            "{line}"
        );
    }
}

fn follow(t: &Test<'_>) {
    start(
        t,
        "i=0; while [ $i -lt 5 ]; do i=$((i+1)); echo line $i; sleep 0.5; done; sleep 1; exit 0",
    );
    let mut command = t.kubectl.command(&["logs", "-f", "pod"]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines: Vec<_> = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok)
        .collect();
    assert!(child.wait().unwrap().success());
    assert_eq!(lines, ["line 1", "line 2", "line 3", "line 4", "line 5"]);
}

fn previous(t: &Test<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let spec = json!({
        "containers": [{"command": ["sh", "-c", "echo x >> /h/n; echo life $(wc -l < /h/n); [ $(wc -l < /h/n) -gt 1 ] || exit 1; sleep 1000"],
            "volumeMounts": [{"name": "h", "mountPath": "/h"}]}],
        "volumes": [{"name": "h", "hostPath": {"path": dir.path()}}],
    });
    t.kubectl.apply(&t.site().pod("pod", spec));
    eventually(SOON, "the second instance runs", || {
        let pod = t.kubectl.get("pod", "pod")?;
        let status = &pod["status"]["containerStatuses"][0];
        if status["restartCount"] == 1 && status["ready"] == true {
            Ok(())
        } else {
            Err(pod["status"].to_string())
        }
    });
    assert_eq!(t.kubectl.run(&["logs", "pod"]), "life 2\n");
    assert_eq!(t.kubectl.run(&["logs", "pod", "--previous"]), "life 1\n");
}

fn container(t: &Test<'_>) {
    let spec = json!({"restartPolicy": "Never", "containers": [
        {"name": "a", "command": ["sh", "-c", "echo from a"]},
        {"name": "b", "command": ["sh", "-c", "echo from b"]},
    ]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    phase(&t.kubectl, "pod", "Succeeded");
    assert_eq!(t.kubectl.run(&["logs", "pod", "-c", "b"]), "from b\n");
    assert_eq!(
        t.kubectl
            .run(&["logs", "pod", "--all-containers", "--prefix"])
            .lines()
            .count(),
        2
    );
}

fn not_started(t: &Test<'_>) {
    let spec = json!({
        "containers": [{"command": ["true"], "volumeMounts": [{"name": "c", "mountPath": "/c"}]}],
        "volumes": [{"name": "c", "configMap": {"name": "absent"}}],
    });
    t.kubectl.apply(&t.site().pod("pod", spec));
    skerry_tests::pods::waiting(&t.kubectl, "pod", &["ContainerCreating"]);
    let message = t.kubectl.attempt(&["logs", "pod"]).unwrap_err();
    assert!(
        message.contains("is waiting to start: ContainerCreating"),
        "{message}"
    );
}

fn exec(t: &Test<'_>) {
    start(t, "sleep 1000");
    let out = t
        .kubectl
        .output(&["exec", "pod", "--", "sh", "-c", "echo out; echo err >&2; exit 3"]);
    assert_eq!(String::from_utf8_lossy(&out.stdout), "out\n");
    assert!(
        String::from_utf8_lossy(&out.stderr).starts_with("err\n"),
        "{}",
        text(&out)
    );
    assert_eq!(out.status.code(), Some(3));
    // More than any buffer on the way.
    let out = t.kubectl.output(&[
        "exec",
        "pod",
        "--",
        "sh",
        "-c",
        "head -c 3000000 /dev/zero | tr '\\0' x",
    ]);
    assert_eq!(
        out.stdout.len(),
        3_000_000,
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

fn exec_stdin(t: &Test<'_>) {
    start(t, "sleep 1000");
    let input = "abc\n".repeat(50_000);
    let out = t
        .kubectl
        .output_with(&["exec", "-i", "pod", "--", "wc", "-c"], &input);
    assert!(out.status.success(), "{}", text(&out));
    assert_eq!(
        String::from_utf8_lossy(&out.stdout).trim(),
        input.len().to_string()
    );
}

fn exec_tty(t: &Test<'_>) {
    start(t, "sleep 1000");
    let kubectl = t.kubectl.command(&["exec", "-it", "pod", "--", "sh"]);
    let words = [kubectl.get_program()].into_iter().chain(kubectl.get_args());
    let line: Vec<_> = words.map(|w| format!("'{}'", w.to_str().unwrap())).collect();
    // script(1) gives kubectl the terminal that it wants, of the size that stty sets.
    let line = format!("stty rows 33 cols 77; {}", line.join(" "));
    let mut child = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script(1) runs");
    let mut stdin = child.stdin.take().unwrap();
    // The size is sent after the start: ask until it is there.
    let commands = "tty; i=0; while [ $i -lt 100 ]; do [ \"$(stty size)\" = '33 77' ] && break; i=$((i+1)); sleep 0.1; done\nstty size; exit 5\n";
    stdin.write_all(commands.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    drop(stdin);
    let shown = String::from_utf8_lossy(&out.stdout);
    assert!(
        shown.contains("/dev/pts/") || shown.contains("/dev/console"),
        "{shown}"
    );
    assert!(shown.lines().any(|l| l.trim_end().ends_with("33 77")), "{shown}");
    assert_eq!(out.status.code(), Some(5), "{shown}");
}

fn exec_missing(t: &Test<'_>) {
    start(t, "sleep 1000");
    let out = t.kubectl.output(&["exec", "pod", "--", "no-such-program"]);
    assert!(!out.status.success());
    assert!(text(&out).contains("no-such-program"), "{}", text(&out));
    let out = t.kubectl.output(&["exec", "pod", "-c", "nobody", "--", "true"]);
    assert!(text(&out).contains("nobody"), "{}", text(&out));
    assert_eq!(
        condition(&t.kubectl.get("pod", "pod").unwrap(), "Ready")["status"],
        "True"
    );
}

fn attach(t: &Test<'_>) {
    // Says what it is told; its standard input stays open when a client goes.
    let script = "echo before; while read line; do echo got $line; done; echo over";
    let container = json!({"command": ["sh", "-c", script], "stdin": true});
    t.kubectl
        .apply(&t.site().pod("pod", json!({"containers": [container]})));
    ready(&t.kubectl, "pod");
    for word in ["one", "two"] {
        let mut child = t
            .kubectl
            .command(&["attach", "-i", "pod"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        writeln!(stdin, "{word}").unwrap();
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        assert_eq!(line, format!("got {word}\n"));
        // The client goes; the container stays for the next one.
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let pod = t.kubectl.get("pod", "pod").unwrap();
    let status = &pod["status"]["containerStatuses"][0];
    assert!(
        status["state"]["running"].is_object() && status["restartCount"] == 0,
        "{status}"
    );
    assert_eq!(t.kubectl.run(&["logs", "pod"]), "before\ngot one\ngot two\n");
}

/// Runs kubectl on a terminal of its own, which script(1) makes, and types `input`; what the terminal showed.
fn on_terminal(t: &Test<'_>, args: &[&str], input: &str) -> (String, Option<i32>) {
    let kubectl = t.kubectl.command(args);
    let words = [kubectl.get_program()].into_iter().chain(kubectl.get_args());
    let line: Vec<_> = words.map(|w| format!("'{}'", w.to_str().unwrap())).collect();
    let line = format!("stty rows 33 cols 77; {}", line.join(" "));
    let mut child = Command::new("script")
        .args(["-qec", &line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script(1) runs");
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    let out = child.wait_with_output().unwrap();
    drop(stdin);
    (
        String::from_utf8_lossy(&out.stdout).into_owned(),
        out.status.code(),
    )
}

fn attach_tty(t: &Test<'_>) {
    let container = json!({"command": ["sh"], "stdin": true, "tty": true, "stdinOnce": true});
    t.kubectl.apply(&t.site().pod(
        "pod",
        json!({"restartPolicy": "Never", "containers": [container]}),
    ));
    ready(&t.kubectl, "pod");
    // The size is sent after the start: ask until it is there.
    let input = "i=0; while [ $i -lt 100 ]; do [ \"$(stty size)\" = '33 77' ] && break; i=$((i+1)); sleep 0.1; done\necho size is $(stty size); exit 0\n";
    let (shown, _) = on_terminal(t, &["attach", "-it", "pod"], input);
    assert!(shown.contains("size is 33 77"), "{shown}");
    phase(&t.kubectl, "pod", "Succeeded");
}

fn run_rm(t: &Test<'_>) {
    let node = json!({"spec": {"nodeSelector": {"kubernetes.io/hostname": t.site().name()}}}).to_string();
    let image = format!("--image={}", skerry_tests::site::IMAGE);
    let overrides = format!("--overrides={node}");
    let out = t.kubectl.output_with(
        &[
            "run",
            "once",
            "--rm",
            "-i",
            "--restart=Never",
            "--quiet",
            &image,
            &overrides,
            "--command",
            "--",
            "sh",
            "-c",
            "cat; echo the end",
        ],
        "typed\n",
    );
    assert!(out.status.success(), "{}", text(&out));
    let shown = String::from_utf8_lossy(&out.stdout);
    assert!(shown.contains("the end"), "{}", text(&out));
    skerry_tests::pods::gone(&t.kubectl, "once");
}

fn port_forward(t: &Test<'_>) {
    // On the process runtime the port is the host's: take one that is free.
    let port = skerry_tests::process::free_port();
    let closed = skerry_tests::process::free_port();
    let busybox = match t.runtime {
        skerry_tests::site::Runtime::Containerd => "",
        skerry_tests::site::Runtime::Process => "busybox ",
    };
    let script = format!("while true; do echo hello from the pod | {busybox}nc -l -p {port}; done");
    start(t, &script);
    let forward = |remote: u16| {
        let mut child = t
            .kubectl
            .command(&[
                "port-forward",
                "--address=127.0.0.1",
                "pod/pod",
                &format!(":{remote}"),
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        // Forwarding from 127.0.0.1:40001 -> 8080
        out.read_line(&mut line).unwrap();
        let local = line.split_once("127.0.0.1:").expect(&line).1;
        let local: u16 = local.split(' ').next().unwrap().parse().unwrap();
        (child, out, local)
    };
    let greet = |port: u16| {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(SOON)).unwrap();
        let mut greeting = String::new();
        let read = std::io::Read::read_to_string(&mut stream, &mut greeting);
        read.map(|_| greeting).map_err(|e| e.to_string())
    };
    // Between two greetings nobody listens, which ends a kubectl: each has one of its own.
    for _ in 0..2 {
        eventually(SOON, "the port answers", || {
            let (mut child, _out, local) = forward(port);
            let text = greet(local);
            child.kill().unwrap();
            child.wait().unwrap();
            skerry_tests::wait::same(text?.as_str(), "hello from the pod\n")
        });
    }
    let (mut child, _out, local) = forward(closed);
    assert_ne!(greet(local).unwrap_or_default(), "hello from the pod\n");
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.to_lowercase().contains("refused") {
        assert!(errors.read_line(&mut said).unwrap() > 0, "{said}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

fn copy(t: &Test<'_>) {
    let spec = json!({
        "containers": [{"command": ["sleep", "1000"], "volumeMounts": [{"name": "d", "mountPath": "/data"}]}],
        "volumes": [{"name": "d", "emptyDir": {}}],
    });
    t.kubectl.apply(&t.site().pod("pod", spec));
    ready(&t.kubectl, "pod");
    let dir = tempfile::tempdir().unwrap();
    let there = dir.path().join("there");
    std::fs::create_dir_all(there.join("deep")).unwrap();
    let big: Vec<u8> = (0..2_000_000_u32).map(|i| i.to_le_bytes()[0]).collect();
    std::fs::write(there.join("deep/big"), &big).unwrap();
    std::fs::write(there.join("empty"), "").unwrap();
    let back = dir.path().join("back");
    t.kubectl.run(&["cp", there.to_str().unwrap(), "pod:/data/copy"]);
    t.kubectl.run(&["cp", "pod:/data/copy", back.to_str().unwrap()]);
    assert!(
        std::fs::read(back.join("deep/big")).unwrap() == big,
        "the copy differs"
    );
    assert_eq!(std::fs::read(back.join("empty")).unwrap(), b"");
}

fn strangers(t: &Test<'_>) {
    start(t, "echo secret; sleep 1000");
    let node = t.kubectl.get("node", t.site().name()).unwrap();
    let address = node["status"]["addresses"][0]["address"].as_str().unwrap();
    let port = &node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"];
    let pod = t.kubectl.get("pod", "pod").unwrap();
    let path = format!(
        "/containerLogs/{}/pod/c0",
        pod["metadata"]["namespace"].as_str().unwrap()
    );
    let url = format!("https://{address}:{port}");
    let ask = |token: &str| {
        // A kubeconfig of nobody: with the administrator's, kubectl would present the certificate.
        let file = tempfile::NamedTempFile::new().unwrap();
        let nobody = skerry_tests::kubectl::Kubectl::new(file.path().to_owned());
        nobody.attempt(&[
            "--server",
            &url,
            "--insecure-skip-tls-verify",
            "--token",
            token,
            "get",
            "--raw",
            &path,
        ])
    };
    let message = ask("nonsense").unwrap_err();
    // kubectl's words for 401.
    assert!(message.contains("provide credentials"), "{message}");
    let default = t.kubectl.run(&["create", "token", "default"]);
    let message = ask(default.trim()).unwrap_err();
    assert!(message.to_lowercase().contains("forbidden"), "{message}");
    let role = t.name("logs-reader");
    t.kubectl.run(&[
        "create",
        "clusterrole",
        &role,
        "--verb=get",
        "--resource=nodes/proxy",
    ]);
    let subject = format!(
        "--serviceaccount={}:default",
        pod["metadata"]["namespace"].as_str().unwrap()
    );
    t.kubectl.run(&[
        "create",
        "clusterrolebinding",
        &role,
        &format!("--clusterrole={role}"),
        &subject,
    ]);
    // The endpoint remembers a refusal for up to half a minute.
    eventually(
        SOON,
        "the ServiceAccount may read logs once a role allows it",
        || {
            let text = ask(default.trim())?;
            skerry_tests::wait::same(text.as_str(), "secret\n")
        },
    );
    t.kubectl
        .run(&["delete", "clusterrole,clusterrolebinding", &role]);
}
