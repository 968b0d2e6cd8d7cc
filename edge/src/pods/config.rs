//! Spec fields as the runtime wants them: identity and powers, published ports.

use k8s_openapi::api::core::v1::{Container, Pod};

use super::env::ConfigError;
use super::plan::{inits, is_sidecar, regulars};
use crate::runtime::{Image, PortMapping, Security};

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
    use serde_json::json;

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
