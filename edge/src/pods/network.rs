//! Hostname, hosts file and resolver of a pod.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;

use crate::runtime::DnsConfig;

/// Most name servers that a resolver takes.
const MAX_SERVERS: usize = 3;
/// Most search domains.
const MAX_SEARCHES: usize = 32;
/// Most characters of the search line.
const MAX_SEARCH_CHARS: usize = 2048;
/// Most characters of one search domain: some resolvers abort at more.
const MAX_SEARCH_DOMAIN: usize = 253;
/// Most characters of the kernel's hostname.
const MAX_FQDN: usize = 64;

/// Resolver settings and what had to be left out of them.
pub(crate) struct Dns {
    /// The settings.
    pub(crate) config: DnsConfig,
    /// The cluster has no DNS configured here: event `MissingClusterDNS`.
    pub(crate) missing_cluster: bool,
    /// Something was cut: event `DNSConfigForming` with this message.
    pub(crate) cut: Option<String>,
}

/// The hostname inside the pod, and its domain when it has a subdomain.
pub(crate) fn hostname(pod: &Pod, cluster_domain: &str) -> (String, Option<String>) {
    let spec = pod.spec.as_ref();
    if let Some(own) = spec.and_then(|s| s.hostname_override.clone()) {
        return (short_name(&own), None);
    }
    let name = spec
        .and_then(|s| s.hostname.as_deref())
        .filter(|h| !h.is_empty())
        .or(pod.metadata.name.as_deref())
        .unwrap_or_default();
    let host = short_name(name);
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let domain = spec
        .and_then(|s| s.subdomain.as_deref())
        .filter(|s| !s.is_empty())
        .map(|sub| format!("{sub}.{namespace}.svc.{cluster_domain}"));
    (host, domain)
}

/// What of a name fits into the kernel's field.
fn short_name(name: &str) -> String {
    let short: String = name.chars().take(63).collect();
    if short.len() == name.len() {
        return short;
    }
    short.trim_end_matches(['-', '.']).to_owned()
}

/// The hostname that the kernel of the pod's UTS namespace gets; empty for host network. Fails when the full name is
/// asked for and the kernel has no room for it.
pub(crate) fn kernel_hostname(pod: &Pod, cluster_domain: &str) -> Result<String, String> {
    let spec = pod.spec.as_ref();
    if spec.and_then(|s| s.host_network).unwrap_or(false) {
        return Ok(String::new());
    }
    let (host, domain) = hostname(pod, cluster_domain);
    match domain {
        Some(domain) if spec.and_then(|s| s.set_hostname_as_fqdn).unwrap_or(false) => {
            let full = format!("{host}.{domain}");
            if full.len() > MAX_FQDN {
                return Err(format!(
                    "failed to construct FQDN from pod hostname and cluster domain, FQDN {full} is too long \
                     ({MAX_FQDN} characters is the max, {} characters requested)",
                    full.len()
                ));
            }
            Ok(full)
        }
        _ => Ok(host),
    }
}

/// The text of the pod's `/etc/hosts`. `node_hosts` is the node's own file, used with host network.
pub(crate) fn hosts_file(pod: &Pod, ips: &[IpAddr], cluster_domain: &str, node_hosts: &str) -> String {
    let spec = pod.spec.as_ref();
    let mut text = String::new();
    if spec.and_then(|s| s.host_network).unwrap_or(false) {
        text.push_str("# Kubernetes-managed hosts file (host network).\n");
        text.push_str(node_hosts);
    } else {
        text.push_str(
            "# Kubernetes-managed hosts file.\n\
             127.0.0.1\tlocalhost\n\
             ::1\tlocalhost ip6-localhost ip6-loopback\n\
             fe00::0\tip6-localnet\n\
             fe00::0\tip6-mcastprefix\n\
             fe00::1\tip6-allnodes\n\
             fe00::2\tip6-allrouters\n",
        );
        let (host, domain) = hostname(pod, cluster_domain);
        for ip in ips {
            match &domain {
                Some(domain) => text.push_str(&format!("{ip}\t{host}.{domain}\t{host}\n")),
                None => text.push_str(&format!("{ip}\t{host}\n")),
            }
        }
    }
    let aliases = spec.and_then(|s| s.host_aliases.as_deref()).unwrap_or_default();
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            text.push_str(&format!(
                "{}\t{}\n",
                alias.ip,
                alias.hostnames.clone().unwrap_or_default().join("\t")
            ));
        }
    }
    text
}

