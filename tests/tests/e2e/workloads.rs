//! What controllers make, the scheduler places and a site runs.

use serde_json::json;
use skerry_tests::pods::output;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each("a Deployment rolls out, scales and goes", deployment),
        Scenario::each("a DaemonSet has its pod on the site", daemon_set),
        Scenario::each("a Job completes", job),
        Scenario::once("the scheduler does not place what does not fit", too_large),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn count(t: &Test<'_>, wanted: usize) {
    eventually(SOON, &format!("{wanted} pods are there"), || {
        same(t.kubectl.list("pods", &["-l", "app=w"])?.len(), wanted)
    });
}

fn template(t: &Test<'_>, script: &str) -> serde_json::Value {
    let spec = t
        .site()
        .complete(json!({"containers": [{"command": ["sh", "-c", script]}]}));
    json!({"metadata": {"labels": {"app": "w"}}, "spec": spec})
}

fn deployment(t: &Test<'_>) {
    let object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": {
        "replicas": 2, "selector": {"matchLabels": {"app": "w"}}, "template": template(t, "sleep 1000"),
    }});
    t.kubectl.apply(&object.to_string());
    t.kubectl
        .run(&["rollout", "status", "deployment/web", "--timeout", "60s"]);
    t.kubectl.run(&["scale", "deployment/web", "--replicas", "1"]);
    count(t, 1);
    t.kubectl.run(&["set", "env", "deployment/web", "COLOUR=blue"]);
    t.kubectl
        .run(&["rollout", "status", "deployment/web", "--timeout", "60s"]);
    t.kubectl.run(&["delete", "deployment", "web"]);
    count(t, 0);
}

fn daemon_set(t: &Test<'_>) {
    let object = json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "agent"}, "spec": {
        "selector": {"matchLabels": {"app": "w"}}, "template": template(t, "sleep 1000"),
    }});
    t.kubectl.apply(&object.to_string());
    t.kubectl
        .run(&["rollout", "status", "daemonset/agent", "--timeout", "60s"]);
    let pods = t.kubectl.list("pods", &["-l", "app=w"]).unwrap();
    assert_eq!(pods.len(), 1);
    assert_eq!(pods[0]["spec"]["nodeName"], t.site().name());
}

fn job(t: &Test<'_>) {
    let mut template = template(t, "echo counted");
    template["spec"]["restartPolicy"] = json!("Never");
    let object = json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "sum"}, "spec": {
        "completions": 2, "parallelism": 1, "template": template,
    }});
    t.kubectl.apply(&object.to_string());
    t.kubectl.run(&[
        "wait",
        "--for",
        "condition=Complete",
        "job/sum",
        "--timeout",
        "60s",
    ]);
    let pods = t.kubectl.list("pods", &["-l", "app=w"]).unwrap();
    assert_eq!(pods.len(), 2);
    assert_eq!(
        output(&t.kubectl, pods[0]["metadata"]["name"].as_str().unwrap()),
        "counted\n"
    );
}

fn too_large(t: &Test<'_>) {
    let spec = json!({"containers": [{"command": ["true"], "resources": {"requests": {"cpu": "100000"}}}]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    let message = skerry_tests::pods::event(&t.kubectl, "pod", "FailedScheduling");
    assert!(message.contains("Insufficient cpu"), "{message}");
}
