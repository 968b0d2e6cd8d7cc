//! Spec fields as the runtime wants them: cgroup values, identity and powers, published ports.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::env::ConfigError;
use super::plan::{inits, is_sidecar, regulars};
use super::quantity;
use crate::runtime::{Image, PortMapping, Resources, Security};

/// CFS period in microseconds.
const PERIOD: i64 = 100_000;

/// A pod's quality of service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Qos {
    Guaranteed,
    Burstable,
    BestEffort,
}

fn amount(list: Option<&BTreeMap<String, Quantity>>, name: &str) -> Option<i128> {
    quantity::milli(list?.get(name)?).filter(|m| *m > 0)
}

/// Request (the limit when there is none) and limit of a container, in thousandths.
fn request_and_limit(container: &Container, name: &str) -> (Option<i128>, Option<i128>) {
    let resources = container.resources.as_ref();
    let limit = resources.and_then(|r| amount(r.limits.as_ref(), name));
    let request = resources
        .and_then(|r| amount(r.requests.as_ref(), name))
        .or(limit);
    (request, limit)
}

/// The class that the API server would give.
pub(crate) fn qos(pod: &Pod) -> Qos {
    match pod.status.as_ref().and_then(|s| s.qos_class.as_deref()) {
        Some("Guaranteed") => return Qos::Guaranteed,
        Some("Burstable") => return Qos::Burstable,
        Some("BestEffort") => return Qos::BestEffort,
        _ => {}
    }
    let mut any = false;
    let mut all = true;
    for container in inits(pod).iter().chain(regulars(pod)) {
        for name in ["cpu", "memory"] {
            let (request, limit) = request_and_limit(container, name);
            any |= request.is_some();
            all &= limit.is_some() && request == limit;
        }
    }
    match (any, all) {
        (false, _) => Qos::BestEffort,
        (true, true) => Qos::Guaranteed,
        (true, false) => Qos::Burstable,
    }
}

/// Parent cgroup of a pod's containers, relative to the controllers' roots.
pub(crate) fn cgroup_parent(pod: &Pod) -> String {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    match qos(pod) {
        Qos::Guaranteed => format!("/kubepods/pod{uid}"),
        Qos::Burstable => format!("/kubepods/burstable/pod{uid}"),
        Qos::BestEffort => format!("/kubepods/besteffort/pod{uid}"),
    }
}

/// A container's cgroup values. `memory_capacity` is the node's, in bytes.
pub(crate) fn resources(pod: &Pod, container: &Container, memory_capacity: i64) -> Resources {
    let (cpu_request, cpu_limit) = request_and_limit(container, "cpu");
    let (_, memory_limit) = request_and_limit(container, "memory");
    let narrow = |value: i128| i64::try_from(value).unwrap_or(i64::MAX);
    let mut oom_score_adj = oom_score_adj(pod, container, memory_capacity);
    if is_sidecar(container) && inits(pod).iter().any(|c| c.name == container.name) {
        let smallest = regulars(pod)
            .iter()
            .map(|c| self::oom_score_adj(pod, c, memory_capacity))
            .min();
        oom_score_adj = oom_score_adj.min(smallest.unwrap_or(oom_score_adj));
    }
    Resources {
        cpu_shares: cpu_request.map_or(2, |m| narrow(m * 1024 / 1000).clamp(2, 262_144)),
        cpu_quota: cpu_limit.map_or(0, |m| narrow(m * i128::from(PERIOD) / 1000).max(1000)),
        cpu_period: if cpu_limit.is_some() { PERIOD } else { 0 },
        memory_limit_bytes: memory_limit.map_or(0, |m| narrow(m / 1000)),
        oom_score_adj,
    }
}

fn oom_score_adj(pod: &Pod, container: &Container, memory_capacity: i64) -> i64 {
    if pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0) >= 2_000_001_000 {
        return -997;
    }
    match qos(pod) {
        Qos::Guaranteed => -997,
        Qos::BestEffort => 1000,
        Qos::Burstable => {
            let (request, _) = request_and_limit(container, "memory");
            let bytes = request.unwrap_or(0) / 1000;
            let share = if memory_capacity > 0 {
                1000 * bytes / i128::from(memory_capacity)
            } else {
                0
            };
            i64::try_from(1000 - share).unwrap_or(3).clamp(3, 999)
        }
    }
}

