use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Secret, Service};
use serde_json::{Value, json};

use super::super::super::fixtures::{UID, pod};
use super::super::super::objects::Objects;
use super::*;

/// One claim, one volume, one node.
struct Cluster {
    claim: Value,
    volume: Value,
}

impl Objects for Cluster {
    fn config_map(&self, _: &str, _: &str) -> Option<ConfigMap> {
        None
    }
    fn secret(&self, _: &str, _: &str) -> Option<Secret> {
        None
    }
    fn services(&self) -> Vec<Service> {
        Vec::new()
    }
    fn node(&self) -> Option<Node> {
        serde_json::from_value(
            json!({"metadata": {"labels": {"kubernetes.io/hostname": "pier", "slots": "4"}}}),
        )
        .ok()
    }
    fn claim(&self, _: &str, name: &str) -> Option<PersistentVolumeClaim> {
        serde_json::from_value::<PersistentVolumeClaim>(self.claim.clone())
            .ok()
            .filter(|c| c.metadata.name.as_deref() == Some(name))
    }
    fn persistent_volume(&self, _: &str) -> Option<PersistentVolume> {
        serde_json::from_value(self.volume.clone()).ok()
    }
    fn token(&self, _: &str) -> Option<String> {
        None
    }
}

fn bound(source: Value) -> Cluster {
    let mut spec = json!({"claimRef": {"uid": "claim-uid", "namespace": "default", "name": "data"}});
    spec.as_object_mut()
        .unwrap()
        .extend(source.as_object().unwrap().clone());
    Cluster {
        claim: json!({"metadata": {"name": "data", "uid": "claim-uid",
                "annotations": {"pv.kubernetes.io/bind-completed": "yes"}},
            "spec": {"volumeName": "pv"}}),
        volume: json!({"metadata": {"name": "pv"}, "spec": spec}),
    }
}

fn user(source: Value) -> Pod {
    pod(
        json!({"containers": [{"name": "c", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
        "volumes": [source]}),
    )
}

fn claimed() -> Pod {
    user(json!({"name": "v", "persistentVolumeClaim": {"claimName": "data"}}))
}

fn try_set_up(cluster: &Cluster, pod: &Pod) -> Result<PathBuf, String> {
    let dir = tempfile::tempdir().unwrap();
    let facts = Facts {
        pod,
        host_ip: None,
        pod_ips: &[],
        objects: cluster,
    };
    let volume = &pod.spec.as_ref().unwrap().volumes.as_ref().unwrap()[0];
    let made = set_up(&facts, volume, dir.path(), &Uses::of(pod));
    super::super::remove(dir.path()).unwrap();
    made.map_err(|failure| {
        super::super::VolumeError {
            volume: "v".into(),
            failure,
        }
        .to_string()
    })
}

#[test]
fn a_host_path_volume_is_used_where_it_is() {
    let cluster = bound(json!({"hostPath": {"path": "/tmp"}}));
    assert_eq!(try_set_up(&cluster, &claimed()).unwrap(), PathBuf::from("/tmp"));
}

#[test]
fn a_local_volume_is_bound_into_the_pod_and_one_that_is_missing_is_named() {
    let cluster = bound(json!({"local": {"path": "/tmp"}}));
    let path = try_set_up(&cluster, &claimed()).unwrap();
    assert!(path.ends_with("kubernetes.io~local-volume/pv") || path == Path::new("/tmp"));
    let cluster = bound(json!({"local": {"path": "/no/such/place"}}));
    assert_eq!(
        try_set_up(&cluster, &claimed()).unwrap_err(),
        "MountVolume.NewMounter initialization failed for volume \"v\" : path \"/no/such/place\" does not exist"
    );
}

#[test]
fn a_claim_that_is_not_there_or_not_bound_is_named() {
    let mut cluster = bound(json!({"hostPath": {"path": "/tmp"}}));
    cluster.claim["metadata"]["annotations"] = json!({});
    assert_eq!(
        try_set_up(&cluster, &claimed()).unwrap_err(),
        "Unable to attach or mount volumes: unmounted volumes=[v], unattached volumes=[], failed to process \
         volumes=[v]: error processing PVC default/data: PVC is not bound"
    );
    cluster.claim["metadata"]["name"] = json!("other");
    assert!(
        try_set_up(&cluster, &claimed())
            .unwrap_err()
            .contains("persistentvolumeclaims \"data\" not found")
    );
}

#[test]
fn a_volume_of_another_claim_is_not_used() {
    let mut cluster = bound(json!({"hostPath": {"path": "/tmp"}}));
    cluster.volume["spec"]["claimRef"]["uid"] = json!("another");
    assert!(
        try_set_up(&cluster, &claimed())
            .unwrap_err()
            .contains("does not point to claim.UID claim-uid")
    );
}

#[test]
fn a_claim_of_an_ephemeral_volume_must_be_the_pod_s_own() {
    let pod = user(json!({"name": "v", "ephemeral": {"volumeClaimTemplate": {"spec": {}}}}));
    let mut cluster = bound(json!({"hostPath": {"path": "/tmp"}}));
    cluster.claim["metadata"]["name"] = json!("p-v");
    assert!(
        try_set_up(&cluster, &pod)
            .unwrap_err()
            .contains("pod is not owner")
    );
    cluster.claim["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": UID, "controller": true}]);
    assert!(try_set_up(&cluster, &pod).is_ok());
}

