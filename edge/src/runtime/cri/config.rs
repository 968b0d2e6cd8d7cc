//! What a pod wants, in CRI's words.

use std::collections::{BTreeMap, HashMap};

use super::api;
use crate::runtime::{
    ContainerConfig, Device, IdRange, Mount, NamespaceOptions, PortMapping, Propagation, Resources,
    RuntimeError, SandboxConfig, SeLinux, Security, labels,
};

/// Annotation in which a container keeps its image as the pod spec names it: containerd before 1.7 drops the field
/// of CRI that is meant for it. Taken out again when containers are listed.
pub(super) const IMAGE_ANNOTATION: &str = "edge.skerry.dev/image";

/// Hidden from a container unless it is privileged or has `procMount: Unmasked`: they tell of the host or change it.
const MASKED_PATHS: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/firmware",
];

/// Also hidden, where the kernel has them.
const MASKED_DEVICES: [&str; 1] = ["/sys/devices/virtual/powercap"];

/// To be read only, under the same condition.
const READONLY_PATHS: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// The sandbox that `config` describes.
pub(super) fn sandbox(config: &SandboxConfig, owner: &str) -> api::PodSandboxConfig {
    api::PodSandboxConfig {
        metadata: Some(api::PodSandboxMetadata {
            name: config.name.clone(),
            uid: config.uid.to_string(),
            namespace: config.namespace.clone(),
            attempt: config.attempt,
        }),
        hostname: config.hostname.clone(),
        log_directory: config.log_directory.to_string_lossy().into_owned(),
        dns_config: config.dns.as_ref().map(|dns| api::DnsConfig {
            servers: dns.servers.clone(),
            searches: dns.searches.clone(),
            options: dns.options.clone(),
        }),
        port_mappings: config.ports.iter().map(port).collect(),
        labels: labels_of(&config.labels, owner),
        annotations: to_map(&config.annotations),
        linux: Some(api::LinuxPodSandboxConfig {
            cgroup_parent: config.cgroup_parent.clone(),
            security_context: Some(api::LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(config.namespaces, config.user_namespace)),
                selinux_options: config.selinux.as_ref().map(selinux),
                run_as_user: config.run_as_user.map(number),
                run_as_group: config.run_as_user.and(config.run_as_group).map(number),
                supplemental_groups: config.supplemental_groups.clone(),
                supplemental_groups_policy: groups_policy(config.strict_groups),
                privileged: config.privileged,
                seccomp: Some(api::SecurityProfile {
                    profile_type: api::security_profile::ProfileType::RuntimeDefault.into(),
                    localhost_ref: String::new(),
                }),
            }),
            sysctls: to_map(&config.sysctls),
        }),
    }
}

/// The container that `config` describes, in a sandbox made from `sandbox`.
pub(super) fn container(
    config: &ContainerConfig,
    sandbox: &SandboxConfig,
    owner: &str,
) -> Result<api::ContainerConfig, RuntimeError> {
    let mut annotations = to_map(&config.annotations);
    annotations.insert(IMAGE_ANNOTATION.to_owned(), config.image.clone());
    let mut security = security(&config.name, &config.security, sandbox)?;
    if let (Some(target), Some(options)) = (&config.target, &mut security.namespace_options) {
        options.set_pid(api::NamespaceMode::Target);
        options.target_id.clone_from(&target.0);
    }
    Ok(api::ContainerConfig {
        metadata: Some(api::ContainerMetadata {
            name: config.name.clone(),
            attempt: config.attempt,
        }),
        image: Some(api::ImageSpec {
            image: config.image_ref.clone(),
            user_specified_image: config.image.clone(),
        }),
        command: config.command.clone(),
        args: config.args.clone(),
        working_dir: config.working_dir.clone(),
        envs: config.env.iter().map(variable).collect(),
        mounts: config
            .mounts
            .iter()
            .map(|m| mount(m, sandbox.user_namespace))
            .collect(),
        devices: config.devices.iter().map(device).collect(),
        labels: labels_of(&config.labels, owner),
        annotations,
        log_path: config.log_path.to_string_lossy().into_owned(),
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        linux: Some(api::LinuxContainerConfig {
            resources: Some(resources(&config.resources)),
            security_context: Some(security),
        }),
        stop_signal: stop_signal(&config.name, &config.stop_signal)?.into(),
    })
}