/// Reads `resolv.conf`; what is not understood is left out.
pub(crate) fn parse_resolv_conf(text: &str) -> DnsConfig {
    let mut config = DnsConfig::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => config.servers.extend(words.next().map(str::to_owned)),
            Some("search") => config.searches = words.filter(|w| *w != ".").map(str::to_owned).collect(),
            Some("options") => config.options = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    config
}

/// The resolver of a pod by its `dnsPolicy` and `dnsConfig`.
pub(crate) fn dns(pod: &Pod, cluster_dns: &[IpAddr], cluster_domain: &str, node: &DnsConfig) -> Dns {
    let spec = pod.spec.as_ref();
    let host_network = spec.and_then(|s| s.host_network).unwrap_or(false);
    let policy = spec
        .and_then(|s| s.dns_policy.as_deref())
        .unwrap_or("ClusterFirst");
    let wants_cluster = policy == "ClusterFirstWithHostNet" || (policy == "ClusterFirst" && !host_network);
    let missing_cluster = wants_cluster && cluster_dns.is_empty();
    let mut config = if policy == "None" {
        DnsConfig::default()
    } else if wants_cluster && !missing_cluster {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let mut searches = Vec::new();
        if !cluster_domain.is_empty() {
            searches.push(format!("{namespace}.svc.{cluster_domain}"));
            searches.push(format!("svc.{cluster_domain}"));
            searches.push(cluster_domain.to_owned());
        }
        searches.extend(node.searches.iter().cloned());
        DnsConfig {
            servers: cluster_dns.iter().map(ToString::to_string).collect(),
            searches,
            options: vec!["ndots:5".to_owned()],
        }
    } else {
        node.clone()
    };
    if let Some(own) = spec.and_then(|s| s.dns_config.as_ref()) {
        config.servers.extend(own.nameservers.iter().flatten().cloned());
        config.searches.extend(own.searches.iter().flatten().cloned());
        for option in own.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            config
                .options
                .retain(|o| o.split(':').next() != Some(name.as_str()));
            config.options.push(match &option.value {
                Some(value) if !value.is_empty() => format!("{name}:{value}"),
                _ => name.clone(),
            });
        }
    }
    dedup(&mut config.servers);
    dedup(&mut config.searches);
    let mut cut = Vec::new();
    if config.servers.len() > MAX_SERVERS {
        config.servers.truncate(MAX_SERVERS);
        cut.push(format!(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {}",
            config.servers.join(" ")
        ));
    }
    let before = config.searches.len();
    config.searches.truncate(MAX_SEARCHES);
    config.searches.retain(|search| search.len() <= MAX_SEARCH_DOMAIN);
    while config.searches.iter().map(|s| s.len() + 1).sum::<usize>() > MAX_SEARCH_CHARS + 1 {
        config.searches.pop();
    }
    if config.searches.len() < before {
        cut.push(format!(
            "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {}",
            config.searches.join(" ")
        ));
    }
    Dns {
        config,
        missing_cluster,
        cut: (!cut.is_empty()).then(|| cut.join("; ")),
    }
}

