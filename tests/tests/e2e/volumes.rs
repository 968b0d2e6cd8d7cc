//! Volumes beyond those that every pod has: claims, refusals, ownership, files as environment.

use std::time::{Duration, SystemTime};

use serde_json::{Value, json};
use skerry_edge::store::Store;
use skerry_proto::link::{Kind, Upsert, change};
use skerry_proto::object::pack;
use skerry_tests::kubectl::Kubectl;
use skerry_tests::pods::{event, identity, output, phase, ready};
use skerry_tests::process::is_root;
use skerry_tests::runner::{Scenario, Test};
use skerry_tests::site::Site;
use skerry_tests::wait::{SOON, eventually, same};

pub(crate) fn scenarios() -> Vec<Scenario> {
    [
        Scenario::each(
            "a claim of a local PersistentVolume shows its directory",
            local_volume,
        ),
        Scenario::each(
            "a pod whose claim is not bound says so and starts once it is",
            unbound_claim,
        ),
        Scenario::each(
            "a generic ephemeral volume is the claim that the pod owns",
            ephemeral_claim,
        ),
        Scenario::each("a volume that needs a driver is refused by name", refused_volume),
        Scenario::each("files of API objects are read-only and the group's", ownership),
        Scenario::each(
            "a variable comes from a file that an init container wrote",
            file_key,
        ),
        Scenario::each(
            "a subPath without its variable is refused by name",
            missing_subpath,
        ),
        Scenario::each(
            "a token whose time is nearly up is replaced in the running pod",
            renewed_token,
        ),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn once(script: &str, mounts: Value, volumes: Value) -> Value {
    json!({"restartPolicy": "Never", "volumes": volumes,
        "containers": [{"command": ["sh", "-c", script], "volumeMounts": mounts}]})
}

/// A PersistentVolume on a directory of the site's machine, for claims of the storage class that has its name.
fn local(t: &Test<'_>, suffix: &str) -> (String, std::path::PathBuf) {
    let (name, dir) = (t.name(suffix), t.cluster.dir().join(t.name(suffix)));
    std::fs::create_dir_all(&dir).unwrap();
    let object = json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": {
        "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": name,
        "persistentVolumeReclaimPolicy": "Retain", "local": {"path": dir},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "In", "values": [t.site().name()]}]}]}}}});
    t.kubectl.apply(&object.to_string());
    (name, dir)
}

fn claim_spec(class: &str) -> Value {
    json!({"accessModes": ["ReadWriteOnce"], "storageClassName": class, "resources": {"requests": {"storage": "1Gi"}}})
}

fn claim(t: &Test<'_>, class: &str) {
    let object = json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"},
        "spec": claim_spec(class)});
    t.kubectl.apply(&object.to_string());
}

fn local_volume(t: &Test<'_>) {
    let (class, dir) = local(t, "disk");
    claim(t, &class);
    let mounts = json!([{"name": "v", "mountPath": "/data"}]);
    let volume = |readonly: bool| json!([{"name": "v", "persistentVolumeClaim": {"claimName": "data", "readOnly": readonly}}]);
    t.kubectl.apply(&t.site().pod(
        "writer",
        once("echo kept > /data/log", mounts.clone(), volume(false)),
    ));
    phase(&t.kubectl, "writer", "Succeeded");
    assert_eq!(std::fs::read_to_string(dir.join("log")).unwrap(), "kept\n");
    if !is_root() {
        return;
    }
    let script = "cat /data/log; echo x 2>/dev/null > /data/log || echo refused";
    t.kubectl
        .apply(&t.site().pod("reader", once(script, mounts, volume(true))));
    assert_eq!(output(&t.kubectl, "reader"), "kept\nrefused\n");
}

