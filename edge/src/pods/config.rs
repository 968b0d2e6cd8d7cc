//! Spec fields as the runtime wants them: published ports.

use k8s_openapi::api::core::v1::{ContainerPort, Pod};

use super::plan::{inits, is_sidecar, regulars};
use crate::runtime::PortMapping;

/// The ports of the containers that stay: init containers that end publish none.
pub(super) fn container_ports(pod: &Pod) -> impl Iterator<Item = &ContainerPort> {
    let sidecars = inits(pod).iter().filter(|c| is_sidecar(c));
    regulars(pod)
        .iter()
        .chain(sidecars)
        .flat_map(|c| c.ports.iter().flatten())
}

/// Ports that the containers publish on the host.
pub(crate) fn port_mappings(pod: &Pod) -> Vec<PortMapping> {
    if pod.spec.as_ref().and_then(|s| s.host_network).unwrap_or(false) {
        return Vec::new();
    }
    container_ports(pod)
        .filter_map(|port| {
            Some(PortMapping {
                protocol: port.protocol.clone().unwrap_or_else(|| "TCP".to_owned()),
                container_port: u16::try_from(port.container_port).ok()?,
                host_port: u16::try_from(port.host_port?).ok().filter(|p| *p > 0)?,
                host_ip: port.host_ip.clone().unwrap_or_default(),
            })
        })
        .collect()
}
