//! A container's environment, command and arguments, resolved as a kubelet does.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{
    Container, EnvVar, Pod, ResourceFieldSelector, ResourceRequirements, Service,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::objects::Objects;
use super::quantity;

/// Why a container cannot be configured: `CreateContainerConfigError`. Tried again when something changes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ConfigError(pub(crate) String);

/// What fields of the pod's surroundings resolve to.
pub(crate) struct Facts<'a> {
    /// The pod.
    pub(crate) pod: &'a Pod,
    /// The node's address.
    pub(crate) host_ip: Option<IpAddr>,
    /// The pod's addresses.
    pub(crate) pod_ips: &'a [IpAddr],
    /// The objects that it may refer to.
    pub(crate) objects: &'a dyn Objects,
}

/// The environment in order, without duplicates.
pub(crate) fn environment(
    facts: &Facts<'_>,
    container: &Container,
) -> Result<Vec<(String, String)>, ConfigError> {
    let namespace = facts.pod.metadata.namespace.as_deref().unwrap_or_default();
    let spec = facts.pod.spec.as_ref();
    let links = spec.and_then(|s| s.enable_service_links).unwrap_or(true);
    let services = service_environment(namespace, &facts.objects.services(), links);
    let mut result = Vec::<(String, String)>::new();
    let mut set = |name: String, value: String| match result.iter_mut().find(|(n, _)| *n == name) {
        Some(slot) => slot.1 = value,
        None => result.push((name, value)),
    };
    let mut known: HashMap<String, String> = services.iter().cloned().collect();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        for (key, value) in env_from(facts, namespace, source)? {
            let name = format!("{prefix}{key}");
            known.insert(name.clone(), value.clone());
            set(name, value);
        }
    }
    for var in container.env.iter().flatten() {
        let Some(value) = value_of(facts, namespace, container, var, &known)? else {
            continue;
        };
        known.insert(var.name.clone(), value.clone());
        set(var.name.clone(), value);
    }
    for (name, value) in services {
        if !result.iter().any(|(n, _)| *n == name) {
            result.push((name, value));
        }
    }
    Ok(result)
}

fn env_from(
    facts: &Facts<'_>,
    namespace: &str,
    source: &k8s_openapi::api::core::v1::EnvFromSource,
) -> Result<Vec<(String, String)>, ConfigError> {
    if let Some(reference) = &source.config_map_ref {
        return match facts.objects.config_map(namespace, &reference.name) {
            Some(map) => Ok(map.data.unwrap_or_default().into_iter().collect()),
            None if reference.optional == Some(true) => Ok(Vec::new()),
            None => Err(ConfigError(format!("configmap \"{}\" not found", reference.name))),
        };
    }
    if let Some(reference) = &source.secret_ref {
        return match facts.objects.secret(namespace, &reference.name) {
            Some(secret) => Ok(secret
                .data
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, String::from_utf8_lossy(&value.0).into_owned()))
                .collect()),
            None if reference.optional == Some(true) => Ok(Vec::new()),
            None => Err(ConfigError(format!("secret \"{}\" not found", reference.name))),
        };
    }
    Ok(Vec::new())
}

fn value_of(
    facts: &Facts<'_>,
    namespace: &str,
    container: &Container,
    var: &EnvVar,
    known: &HashMap<String, String>,
) -> Result<Option<String>, ConfigError> {
    let Some(from) = &var.value_from else {
        return Ok(Some(expand(var.value.as_deref().unwrap_or_default(), known)));
    };
    if let Some(field) = &from.field_ref {
        return field_value(facts, &field.field_path).map(Some);
    }
    if let Some(field) = &from.resource_field_ref {
        return resource_value(facts, Some(container), field).map(Some);
    }
    if let Some(key) = &from.config_map_key_ref {
        let optional = key.optional == Some(true);
        let value = match facts.objects.config_map(namespace, &key.name) {
            Some(map) => map.data.and_then(|d| d.get(&key.key).cloned()),
            None if optional => return Ok(None),
            None => return Err(ConfigError(format!("configmap \"{}\" not found", key.name))),
        };
        return match value {
            None if !optional => Err(ConfigError(format!(
                "couldn't find key {} in ConfigMap {namespace}/{}",
                key.key, key.name
            ))),
            value => Ok(value),
        };
    }
    if let Some(key) = &from.secret_key_ref {
        let optional = key.optional == Some(true);
        let value = match facts.objects.secret(namespace, &key.name) {
            Some(secret) => secret.data.and_then(|d| d.get(&key.key).cloned()),
            None if optional => return Ok(None),
            None => return Err(ConfigError(format!("secret \"{}\" not found", key.name))),
        };
        return match value {
            None if !optional => Err(ConfigError(format!(
                "couldn't find key {} in Secret {namespace}/{}",
                key.key, key.name
            ))),
            value => Ok(value.map(|v| String::from_utf8_lossy(&v.0).into_owned())),
        };
    }
    Err(ConfigError(format!(
        "the source of environment variable {} is not supported by this node",
        var.name
    )))
}

