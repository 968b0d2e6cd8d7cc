//! From a container's configuration to what the shim needs; refuses what a process of the host cannot have.

use std::path::Path;
use std::str::FromStr;

use nix::sys::signal::Signal;

use super::child;
use super::record::{ContainerRecord, Launch, MountRecord};
use super::unsupported;
use crate::runtime::{
    ContainerConfig, Propagation, RuntimeError, SandboxConfig, SandboxId, Security, labels,
};

/// Capabilities by number, as in `linux/capability.h`.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// What container engines grant without being asked.
const DEFAULT: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// Checks a configuration and makes the container's record.
pub(super) fn container_record(
    id: &str,
    sandbox: &SandboxId,
    config: &ContainerConfig,
    pod: &SandboxConfig,
    state_root: &Path,
) -> Result<ContainerRecord, RuntimeError> {
    if config.command.is_empty() {
        return Err(RuntimeError::Invalid(format!(
            "container {:?}: the process runtime needs spec.containers[].command: it has no images",
            config.name
        )));
    }
    let root = nix::unistd::geteuid().is_root();
    let security = &config.security;
    let mut groups = ids("supplementalGroups", &security.supplemental_groups)?;
    groups.extend(ids("fsGroup", &pod.supplemental_groups)?);
    groups.sort_unstable();
    groups.dedup();
    check(security, &groups, root)?;
    let annotation = |key: &str| config.annotations.get(key).cloned().unwrap_or_default();
    let parent = if pod.cgroup_parent.is_empty() {
        "skerry"
    } else {
        &pod.cgroup_parent
    };
    let resources = &config.resources;
    let uid = security.run_as_user.map(|n| one_id("runAsUser", n)).transpose()?;
    let gid = security
        .run_as_group
        .map(|n| one_id("runAsGroup", n))
        .transpose()?;
    let launch = Launch {
        argv: config.command.iter().chain(&config.args).cloned().collect(),
        working_dir: config.working_dir.clone(),
        env: config.env.clone(),
        mounts: mounts(config)?.into_iter().chain(devices(config)?).collect(),
        state_root: state_root.to_owned(),
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        tty: config.tty,
        uid,
        // Found out once: it is shown in the pod's status, too.
        gid: gid.or_else(|| uid.filter(|_| root).map(child::primary_group)),
        groups,
        no_new_privileges: security.no_new_privileges,
        readonly_rootfs: security.readonly_rootfs,
        capabilities: capabilities(security)?,
        cgroup: format!("{}/{id}", parent.trim_matches('/')),
        cpu_shares: resources.cpu_shares,
        cpu_quota: resources.cpu_quota,
        cpu_period: resources.cpu_period,
        memory_limit_bytes: resources.memory_limit_bytes,
        oom_score_adj: resources.oom_score_adj,
    };
    if !config.stop_signal.is_empty() && Signal::from_str(&config.stop_signal).is_err() {
        return Err(unsupported(format!(
            "the stop signal {}: use one that is not a real-time signal",
            config.stop_signal
        )));
    }
    Ok(ContainerRecord {
        sandbox: sandbox.0.clone(),
        pod_uid: pod.uid.as_str().to_owned(),
        name: config.name.clone(),
        restart_count: annotation(labels::RESTART_COUNT)
            .parse()
            .unwrap_or(config.attempt),
        spec_hash: annotation(labels::CONTAINER_HASH),
        created_at: jiff::Timestamp::now(),
        image: config.image.clone(),
        image_ref: config.image_ref.clone(),
        log_path: pod.log_directory.join(&config.log_path),
        annotations: config.annotations.clone(),
        stop_signal: config.stop_signal.clone(),
        launch,
    })
}

fn check(security: &Security, groups: &[u32], root: bool) -> Result<(), RuntimeError> {
    if security.seccomp.starts_with("Localhost/") {
        return Err(unsupported(
            "seccomp profiles of the host: leave seccompProfile at RuntimeDefault",
        ));
    }
    if !matches!(security.apparmor.as_str(), "" | "Unconfined") {
        return Err(unsupported(
            "AppArmor profiles: leave appArmorProfile out, or choose a runtime with containers",
        ));
    }
    if security.selinux.is_some() {
        return Err(unsupported(
            "seLinuxOptions: leave them out, or choose a runtime with containers",
        ));
    }
    if !root {
        if security.privileged {
            return Err(unsupported(
                "privileged containers unless skerry-edge runs as root",
            ));
        }
        if !groups.is_empty() {
            return Err(unsupported(
                "supplementalGroups and fsGroup unless skerry-edge runs as root",
            ));
        }
    }
    Ok(())
}

