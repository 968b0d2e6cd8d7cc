//! What a pod was given, as opposed to what its spec asks for now.
//!
//! A pod is admitted with the resources that its spec asked for then. A later resize changes the spec at once, but what
//! counts, for the node's book, for cgroups and for the status, stays what was allocated until the node grants the new
//! size. Source: a kubelet's allocation manager.

use std::borrow::Cow;
use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use serde::{Deserialize, Serialize};

use super::plan::{inits, regulars};
use super::resources;

/// Resources by container, and of the pod as a whole.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Allocation {
    /// `spec.resources`.
    pub(crate) pod: Option<ResourceRequirements>,
    /// By name; init containers too.
    pub(crate) containers: BTreeMap<String, ResourceRequirements>,
}

impl Allocation {
    /// What the spec asks for.
    pub(crate) fn of(pod: &Pod) -> Self {
        Self {
            pod: pod.spec.as_ref().and_then(|s| s.resources.clone()),
            containers: inits(pod)
                .iter()
                .chain(regulars(pod))
                .map(|c| (c.name.clone(), c.resources.clone().unwrap_or_default()))
                .collect(),
        }
    }

    /// The pod with this in place of what its spec asks for.
    pub(crate) fn apply<'a>(&self, pod: &'a Pod) -> Cow<'a, Pod> {
        if Self::of(pod) == *self {
            return Cow::Borrowed(pod);
        }
        let mut pod = pod.clone();
        if let Some(spec) = &mut pod.spec {
            spec.resources.clone_from(&self.pod);
            for container in spec
                .init_containers
                .iter_mut()
                .flatten()
                .chain(&mut spec.containers)
            {
                if let Some(given) = self.containers.get(&container.name) {
                    container.resources = Some(given.clone());
                }
            }
        }
        Cow::Owned(pod)
    }
}

/// What a container or pod is set up with, in thousandths; 0 when there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sizes {
    pub(crate) cpu_request: i128,
    pub(crate) cpu_limit: i128,
    pub(crate) memory_request: i128,
    pub(crate) memory_limit: i128,
}

impl Sizes {
    /// What a container of an allocated pod should have.
    pub(crate) fn of(pod: &Pod, container: &Container) -> Self {
        let request = |name| resources::container_request(container, name).unwrap_or(0);
        let limit = |name| resources::container_limit(pod, container, name).unwrap_or(0);
        Self {
            cpu_request: request("cpu"),
            cpu_limit: limit("cpu"),
            memory_request: request("memory"),
            memory_limit: limit("memory"),
        }
    }

    pub(crate) fn same_cpu(&self, other: &Self) -> bool {
        (self.cpu_request, self.cpu_limit) == (other.cpu_request, other.cpu_limit)
    }

    pub(crate) fn same_memory(&self, other: &Self) -> bool {
        (self.memory_request, self.memory_limit) == (other.memory_request, other.memory_limit)
    }
}

/// What the newest instance of a container was last given by the runtime.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Actuated {
    /// As the status shows it.
    pub(crate) resources: ResourceRequirements,
    /// As it is compared.
    pub(crate) sizes: Sizes,
}

impl Actuated {
    /// What a container of an allocated pod is set up with.
    pub(crate) fn of(pod: &Pod, container: &Container) -> Self {
        Self {
            resources: container.resources.clone().unwrap_or_default(),
            sizes: Sizes::of(pod, container),
        }
    }
}

/// Where a resize stands. Empty for a pod whose spec is what it was given and has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Resizing {
    /// Not granted.
    pub(crate) pending: Option<Pending>,
    /// Granted, and not everywhere done.
    pub(crate) progress: Option<Progress>,
}

/// A resize that is not granted: condition `PodResizePending`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pending {
    /// It cannot be granted on this node, ever; otherwise when pods have left.
    pub(crate) infeasible: bool,
    /// Why.
    pub(crate) message: String,
    /// Generation of the spec that asks for it.
    pub(crate) generation: Option<i64>,
    /// Since when.
    pub(crate) since: Timestamp,
}

/// A resize that was granted: condition `PodResizeInProgress`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Progress {
    /// What kept it from being done, the last time that it was tried.
    pub(crate) error: Option<String>,
    /// Generation of the spec that asked for it.
    pub(crate) generation: Option<i64>,
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::pod;
    use super::*;
    use serde_json::json;

    #[test]
    fn an_allocation_hides_what_the_spec_asks_for_since() {
        let of =
            |cpu: &str| pod(json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": cpu}}}]}));
        let given = Allocation::of(&of("1"));
        assert!(matches!(given.apply(&of("1")), Cow::Borrowed(_)));
        let wished = of("2");
        let seen = given.apply(&wished);
        assert_eq!(Allocation::of(&seen), given);
        assert_eq!(Sizes::of(&seen, &regulars(&seen)[0]).cpu_request, 1000);
    }

    #[test]
    fn an_allocation_survives_json() {
        let given = Allocation::of(&pod(
            json!({"resources": {"limits": {"cpu": "1"}}, "containers": [{"name": "c"}]}),
        ));
        let text = serde_json::to_string(&given).unwrap();
        assert_eq!(serde_json::from_str::<Allocation>(&text).unwrap(), given);
    }
}
