//! Who a container runs as and what it may do: the pod's security settings, resolved as a kubelet does.
//!
//! In: a Pod, what the runtime says that it can do, what the machine enforces. Out: the runtime's [`Security`], or a
//! refusal in a kubelet's words: as a pod failure ([`refusal`]), as a sandbox that is not made ([`user_namespace`],
//! [`runtime_handler`]), or as a container that is not made ([`ConfigError`]).
//!
//! What must hold: a setting that would make a pod safer is honoured or refused, never left out.

mod admission;
mod userns;

use std::path::Path;

use k8s_openapi::api::core::v1::{Container, Pod, SELinuxOptions, VolumeMount};

use super::env::ConfigError;
use super::objects::Objects;
use crate::runtime::{Image, SeLinux, Security};

pub(crate) use admission::{apparmor_enabled, dotted, refusal};
pub(crate) use userns::{UserRanges, user_namespace};

/// The handler of the pod's RuntimeClass; empty for the default. Fails in the API's words when there is no such class.
pub(crate) fn runtime_handler(pod: &Pod, objects: &dyn Objects) -> Result<String, String> {
    let name = pod.spec.as_ref().and_then(|s| s.runtime_class_name.as_deref());
    let Some(name) = name.filter(|n| !n.is_empty()) else {
        return Ok(String::new());
    };
    objects
        .runtime_class(name)
        .map(|class| class.handler)
        .ok_or_else(|| format!("runtimeclass.node.k8s.io \"{name}\" not found"))
}

/// Identity and powers of a container, the pod's settings below its own.
pub(crate) fn security(
    pod: &Pod,
    container: &Container,
    image: Option<&Image>,
    seccomp_default: bool,
    seccomp_dir: &Path,
) -> Result<Security, ConfigError> {
    let pod_context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    let own = container.security_context.as_ref();
    let asked_user = own
        .and_then(|c| c.run_as_user)
        .or(pod_context.and_then(|c| c.run_as_user));
    let run_as_group = own
        .and_then(|c| c.run_as_group)
        .or(pod_context.and_then(|c| c.run_as_group));
    let non_root = own
        .and_then(|c| c.run_as_non_root)
        .or(pod_context.and_then(|c| c.run_as_non_root));
    if non_root == Some(true) {
        check_non_root(pod, container, asked_user, image)?;
    }
    // The image's user is told too: a group without a user would be refused.
    let run_as_user = asked_user.or(image.and_then(|i| i.uid));
    let run_as_username = image
        .filter(|_| run_as_user.is_none())
        .map(|i| i.username.clone())
        .unwrap_or_default();
    let run_as_user = match (run_as_user, run_as_group, run_as_username.as_str()) {
        (None, Some(_), "") => Some(0),
        (user, _, _) => user,
    };
    let profile = own
        .and_then(|c| c.seccomp_profile.as_ref())
        .or(pod_context.and_then(|c| c.seccomp_profile.as_ref()));
    let seccomp = match profile {
        Some(p) if p.type_ == "Localhost" => match p.localhost_profile.as_deref() {
            Some(name) if !name.is_empty() => format!("Localhost/{}", seccomp_dir.join(name).display()),
            _ => {
                return Err(ConfigError(
                    "localhostProfile must be set if seccompProfile type is Localhost.".to_owned(),
                ));
            }
        },
        Some(p) => p.type_.clone(),
        None if seccomp_default => "RuntimeDefault".to_owned(),
        None => String::new(),
    };
    let profile = own
        .and_then(|c| c.app_armor_profile.as_ref())
        .or(pod_context.and_then(|c| c.app_armor_profile.as_ref()));
    let apparmor = match profile {
        Some(p) if p.type_ == "Localhost" => match p.localhost_profile.as_deref() {
            Some(name) => format!("Localhost/{name}"),
            None => return Err(ConfigError("missing localhost apparmor profile name".to_owned())),
        },
        Some(p) => p.type_.clone(),
        None => String::new(),
    };
    let label = own
        .and_then(|c| c.se_linux_options.as_ref())
        .or(pod_context.and_then(|c| c.se_linux_options.as_ref()));
    let capabilities = own.and_then(|c| c.capabilities.as_ref());
    Ok(Security {
        run_as_user,
        run_as_username,
        run_as_group,
        supplemental_groups: supplemental_groups(pod),
        strict_groups: strict_groups(pod),
        privileged: is_privileged(container),
        readonly_rootfs: own.and_then(|c| c.read_only_root_filesystem).unwrap_or(false),
        no_new_privileges: own.and_then(|c| c.allow_privilege_escalation) == Some(false),
        add_capabilities: capabilities.and_then(|c| c.add.clone()).unwrap_or_default(),
        drop_capabilities: capabilities.and_then(|c| c.drop.clone()).unwrap_or_default(),
        seccomp,
        apparmor,
        selinux: label.map(selinux),
        unmasked_proc: own.and_then(|c| c.proc_mount.as_deref()) == Some("Unmasked"),
    })
}

