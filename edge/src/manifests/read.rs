//! One file to one static pod: parsing, checks, defaults, identity.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use skerry_proto::SiteName;
use skerry_proto::static_pod::{HASH, SEEN, SOURCE, forbidden_reference};

/// Larger files are refused.
pub(super) const MAX_BYTES: u64 = 10 * 1024 * 1024;
/// Longest name of a pod.
const MAX_NAME: usize = 253;

/// Why a file gives no pod. The other files go on; the file is read again when it changes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ManifestError {
    #[error("it cannot be read: {0}")]
    Read(String),
    #[error("it is larger than {MAX_BYTES} bytes")]
    TooLarge,
    #[error("it is neither YAML nor JSON: {0}")]
    Syntax(String),
    #[error("it must hold one Pod of apiVersion v1, but holds {0}")]
    Kind(String),
    #[error("it is not a valid Pod: {0}")]
    Invalid(String),
    #[error("static pods may not refer to {0}: the site has no API to ask")]
    Reference(String),
    #[error("pod {0} comes from another file already")]
    Duplicate(String),
}

/// Reads a pod from the text of the file at `path`. The same text at the same path gives the same UID.
pub(crate) fn parse(text: &str, path: &str, node: &SiteName, seen: Timestamp) -> Result<Pod, ManifestError> {
    let mut documents = serde_norway::Deserializer::from_str(text);
    let first = documents
        .next()
        .ok_or_else(|| ManifestError::Kind("nothing".to_owned()))?;
    let mut pod: Value =
        serde::Deserialize::deserialize(first).map_err(|e| ManifestError::Syntax(e.to_string()))?;
    if documents.next().is_some() {
        return Err(ManifestError::Kind("several documents".to_owned()));
    }
    if pod.is_null() {
        return Err(ManifestError::Kind("nothing".to_owned()));
    }
    if pod["kind"] != "Pod" || pod["apiVersion"] != "v1" {
        let kind = pod["kind"].as_str().unwrap_or("no kind");
        let version = pod["apiVersion"].as_str().unwrap_or("none");
        return Err(ManifestError::Kind(format!("{kind} of apiVersion {version}")));
    }
    check(&pod)?;
    let uid = identity(&pod, path, node);
    complete(&mut pod, node, &uid, seen)?;
    serde_json::from_value(pod).map_err(|e| ManifestError::Invalid(e.to_string()))
}

fn check(pod: &Value) -> Result<(), ManifestError> {
    let invalid = |text: String| Err(ManifestError::Invalid(text));
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    if !is_subdomain(name) {
        return invalid(format!(
            "metadata.name {name:?} must be lower-case letters, digits, '-' and '.'"
        ));
    }
    let namespace = pod["metadata"]["namespace"].as_str().unwrap_or("default");
    if !is_subdomain(namespace) {
        return invalid(format!("metadata.namespace {namespace:?} is no name"));
    }
    let spec = &pod["spec"];
    if spec["ephemeralContainers"]
        .as_array()
        .is_some_and(|l| !l.is_empty())
    {
        return invalid("ephemeral containers can be added to running pods only".to_owned());
    }
    let list = |key: &str| spec[key].as_array().cloned().unwrap_or_default();
    if list("containers").is_empty() {
        return invalid("spec.containers must name one container at least".to_owned());
    }
    let mut names = Vec::new();
    for container in list("initContainers").iter().chain(&list("containers")) {
        let name = container["name"].as_str().unwrap_or_default().to_owned();
        if name.len() > 63 || name.contains('.') || !is_subdomain(&name) {
            return invalid(format!("the container name {name:?} is no DNS label"));
        }
        if container["image"].as_str().unwrap_or_default().is_empty() {
            return invalid(format!("container {name} needs an image"));
        }
        if names.contains(&name) {
            return invalid(format!("two containers are named {name}"));
        }
        names.push(name);
    }
    match forbidden_reference(pod) {
        Some(what) => Err(ManifestError::Reference(what)),
        None => Ok(()),
    }
}

fn is_subdomain(name: &str) -> bool {
    let label = |part: &str| {
        let bytes = part.as_bytes();
        let plain = |c: &u8| c.is_ascii_lowercase() || c.is_ascii_digit();
        bytes.iter().all(|c| plain(c) || *c == b'-')
            && bytes.first().is_some_and(plain)
            && bytes.last().is_some_and(plain)
    };
    name.len() <= MAX_NAME && name.split('.').all(label)
}