/// A `fieldRef` of the environment or a downward volume.
pub(crate) fn field_value(facts: &Facts<'_>, path: &str) -> Result<String, ConfigError> {
    let metadata = &facts.pod.metadata;
    let spec = facts.pod.spec.as_ref();
    let joined = |ips: &[IpAddr]| ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let host: Vec<IpAddr> = facts.host_ip.into_iter().collect();
    let pod_ips = if facts.pod_ips.is_empty() {
        &host
    } else {
        facts.pod_ips
    };
    if let Some((map, key)) = subscript(path) {
        let map = match map {
            "metadata.labels" => metadata.labels.as_ref(),
            "metadata.annotations" => metadata.annotations.as_ref(),
            _ => return Err(ConfigError(format!("unsupported fieldPath: {path}"))),
        };
        return Ok(map.and_then(|m| m.get(key)).cloned().unwrap_or_default());
    }
    Ok(match path {
        "metadata.name" => metadata.name.clone().unwrap_or_default(),
        "metadata.namespace" => metadata.namespace.clone().unwrap_or_default(),
        "metadata.uid" => metadata.uid.clone().unwrap_or_default(),
        "metadata.labels" => format_map(metadata.labels.as_ref()),
        "metadata.annotations" => format_map(metadata.annotations.as_ref()),
        "spec.nodeName" => spec.and_then(|s| s.node_name.clone()).unwrap_or_default(),
        "spec.serviceAccountName" => spec
            .and_then(|s| s.service_account_name.clone())
            .unwrap_or_default(),
        "status.hostIP" => host.first().map(ToString::to_string).unwrap_or_default(),
        "status.hostIPs" => joined(&host),
        "status.podIP" => pod_ips.first().map(ToString::to_string).unwrap_or_default(),
        "status.podIPs" => joined(pod_ips),
        _ => return Err(ConfigError(format!("unsupported fieldPath: {path}"))),
    })
}

fn subscript(path: &str) -> Option<(&str, &str)> {
    let (map, rest) = path.split_once("['")?;
    Some((map, rest.strip_suffix("']")?))
}