/// Identity and powers of a container, the pod's settings below its own.
pub(crate) fn security(
    pod: &Pod,
    container: &Container,
    image: Option<&Image>,
    seccomp_default: bool,
) -> Result<Security, ConfigError> {
    let pod_context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let own = container.security_context.as_ref();
    let run_as_user = own
        .and_then(|c| c.run_as_user)
        .or(pod_context.and_then(|c| c.run_as_user));
    let run_as_group = own
        .and_then(|c| c.run_as_group)
        .or(pod_context.and_then(|c| c.run_as_group));
    let non_root = own
        .and_then(|c| c.run_as_non_root)
        .or(pod_context.and_then(|c| c.run_as_non_root));
    if non_root == Some(true) {
        check_non_root(run_as_user, image)?;
    }
    let profile = own
        .and_then(|c| c.seccomp_profile.as_ref())
        .or(pod_context.and_then(|c| c.seccomp_profile.as_ref()));
    let seccomp = match profile {
        Some(p) if p.type_ == "Localhost" => {
            format!("Localhost/{}", p.localhost_profile.as_deref().unwrap_or_default())
        }
        Some(p) => p.type_.clone(),
        None if seccomp_default => "RuntimeDefault".to_owned(),
        None => String::new(),
    };
    let capabilities = own.and_then(|c| c.capabilities.as_ref());
    Ok(Security {
        run_as_user,
        run_as_group,
        supplemental_groups: supplemental_groups(pod),
        privileged: is_privileged(container),
        readonly_rootfs: own.and_then(|c| c.read_only_root_filesystem).unwrap_or(false),
        no_new_privileges: own.and_then(|c| c.allow_privilege_escalation) == Some(false),
        add_capabilities: capabilities.and_then(|c| c.add.clone()).unwrap_or_default(),
        drop_capabilities: capabilities.and_then(|c| c.drop.clone()).unwrap_or_default(),
        seccomp,
        unmasked_proc: own.and_then(|c| c.proc_mount.as_deref()) == Some("Unmasked"),
    })
}

fn check_non_root(run_as_user: Option<i64>, image: Option<&Image>) -> Result<(), ConfigError> {
    match (run_as_user, image) {
        (Some(0), _) => Err(ConfigError(
            "container's runAsUser breaks non-root policy".to_owned(),
        )),
        (Some(_), _) | (None, None) => Ok(()),
        (None, Some(image)) => match (image.uid, image.username.as_str()) {
            (Some(0), _) | (None, "" | "root") => Err(ConfigError(
                "container has runAsNonRoot and image will run as root".to_owned(),
            )),
            (Some(_), _) => Ok(()),
            (None, name) => Err(ConfigError(format!(
                "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root"
            ))),
        },
    }
}

/// `supplementalGroups` and `fsGroup`.
pub(crate) fn supplemental_groups(pod: &Pod) -> Vec<i64> {
    let Some(context) = pod.spec.as_ref().and_then(|s| s.security_context.as_ref()) else {
        return Vec::new();
    };
    let mut groups = context.supplemental_groups.clone().unwrap_or_default();
    groups.extend(context.fs_group.filter(|g| !groups.contains(g)));
    groups
}

/// The container has all powers.
pub(crate) fn is_privileged(container: &Container) -> bool {
    container
        .security_context
        .as_ref()
        .and_then(|c| c.privileged)
        .unwrap_or(false)
}

/// The first kernel parameter of the pod that this node does not let a pod set: only those that are namespaced and
/// cannot harm a neighbour are safe.
pub(crate) fn forbidden_sysctl(pod: &Pod) -> Option<String> {
    const SAFE: [&str; 13] = [
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.ping_group_range",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_wmem",
        "net.ipv4.tcp_notsent_lowat",
    ];
    let spec = pod.spec.as_ref()?;
    let host_network = spec.host_network.unwrap_or(false);
    let asked = spec.security_context.as_ref()?.sysctls.iter().flatten();
    asked.map(|s| s.name.replace('/', ".")).find(|name| {
        !SAFE.contains(&name.as_str())
            || (host_network && name.starts_with("net."))
            || (spec.host_ipc.unwrap_or(false) && name.starts_with("kernel.shm"))
    })
}

