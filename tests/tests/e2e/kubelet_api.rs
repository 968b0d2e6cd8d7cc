//! The kubelet API about whole nodes: measurements, lists, settings, and who may read them.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use skerry_tests::certificate;
use skerry_tests::kubectl::Kubectl;
use skerry_tests::metrics_server::MetricsServer;
use skerry_tests::pods::ready;
use skerry_tests::process::text;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{Runtime, Site};
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::on(
            Runtime::Containerd,
            "kubectl top shows nodes and pods, on both runtimes, with an unmodified metrics-server",
            top,
        ),
        Scenario::each(
            "a node's summary and metrics measure its pods, through the API server's proxy",
            measurements,
        ),
        Scenario::each("a node lists its own pods, as ordered and as they run", lists),
        Scenario::each("a node runs a command, and refuses what it does not do", run),
        Scenario::once("a node's metrics count calls, starts and itself", own_metrics),
        Scenario::once(
            "the kubelet endpoint takes up the cluster's certificates as they are approved, and drops no stream",
            serving_certificate,
        ),
        Scenario::once(
            "a node may be read by whom the kubelet's rules allow",
            permissions,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A path of the node, through the API server.
fn proxied(kubectl: &Kubectl, node: &str, path: &str) -> Result<String, String> {
    kubectl.attempt(&["get", "--raw", &format!("/api/v1/nodes/{node}/proxy{path}")])
}

fn json_of(kubectl: &Kubectl, node: &str, path: &str) -> Result<Value, String> {
    serde_json::from_str(&proxied(kubectl, node, path)?).map_err(|e| format!("{path}: {e}"))
}

/// A pod that works and writes.
fn start(t: &Test<'_>, name: &str) {
    let script = "head -c 300000 /dev/zero > /data/file; while true; do i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 0.1; done";
    let spec = json!({
        "containers": [{"command": ["sh", "-c", script], "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
        "volumes": [{"name": "data", "emptyDir": {}}],
    });
    t.kubectl.apply(&t.site().pod(name, spec));
    ready(&t.kubectl, name);
}

fn namespace(t: &Test<'_>, pod: &str) -> String {
    let pod = t.kubectl.get("pod", pod).unwrap();
    pod["metadata"]["namespace"].as_str().unwrap().to_owned()
}

fn measurements(t: &Test<'_>) {
    start(t, "pod");
    let (node, namespace) = (t.site().name(), namespace(t, "pod"));
    let mine = |summary: &Value| {
        let pods = summary["pods"].as_array().cloned().unwrap_or_default();
        let found = pods
            .into_iter()
            .find(|pod| pod["podRef"]["name"] == "pod" && pod["podRef"]["namespace"] == namespace.as_str());
        found.ok_or_else(|| format!("no such pod in {summary}"))
    };
    // The first look at a pod may come before it has used anything, and a rate needs two.
    let (summary, pod) = eventually(SOON, "the pod is measured", || {
        let summary = json_of(&t.kubectl, node, "/stats/summary")?;
        let pod = mine(&summary)?;
        let container = &pod["containers"][0];
        let wanted = [
            &container["cpu"]["usageCoreNanoSeconds"],
            &container["cpu"]["usageNanoCores"],
            &container["memory"]["workingSetBytes"],
            &pod["cpu"]["usageCoreNanoSeconds"],
            &pod["memory"]["workingSetBytes"],
            &pod["ephemeral-storage"]["usedBytes"],
            &pod["volume"][0]["usedBytes"],
        ];
        match wanted.iter().all(|value| value.as_u64().is_some_and(|n| n > 0)) {
            true => Ok((summary.clone(), pod)),
            false => Err(pod.to_string()),
        }
    });
    assert_eq!(summary["node"]["nodeName"], node);
    let volumes = pod["volume"].as_array().unwrap();
    let data = volumes.iter().find(|volume| volume["name"] == "data");
    assert!(data.unwrap()["usedBytes"].as_u64().unwrap() >= 300_000, "{pod}");
    for field in ["cpu", "memory", "fs", "network", "rlimit", "swap", "runtime"] {
        assert!(
            summary["node"][field].is_object(),
            "{field} in {}",
            summary["node"]
        );
    }
    if t.runtime == Runtime::Containerd {
        assert!(pod["network"]["interfaces"][0]["rxBytes"].is_u64(), "{pod}");
    }
    let brief = json_of(&t.kubectl, node, "/stats/summary?only_cpu_and_memory=true").unwrap();
    let brief_pod = mine(&brief).unwrap();
    assert!(
        brief_pod["memory"].is_object() && brief_pod.get("volume").is_none(),
        "{brief_pod}"
    );

    let resource = proxied(&t.kubectl, node, "/metrics/resource").unwrap();
    let labels = format!("container=\"c0\",namespace=\"{namespace}\",pod=\"pod\"");
    for (name, timed) in [
        ("container_cpu_usage_seconds_total", true),
        ("container_memory_working_set_bytes", true),
        ("container_start_time_seconds", false),
    ] {
        let start = format!("{name}{{{labels}}} ");
        let line = resource.lines().find_map(|line| line.strip_prefix(&start));
        let words: Vec<&str> = line
            .unwrap_or_else(|| panic!("{start} in {resource}"))
            .split(' ')
            .collect();
        assert!(words[0].parse::<f64>().unwrap() > 0.0, "{words:?}");
        // Milliseconds since 1970.
        assert_eq!(
            words.get(1).map(|time| time.len()),
            timed.then_some(13),
            "{name} {words:?}"
        );
    }
    assert!(resource.contains("\nresource_scrape_error 0\n"), "{resource}");

    let cadvisor = proxied(&t.kubectl, node, "/metrics/cadvisor").unwrap();
    for name in [
        "container_cpu_usage_seconds_total{",
        "container_memory_working_set_bytes{",
    ] {
        let line = cadvisor.lines().find(|line| {
            line.starts_with(name) && line.contains("container=\"c0\"") && line.contains(&namespace)
        });
        assert!(line.is_some(), "{name} in {cadvisor}");
    }
    assert!(cadvisor.contains("\nmachine_cpu_cores{"), "{cadvisor}");
}

fn lists(t: &Test<'_>) {
    start(t, "pod");
    let (node, namespace) = (t.site().name(), namespace(t, "pod"));
    let names = |list: &Value| -> BTreeSet<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let pods = list["items"].as_array().cloned().unwrap_or_default();
        let names = pods.iter().map(|pod| &pod["metadata"]);
        names
            .map(|of| (text(&of["namespace"]), text(&of["name"])))
            .collect()
    };
    let mine = (namespace, "pod".to_owned());
    let ordered = json_of(&t.kubectl, node, "/pods").unwrap();
    assert_eq!(
        (&ordered["kind"], &ordered["apiVersion"]),
        (&json!("PodList"), &json!("v1"))
    );
    assert!(names(&ordered).contains(&mine));
    for pod in ordered["items"].as_array().unwrap() {
        assert_eq!(pod["spec"]["nodeName"], node, "{pod}");
    }
    let running = json_of(&t.kubectl, node, "/runningpods/").unwrap();
    assert!(names(&running).contains(&mine), "{running}");

    let config = json_of(&t.kubectl, node, "/configz").unwrap();
    assert_eq!(config["kubeletconfig"]["maxPods"], 110, "{config}");
    assert_eq!(proxied(&t.kubectl, node, "/healthz").unwrap(), "ok");
    assert_eq!(proxied(&t.kubectl, node, "/healthz/syncloop").unwrap(), "ok");

    // No two nodes share a port: it is what tells them apart.
    let nodes = t.kubectl.list("nodes", &["-l", "edge.skerry.dev/site"]).unwrap();
    let ports: BTreeSet<String> = nodes
        .iter()
        .map(|node| node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"].to_string())
        .collect();
    assert_eq!(ports.len(), nodes.len(), "{ports:?}");
}

fn run(t: &Test<'_>) {
    start(t, "pod");
    let (node, namespace) = (t.site().name(), namespace(t, "pod"));
    let post = |path: &str| {
        let path = format!("/api/v1/nodes/{node}/proxy{path}");
        t.kubectl.output_with(&["create", "--raw", &path, "-f", "-"], "")
    };
    let out = post(&format!("/run/{namespace}/pod/c0?cmd=echo+hello"));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "hello\n", "{}", text(&out));
    let uid = t.kubectl.get("pod", "pod").unwrap()["metadata"]["uid"].clone();
    let uid = uid.as_str().unwrap();
    let out = post(&format!("/run/{namespace}/pod/{uid}/c0?cmd=echo+again"));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "again\n", "{}", text(&out));
    for (path, words) in [
        (format!("/run/{namespace}/pod/c0?cmd=false"), "exited with 1"),
        (format!("/run/{namespace}/pod/c0"), "BadRequest"),
        (
            format!("/run/{namespace}/pod/wrong-uid/c0?cmd=true"),
            "could not find",
        ),
        (
            format!("/checkpoint/{namespace}/pod/c0"),
            "does not support checkpoints",
        ),
    ] {
        let out = post(&path);
        assert!(
            !out.status.success() && text(&out).contains(words),
            "{path}: {}",
            text(&out)
        );
    }
    let refused = proxied(&t.kubectl, node, "/logs/").unwrap_err();
    assert!(refused.contains("does not serve /logs/"), "{refused}");
    let missing = proxied(&t.kubectl, node, "/no-such-thing").unwrap_err();
    assert!(missing.contains("not"), "{missing}");
}

fn own_metrics(t: &Test<'_>) {
    // A site of its own, on containerd, so that its counters are its own.
    let site = Site::start(t.cluster, &t.name("counted"), Runtime::Containerd);
    t.kubectl
        .apply(&site.pod("pod", json!({"containers": [{"command": ["sleep", "1000"]}]})));
    ready(&t.kubectl, "pod");
    let metrics = eventually(SOON, "the start is counted", || {
        let metrics = proxied(&t.kubectl, site.name(), "/metrics")?;
        match metrics.contains("\nkubelet_pod_start_sli_duration_seconds_count 1\n") {
            true => Ok(metrics),
            false => Err(metrics),
        }
    });
    for wanted in [
        "\nkubelet_running_pods 1\n",
        "\nkubelet_running_containers{container_state=\"running\"} 1\n",
        "\nkubelet_runtime_operations_total{operation_type=\"run_podsandbox\"} 1\n",
        "\nkubelet_runtime_operations_duration_seconds_count{operation_type=\"create_container\"} 1\n",
        "\nprocess_resident_memory_bytes ",
        "\n# TYPE kubelet_runtime_operations_total counter\n",
    ] {
        assert!(metrics.contains(wanted), "{wanted} in {metrics}");
    }
    let node = format!("kubelet_node_name{{node=\"{}\"}} 1", site.name());
    assert!(metrics.contains(&node), "{metrics}");
    let probes = proxied(&t.kubectl, site.name(), "/metrics/probes").unwrap();
    assert!(probes.contains("process_start_time_seconds "), "{probes}");
    let slis = proxied(&t.kubectl, site.name(), "/metrics/slis").unwrap();
    assert!(slis.contains("kubernetes_healthcheck{"), "{slis}");
    t.kubectl.run(&["delete", "pod", "pod", "--wait=true"]);
}

fn top(t: &Test<'_>) {
    let other = Site::start(t.cluster, &t.name("top"), Runtime::Process);
    let server = MetricsServer::start(t.cluster);
    start(t, "on-containerd");
    let busy = json!({"containers": [{"command": ["sh", "-c", "while true; do :; done"]}]});
    t.kubectl.apply(&other.pod("on-process", busy));
    ready(&t.kubectl, "on-process");
    // Two scrapes a quarter of a minute apart make the first value.
    eventually(
        Duration::from_secs(120),
        "kubectl top shows both nodes and pods",
        || {
            let nodes = t.kubectl.attempt(&["top", "node", "--no-headers"])?;
            let pods = t.kubectl.attempt(&["top", "pod", "--no-headers"])?;
            let row = |text: &str, name: &str| {
                let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
                let line = line.ok_or_else(|| format!("no {name} in {text}\n{}", server.log_tail()))?;
                Ok::<_, String>(line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
            };
            for node in [t.site().name(), other.name()] {
                let row = row(&nodes, node)?;
                same(row[1].ends_with('m') && row[3].ends_with("Mi"), true)
                    .map_err(|_| format!("{row:?}"))?;
            }
            for pod in ["on-containerd", "on-process"] {
                let row = row(&pods, pod)?;
                let number = |text: &str| text.trim_end_matches(char::is_alphabetic).parse::<u64>();
                // A busy loop uses more than nothing.
                same(number(&row[1]).is_ok_and(|milli| milli > 0), true).map_err(|_| format!("{row:?}"))?;
                same(number(&row[2]).is_ok(), true).map_err(|_| format!("{row:?}"))?;
            }
            Ok(())
        },
    );
    t.kubectl.run(&["delete", "pod", "on-process", "--wait=true"]);
}

/// The newest request for a serving certificate that nobody has answered.
fn open_request(kubectl: &Kubectl) -> Result<Value, String> {
    let requests = kubectl.list("csr", &[])?;
    let open = requests.into_iter().find(|csr| {
        csr["spec"]["signerName"] == "kubernetes.io/kubelet-serving" && csr["status"]["certificate"].is_null()
    });
    open.ok_or_else(|| "there is none".into())
}

/// Asks the kubelet endpoint as nobody, who trusts that CA: refused either way, but by whom says which certificate is shown.
fn is_shown(server: &str, ca: &std::path::Path) -> Result<(), String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let nobody = Kubectl::new(file.path().to_owned());
    let ca = ca.to_str().unwrap();
    let args = [
        &format!("--server={server}"),
        "--certificate-authority",
        ca,
        "--token",
        "nonsense",
        "get",
        "--raw",
        "/healthz",
    ];
    let answer = nobody.attempt(&args).unwrap_err();
    match answer.contains("provide credentials") {
        true => Ok(()),
        false => Err(answer),
    }
}

fn serving_certificate(t: &Test<'_>) {
    let node = t.kubectl.get("node", t.site().name()).unwrap();
    let address = node["status"]["addresses"][0]["address"].as_str().unwrap();
    let port = &node["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"];
    let server = format!("https://{address}:{port}");
    let ca = t.cluster.dir().join("control-plane/ca.crt");
    let before = is_shown(&server, &ca).unwrap_err();
    assert!(
        before.contains("certificate signed by unknown authority"),
        "{before}"
    );
    // What is open stays open, whatever is shown to those who come later.
    let spec = json!({"containers": [{"command": ["sleep", "1000"]}]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    ready(&t.kubectl, "pod");
    let mut talk = t
        .kubectl
        .command(&["exec", "-i", "pod", "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut say, mut hear) = (
        talk.stdin.take().unwrap(),
        BufReader::new(talk.stdout.take().unwrap()),
    );
    let mut echo = |word: &str| {
        writeln!(say, "{word}").unwrap();
        let mut line = String::new();
        hear.read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), word);
    };
    echo("before");

    // A first certificate, by another signer, whose time for a successor has come.
    let first = eventually(SOON, "the provider has asked for a certificate", || {
        open_request(&t.kubectl)
    });
    let (other_ca, certificate) = certificate::sign_aged(&first);
    let mut signed = first.clone();
    signed["status"] = json!({"certificate": STANDARD.encode(certificate)});
    let name = |request: &Value| request["metadata"]["name"].as_str().unwrap().to_owned();
    let path = format!(
        "/apis/certificates.k8s.io/v1/certificatesigningrequests/{}/status",
        name(&first)
    );
    let out = t
        .kubectl
        .output_with(&["replace", "--raw", &path, "-f", "-"], &signed.to_string());
    assert!(out.status.success(), "{}", text(&out));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), other_ca).unwrap();
    eventually(SOON, "the first certificate is shown", || {
        is_shown(&server, file.path())
    });
    echo("with the first");

    let second = eventually(SOON, "the provider has asked for another", || {
        let request = open_request(&t.kubectl)?;
        if name(&request) == name(&first) {
            Err("that is the first".into())
        } else {
            Ok(request)
        }
    });
    is_shown(&server, file.path()).unwrap();
    t.kubectl.run(&["certificate", "approve", &name(&second)]);
    eventually(SOON, "the certificate of the cluster's signer is shown", || {
        is_shown(&server, &ca)
    });
    is_shown(&server, file.path()).unwrap_err();
    echo("with the second");
    drop(say);
    assert!(talk.wait().unwrap().success());

    let metrics = skerry_tests::cluster::http_get(t.cluster.metrics(), "/metrics")
        .unwrap()
        .1;
    assert!(
        metrics.contains("\nskerry_kubelet_certificate_by_cluster 1\n"),
        "{metrics}"
    );
    let kept = t.kubectl.in_namespace("skerry-system");
    assert_eq!(
        kept.get("secret", "skerry-kubelet-serving").unwrap()["type"],
        "kubernetes.io/tls"
    );
    // Everything else goes on.
    assert_eq!(proxied(&t.kubectl, t.site().name(), "/healthz").unwrap(), "ok");
}