fn check_non_root(
    pod: &Pod,
    container: &Container,
    run_as_user: Option<i64>,
    image: Option<&Image>,
) -> Result<(), ConfigError> {
    let what = match (run_as_user, image) {
        (Some(0), _) => "container's runAsUser breaks non-root policy".to_owned(),
        (Some(_), _) => return Ok(()),
        (None, Some(image)) => match (image.uid, image.username.as_str()) {
            (Some(0), _) | (None, "") => "container has runAsNonRoot and image will run as root".to_owned(),
            (Some(_), _) => return Ok(()),
            (None, name) => format!(
                "container has runAsNonRoot and image has non-numeric user ({name}), cannot verify user is non-root"
            ),
        },
        (None, None) => "container has runAsNonRoot and image will run as root".to_owned(),
    };
    let metadata = &pod.metadata;
    Err(ConfigError(format!(
        "{what} (pod: \"{}_{}({})\", container: {})",
        metadata.name.as_deref().unwrap_or_default(),
        metadata.namespace.as_deref().unwrap_or_default(),
        metadata.uid.as_deref().unwrap_or_default(),
        container.name
    )))
}

/// `fsGroup` and `supplementalGroups`.
pub(crate) fn supplemental_groups(pod: &Pod) -> Vec<i64> {
    let Some(context) = pod.spec.as_ref().and_then(|s| s.security_context.as_ref()) else {
        return Vec::new();
    };
    let mut groups: Vec<i64> = context.fs_group.into_iter().collect();
    groups.extend(context.supplemental_groups.iter().flatten());
    groups
}

/// The groups that an image gives its user do not count.
pub(crate) fn strict_groups(pod: &Pod) -> bool {
    let context = pod.spec.as_ref().and_then(|s| s.security_context.as_ref());
    context.and_then(|c| c.supplemental_groups_policy.as_deref()) == Some("Strict")
}

/// An SELinux label in the runtime's terms.
pub(crate) fn selinux(options: &SELinuxOptions) -> SeLinux {
    SeLinux {
        user: options.user.clone().unwrap_or_default(),
        role: options.role.clone().unwrap_or_default(),
        kind: options.type_.clone().unwrap_or_default(),
        level: options.level.clone().unwrap_or_default(),
    }
}

/// The container has all powers.
pub(crate) fn is_privileged(container: &Container) -> bool {
    container
        .security_context
        .as_ref()
        .and_then(|c| c.privileged)
        .unwrap_or(false)
}

