//! Security settings of a pod are honoured or refused, never left out.

use serde_json::{Value, json};
use skerry_tests::pods::{event, output, phase, waiting};
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::Runtime;
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    let containerd = |name, run| Scenario::on(Runtime::Containerd, name, run);
    [
        Scenario::each(
            "a pod that this node cannot confine as asked fails with the reason",
            refusals,
        ),
        Scenario::each(
            "a user namespace that the runtime lacks is refused by an event",
            user_namespace,
        ),
        containerd(
            "a RuntimeClass chooses the handler, one that is not there is named",
            runtime_class,
        ),
        containerd(
            "a mount that cannot be as read-only as asked is refused",
            recursive_readonly,
        ),
        containerd(
            "an image volume that the runtime cannot mount is refused",
            image_volume,
        ),
        containerd(
            "a container gets the users, groups and kernel parameters it asks for",
            identity,
        ),
        containerd(
            "a container that must not be root is not started as root",
            non_root,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn confined(context: Value) -> Value {
    json!({"restartPolicy": "Never", "securityContext": context, "containers": [{"command": ["true"]}]})
}

fn failed(t: &Test<'_>, name: &str, context: Value, reason: &str, message: &str) {
    t.kubectl.apply(&t.site().pod(name, confined(context)));
    let pod = phase(&t.kubectl, name, "Failed");
    assert_eq!(pod["status"]["reason"], reason, "{}", pod["status"]);
    assert!(
        pod["status"]["message"]
            .as_str()
            .unwrap_or_default()
            .contains(message),
        "{}",
        pod["status"]
    );
    let said = event(&t.kubectl, name, reason);
    assert!(said.contains(message), "{said}");
}

fn refusals(t: &Test<'_>) {
    failed(
        t,
        "sysctl",
        json!({"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}),
        "SysctlForbidden",
        "forbidden sysctl: \"kernel.msgmax\" not allowlisted",
    );
    if !std::path::Path::new("/sys/kernel/security/apparmor").exists() {
        failed(
            t,
            "apparmor",
            json!({"appArmorProfile": {"type": "RuntimeDefault"}}),
            "AppArmor",
            "Cannot enforce AppArmor: AppArmor is not enabled on the host",
        );
    }
    let node = t.kubectl.get("node", t.site().name()).unwrap();
    if node["status"]["features"]["supplementalGroupsPolicy"] != true {
        failed(
            t,
            "groups",
            json!({"supplementalGroupsPolicy": "Strict"}),
            "SupplementalGroupsPolicyNotSupported",
            "SupplementalGroupsPolicy=Strict is not supported in this node",
        );
    }
}

/// Whether the default handler of the site's runtime says that it can do that.
fn handler_can(t: &Test<'_>, feature: &str) -> bool {
    let node = t.kubectl.get("node", t.site().name()).unwrap();
    let handlers = node["status"]["runtimeHandlers"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    handlers
        .iter()
        .any(|h| h["name"].as_str().unwrap_or_default().is_empty() && h["features"][feature] == true)
}

fn user_namespace(t: &Test<'_>) {
    if handler_can(t, "userNamespaces") {
        return;
    }
    let spec = json!({"hostUsers": false, "containers": [{"command": ["true"]}]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    assert_eq!(
        event(&t.kubectl, "pod", "FailedCreatePodSandBox"),
        "Failed to create pod sandbox: can't set `spec.hostUsers: false`, runtime does not support user namespaces"
    );
    assert_eq!(t.kubectl.get("pod", "pod").unwrap()["status"]["phase"], "Pending");
}

fn runtime_class(t: &Test<'_>) {
    let class = |suffix: &str, handler: &str| {
        let name = t.name(suffix);
        let object = json!({"apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": name},
            "handler": handler});
        t.kubectl.apply(&object.to_string());
        name
    };
    let pod = |name: &str, class: &str| {
        let spec = json!({"restartPolicy": "Never", "runtimeClassName": class,
            "containers": [{"command": ["echo", "handled"]}]});
        t.kubectl.apply(&t.site().pod(name, spec));
    };
    pod("known", &class("known", "runc"));
    assert_eq!(output(&t.kubectl, "known"), "handled\n");
    pod("unknown", &class("unknown", "no-such-handler"));
    let message = event(&t.kubectl, "unknown", "FailedCreatePodSandBox");
    assert!(message.contains("no-such-handler"), "{message}");
}

fn config_error(t: &Test<'_>, name: &str, message: &str) {
    eventually(SOON, "the container is refused", || {
        let pod = t.kubectl.get("pod", name)?;
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        same(waiting["reason"].as_str(), Some("CreateContainerConfigError"))?;
        let found = waiting["message"].as_str().unwrap_or_default();
        if found.contains(message) {
            Ok(())
        } else {
            Err(found.to_owned())
        }
    });
}

fn recursive_readonly(t: &Test<'_>) {
    if handler_can(t, "recursiveReadOnlyMounts") {
        return;
    }
    let spec = json!({"volumes": [{"name": "v", "emptyDir": {}}], "containers": [{"command": ["true"],
        "volumeMounts": [{"name": "v", "mountPath": "/v", "readOnly": true, "recursiveReadOnly": "Enabled"}]}]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    config_error(
        t,
        "pod",
        "volume \"v\" requested recursive read-only mode, but it is not supported by the runtime",
    );
}

fn image_volume(t: &Test<'_>) {
    let node = t.kubectl.get("node", t.site().name()).unwrap();
    if node["status"]["features"]["supplementalGroupsPolicy"] == true {
        return; // Of an age with image volumes.
    }
    let spec = json!({"volumes": [{"name": "v", "image": {"reference": skerry_tests::site::IMAGE}}],
        "containers": [{"command": ["true"], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    let status = waiting(&t.kubectl, "pod", &["ImageVolumeMountFailed"]);
    let message = status["state"]["waiting"]["message"].as_str().unwrap_or_default();
    assert!(message.contains("cannot mount images"), "{message}");
}

fn identity(t: &Test<'_>) {
    let spec = json!({"restartPolicy": "Never",
        "securityContext": {"runAsGroup": 3333, "fsGroup": 4444, "supplementalGroups": [5555],
            "sysctls": [{"name": "net/ipv4/tcp_syncookies", "value": "0"}]},
        "containers": [{"command": ["sh", "-c", "id -u; id -g; id -G; cat /proc/sys/net/ipv4/tcp_syncookies"]}]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    let said = output(&t.kubectl, "pod");
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!((lines[0], lines[1], lines[3]), ("0", "3333", "0"), "{said}");
    for group in ["3333", "4444", "5555"] {
        assert!(lines[2].split(' ').any(|g| g == group), "{said}");
    }
}

fn non_root(t: &Test<'_>) {
    t.kubectl
        .apply(&t.site().pod("pod", confined(json!({"runAsNonRoot": true}))));
    config_error(
        t,
        "pod",
        "container has runAsNonRoot and image will run as root (pod: \"pod_",
    );
}
