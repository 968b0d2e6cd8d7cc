//! Images that must stay, and where images are kept.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::Deserialize;

use super::api;
use super::client::Client;
use crate::runtime::{ImageFs, RuntimeError};

/// The part of containerd's configuration that matters here.
#[derive(Deserialize)]
struct EngineConfig {
    #[serde(default, rename = "sandboxImage")]
    sandbox_image: String,
}

/// References of the images that the engine or any container of it needs.
pub(super) async fn images_in_use(client: &Client) -> Result<BTreeSet<String>, RuntimeError> {
    let mut stay: BTreeSet<String> = client.images_of_all_containers().await?.into_iter().collect();
    for image in client.list_images().await? {
        if image.pinned || image.repo_tags.iter().any(|tag| is_pause(tag)) {
            stay.insert(image.id);
        }
    }
    // containerd before 1.7 pins nothing, but names its sandbox image.
    let configured = client.info().await?.get("config").and_then(|c| sandbox_image(c));
    if let Some(name) = configured {
        stay.extend(client.image_status(&name).await?.map(|image| image.id));
        stay.insert(name);
    }
    stay.remove("");
    Ok(stay)
}

fn sandbox_image(config: &str) -> Option<String> {
    let config: EngineConfig = serde_json::from_str(config).ok()?;
    Some(config.sandbox_image).filter(|name| !name.is_empty())
}

/// The usual name of a sandbox image, for engines that say nothing of it.
fn is_pause(tag: &str) -> bool {
    let name = tag.rsplit('/').next().unwrap_or(tag);
    name.split(':').next() == Some("pause")
}

/// A file system that images are on, in our words; `None` when it has no path.
pub(super) fn image_fs(usage: api::FilesystemUsage) -> Option<ImageFs> {
    let mountpoint = usage.fs_id?.mountpoint;
    (!mountpoint.is_empty()).then(|| ImageFs {
        mountpoint: PathBuf::from(mountpoint),
        used_bytes: usage.used_bytes.map_or(0, |v| v.value),
        inodes_used: usage.inodes_used.map_or(0, |v| v.value),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sandbox_image_is_known_by_the_configuration_or_by_its_usual_name() {
        assert_eq!(
            sandbox_image(r#"{"sandboxImage": "r.example/pause:3.9", "other": 1}"#).as_deref(),
            Some("r.example/pause:3.9")
        );
        assert_eq!(sandbox_image("{}"), None);
        assert!(is_pause("registry.k8s.io/pause:3.10") && is_pause("localhost:5000/pause"));
        assert!(!is_pause("docker.io/library/pauseless:1"));
    }
}