/// Whether a mount is made read only all the way down. `supported` is what the pod's handler can do.
pub(crate) fn recursive_readonly(mount: &VolumeMount, supported: bool) -> Result<bool, ConfigError> {
    let refused = |why: String| {
        Err(ConfigError(format!(
            "failed to resolve recursive read-only mode: {why}"
        )))
    };
    let name = &mount.name;
    let mode = mount.recursive_read_only.as_deref().unwrap_or("Disabled");
    if mode == "Disabled" {
        return Ok(false);
    }
    if mount.read_only != Some(true) {
        return refused(format!(
            "volume \"{name}\" requested recursive read-only mode, but it is not read-only"
        ));
    }
    if let Some(propagation) = mount.mount_propagation.as_deref().filter(|p| *p != "None") {
        return refused(format!(
            "volume \"{name}\" requested recursive read-only mode, but it is not compatible with propagation \
             \"{propagation}\""
        ));
    }
    match mode {
        "IfPossible" => Ok(supported),
        "Enabled" if supported => Ok(true),
        "Enabled" => refused(format!(
            "volume \"{name}\" requested recursive read-only mode, but it is not supported by the runtime"
        )),
        other => refused(format!("unknown recursive read-only mode \"{other}\"")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::pod;
    use super::super::plan::regulars;
    use super::*;
    use serde_json::json;

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

    fn of(pod: &Pod, image: Option<&Image>) -> Result<Security, ConfigError> {
        security(pod, &regulars(pod)[0], image, false, Path::new("/profiles"))
    }

    #[test]
    fn an_image_that_would_run_as_root_is_refused_when_non_root_is_asked() {
        let pod = pod(json!({"securityContext": {"runAsNonRoot": true}, "containers": [{"name": "c"}]}));
        assert!(of(&pod, Some(&image(Some(0), ""))).is_err());
        assert_eq!(
            of(&pod, Some(&image(None, ""))).unwrap_err().0,
            "container has runAsNonRoot and image will run as root (pod: \
             \"p_default(11111111-2222-3333-4444-555555555555)\", container: c)"
        );
        let named = of(&pod, Some(&image(None, "app"))).unwrap_err().0;
        assert!(named.contains("non-numeric user (app), cannot verify"), "{named}");
        assert!(of(&pod, Some(&image(Some(1000), ""))).is_ok());
    }

    #[test]
    fn the_container_s_settings_win_over_the_pod_s() {
        let pod = pod(
            json!({"securityContext": {"runAsUser": 1, "fsGroup": 5, "supplementalGroups": [4],
                "appArmorProfile": {"type": "RuntimeDefault"}, "seLinuxOptions": {"level": "s0"},
                "supplementalGroupsPolicy": "Strict"},
            "containers": [{"name": "c", "securityContext": {"runAsUser": 2, "capabilities": {"drop": ["ALL"]},
                "allowPrivilegeEscalation": false,
                "appArmorProfile": {"type": "Localhost", "localhostProfile": "k8s"},
                "seccompProfile": {"type": "Localhost", "localhostProfile": "a/b.json"}}}]}),
        );
        let made = of(&pod, None).unwrap();
        assert_eq!(made.run_as_user, Some(2));
        assert_eq!(made.supplemental_groups, [5, 4]);
        assert!(made.no_new_privileges && made.strict_groups);
        assert_eq!(made.seccomp, "Localhost//profiles/a/b.json");
        assert_eq!(made.apparmor, "Localhost/k8s");
        assert_eq!(made.selinux.unwrap().level, "s0");
    }

    #[test]
    fn a_group_alone_goes_with_the_image_s_user() {
        let pod = pod(json!({"securityContext": {"runAsGroup": 7}, "containers": [{"name": "c"}]}));
        assert_eq!(of(&pod, Some(&image(Some(9), ""))).unwrap().run_as_user, Some(9));
        assert_eq!(of(&pod, Some(&image(None, ""))).unwrap().run_as_user, Some(0));
        let named = of(&pod, Some(&image(None, "app"))).unwrap();
        assert_eq!((named.run_as_user, named.run_as_username.as_str()), (None, "app"));
    }

    #[test]
    fn a_mount_is_recursively_read_only_where_that_is_possible_and_refused_where_it_must_be() {
        let check = |mount: serde_json::Value, supported| {
            let mount: VolumeMount = serde_json::from_value(mount).unwrap();
            recursive_readonly(&mount, supported)
        };
        let with =
            |mode: &str| json!({"name": "v", "mountPath": "/v", "readOnly": true, "recursiveReadOnly": mode});
        assert_eq!(check(with("IfPossible"), false), Ok(false));
        assert_eq!(check(with("IfPossible"), true), Ok(true));
        assert_eq!(
            check(with("Enabled"), false).unwrap_err().0,
            "failed to resolve recursive read-only mode: volume \"v\" requested recursive read-only mode, but it is \
             not supported by the runtime"
        );
        let writable = json!({"name": "v", "mountPath": "/v", "recursiveReadOnly": "Enabled"});
        assert!(
            check(writable, true)
                .unwrap_err()
                .0
                .contains("it is not read-only")
        );
    }
}