/// UID and hash of the pod: over all that it says, its node and its file.
fn identity(pod: &Value, path: &str, node: &SiteName) -> String {
    let mut hash = Sha256::new();
    // serde_json keeps the keys of a map in order, so equal pods are equal bytes.
    hash.update(pod.to_string());
    hash.update(format!("\0host:{node}\0file:{path}"));
    hash.finalize()[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Whether a UID is that of a static pod: those of the API have dashes.
pub(crate) fn is_static_uid(uid: &str) -> bool {
    uid.len() == 32 && uid.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Makes the pod what the API server and a kubelet would have made of it.
fn complete(pod: &mut Value, node: &SiteName, uid: &str, seen: Timestamp) -> Result<(), ManifestError> {
    let name = format!("{}-{node}", pod["metadata"]["name"].as_str().unwrap_or_default());
    if name.len() > MAX_NAME {
        return Err(ManifestError::Invalid(format!("the name {name} is too long")));
    }
    let metadata = object(&mut pod["metadata"]);
    metadata.insert("name".to_owned(), json!(name));
    metadata.entry("namespace").or_insert(json!("default"));
    metadata.insert("uid".to_owned(), json!(uid));
    for key in [
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "resourceVersion",
        "generation",
    ] {
        metadata.remove(key);
    }
    let annotations = object(metadata.entry("annotations").or_insert(Value::Null));
    annotations.insert(HASH.to_owned(), json!(uid));
    annotations.insert(SEEN.to_owned(), json!(seen.to_string()));
    annotations.insert(SOURCE.to_owned(), json!("file"));
    object(pod).insert("status".to_owned(), json!({"phase": "Pending"}));
    let spec = object(&mut pod["spec"]);
    spec.insert("nodeName".to_owned(), json!(node.as_str()));
    for (key, value) in [
        ("restartPolicy", json!("Always")),
        ("dnsPolicy", json!("ClusterFirst")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("enableServiceLinks", json!(true)),
        ("schedulerName", json!("default-scheduler")),
        ("securityContext", json!({})),
    ] {
        spec.entry(key).or_insert(value);
    }
    let tolerations = spec.entry("tolerations").or_insert(json!([]));
    let everything = json!({"operator": "Exists", "effect": "NoExecute"});
    if let Some(list) = tolerations.as_array_mut()
        && !list.contains(&everything)
    {
        list.push(everything);
    }
    let host_network = spec.get("hostNetwork") == Some(&json!(true));
    for kind in ["initContainers", "containers"] {
        for container in spec
            .get_mut(kind)
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            complete_container(object(container), host_network);
        }
    }
    for volume in spec
        .get_mut("volumes")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        complete_volume(object(volume));
    }
    Ok(())
}

fn complete_container(container: &mut Map<String, Value>, host_network: bool) {
    let image = container.get("image").and_then(Value::as_str).unwrap_or_default();
    let policy = crate::pods::default_pull_policy(image);
    container.entry("imagePullPolicy").or_insert(json!(policy));
    container
        .entry("terminationMessagePath")
        .or_insert(json!("/dev/termination-log"));
    container
        .entry("terminationMessagePolicy")
        .or_insert(json!("File"));
    for port in container
        .get_mut("ports")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        let port = object(port);
        port.entry("protocol").or_insert(json!("TCP"));
        if host_network && let Some(number) = port.get("containerPort").cloned() {
            port.entry("hostPort").or_insert(number);
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = container.get_mut(probe).filter(|p| p.is_object()) else {
            continue;
        };
        let probe = object(probe);
        for (key, value) in [
            ("timeoutSeconds", 1),
            ("periodSeconds", 10),
            ("successThreshold", 1),
            ("failureThreshold", 3),
        ] {
            probe.entry(key).or_insert(json!(value));
        }
        complete_http(probe);
    }
    if let Some(lifecycle) = container.get_mut("lifecycle").filter(|l| l.is_object()) {
        for hook in object(lifecycle).values_mut().filter(|h| h.is_object()) {
            complete_http(object(hook));
        }
    }
    // A limit without a request asks for as much.
    if let Some(resources) = container.get_mut("resources").filter(|r| r.is_object()) {
        let resources = object(resources);
        let limits = resources
            .get("limits")
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default();
        if !limits.is_empty() {
            let requests = object(resources.entry("requests").or_insert(json!({})));
            for (key, value) in limits {
                requests.entry(key).or_insert(value);
            }
        }
    }
}

fn complete_http(action: &mut Map<String, Value>) {
    if let Some(http) = action.get_mut("httpGet").filter(|h| h.is_object()) {
        let http = object(http);
        http.entry("path").or_insert(json!("/"));
        http.entry("scheme").or_insert(json!("HTTP"));
    }
}

fn complete_volume(volume: &mut Map<String, Value>) {
    let has_source = volume
        .iter()
        .any(|(key, value)| key != "name" && !value.is_null());
    if !has_source {
        volume.insert("emptyDir".to_owned(), json!({}));
    }
    for kind in ["downwardAPI", "projected"] {
        if let Some(source) = volume.get_mut(kind).filter(|s| s.is_object()) {
            object(source).entry("defaultMode").or_insert(json!(0o644));
        }
    }
    if let Some(path) = volume.get_mut("hostPath").filter(|s| s.is_object()) {
        object(path).entry("type").or_insert(json!(""));
    }
}

/// The value as a map; whatever else it was is replaced by an empty one.
fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("it was made a map above"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  hostNetwork: true
  containers:
  - name: c
    image: busybox
    ports: [{containerPort: 80}]
    livenessProbe: {httpGet: {port: 80}}
    resources: {limits: {memory: 1Mi}}
  volumes: [{name: v}]
";

    fn read(text: &str) -> Result<Pod, ManifestError> {
        parse(
            text,
            "/m/web.yaml",
            &"harbour".parse().unwrap(),
            Timestamp::UNIX_EPOCH,
        )
    }

    #[test]
    fn a_file_becomes_the_pod_that_the_api_and_a_kubelet_would_make_of_it() {
        let pod = read(POD).unwrap();
        assert_eq!(pod.metadata.name.as_deref(), Some("web-harbour"));
        assert_eq!(pod.metadata.namespace.as_deref(), Some("default"));
        let uid = pod.metadata.uid.unwrap();
        assert!(is_static_uid(&uid));
        let annotations = pod.metadata.annotations.unwrap();
        assert_eq!(
            (annotations[HASH].as_str(), annotations[SOURCE].as_str()),
            (uid.as_str(), "file")
        );
        let spec = pod.spec.unwrap();
        assert_eq!(spec.node_name.as_deref(), Some("harbour"));
        assert_eq!(spec.restart_policy.as_deref(), Some("Always"));
        assert_eq!(spec.tolerations.unwrap()[0].effect.as_deref(), Some("NoExecute"));
        let container = &spec.containers[0];
        assert_eq!(container.image_pull_policy.as_deref(), Some("Always"));
        assert_eq!(container.ports.as_ref().unwrap()[0].host_port, Some(80));
        let probe = container.liveness_probe.as_ref().unwrap();
        assert_eq!(
            (probe.period_seconds, probe.failure_threshold),
            (Some(10), Some(3))
        );
        assert_eq!(
            container.resources.as_ref().unwrap().requests.as_ref().unwrap()["memory"].0,
            "1Mi"
        );
        assert!(spec.volumes.unwrap()[0].empty_dir.is_some());
    }

    #[test]
    fn the_uid_follows_content_file_and_node_and_nothing_else() {
        let node: SiteName = "harbour".parse().unwrap();
        let uid = |text: &str, path: &str, node: &SiteName, second: i64| {
            let seen = Timestamp::from_second(second).unwrap();
            parse(text, path, node, seen).unwrap().metadata.uid.unwrap()
        };
        let this = uid(POD, "/m/a", &node, 0);
        assert_eq!(this, uid(POD, "/m/a", &node, 99));
        assert_eq!(this, uid(&format!("# a comment\n{POD}"), "/m/a", &node, 0));
        assert_ne!(this, uid(POD, "/m/b", &node, 0));
        assert_ne!(this, uid(POD, "/m/a", &"other".parse().unwrap(), 0));
        assert_ne!(this, uid(&POD.replace("80", "81"), "/m/a", &node, 0));
    }

    #[test]
    fn what_is_wrong_with_a_file_is_named() {
        for (text, words) in [
            ("", "nothing"),
            ("a: [", "neither YAML nor JSON"),
            ("{apiVersion: v1, kind: PodList, items: []}", "PodList"),
            (&format!("{POD}---\n{POD}"), "several documents"),
            (&POD.replace("name: web", "name: Web"), "metadata.name"),
            (
                &POD.replace("image: busybox", "image: ''"),
                "container c needs an image",
            ),
            (
                &POD.replace("containerPort: 80", "containerPort: x"),
                "not a valid Pod",
            ),
            (
                &POD.replace("hostNetwork: true", "serviceAccountName: x"),
                "serviceaccounts",
            ),
            (
                "{apiVersion: v1, kind: Pod, metadata: {name: x}, spec: {}}",
                "one container",
            ),
        ] {
            let error = read(text).unwrap_err().to_string();
            assert!(error.contains(words), "{error:?} should contain {words:?}");
        }
    }

    #[test]
    fn json_is_read_as_well() {
        let json = serde_json::to_string(
            &json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"},
            "spec": {"containers": [{"name": "c", "image": "i:1"}]}}),
        );
        assert_eq!(
            read(&json.unwrap()).unwrap().metadata.name.as_deref(),
            Some("x-harbour")
        );
    }

    proptest::proptest! {
        #[test]
        fn any_text_gives_a_pod_or_an_error(text: String) {
            let _ = read(&text);
        }
    }
}
