//! What of the host a container sees: its volumes, the hosts file, the termination message.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use k8s_openapi::api::core::v1::{Container, Pod, VolumeMount};

use super::env::{self, ConfigError};
use super::message::message_file;
use super::network;
use super::security;
use super::volumes::{self, Subpath, prepare_subpath};
use super::worker::Worker;
use crate::runtime::{Device, ImageMount, Mount, Propagation};

impl Worker {
    /// The images that the container mounts as volumes, by volume, once they are there; `None` while one is not.
    pub(super) async fn image_volumes(
        &mut self,
        pod: &Pod,
        container: &Container,
    ) -> Option<BTreeMap<String, ImageMount>> {
        let mut found = BTreeMap::new();
        let volumes = pod.spec.iter().flat_map(|s| s.volumes.iter().flatten());
        for volume in volumes {
            let mounts = container.volume_mounts.iter().flatten();
            let (Some(source), true) = (&volume.image, mounts.into_iter().any(|m| m.name == volume.name))
            else {
                continue;
            };
            let reference = source.reference.clone().unwrap_or_default();
            if !self.features.image_mounts {
                let message = format!(
                    "volume \"{}\" is the image \"{reference}\", and the container runtime of this node cannot mount \
                     images: use containerd 2.1, CRI-O 1.33 or newer",
                    volume.name
                );
                self.fail(pod, &container.name, "ImageVolumeMountFailed", message)
                    .await;
                return None;
            }
            let policy = source.pull_policy.as_deref();
            let pulled = self.image_of(pod, container, &reference, policy).await?;
            let mount = ImageMount {
                reference: pulled.reference,
                image: reference,
                sub_path: String::new(),
            };
            found.insert(volume.name.clone(), mount);
        }
        Some(found)
    }

    /// The block volumes of the container.
    pub(super) fn devices(&self, pod: &Pod, container: &Container) -> Result<Vec<Device>, ConfigError> {
        let convert = |device: &k8s_openapi::api::core::v1::VolumeDevice| {
            let path = self.volumes.get(&device.name).ok_or_else(|| {
                ConfigError(format!(
                    "cannot find volume \"{}\" to pass into container \"{}\"",
                    device.name, container.name
                ))
            })?;
            Ok(Device {
                container_path: device.device_path.clone(),
                host_path: path.clone(),
                readonly: volumes::attributes(pod, &device.name).readonly,
            })
        };
        container.volume_devices.iter().flatten().map(convert).collect()
    }

    /// Everything that is mounted into the container.
    pub(super) fn mounts(
        &self,
        pod: &Pod,
        container: &Container,
        restart_count: u32,
        known: &HashMap<String, String>,
        message_path: &str,
        images: &BTreeMap<String, ImageMount>,
    ) -> Result<Vec<Mount>, ConfigError> {
        let dir = self.pod_dir();
        let handler = security::runtime_handler(pod, &self.shared.store).map_err(ConfigError)?;
        let can_rro = self.features.handler(&handler).recursive_readonly;
        let relabels = Path::new("/sys/fs/selinux/enforce").exists();
        let mut mounts = Vec::new();
        for (index, mount) in container.volume_mounts.iter().flatten().enumerate() {
            let sub = subpath_of(mount, known)?;
            let attributes = volumes::attributes(pod, &mount.name);
            let mut made = Mount {
                container_path: mount.mount_path.clone(),
                readonly: attributes.readonly || mount.read_only == Some(true),
                recursive_readonly: security::recursive_readonly(mount, can_rro)?,
                selinux_relabel: relabels && attributes.managed,
                propagation: match mount.mount_propagation.as_deref() {
                    Some("HostToContainer") => Propagation::HostToContainer,
                    Some("Bidirectional") => Propagation::Bidirectional,
                    _ => Propagation::Private,
                },
                ..Mount::default()
            };
            if let Some(image) = images.get(&mount.name) {
                made.image = Some(ImageMount {
                    sub_path: sub.unwrap_or_default(),
                    ..image.clone()
                });
                mounts.push(made);
                continue;
            }
            let volume = self.volumes.get(&mount.name).ok_or_else(|| {
                ConfigError(format!(
                    "cannot find volume \"{}\" to mount into container \"{}\"",
                    mount.name, container.name
                ))
            })?;
            made.host_path = match sub {
                None => volume.clone(),
                Some(path) => {
                    let target = dir
                        .join("volume-subpaths")
                        .join(&mount.name)
                        .join(&container.name)
                        .join(index.to_string());
                    prepare_subpath(&Subpath {
                        volume,
                        name: &mount.name,
                        container: &container.name,
                        path: &path,
                        target: &target,
                    })
                    .map_err(ConfigError)?
                }
            };
            mounts.push(made);
        }
        let io = |path: &Path, e: std::io::Error| ConfigError(format!("{}: {e}", path.display()));
        let own_hosts = mounts.iter().any(|m| m.container_path == "/etc/hosts");
        if !own_hosts && self.shared.runtime.isolated() {
            let path = dir.join("etc-hosts");
            let node = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
            let text = network::hosts_file(pod, &self.pod_ips(), &self.shared.config.cluster_domain, &node);
            std::fs::write(&path, text).map_err(|e| io(&path, e))?;
            mounts.push(Mount {
                container_path: "/etc/hosts".to_owned(),
                host_path: path,
                selinux_relabel: relabels,
                ..Mount::default()
            });
        }
        let path = message_file(&dir, &container.name, restart_count);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|e| io(parent, e))?;
        }
        std::fs::write(&path, b"").map_err(|e| io(&path, e))?;
        // The container may run as any user.
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).map_err(|e| io(&path, e))?;
        mounts.push(Mount {
            container_path: message_path.to_owned(),
            host_path: path,
            selinux_relabel: relabels,
            ..Mount::default()
        });
        Ok(mounts)
    }
}

/// The part of its volume that a mount shows; `None` for the whole.
fn subpath_of(mount: &VolumeMount, known: &HashMap<String, String>) -> Result<Option<String>, ConfigError> {
    if let Some(expression) = mount.sub_path_expr.as_deref().filter(|e| !e.is_empty()) {
        let missing = env::missing(expression, known);
        if !missing.is_empty() {
            return Err(ConfigError(format!("missing value for {}", missing.join(", "))));
        }
        return Ok(Some(env::expand(expression, known)));
    }
    Ok(mount.sub_path.clone().filter(|p| !p.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_subpath_is_expanded_from_the_environment_and_what_is_missing_is_named() {
        let of = |expression: &str| {
            let mount: VolumeMount =
                serde_json::from_value(json!({"name": "v", "mountPath": "/v", "subPathExpr": expression}))
                    .unwrap();
            let known = HashMap::from([("A".to_owned(), "a".to_owned()), ("E".to_owned(), String::new())]);
            subpath_of(&mount, &known)
        };
        assert_eq!(of("x/$(A)/$$(B)").unwrap().as_deref(), Some("x/a/$(B)"));
        assert_eq!(of("$(B)/$(E)/$(A)").unwrap_err().0, "missing value for B, E");
    }
}
