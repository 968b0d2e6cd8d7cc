//! Pods that come from files of the site.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use skerry_tests::pods::identity;
use skerry_tests::relay::Line;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::{IMAGE, Site};
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each(
            "a static pod follows its file, and its mirror shows it",
            life_of_a_static_pod,
        ),
        Scenario::each(
            "a static pod runs without any cloud, and is shown once there is one",
            without_a_cloud,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A site with a directory of manifests; its daemon is not running yet.
fn site(t: &Test<'_>, name: &str) -> (Site, PathBuf) {
    let mut site = Site::enrol(t.cluster, &t.name(name), t.runtime);
    let directory = site.dir().join("manifests");
    std::fs::create_dir_all(&directory).expect("the directory can be made");
    site.set_flags(&["--static-pod-path", directory.to_str().expect("the path is text")]);
    (site, directory)
}

fn write(directory: &Path, file: &str, namespace: &str, script: &str) {
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "namespace": namespace, "labels": {"app": "web"}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "c0", "image": IMAGE, "command": ["sh", "-c", script]}],
        },
    });
    // Renamed into place, as tools do.
    let aside = directory.join(".new");
    std::fs::write(&aside, pod.to_string()).expect("the file can be written");
    std::fs::rename(aside, directory.join(file)).expect("the file can be renamed");
}

fn namespace(t: &Test<'_>) -> String {
    let json = t.kubectl.run(&["get", "serviceaccount", "default", "-o", "json"]);
    let account: Value = serde_json::from_str(&json).expect("kubectl prints JSON");
    account["metadata"]["namespace"]
        .as_str()
        .expect("it has a namespace")
        .to_owned()
}

/// Waits until the mirror is ready and `check` holds; the mirror.
fn mirror(t: &Test<'_>, name: &str, what: &str, check: impl Fn(&Value) -> bool) -> Value {
    eventually(SOON, what, || {
        let pod = t.kubectl.get("pod", name)?;
        let ready = skerry_tests::kubectl::condition(&pod, "Ready")["status"] == "True";
        if ready && check(&pod) {
            Ok(pod)
        } else {
            Err(pod.to_string())
        }
    })
}

fn life_of_a_static_pod(t: &Test<'_>) {
    let (mut site, directory) = site(t, "files");
    let namespace = namespace(t);
    write(&directory, "web.json", &namespace, "echo first; sleep 1000");
    std::fs::write(directory.join("broken.yaml"), "kind: [").expect("the file can be written");
    std::fs::write(
        directory.join("reference.yaml"),
        format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: x}}, spec: {{serviceAccountName: y, containers: [{{name: c, image: \"{IMAGE}\"}}]}}}}"
        ),
    )
    .expect("the file can be written");
    site.start_edge();
    site.wait_ready();
    let name = format!("web-{}", site.name());

    let first = mirror(t, &name, "the mirror is ready", |_| true);
    let annotations = &first["metadata"]["annotations"];
    let hash = annotations["kubernetes.io/config.hash"]
        .as_str()
        .expect("it has a hash");
    assert_eq!(annotations["kubernetes.io/config.mirror"].as_str(), Some(hash));
    assert_eq!(annotations["kubernetes.io/config.source"], "file");
    let owner = &first["metadata"]["ownerReferences"][0];
    assert_eq!(
        (&owner["kind"], &owner["controller"]),
        (&json!("Node"), &json!(true))
    );
    assert_eq!(first["spec"]["nodeName"].as_str(), Some(site.name()));
    assert_eq!(t.kubectl.run(&["logs", &name]), "first\n");
    assert_eq!(
        t.kubectl.run(&["exec", &name, "--", "echo", "inside"]),
        "inside\n"
    );

    // Files that cannot be used are named, and the other pod runs all the same.
    let default = t.kubectl.in_namespace("default");
    eventually(SOON, "both bad files are named", || {
        let said = default.list("events", &["--field-selector", "reason=InvalidStaticPod"])?;
        let said = serde_json::to_string(&said).map_err(|e| e.to_string())?;
        let all = said.contains("broken.yaml")
            && said.contains("reference.yaml")
            && said.contains("serviceaccounts");
        if all { Ok(()) } else { Err(said) }
    });

    // Somebody deletes the mirror: the pod goes on, and is shown again.
    let (uid, container, _) = identity(&first);
    t.kubectl.run(&["delete", "pod", &name, "--wait=false"]);
    let second = mirror(t, &name, "the mirror is made again", |pod| {
        pod["metadata"]["uid"] != uid
    });
    assert_eq!(identity(&second).1, container, "the pod was restarted");

    // The file changes: another pod under the same name.
    write(&directory, "web.json", &namespace, "echo second; sleep 1000");
    let third = mirror(t, &name, "the mirror shows the new pod", |pod| {
        pod["metadata"]["annotations"]["kubernetes.io/config.hash"] != *hash
    });
    assert_ne!(identity(&third).1, container);
    assert_eq!(t.kubectl.run(&["logs", &name]), "second\n");

    // A restart of the daemon changes nothing.
    let container = identity(&third).1;
    site.stop_edge();
    site.start_edge();
    site.wait_ready();
    let fourth = mirror(t, &name, "the mirror is there", |_| true);
    assert_eq!(identity(&fourth).1, container);

    // The file goes, and the pod with it.
    std::fs::remove_file(directory.join("web.json")).expect("the file can be removed");
    skerry_tests::pods::gone(&t.kubectl, &name);
}

fn without_a_cloud(t: &Test<'_>) {
    let (mut site, directory) = site(t, "alone");
    let namespace = namespace(t);
    let file = site.dir().join("lived");
    let script = "while :; do date >>/shared/lived; sleep 0.2; done";
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "alone", "namespace": namespace},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "volumes": [{"name": "shared", "hostPath": {"path": site.dir()}}],
            "containers": [{"name": "c0", "image": IMAGE, "command": ["sh", "-c", script],
                "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}],
        },
    });
    std::fs::write(directory.join("alone.json"), pod.to_string()).expect("the file can be written");
    site.line().set(Line::Closed);
    site.start_edge();
    skerry_tests::pods::lines(&file, 3, SOON);
    let name = format!("alone-{}", site.name());
    assert!(t.kubectl.get("pod", &name).is_err(), "nobody could have shown it");
    site.line().set(Line::Up);
    site.wait_ready();
    let shown = mirror(t, &name, "the mirror is ready", |_| true);
    same(
        shown["status"]["containerStatuses"][0]["restartCount"].as_u64(),
        Some(0),
    )
    .expect("it was not restarted");
}