/// Labels or annotations as a downward volume shows them: `key="value"`, sorted, one a line.
fn format_map(map: Option<&BTreeMap<String, String>>) -> String {
    map.into_iter()
        .flatten()
        .map(|(key, value)| format!("{key}={value:?}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// A `resourceFieldRef`; `own` is the container that asks, when the selector names none.
pub(crate) fn resource_value(
    facts: &Facts<'_>,
    own: Option<&Container>,
    field: &ResourceFieldSelector,
) -> Result<String, ConfigError> {
    let named = field.container_name.as_deref().filter(|n| !n.is_empty());
    let container = match named {
        Some(name) => super::plan::find_container(facts.pod, name)
            .ok_or_else(|| ConfigError(format!("container {name} not found")))?,
        None => own.ok_or_else(|| ConfigError("a resourceFieldRef must name its container".to_owned()))?,
    };
    let (list, resource) = field
        .resource
        .split_once('.')
        .ok_or_else(|| ConfigError(format!("unsupported container resource: {}", field.resource)))?;
    let resources = container.resources.as_ref();
    let found = match list {
        "limits" => {
            // What has no limit, or none to speak of, has the pod's, and that failing the node's.
            let limit = |r: Option<&ResourceRequirements>| {
                let limit = r?.limits.as_ref()?.get(resource)?;
                quantity::milli(limit)
                    .is_some_and(|n| n > 0)
                    .then(|| limit.clone())
            };
            let pod = || limit(facts.pod.spec.as_ref()?.resources.as_ref());
            let node = || facts.objects.node()?.status?.allocatable?.get(resource).cloned();
            limit(resources).or_else(pod).or_else(node)
        }
        "requests" => resources.and_then(|r| r.requests.as_ref()?.get(resource).cloned()),
        _ => {
            return Err(ConfigError(format!(
                "unsupported container resource: {}",
                field.resource
            )));
        }
    };
    let amount = found.as_ref().and_then(quantity::milli).unwrap_or(0);
    let one = Quantity("1".to_owned());
    let divisor = field.divisor.as_ref().filter(|d| d.0 != "0").unwrap_or(&one);
    let divisor = quantity::milli(divisor)
        .filter(|d| *d > 0)
        .ok_or_else(|| ConfigError(format!("invalid divisor {}", divisor.0)))?;
    Ok((amount / divisor + i128::from(amount % divisor != 0)).to_string())
}

/// Expands `$(NAME)`; `$$` is a dollar, what is unknown stays as it is.
pub(crate) fn expand(text: &str, known: &HashMap<String, String>) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            match known.get(name) {
                Some(value) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    out
}

/// The names that an expansion would look for and not find, or find empty; sorted, each once.
pub(crate) fn missing(text: &str, known: &HashMap<String, String>) -> Vec<String> {
    let mut names = std::collections::BTreeSet::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix('(').and_then(|r| r.split_once(')')) {
            if known.get(name).is_none_or(String::is_empty) {
                names.insert(name.to_owned());
            }
            rest = after;
        }
    }
    names.into_iter().collect()
}

/// Variables that name the namespace's Services, and always `default/kubernetes`.
fn service_environment(namespace: &str, services: &[Service], links: bool) -> Vec<(String, String)> {
    let mut chosen = BTreeMap::<&str, &Service>::new();
    for service in services {
        let name = service.metadata.name.as_deref().unwrap_or_default();
        let own = service.metadata.namespace.as_deref() == Some(namespace);
        let master = name == "kubernetes" && service.metadata.namespace.as_deref() == Some("default");
        if (own && links) || (master && !chosen.contains_key(name)) {
            chosen.insert(name, service);
        }
    }
    let mut vars = Vec::new();
    for (name, service) in chosen {
        let Some(spec) = &service.spec else { continue };
        let Some(ip) = spec
            .cluster_ip
            .as_deref()
            .filter(|ip| !ip.is_empty() && *ip != "None")
        else {
            continue;
        };
        let ports = spec.ports.as_deref().unwrap_or_default();
        let Some(first) = ports.first() else { continue };
        let prefix = upper(name);
        vars.push((format!("{prefix}_SERVICE_HOST"), ip.to_owned()));
        vars.push((format!("{prefix}_SERVICE_PORT"), first.port.to_string()));
        for port in ports {
            if let Some(port_name) = port.name.as_deref().filter(|n| !n.is_empty()) {
                vars.push((
                    format!("{prefix}_SERVICE_PORT_{}", upper(port_name)),
                    port.port.to_string(),
                ));
            }
        }
        for (index, port) in ports.iter().enumerate() {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let host = if ip.contains(':') {
                format!("[{ip}]")
            } else {
                ip.to_owned()
            };
            let url = format!("{}://{host}:{}", protocol.to_lowercase(), port.port);
            if index == 0 {
                vars.push((format!("{prefix}_PORT"), url.clone()));
            }
            let stem = format!("{prefix}_PORT_{}_{}", port.port, protocol.to_uppercase());
            vars.push((format!("{stem}_PROTO"), protocol.to_lowercase()));
            vars.push((format!("{stem}_PORT"), port.port.to_string()));
            vars.push((format!("{stem}_ADDR"), ip.to_owned()));
            vars.push((stem, url));
        }
    }
    vars
}

fn upper(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}

#[cfg(test)]
#[path = "env_tests.rs"]
mod tests;
