use super::super::fixtures::pod;
use super::*;
use crate::cgroup::{Driver, HugePages};
use serde_json::{Value, json};

fn with_resources(resources: Value) -> Pod {
    pod(json!({"containers": [{"name": "c", "resources": resources}]}))
}

fn kernel() -> Kernel {
    Kernel {
        v2: false,
        swap: false,
        huge_pages: HugePages(BTreeMap::from([(2 << 20, "2MB".to_owned())])),
    }
}

fn of(pod: &Pod) -> Resources {
    container_values(pod, &regulars(pod)[0], 1 << 30, &kernel())
}

#[test]
fn requests_and_limits_become_cgroup_values() {
    let r = of(&with_resources(
        json!({"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"cpu": "500m", "memory": "768Mi"}}),
    ));
    assert_eq!((r.cpu_shares, r.cpu_quota, r.cpu_period), (256, 50_000, 100_000));
    assert_eq!((r.memory_limit_bytes, r.oom_score_adj), (768 << 20, 500));
    assert_eq!(r.huge_pages, BTreeMap::from([("2MB".to_owned(), 0)]));
}

#[test]
fn the_quality_of_service_gives_the_oom_score_and_the_cgroup() {
    let best = with_resources(json!({}));
    assert_eq!((of(&best).cpu_shares, of(&best).oom_score_adj), (2, 1000));
    assert!(
        cgroup(&best)
            .parent(Driver::Cgroupfs)
            .starts_with("/kubepods/besteffort/pod1111")
    );
    let sure = with_resources(json!({"limits": {"cpu": "1", "memory": "1Gi"}}));
    assert_eq!((qos(&sure), of(&sure).oom_score_adj), (Tier::Guaranteed, -997));
}

#[test]
fn a_tiny_limit_keeps_the_smallest_quota() {
    assert_eq!(
        of(&with_resources(json!({"limits": {"cpu": "1m"}}))).cpu_quota,
        1000
    );
}

#[test]
fn a_pod_requests_the_larger_of_its_run_and_its_initialisation() {
    let cpu = |milli: &str| json!({"requests": {"cpu": milli}});
    let pod = pod(json!({
        "overhead": {"cpu": "10m"},
        "initContainers": [
            {"name": "side", "restartPolicy": "Always", "resources": cpu("100m")},
            {"name": "init", "resources": cpu("500m")}],
        "containers": [{"name": "a", "resources": cpu("200m")}, {"name": "b", "resources": cpu("150m")}],
    }));
    assert_eq!(requests(&pod)["cpu"].milli, 610);
    assert_eq!(to_list(&requests(&pod))["cpu"].0, "610m");
}

#[test]
fn a_pod_is_limited_only_when_each_container_is() {
    let one = json!({"limits": {"cpu": "100m", "memory": "10Mi"}});
    let both = pod(json!({"containers": [{"name": "a", "resources": one}, {"name": "b", "resources": one}]}));
    let values = pod_values(&both, &kernel(), Some(9));
    assert_eq!(
        (values.cpu_quota, values.memory_bytes, values.pids),
        (Some(20_000), Some(20 << 20), Some(9))
    );
    let half = pod(json!({"containers": [{"name": "a", "resources": one}, {"name": "b"}]}));
    let values = pod_values(&half, &kernel(), None);
    assert_eq!((values.cpu_quota, values.memory_bytes), (None, None));
    assert_eq!(
        pod_values(&with_resources(json!({})), &kernel(), None).cpu_shares,
        Some(2)
    );
}

#[test]
fn pod_level_resources_stand_above_the_containers() {
    let pod = pod(json!({
        "resources": {"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"cpu": "2", "memory": "1Gi"}},
        "containers": [{"name": "a", "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}}}, {"name": "b"}],
    }));
    let values = pod_values(&pod, &kernel(), None);
    assert_eq!(
        (values.cpu_shares, values.cpu_quota, values.memory_bytes),
        (Some(1024), Some(200_000), Some(1 << 30))
    );
    let b = container_values(&pod, &regulars(&pod)[1], 1 << 30, &kernel());
    // No request of its own: the pod's limit counts, as for a container with a limit only.
    assert_eq!(
        (b.cpu_shares, b.cpu_quota, b.memory_limit_bytes),
        (2048, 200_000, 1 << 30)
    );
    // 256Mi are left over for two containers.
    assert_eq!(b.oom_score_adj, 875);
    assert_eq!(of(&pod).oom_score_adj, 625);
    assert_eq!(qos(&pod), Tier::Burstable);
}

#[test]
fn huge_pages_are_limited_by_their_size() {
    let pod = with_resources(json!({"limits": {"hugepages-2Mi": "4Mi", "memory": "1Gi", "cpu": "1"}}));
    assert_eq!(of(&pod).huge_pages["2MB"], 4 << 20);
}

#[test]
fn a_sidecar_is_not_killed_before_its_pod() {
    let pod = pod(json!({
        "initContainers": [{"name": "side", "restartPolicy": "Always"}],
        "containers": [{"name": "a", "resources": {"requests": {"memory": "512Mi"}}}],
    }));
    let side = container_values(&pod, &inits(&pod)[0], 1 << 30, &kernel());
    assert_eq!(side.oom_score_adj, 500);
}

#[test]
fn on_v2_a_container_dies_as_a_whole_and_does_not_swap() {
    let v2 = Kernel {
        v2: true,
        swap: true,
        ..kernel()
    };
    let pod = with_resources(json!({"limits": {"memory": "1Gi"}}));
    let values = container_values(&pod, &regulars(&pod)[0], 1 << 30, &v2);
    assert_eq!(values.unified["memory.oom.group"], "1");
    assert_eq!(
        (
            values.unified["memory.swap.max"].as_str(),
            values.memory_swap_bytes
        ),
        ("0", 0)
    );
}