fn dedup(list: &mut Vec<String>) {
    let mut seen = std::collections::HashSet::new();
    list.retain(|item| seen.insert(item.clone()));
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::pod;
    use super::*;
    use serde_json::json;

    #[test]
    fn cluster_first_asks_the_cluster_and_searches_its_domains() {
        let node = parse_resolv_conf("nameserver 1.1.1.1\nsearch lan\n");
        let dns = dns(
            &pod(json!({"containers": []})),
            &["10.96.0.10".parse().unwrap()],
            "cluster.local",
            &node,
        );
        assert_eq!(dns.config.servers, ["10.96.0.10"]);
        assert_eq!(
            dns.config.searches,
            [
                "default.svc.cluster.local",
                "svc.cluster.local",
                "cluster.local",
                "lan"
            ]
        );
        assert_eq!(dns.config.options, ["ndots:5"]);
    }

    #[test]
    fn without_cluster_dns_the_node_s_resolver_is_used_and_it_is_said() {
        let node = parse_resolv_conf("nameserver 1.1.1.1\n");
        let dns = dns(&pod(json!({"containers": []})), &[], "cluster.local", &node);
        assert!(dns.missing_cluster);
        assert_eq!(dns.config.servers, ["1.1.1.1"]);
    }

    #[test]
    fn host_network_uses_the_node_unless_asked_otherwise() {
        let node = parse_resolv_conf("nameserver 1.1.1.1\n");
        let cluster = ["10.96.0.10".parse().unwrap()];
        let plain = pod(json!({"hostNetwork": true, "containers": []}));
        assert_eq!(dns(&plain, &cluster, "c", &node).config.servers, ["1.1.1.1"]);
        let asked =
            pod(json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet", "containers": []}));
        assert_eq!(dns(&asked, &cluster, "c", &node).config.servers, ["10.96.0.10"]);
    }

    #[test]
    fn too_many_name_servers_are_cut_and_it_is_said() {
        let pod = pod(json!({"dnsPolicy": "None", "containers": [],
            "dnsConfig": {"nameservers": ["1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"], "options": [{"name": "ndots", "value": "2"}]}}));
        let dns = dns(&pod, &[], "c", &DnsConfig::default());
        assert_eq!(dns.config.servers.len(), 3);
        assert_eq!(dns.config.options, ["ndots:2"]);
        assert!(dns.cut.unwrap().contains("1.1.1.1 1.1.1.2 1.1.1.3"));
    }

    #[test]
    fn the_hosts_file_names_the_pod_by_its_domain() {
        let pod = pod(
            json!({"subdomain": "sub", "containers": [], "hostAliases": [{"ip": "9.9.9.9", "hostnames": ["a", "b"]}]}),
        );
        let text = hosts_file(&pod, &["10.0.0.5".parse().unwrap()], "cluster.local", "");
        assert!(
            text.contains("10.0.0.5\tp.sub.default.svc.cluster.local\tp\n"),
            "{text}"
        );
        assert!(text.contains("9.9.9.9\ta\tb\n"));
    }

    #[test]
    fn a_full_name_that_the_kernel_has_no_room_for_is_an_error() {
        let with = |sub: &str| {
            kernel_hostname(
                &pod(json!({"subdomain": sub, "setHostnameAsFQDN": true, "containers": []})),
                "cluster.local",
            )
        };
        assert_eq!(with("s").unwrap(), "p.s.default.svc.cluster.local");
        assert!(
            with(&"s".repeat(50))
                .unwrap_err()
                .contains("is too long (64 characters")
        );
    }

    #[test]
    fn a_search_domain_that_breaks_resolvers_is_left_out() {
        let pod = pod(json!({"dnsPolicy": "None", "containers": [],
            "dnsConfig": {"nameservers": ["1.1.1.1"], "searches": ["a".repeat(254), "b"]}}));
        let dns = dns(&pod, &[], "c", &DnsConfig::default());
        assert_eq!(dns.config.searches, ["b"]);
        assert!(dns.cut.unwrap().ends_with("the applied search line is: b"));
    }

    #[test]
    fn a_long_name_is_cut_without_a_trailing_dash() {
        let mut pod = pod(json!({"containers": []}));
        pod.metadata.name = Some(format!("{}-tail", "a".repeat(62)));
        assert_eq!(hostname(&pod, "c").0, "a".repeat(62));
    }
}
