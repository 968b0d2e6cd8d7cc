//! Which images the pods need.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::link::Kind;

use super::{Pods, StaticPods};
use crate::images::{Forget, Needs, NeedsError};

impl Needs for Pods {
    fn images(&self) -> Result<BTreeSet<String>, NeedsError> {
        let mut names = BTreeSet::new();
        let mut undecoded = 0;
        // One at a time: there may be thousands. What has ended and rests needs no image any more.
        let (_, unread) = self.shared.store.each(Kind::Pod, |object| {
            if self.shared.resting.has(&object.key.uid) {
                return;
            }
            match object.decode::<Pod>() {
                Ok(pod) => names.extend(images_of(&pod)),
                Err(_) => undecoded += 1,
            }
        })?;
        if unread + undecoded > 0 {
            return Err(NeedsError::Unreadable(unread + undecoded));
        }
        let statics = match &*self.shared.statics.borrow() {
            StaticPods::Unknown => return Err(NeedsError::StaticPods),
            StaticPods::Known(statics) => statics.values().cloned().collect::<Vec<_>>(),
        };
        names.extend(statics.iter().flat_map(|pod| images_of(pod)));
        Ok(names)
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