fn permissions(t: &Test<'_>) {
    start(t, "pod");
    let (node, namespace) = (t.site().name(), namespace(t, "pod"));
    let object = t.kubectl.get("node", node).unwrap();
    let address = object["status"]["addresses"][0]["address"].as_str().unwrap();
    let port = &object["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"];
    let url = format!("https://{address}:{port}");
    let ask = |token: &str, path: &str| {
        // A kubeconfig of nobody: with the administrator's, kubectl would present the certificate.
        let file = tempfile::NamedTempFile::new().unwrap();
        let nobody = Kubectl::new(file.path().to_owned());
        nobody.attempt(&[
            "--server",
            &url,
            "--insecure-skip-tls-verify",
            "--token",
            token,
            "get",
            "--raw",
            path,
        ])
    };
    // One account for each right, so that no remembered refusal is in the way.
    let account = |name: &str, resource: &str| {
        t.kubectl.run(&["create", "serviceaccount", name]);
        let role = t.name(name);
        let resource = format!("--resource={resource}");
        t.kubectl
            .run(&["create", "clusterrole", &role, "--verb=get", &resource]);
        let (role_flag, subject) = (
            format!("--clusterrole={role}"),
            format!("--serviceaccount={namespace}:{name}"),
        );
        t.kubectl
            .run(&["create", "clusterrolebinding", &role, &role_flag, &subject]);
        t.kubectl.run(&["create", "token", name]).trim().to_owned()
    };
    let (metrics, stats, pods) = (
        account("metrics", "nodes/metrics"),
        account("stats", "nodes/stats"),
        account("pods", "nodes/pods"),
    );
    let logs = format!("/containerLogs/{namespace}/pod/c0");
    for (token, path, subresources) in [
        (&metrics, "/metrics/resource", None),
        (&metrics, "/metrics", None),
        (&metrics, "/stats/summary", Some("stats")),
        (&metrics, "/pods", Some("pods proxy")),
        (&metrics, "/configz", Some("configz proxy")),
        (&metrics, "/healthz", Some("healthz proxy")),
        (&metrics, logs.as_str(), Some("proxy")),
        (&stats, "/stats/summary", None),
        (&stats, "/metrics/resource", Some("metrics")),
        (&pods, "/pods", None),
        (&pods, "/runningpods/", None),
        (&pods, "/logs/", Some("log")),
    ] {
        match (ask(token, path), subresources) {
            (Ok(_), None) => {}
            (Err(error), Some(wanted)) => {
                let wanted = format!("resource=nodes, subresource(s)=[{wanted}])");
                assert!(
                    error.contains("Forbidden") && error.contains(&wanted),
                    "{path}: {error}"
                );
            }
            (other, wanted) => panic!("{path} answered {other:?}, wanted {wanted:?}"),
        }
    }
    let stranger = ask("nonsense", "/metrics/resource").unwrap_err();
    assert!(stranger.contains("provide credentials"), "{stranger}");
    for name in ["metrics", "stats", "pods"] {
        t.kubectl
            .run(&["delete", "clusterrole,clusterrolebinding", &t.name(name)]);
    }
}
