//! What an evicted pod's status says. The words are a kubelet's: people and tools look for them.

use k8s_openapi::api::core::v1::Pod;
use skerry_proto::stats::{ContainerStats, PodStats};

use super::state::Crossed;
use super::threshold::{Bytes, Signal};
use crate::pods::quantity;

/// Why a pod went when the node ran short.
pub(super) fn shortage(pod: &Pod, stats: Option<&PodStats>, crossed: &Crossed) -> String {
    let signal = crossed.threshold.signal;
    let resource = signal.resource();
    let amount = |value: u64| {
        if signal.is_bytes() {
            Bytes(value).to_string()
        } else {
            value.to_string()
        }
    };
    let mut message = format!(
        "The node was low on resource: {resource}. Threshold quantity: {}, available: {}. ",
        amount(crossed.limit()),
        if signal.is_bytes() {
            // Rounded to what is worth reading.
            Bytes(crossed.observed.available / 1024 * 1024).to_string()
        } else {
            crossed.observed.available.to_string()
        }
    );
    for container in stats.iter().flat_map(|stats| &stats.containers) {
        let Some(used) = used(container, signal) else {
            continue;
        };
        let Some(request) = request(pod, &container.name, resource) else {
            continue;
        };
        if i128::from(used) > request.0 {
            message.push_str(&format!(
                "Container {} was using {}, request is {}, has larger consumption of {resource}. ",
                container.name,
                Bytes(used / 1024 * 1024),
                request.1
            ));
        }
    }
    message
}

fn used(container: &ContainerStats, signal: Signal) -> Option<u64> {
    match signal.resource() {
        "memory" => container.memory.as_ref()?.working_set_bytes,
        "ephemeral-storage" => {
            Some(container.rootfs.as_ref()?.used_bytes? + container.logs.as_ref()?.used_bytes?)
        }
        _ => None,
    }
}

/// What a container of the pod requests, as a number and as the spec has it; `None` for one that is not in the spec.
fn request(pod: &Pod, name: &str, resource: &str) -> Option<(i128, String)> {
    let spec = pod.spec.as_ref()?;
    let mut containers = spec
        .containers
        .iter()
        .chain(spec.init_containers.iter().flatten());
    let container = containers.find(|c| c.name == name)?;
    let requests = container.resources.as_ref().and_then(|r| r.requests.as_ref());
    let quantity = requests.and_then(|list| list.get(resource));
    Some(quantity.map_or_else(
        || (0, "0".to_owned()),
        |q| (quantity::value(q).unwrap_or(0).into(), q.0.clone()),
    ))
}

#[cfg(test)]
mod tests {
    use super::super::state::Observation;
    use super::super::threshold::{Amount, Threshold};
    use super::*;
    use serde_json::json;
    use skerry_proto::stats::MemoryStats;
    use std::time::Duration;

    #[test]
    fn the_message_names_resource_threshold_and_who_used_more_than_was_asked_for() {
        let pod: Pod = serde_json::from_value(json!({"spec": {"containers": [
            {"name": "a", "resources": {"requests": {"memory": "1Mi"}}}, {"name": "b"}]}}))
        .unwrap();
        let container = |name: &str, bytes| ContainerStats {
            name: name.to_owned(),
            memory: Some(MemoryStats {
                working_set_bytes: Some(bytes),
                ..MemoryStats::default()
            }),
            ..ContainerStats::default()
        };
        let stats = PodStats {
            containers: vec![
                container("a", 1 << 20),
                container("b", 5 << 20),
                container("x", 1),
            ],
            ..PodStats::default()
        };
        let crossed = Crossed {
            threshold: Threshold {
                signal: Signal::MemoryAvailable,
                below: Amount::Absolute(100 << 20),
                grace: Duration::ZERO,
                reclaim: Amount::Absolute(0),
            },
            observed: Observation {
                available: 50 << 20,
                capacity: 1 << 30,
            },
        };
        assert_eq!(
            shortage(&pod, Some(&stats), &crossed),
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. Container b was using \
             5Mi, request is 0, has larger consumption of memory. "
        );
    }
}