/// Ports that the containers publish on the host.
pub(crate) fn port_mappings(pod: &Pod) -> Vec<PortMapping> {
    if pod.spec.as_ref().and_then(|s| s.host_network).unwrap_or(false) {
        return Vec::new();
    }
    let sidecars = inits(pod).iter().filter(|c| is_sidecar(c));
    let ports = regulars(pod)
        .iter()
        .chain(sidecars)
        .flat_map(|c| c.ports.iter().flatten());
    ports
        .filter_map(|port| {
            Some(PortMapping {
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                container_port: u16::try_from(port.container_port).ok()?,
                host_port: u16::try_from(port.host_port?).ok().filter(|p| *p > 0)?,
                host_ip: port.host_ip.clone().unwrap_or_default(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::pod;
    use super::*;
    use serde_json::{Value, json};

    fn with_resources(resources: Value) -> Pod {
        pod(json!({"containers": [{"name": "c", "resources": resources}]}))
    }

    fn of(pod: &Pod) -> Resources {
        resources(pod, &regulars(pod)[0], 1 << 30)
    }

    #[test]
    fn requests_and_limits_become_cgroup_values() {
        let r = of(&with_resources(
            json!({"requests": {"cpu": "250m", "memory": "512Mi"}, "limits": {"cpu": "500m", "memory": "768Mi"}}),
        ));
        assert_eq!((r.cpu_shares, r.cpu_quota, r.cpu_period), (256, 50_000, 100_000));
        assert_eq!((r.memory_limit_bytes, r.oom_score_adj), (768 << 20, 500));
    }

    #[test]
    fn the_quality_of_service_gives_the_oom_score_and_the_cgroup() {
        let best = with_resources(json!({}));
        assert_eq!((of(&best).cpu_shares, of(&best).oom_score_adj), (2, 1000));
        assert!(cgroup_parent(&best).starts_with("/kubepods/besteffort/pod1111"));
        let sure = with_resources(json!({"limits": {"cpu": "1", "memory": "1Gi"}}));
        assert_eq!((qos(&sure), of(&sure).oom_score_adj), (Qos::Guaranteed, -997));
        assert!(cgroup_parent(&sure).starts_with("/kubepods/pod"));
    }

    #[test]
    fn a_tiny_limit_keeps_the_smallest_quota() {
        assert_eq!(
            of(&with_resources(json!({"limits": {"cpu": "1m"}}))).cpu_quota,
            1000
        );
    }

    #[test]
    fn a_kernel_parameter_that_is_not_safe_is_named() {
        let with = |name: &str, host: bool| {
            forbidden_sysctl(&pod(json!({"hostNetwork": host, "containers": [],
                "securityContext": {"sysctls": [{"name": name, "value": "1"}]}})))
        };
        assert_eq!(with("kernel/msgmax", false).as_deref(), Some("kernel.msgmax"));
        assert_eq!(with("net.ipv4.tcp_syncookies", false), None);
        assert!(with("net.ipv4.tcp_syncookies", true).is_some());
    }

    fn image(uid: Option<i64>, username: &str) -> Image {
        Image {
            id: String::new(),
            tags: vec![],
            digests: vec![],
            size_bytes: 0,
            uid,
            username: username.into(),
        }
    }

    #[test]
    fn an_image_that_would_run_as_root_is_refused_when_non_root_is_asked() {
        let pod = pod(json!({"securityContext": {"runAsNonRoot": true}, "containers": [{"name": "c"}]}));
        let check = |i: &Image| security(&pod, &regulars(&pod)[0], Some(i), false);
        assert!(check(&image(Some(0), "")).is_err());
        assert!(check(&image(None, "")).is_err());
        assert!(
            check(&image(None, "app"))
                .unwrap_err()
                .0
                .contains("non-numeric user (app)")
        );
        assert!(check(&image(Some(1000), "")).is_ok());
    }

    #[test]
    fn the_container_s_settings_win_over_the_pod_s() {
        let pod = pod(
            json!({"securityContext": {"runAsUser": 1, "fsGroup": 5, "supplementalGroups": [4]},
            "containers": [{"name": "c", "securityContext": {"runAsUser": 2, "capabilities": {"drop": ["ALL"]},
                "allowPrivilegeEscalation": false}}]}),
        );
        let security = security(&pod, &regulars(&pod)[0], None, true).unwrap();
        assert_eq!(security.run_as_user, Some(2));
        assert_eq!(security.supplemental_groups, [4, 5]);
        assert!(security.no_new_privileges);
        assert_eq!(security.seccomp, "RuntimeDefault");
    }
}
