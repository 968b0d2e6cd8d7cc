//! Pods that this node refuses because it could not protect them, or itself, as asked.

use k8s_openapi::api::core::v1::{AppArmorProfile, Pod};

use super::super::admission::Rejection;
use super::super::plan::{inits, regulars};
use crate::runtime::Features;

/// The kernel enforces AppArmor profiles. What it says at the start of the daemon holds until the next start.
pub(crate) fn apparmor_enabled() -> bool {
    std::path::Path::new("/sys/kernel/security/apparmor").exists()
        && std::fs::read_to_string("/sys/module/apparmor/parameters/enabled")
            .is_ok_and(|text| text.starts_with('Y'))
}

/// Why the pod is refused before anything of it runs; `None` when it may run.
pub(crate) fn refusal(pod: &Pod, features: &Features, apparmor: bool) -> Option<Rejection> {
    let refused = |reason: &str, message: String| Some(Rejection::new(reason, message));
    if let Some(why) = forbidden_sysctl(pod) {
        return refused("SysctlForbidden", format!("forbidden sysctl: {why}"));
    }
    if let Some(why) = apparmor_trouble(pod, apparmor) {
        return refused("AppArmor", format!("Cannot enforce AppArmor: {why}"));
    }
    if super::strict_groups(pod) && !features.supplemental_groups_policy {
        return refused(
            "SupplementalGroupsPolicyNotSupported",
            "SupplementalGroupsPolicy=Strict is not supported in this node".to_owned(),
        );
    }
    None
}

fn apparmor_trouble(pod: &Pod, enabled: bool) -> Option<String> {
    let pod_profile = pod
        .spec
        .as_ref()
        .and_then(|s| s.security_context.as_ref()?.app_armor_profile.as_ref());
    let containers = inits(pod).iter().chain(regulars(pod));
    let own = containers.filter_map(|c| c.security_context.as_ref()?.app_armor_profile.as_ref());
    let asked: Vec<&AppArmorProfile> = own
        .chain(pod_profile)
        .filter(|p| p.type_ != "Unconfined")
        .collect();
    if asked.is_empty() {
        return None;
    }
    if !enabled {
        return Some("AppArmor is not enabled on the host".to_owned());
    }
    let nameless = |p: &&AppArmorProfile| {
        p.type_ == "Localhost" && p.localhost_profile.as_deref().is_none_or(|n| n.trim().is_empty())
    };
    asked
        .iter()
        .any(nameless)
        .then(|| "invalid empty AppArmor profile name".to_owned())
}

/// A kernel parameter's name with dots, whichever separator it is written with.
///
/// `net/ipv4/conf/eth0.1/forwarding` is `net.ipv4.conf.eth0/1.forwarding`: the first separator tells which is which.
pub(crate) fn dotted(name: &str) -> String {
    if name.chars().find(|c| matches!(c, '.' | '/')) != Some('/') {
        return name.to_owned();
    }
    let swapped = name.chars().map(|c| match c {
        '.' => '/',
        '/' => '.',
        other => other,
    });
    swapped.collect()
}

/// The first kernel parameter of the pod that this node does not let a pod set, and why: only those that are
/// namespaced and cannot harm a neighbour are safe.
fn forbidden_sysctl(pod: &Pod) -> Option<String> {
    const SAFE: [&str; 12] = [
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
    ];
    let spec = pod.spec.as_ref()?;
    let (host_network, host_ipc) = (spec.host_network == Some(true), spec.host_ipc == Some(true));
    let asked = spec.security_context.as_ref()?.sysctls.iter().flatten();
    asked.map(|s| dotted(&s.name)).find_map(|name| {
        if !SAFE.contains(&name.as_str()) {
            Some(format!("\"{name}\" not allowlisted"))
        } else if host_network && name.starts_with("net.") {
            Some(format!("\"{name}\" not allowed with host Net enabled"))
        } else if host_ipc && name.starts_with("kernel.") {
            Some(format!("\"{name}\" not allowed with host IPC enabled"))
        } else {
            None
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::super::fixtures::pod;
    use super::*;
    use serde_json::{Value, json};

    fn refused(spec: Value, apparmor: bool) -> Option<(String, String)> {
        refusal(&pod(spec), &Features::default(), apparmor).map(|end| (end.reason, end.message))
    }

    #[test]
    fn a_kernel_parameter_that_is_not_safe_is_named() {
        let with = |name: &str, host: bool| {
            refused(
                json!({"hostNetwork": host, "containers": [],
                    "securityContext": {"sysctls": [{"name": name, "value": "1"}]}}),
                false,
            )
            .map(|(_, message)| message)
        };
        let message = with("kernel/msgmax", false);
        assert_eq!(
            message.as_deref(),
            Some("forbidden sysctl: \"kernel.msgmax\" not allowlisted")
        );
        assert_eq!(with("net.ipv4.tcp_syncookies", false), None);
        assert!(
            with("net/ipv4/tcp_syncookies", true)
                .unwrap()
                .contains("host Net enabled")
        );
    }

    #[test]
    fn the_first_separator_of_a_kernel_parameter_tells_the_others() {
        assert_eq!(dotted("net/ipv4/conf/eth0.1/x"), "net.ipv4.conf.eth0/1.x");
        assert_eq!(dotted("net.ipv4.conf.eth0/1.x"), "net.ipv4.conf.eth0/1.x");
    }

    #[test]
    fn a_profile_that_the_machine_cannot_enforce_refuses_the_pod() {
        let with = |kind: &str| json!({"containers": [{"name": "c", "securityContext": {"appArmorProfile": {"type": kind}}}]});
        let (reason, message) = refused(with("RuntimeDefault"), false).unwrap();
        assert_eq!(reason, "AppArmor");
        assert_eq!(
            message,
            "Cannot enforce AppArmor: AppArmor is not enabled on the host"
        );
        assert_eq!(refused(with("Unconfined"), false), None);
        assert_eq!(refused(with("RuntimeDefault"), true), None);
        assert!(refused(with("Localhost"), true).is_some());
    }

    #[test]
    fn strict_groups_need_a_runtime_that_has_them() {
        let spec = json!({"containers": [], "securityContext": {"supplementalGroupsPolicy": "Strict"}});
        let (reason, _) = refused(spec.clone(), false).unwrap();
        assert_eq!(reason, "SupplementalGroupsPolicyNotSupported");
        let able = Features {
            supplemental_groups_policy: true,
            ..Features::default()
        };
        assert!(refusal(&pod(spec), &able, false).is_none());
    }
}