#[test]
fn a_volume_of_another_node_is_refused() {
    let with = |operator: &str, key: &str, values: Value| {
        let cluster = bound(
            json!({"hostPath": {"path": "/tmp"}, "nodeAffinity": {"required": {"nodeSelectorTerms": [
            {"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]}}}),
        );
        try_set_up(&cluster, &claimed())
    };
    assert!(with("In", "kubernetes.io/hostname", json!(["pier"])).is_ok());
    assert!(with("Gt", "slots", json!(["3"])).is_ok());
    assert_eq!(
        with("In", "kubernetes.io/hostname", json!(["quay"])).unwrap_err(),
        "MountVolume.NodeAffinity check failed for volume \"v\" : no matching NodeSelectorTerms"
    );
    assert!(with("Lt", "slots", json!(["3"])).is_err());
    assert!(with("DoesNotExist", "slots", json!(null)).is_err());
    assert!(with("NotIn", "zone", json!(["a"])).is_ok());
}

#[test]
fn a_volume_of_a_kind_that_needs_a_driver_is_refused_by_name() {
    let cluster = bound(json!({"csi": {"driver": "disk.example", "volumeHandle": "x"}}));
    let error = try_set_up(&cluster, &claimed()).unwrap_err();
    assert!(
        error.contains("PersistentVolume pv is of type csi (driver disk.example)"),
        "{error}"
    );
    assert!(error.contains("use a local or hostPath"), "{error}");
    let cluster = bound(json!({"nfs": {"server": "a", "path": "/b"}, "capacity": {"storage": "1Gi"}}));
    assert!(
        try_set_up(&cluster, &claimed())
            .unwrap_err()
            .contains("of type nfs,")
    );
}

#[test]
fn a_block_volume_is_not_mounted_and_a_directory_is_no_block_volume() {
    let cluster = bound(json!({"local": {"path": "/tmp"}, "volumeMode": "Block"}));
    assert!(
        try_set_up(&cluster, &claimed())
            .unwrap_err()
            .ends_with("volume v has volumeMode Block, but is specified in volumeMounts")
    );
    let raw = pod(
        json!({"containers": [{"name": "c", "volumeDevices": [{"name": "v", "devicePath": "/dev/x"}]}],
        "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data"}}]}),
    );
    assert!(
        try_set_up(&cluster, &raw)
            .unwrap_err()
            .contains("/tmp is not a block device")
    );
}

#[test]
fn mount_options_that_a_bind_mount_cannot_have_are_refused() {
    let flags = mount_flags(&["noexec,nodev".to_owned()], true).unwrap();
    assert!(flags.contains(MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV));
    assert!(
        mount_flags(&["hard".to_owned()], false)
            .unwrap_err()
            .contains("hard")
    );
}