/// The signal of that name (`SIGRTMIN+3` among them).
fn stop_signal(container: &str, name: &str) -> Result<api::Signal, RuntimeError> {
    if name.is_empty() {
        return Ok(api::Signal::RuntimeDefault);
    }
    let known = name.replace('+', "PLUS").replace('-', "MINUS");
    api::Signal::from_str_name(&known)
        .filter(|signal| *signal != api::Signal::RuntimeDefault)
        .ok_or_else(|| {
            RuntimeError::Invalid(format!(
                "container {container} asks for the stop signal {name}, which is none"
            ))
        })
}

fn labels_of(given: &BTreeMap<String, String>, owner: &str) -> HashMap<String, String> {
    let mut all = to_map(given);
    all.insert(labels::MANAGED_BY.to_owned(), owner.to_owned());
    all
}

fn to_map(given: &BTreeMap<String, String>) -> HashMap<String, String> {
    given.clone().into_iter().collect()
}

fn number(value: i64) -> api::Int64Value {
    api::Int64Value { value }
}

fn groups_policy(strict: bool) -> i32 {
    let policy = if strict {
        api::SupplementalGroupsPolicy::Strict
    } else {
        api::SupplementalGroupsPolicy::Merge
    };
    policy.into()
}

fn selinux(label: &SeLinux) -> api::SeLinuxOption {
    api::SeLinuxOption {
        user: label.user.clone(),
        role: label.role.clone(),
        r#type: label.kind.clone(),
        level: label.level.clone(),
    }
}

fn mappings(range: IdRange) -> Vec<api::IdMapping> {
    vec![api::IdMapping {
        host_id: range.first,
        container_id: 0,
        length: range.count,
    }]
}

/// The host's user namespace unless the pod has one: absent would mean one of the pod's own to newer engines.
fn user_namespace(range: Option<IdRange>) -> api::UserNamespace {
    match range {
        None => api::UserNamespace {
            mode: api::NamespaceMode::Node.into(),
            uids: Vec::new(),
            gids: Vec::new(),
        },
        Some(range) => api::UserNamespace {
            mode: api::NamespaceMode::Pod.into(),
            uids: mappings(range),
            gids: mappings(range),
        },
    }
}

fn device(device: &Device) -> api::Device {
    api::Device {
        container_path: device.container_path.clone(),
        host_path: device.host_path.to_string_lossy().into_owned(),
        permissions: if device.readonly { "r" } else { "mrw" }.to_owned(),
    }
}

fn namespaces(options: NamespaceOptions, users: Option<IdRange>) -> api::NamespaceOption {
    use api::NamespaceMode::{Container, Node, Pod};
    let pod_or_node = |host| if host { Node } else { Pod };
    let pid = match (options.host_pid, options.share_process) {
        (true, _) => Node,
        (false, true) => Pod,
        (false, false) => Container,
    };
    api::NamespaceOption {
        network: pod_or_node(options.host_network).into(),
        pid: pid.into(),
        ipc: pod_or_node(options.host_ipc).into(),
        target_id: String::new(),
        userns_options: Some(user_namespace(users)),
    }
}

fn port(port: &PortMapping) -> api::PortMapping {
    let protocol = match port.protocol.as_str() {
        "UDP" => api::Protocol::Udp,
        "SCTP" => api::Protocol::Sctp,
        _ => api::Protocol::Tcp,
    };
    api::PortMapping {
        protocol: protocol.into(),
        container_port: port.container_port.into(),
        host_port: port.host_port.into(),
        host_ip: port.host_ip.clone(),
    }
}