fn mounts(config: &ContainerConfig) -> Result<Vec<MountRecord>, RuntimeError> {
    let convert = |mount: &crate::runtime::Mount| {
        if let Some(image) = &mount.image {
            return Err(unsupported(format!("image volumes, asked for {}", image.image)));
        }
        if mount.propagation == Propagation::Bidirectional {
            return Err(unsupported(format!(
                "mountPropagation Bidirectional, asked for {}",
                mount.container_path
            )));
        }
        if !mount.container_path.starts_with('/') || mount.container_path.trim_matches('/').is_empty() {
            return Err(RuntimeError::Invalid(format!(
                "container {:?}: mountPath {:?} must be an absolute path other than /",
                config.name, mount.container_path
            )));
        }
        Ok(MountRecord {
            container_path: mount.container_path.clone(),
            host_path: mount.host_path.clone(),
            readonly: mount.readonly,
            follow_host: mount.propagation == Propagation::HostToContainer,
        })
    };
    config.mounts.iter().map(convert).collect()
}

/// A device is a file of the host, bound to where the container expects it.
fn devices(config: &ContainerConfig) -> Result<Vec<MountRecord>, RuntimeError> {
    let convert = |device: &crate::runtime::Device| {
        if device.readonly {
            return Err(unsupported(format!(
                "read-only block volumes, asked for {}",
                device.container_path
            )));
        }
        Ok(MountRecord {
            container_path: device.container_path.clone(),
            host_path: device.host_path.clone(),
            readonly: false,
            follow_host: false,
        })
    };
    config.devices.iter().map(convert).collect()
}

fn one_id(what: &str, value: i64) -> Result<u32, RuntimeError> {
    // The highest number means "unchanged" to the kernel.
    u32::try_from(value)
        .ok()
        .filter(|n| *n != u32::MAX)
        .ok_or_else(|| {
            RuntimeError::Invalid(format!("securityContext.{what} {value} is no user or group id"))
        })
}

fn ids(what: &str, values: &[i64]) -> Result<Vec<u32>, RuntimeError> {
    values.iter().map(|v| one_id(what, *v)).collect()
}

/// Numbers of the capabilities to keep; `None` keeps all.
fn capabilities(security: &Security) -> Result<Option<Vec<u32>>, RuntimeError> {
    if security.privileged {
        return Ok(None);
    }
    let mut keep: Vec<u32> = DEFAULT.iter().filter_map(|n| number(n)).collect();
    for name in &security.drop_capabilities {
        if name.eq_ignore_ascii_case("ALL") {
            keep.clear();
        } else {
            let dropped = known(name)?;
            keep.retain(|n| *n != dropped);
        }
    }
    for name in &security.add_capabilities {
        if name.eq_ignore_ascii_case("ALL") {
            return Ok(None);
        }
        keep.push(known(name)?);
    }
    keep.sort_unstable();
    keep.dedup();
    Ok(Some(keep))
}

fn number(name: &str) -> Option<u32> {
    NAMES
        .iter()
        .zip(0..)
        .find(|(n, _)| **n == name)
        .map(|(_, number)| number)
}

fn known(name: &str) -> Result<u32, RuntimeError> {
    let upper = name.to_ascii_uppercase();
    number(upper.strip_prefix("CAP_").unwrap_or(&upper))
        .ok_or_else(|| unsupported(format!("the capability {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_all_and_adding_one_leaves_one() {
        let security = Security {
            drop_capabilities: vec!["ALL".into()],
            add_capabilities: vec!["NET_BIND_SERVICE".into()],
            ..Security::default()
        };
        assert_eq!(capabilities(&security).unwrap(), Some(vec![10]));
    }

    #[test]
    fn a_privileged_container_keeps_every_capability() {
        assert_eq!(
            capabilities(&Security {
                privileged: true,
                ..Security::default()
            })
            .unwrap(),
            None
        );
    }

    #[test]
    fn an_unknown_capability_is_refused_by_name() {
        let security = Security {
            add_capabilities: vec!["FLY".into()],
            ..Security::default()
        };
        assert!(capabilities(&security).unwrap_err().to_string().contains("FLY"));
    }

    #[test]
    fn a_negative_user_is_invalid() {
        assert!(matches!(one_id("runAsUser", -1), Err(RuntimeError::Invalid(_))));
    }
}