fn unbound_claim(t: &Test<'_>) {
    let mut spec = once(
        "echo mounted",
        json!([{"name": "v", "mountPath": "/data"}]),
        json!([{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]),
    );
    // The scheduler would wait for the claim as well.
    spec["nodeName"] = json!(t.site().name());
    t.kubectl.apply(&t.site().pod("pod", spec));
    let message = event(&t.kubectl, "pod", "FailedMount");
    assert!(
        message.contains("unmounted volumes=[v]")
            && message.contains("persistentvolumeclaims \"data\" not found"),
        "{message}"
    );
    let (class, _) = local(t, "disk");
    claim(t, &class);
    assert_eq!(output(&t.kubectl, "pod"), "mounted\n");
}

fn ephemeral_claim(t: &Test<'_>) {
    let (class, dir) = local(t, "scratch");
    let spec = once(
        "echo here > /scratch/file",
        json!([{"name": "scratch", "mountPath": "/scratch"}]),
        json!([{"name": "scratch", "ephemeral": {"volumeClaimTemplate": {"spec": claim_spec(&class)}}}]),
    );
    t.kubectl.apply(&t.site().pod("pod", spec));
    phase(&t.kubectl, "pod", "Succeeded");
    assert_eq!(std::fs::read_to_string(dir.join("file")).unwrap(), "here\n");
    assert!(t.kubectl.get("pvc", "pod-scratch").is_ok());
}

fn refused_volume(t: &Test<'_>) {
    let spec = once(
        "true",
        json!([{"name": "share", "mountPath": "/share"}]),
        json!([{"name": "share", "nfs": {"server": "files.example", "path": "/"}},
            {"name": "unused", "csi": {"driver": "none.example"}}]),
    );
    t.kubectl.apply(&t.site().pod("pod", spec));
    let message = event(&t.kubectl, "pod", "FailedMount");
    assert!(
        message.starts_with(
            "MountVolume.SetUp failed for volume \"share\" : volumes of type nfs are not supported"
        ),
        "{message}"
    );
    assert_eq!(t.kubectl.get("pod", "pod").unwrap()["status"]["phase"], "Pending");
}

fn ownership(t: &Test<'_>) {
    t.kubectl
        .run(&["create", "configmap", "settings", "--from-literal=colour=blue"]);
    let script = "cd /settings; cat colour; stat -Lc %a colour; echo x 2>/dev/null > colour || echo refused; \
                  stat -c %a /scratch; stat -Lc '%a %u' /token/token; [ -d /settings/nested ] && echo nested";
    let mut spec = once(
        script,
        json!([{"name": "s", "mountPath": "/settings"}, {"name": "e", "mountPath": "/scratch"},
            {"name": "n", "mountPath": "/settings/nested"}, {"name": "t", "mountPath": "/token"}]),
        json!([{"name": "s", "configMap": {"name": "settings", "defaultMode": 256}}, {"name": "e", "emptyDir": {}},
            {"name": "n", "emptyDir": {}},
            {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}]),
    );
    if !is_root() {
        return;
    }
    spec["securityContext"] = json!({"fsGroup": 4321, "runAsUser": 1234});
    t.kubectl.apply(&t.site().pod("pod", spec));
    assert_eq!(
        output(&t.kubectl, "pod"),
        "blue440\nrefused\n2777\n640 1234\nnested\n"
    );
}

fn file_key(t: &Test<'_>) {
    let from = |key: &str, optional: bool| json!({"fileKeyRef": {"volumeName": "v", "path": "env", "key": key, "optional": optional}});
    let spec = json!({"restartPolicy": "Never", "volumes": [{"name": "v", "emptyDir": {}}],
        "initContainers": [{"command": ["sh", "-c", "echo \"WHERE='the $HOME quay'\" > /v/env"],
            "name": "maker", "env": [{"name": "HOME", "value": "north"}],
            "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
        "containers": [{"command": ["sh", "-c", "echo \"$WHERE|$COPY\""],
            "env": [{"name": "WHERE", "valueFrom": from("WHERE", false)},
                {"name": "COPY", "value": "at $(WHERE)"},
                {"name": "LEFT_OUT", "valueFrom": from("OTHER", true)}]}]});
    t.kubectl.apply(&t.site().pod("pod", spec));
    assert_eq!(output(&t.kubectl, "pod"), "the north quay|at the north quay\n");
}

fn missing_subpath(t: &Test<'_>) {
    let spec = once(
        "true",
        json!([{"name": "v", "mountPath": "/v", "subPathExpr": "logs/$(NOWHERE)"}]),
        json!([{"name": "v", "emptyDir": {}}]),
    );
    t.kubectl.apply(&t.site().pod("pod", spec));
    eventually(SOON, "the missing variable is named", || {
        let pod = t.kubectl.get("pod", "pod")?;
        let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
        same(waiting["message"].as_str(), Some("missing value for NOWHERE"))?;
        same(waiting["reason"].as_str(), Some("CreateContainerConfigError"))
    });
}

/// What the API server says of a token: whose pod it is.
fn review(kubectl: &Kubectl, token: &str) -> Value {
    let review =
        json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
    let out = kubectl.output_with(&["create", "-f", "-", "-o", "json"], &review.to_string());
    let review: Value = serde_json::from_slice(&out.stdout).unwrap();
    review["status"]["user"]["extra"]["authentication.kubernetes.io/pod-name"][0].clone()
}

/// Makes every token in the site's store one that expires in a minute, as if most of its life had passed. The daemon
/// must not be running.
fn age_tokens(site: &Site) -> usize {
    let soon = SystemTime::now() + Duration::from_secs(60);
    let soon = soon.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let store = Store::open(&site.data_dir()).unwrap();
    let tokens = store.list(Kind::ServiceAccountToken).unwrap();
    let aged: Vec<_> = tokens
        .iter()
        .map(|token| {
            change::Change::Upsert(Upsert {
                kind: Kind::ServiceAccountToken.into(),
                uid: token.key.uid.to_string(),
                namespace: token.namespace.clone(),
                name: token.name.clone(),
                hash: token.hash.0.to_vec().into(),
                json_zstd: pack(&token.decode().unwrap()).unwrap().into(),
                expires_unix: i64::try_from(soon).unwrap(),
            })
        })
        .collect();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(store.apply(aged)).unwrap();
    tokens.len()
}

fn renewed_token(t: &Test<'_>) {
    let mut site = t.own_site();
    let spec = json!({
        "containers": [{"command": ["sleep", "1000"], "volumeMounts": [{"name": "t", "mountPath": "/t"}]}],
        "automountServiceAccountToken": false,
        "volumes": [{"name": "t", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}}]}}],
    });
    t.kubectl.apply(&site.pod("pod", spec));
    let before = identity(&ready(&t.kubectl, "pod"));
    let read = || t.kubectl.attempt(&["exec", "pod", "--", "cat", "/t/token"]);
    let first = eventually(SOON, "the token can be read", read);
    assert_eq!(review(&t.kubectl, &first), "pod");

    assert_eq!(site.stop_edge(), 0);
    assert_eq!(age_tokens(&site), 1);
    site.start_edge();
    site.wait_ready();
    let second = eventually(SOON, "the pod has another token", || {
        let token = read()?;
        if token == first {
            Err("it is the old one".into())
        } else {
            Ok(token)
        }
    });
    assert_eq!(review(&t.kubectl, &second), "pod");
    // Nothing else has changed, and the new one is left in peace.
    assert_eq!(identity(&ready(&t.kubectl, "pod")), before);
    assert_eq!(read().unwrap(), second);
}