fn variable((key, value): &(String, String)) -> api::KeyValue {
    api::KeyValue {
        key: key.clone(),
        value: value.clone().into_bytes(),
    }
}

fn mount(mount: &Mount, users: Option<IdRange>) -> api::Mount {
    let propagation = match mount.propagation {
        Propagation::Private => api::MountPropagation::PropagationPrivate,
        Propagation::HostToContainer => api::MountPropagation::PropagationHostToContainer,
        Propagation::Bidirectional => api::MountPropagation::PropagationBidirectional,
    };
    api::Mount {
        container_path: mount.container_path.clone(),
        host_path: mount.host_path.to_string_lossy().into_owned(),
        readonly: mount.readonly,
        selinux_relabel: mount.selinux_relabel,
        propagation: propagation.into(),
        uid_mappings: users.map(mappings).unwrap_or_default(),
        gid_mappings: users.map(mappings).unwrap_or_default(),
        recursive_read_only: mount.recursive_readonly,
        image: mount.image.as_ref().map(|image| api::ImageSpec {
            image: image.reference.clone(),
            user_specified_image: image.image.clone(),
        }),
        image_sub_path: mount
            .image
            .as_ref()
            .map(|i| i.sub_path.clone())
            .unwrap_or_default(),
    }
}

/// cgroup settings.
pub(super) fn resources(resources: &Resources) -> api::LinuxContainerResources {
    api::LinuxContainerResources {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        memory_limit_in_bytes: resources.memory_limit_bytes,
        oom_score_adj: resources.oom_score_adj,
        hugepage_limits: resources
            .huge_pages
            .iter()
            .map(|(size, limit)| api::HugepageLimit {
                page_size: size.clone(),
                limit: *limit,
            })
            .collect(),
        unified: to_map(&resources.unified),
        memory_swap_limit_in_bytes: resources.memory_swap_bytes,
    }
}

fn security(
    container: &str,
    security: &Security,
    sandbox: &SandboxConfig,
) -> Result<api::LinuxContainerSecurityContext, RuntimeError> {
    let masked = !security.privileged && !security.unmasked_proc;
    let (apparmor, apparmor_profile) = apparmor(&security.apparmor);
    let masked_paths = MASKED_PATHS
        .iter()
        .chain(&MASKED_DEVICES)
        .map(|p| (*p).to_owned());
    Ok(api::LinuxContainerSecurityContext {
        capabilities: Some(api::Capability {
            add_capabilities: security.add_capabilities.clone(),
            drop_capabilities: security.drop_capabilities.clone(),
        }),
        privileged: security.privileged,
        namespace_options: Some(namespaces(sandbox.namespaces, sandbox.user_namespace)),
        selinux_options: security.selinux.as_ref().map(selinux),
        run_as_user: security.run_as_user.map(number),
        run_as_username: security.run_as_username.clone(),
        readonly_rootfs: security.readonly_rootfs,
        supplemental_groups: security.supplemental_groups.clone(),
        no_new_privs: security.no_new_privileges,
        run_as_group: security.run_as_group.map(number),
        masked_paths: when(masked, masked_paths.chain(thermal_throttles())),
        readonly_paths: when(masked, READONLY_PATHS.iter().map(|p| (*p).to_owned())),
        seccomp: Some(seccomp(container, &security.seccomp)?),
        apparmor,
        apparmor_profile,
        supplemental_groups_policy: groups_policy(security.strict_groups),
    })
}

fn when(condition: bool, paths: impl Iterator<Item = String>) -> Vec<String> {
    if condition { paths.collect() } else { Vec::new() }
}

