//! Which images the pods need.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::link::Kind;

use super::{Pods, StaticPods};
use crate::images::{Forget, Needs, NeedsError};

impl Needs for Pods {
    fn images(&self) -> Result<BTreeSet<String>, NeedsError> {
        // Counted first: a pod that comes in between must not pass for one that cannot be read.
        let expected = self.shared.store.count(Kind::Pod)?;
        let stored = self.shared.store.list(Kind::Pod)?;
        let pods: Vec<Pod> = stored.iter().filter_map(|object| object.decode().ok()).collect();
        let unreadable = expected.max(stored.len()) - pods.len();
        if unreadable > 0 {
            return Err(NeedsError::Unreadable(unreadable));
        }
        let statics = match &*self.shared.statics.borrow() {
            StaticPods::Unknown => return Err(NeedsError::StaticPods),
            StaticPods::Known(statics) => statics.values().cloned().collect::<Vec<_>>(),
        };
        let statics = statics.iter().map(|pod| &**pod);
        Ok(pods.iter().chain(statics).flat_map(images_of).collect())
    }

    fn before_listing(&self) -> Forget {
        self.shared.images.before_listing()
    }
}

/// Every image that a pod names: of all kinds of containers, and as volumes.
fn images_of(pod: &Pod) -> Vec<String> {
    let Some(spec) = &pod.spec else { return Vec::new() };
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let ephemeral = spec.ephemeral_containers.iter().flatten().map(|c| &c.image);
    let volumes = spec.volumes.iter().flatten();
    containers
        .map(|c| &c.image)
        .chain(ephemeral)
        .flatten()
        .chain(volumes.filter_map(|v| v.image.as_ref()?.reference.as_ref()))
        .filter(|name| !name.is_empty())
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::pod;
    use super::*;
    use serde_json::json;

    #[test]
    fn images_of_all_containers_and_of_volumes_are_needed() {
        let pod = pod(json!({
            "initContainers": [{"name": "i", "image": "init:1"}],
            "containers": [{"name": "c", "image": "main:1"}, {"name": "d", "image": ""}],
            "ephemeralContainers": [{"name": "e", "image": "debug:1"}],
            "volumes": [{"name": "v", "image": {"reference": "data:1"}}, {"name": "w", "emptyDir": {}}],
        }));
        assert_eq!(images_of(&pod), ["init:1", "main:1", "debug:1", "data:1"]);
    }
}