/// Each processor's counter of thermal events, where the kernel has one: the load of neighbours shows in it.
fn thermal_throttles() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/devices/system/cpu")
        .into_iter()
        .flatten()
        .flatten();
    let mut found: Vec<String> = entries
        .filter(|entry| {
            let name = entry.file_name();
            let number = name.to_str().and_then(|n| n.strip_prefix("cpu"));
            number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
        })
        .map(|entry| entry.path().join("thermal_throttle"))
        .filter(|path| path.exists())
        .map(|path| path.to_string_lossy().into_owned())
        .collect();
    found.sort();
    found
}

/// A profile as engines take it: a message, and the string that older ones read.
fn apparmor(profile: &str) -> (Option<api::SecurityProfile>, String) {
    use api::security_profile::ProfileType;
    let made = |kind: ProfileType, name: &str| {
        Some(api::SecurityProfile {
            profile_type: kind.into(),
            localhost_ref: name.to_owned(),
        })
    };
    match profile {
        "" => (None, String::new()),
        "RuntimeDefault" => (
            made(ProfileType::RuntimeDefault, ""),
            "runtime/default".to_owned(),
        ),
        "Unconfined" => (made(ProfileType::Unconfined, ""), "unconfined".to_owned()),
        other => {
            let name = other.strip_prefix("Localhost/").unwrap_or(other);
            (made(ProfileType::Localhost, name), format!("localhost/{name}"))
        }
    }
}

fn seccomp(container: &str, profile: &str) -> Result<api::SecurityProfile, RuntimeError> {
    use api::security_profile::ProfileType;
    let (kind, path) = match profile {
        "" | "Unconfined" => (ProfileType::Unconfined, ""),
        "RuntimeDefault" => (ProfileType::RuntimeDefault, ""),
        other => match other.strip_prefix("Localhost/") {
            Some(path) if !path.is_empty() => (ProfileType::Localhost, path),
            _ => {
                return Err(RuntimeError::Invalid(format!(
                    "container {container} asks for the seccomp profile {other:?}; use Unconfined, RuntimeDefault or \
                     Localhost with a path"
                )));
            }
        },
    };
    Ok(api::SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: path.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modes(options: NamespaceOptions) -> (api::NamespaceMode, api::NamespaceMode, api::NamespaceMode) {
        let made = namespaces(options, None);
        (made.network(), made.pid(), made.ipc())
    }

    #[test]
    fn a_plain_pod_has_its_own_network_and_ipc_and_a_pid_namespace_per_container() {
        use api::NamespaceMode::{Container, Pod};
        assert_eq!(modes(NamespaceOptions::default()), (Pod, Container, Pod));
    }

    #[test]
    fn host_namespaces_win_over_a_shared_process_namespace() {
        use api::NamespaceMode::{Node, Pod};
        let shared = NamespaceOptions {
            share_process: true,
            ..Default::default()
        };
        assert_eq!(modes(shared), (Pod, Pod, Pod));
        let host = NamespaceOptions {
            host_network: true,
            host_pid: true,
            host_ipc: true,
            share_process: true,
        };
        assert_eq!(modes(host), (Node, Node, Node));
    }

    #[test]
    fn resources_travel_under_the_numbers_that_engines_read() {
        use prost::Message as _;
        let sent = resources(&Resources {
            cpu_period: 1,
            cpu_quota: 1,
            cpu_shares: 1,
            memory_limit_bytes: 1,
            oom_score_adj: 1,
            huge_pages: [(String::new(), 0)].into(),
            unified: [(String::new(), String::new())].into(),
            memory_swap_bytes: 1,
        })
        .encode_to_vec();
        // Each field is a key and one byte; the key's upper bits are the field's number in api.proto of cri-api.
        let numbers: Vec<u8> = sent.chunks(2).map(|field| field[0] >> 3).collect();
        assert_eq!(numbers, [1, 2, 3, 4, 5, 8, 9, 10]);
    }

    fn sandbox_with(user_namespace: Option<IdRange>) -> SandboxConfig {
        SandboxConfig {
            name: "p".into(),
            namespace: "n".into(),
            uid: "u".into(),
            attempt: 0,
            hostname: String::new(),
            log_directory: std::path::PathBuf::new(),
            dns: None,
            ports: Vec::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            cgroup_parent: String::new(),
            namespaces: NamespaceOptions::default(),
            sysctls: BTreeMap::new(),
            privileged: false,
            runtime_handler: String::new(),
            supplemental_groups: Vec::new(),
            strict_groups: false,
            run_as_user: None,
            run_as_group: None,
            selinux: None,
            user_namespace,
        }
    }

    #[test]
    fn a_user_namespace_maps_the_pod_and_its_mounts_and_without_one_it_is_the_host_s() {
        let range = IdRange {
            first: 131_072,
            count: 65_536,
        };
        let made = security("c", &Security::default(), &sandbox_with(Some(range))).unwrap();
        let users = made.namespace_options.unwrap().userns_options.unwrap();
        assert_eq!(users.mode(), api::NamespaceMode::Pod);
        assert_eq!((users.uids[0].host_id, users.gids[0].length), (131_072, 65_536));
        assert_eq!(mount(&Mount::default(), Some(range)).uid_mappings, users.uids);
        let made = security("c", &Security::default(), &sandbox_with(None)).unwrap();
        let users = made.namespace_options.unwrap().userns_options.unwrap();
        assert_eq!(users.mode(), api::NamespaceMode::Node);
    }

    #[test]
    fn an_apparmor_profile_is_told_to_new_and_old_engines() {
        assert_eq!(apparmor(""), (None, String::new()));
        assert_eq!(apparmor("RuntimeDefault").1, "runtime/default");
        let (made, old) = apparmor("Localhost/k8s-deny");
        assert_eq!(made.unwrap().localhost_ref, "k8s-deny");
        assert_eq!(old, "localhost/k8s-deny");
    }

    #[test]
    fn proc_is_masked_unless_privileged_or_unmasked() {
        let paths = |security: Security| {
            let made = super::security("c", &security, &sandbox_with(None)).unwrap();
            (
                made.masked_paths.len()
                    - if made.masked_paths.is_empty() {
                        0
                    } else {
                        thermal_throttles().len()
                    },
                made.readonly_paths.len(),
            )
        };
        assert_eq!(paths(Security::default()), (12, 5));
        let privileged = Security {
            privileged: true,
            ..Default::default()
        };
        assert_eq!(paths(privileged), (0, 0));
        let unmasked = Security {
            unmasked_proc: true,
            ..Default::default()
        };
        assert_eq!(paths(unmasked), (0, 0));
    }

    #[test]
    fn a_stop_signal_goes_by_its_name_and_nonsense_is_refused() {
        assert_eq!(stop_signal("c", "").unwrap(), api::Signal::RuntimeDefault);
        assert_eq!(stop_signal("c", "SIGUSR1").unwrap() as i32, 29);
        assert_eq!(stop_signal("c", "SIGRTMIN+3").unwrap() as i32, 38);
        assert_eq!(stop_signal("c", "SIGRTMAX-1").unwrap() as i32, 64);
        assert!(stop_signal("c", "SIGNOTHING").is_err());
        assert!(stop_signal("c", "RUNTIME_DEFAULT").is_err());
    }

    #[test]
    fn a_localhost_seccomp_profile_keeps_its_absolute_path_and_nonsense_is_refused() {
        let local = seccomp("c", "Localhost//profiles/a.json").unwrap();
        assert_eq!(local.localhost_ref, "/profiles/a.json");
        assert!(matches!(
            seccomp("c", "Localhost/"),
            Err(RuntimeError::Invalid(_))
        ));
        assert!(matches!(seccomp("c", "Confined"), Err(RuntimeError::Invalid(_))));
    }

    #[test]
    fn the_owner_replaces_a_given_label_of_the_same_name() {
        let given = BTreeMap::from([(labels::MANAGED_BY.to_owned(), "pod".to_owned())]);
        assert_eq!(labels_of(&given, "site")[labels::MANAGED_BY], "site");
    }
}
