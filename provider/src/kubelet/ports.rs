//! One port of the listener for every node, so that paths that name no node reach the right one.
//!
//! `/metrics/resource`, `/stats/summary`, `/pods` and the like say nothing of the node: whoever asks has connected to the
//! node's address and port, as Node status gives them. All sites share this provider's address; each gets a port of its
//! own out of a range. The port is remembered where it is published, in Node status: a provider that starts again
//! takes the ports that its Nodes show.
//!
//! What must always hold: a port belongs to one site; it listens before it is published.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use skerry_proto::SiteName;
use skerry_proto::link::Kind;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::cluster::{Mirror, Object};
use crate::node::status::SITE_LABEL;

/// How often ports of sites that are gone are given back.
const SWEEP: Duration = Duration::from_secs(30);

/// A listener for one node, to be served until `stop`.
pub struct NodeListener {
    /// The node.
    pub site: SiteName,
    /// Bound and listening.
    pub listener: TcpListener,
    /// The site is gone.
    pub stop: CancellationToken,
}

/// Gives ports to nodes.
pub struct NodePorts {
    address: IpAddr,
    range: Option<RangeInclusive<u16>>,
    /// The port for all nodes, where there is no port of their own.
    shared: u16,
    given: Mutex<Given>,
    listeners: mpsc::UnboundedSender<NodeListener>,
}

#[derive(Default)]
struct Given {
    by_site: HashMap<SiteName, (u16, CancellationToken)>,
    by_port: HashMap<u16, SiteName>,
    /// Where the search for a free port goes on.
    next: u16,
}

impl NodePorts {
    /// Ports of `range` on `address`; without a range every node has the `shared` port. The listeners come out of the
    /// returned end.
    pub fn new(
        address: IpAddr,
        shared: u16,
        range: Option<RangeInclusive<u16>>,
    ) -> (Self, mpsc::UnboundedReceiver<NodeListener>) {
        let (listeners, made) = mpsc::unbounded_channel();
        let ports = Self {
            address,
            range,
            shared,
            given: Mutex::default(),
            listeners,
        };
        (ports, made)
    }

    fn given(&self) -> MutexGuard<'_, Given> {
        // No code panics while it holds the lock, and the maps agree between any two statements.
        self.given.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The site's port, which listens. `published` is the one that its Node shows and that it keeps if it can; `taken`
    /// says of a port that another Node shows it. Must be called in a tokio runtime.
    pub fn port(&self, site: &SiteName, published: Option<u16>, taken: impl Fn(u16) -> bool) -> u16 {
        let Some(range) = &self.range else {
            return self.shared;
        };
        let mut given = self.given();
        if let Some((port, _)) = given.by_site.get(site) {
            return *port;
        }
        if let Some(port) = published.filter(|port| range.contains(port))
            && self.give(&mut given, site, port)
        {
            return port;
        }
        let size = range.len();
        let (first, start) = (*range.start(), given.next);
        for step in 0..size {
            let offset = (usize::from(start) + step) % size;
            let Ok(offset) = u16::try_from(offset) else { break };
            let port = first + offset;
            if !taken(port) && self.give(&mut given, site, port) {
                given.next = offset.wrapping_add(1);
                return port;
            }
        }
        tracing::error!(%site, first, last = range.end(),
            "no port is left for the node: kubectl top and its metrics do not work; widen --node-ports");
        self.shared
    }

    fn give(&self, given: &mut Given, site: &SiteName, port: u16) -> bool {
        if given.by_port.contains_key(&port) {
            return false;
        }
        let listener = match listen(SocketAddr::new(self.address, port)) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::warn!(%site, port, %error, "a node's port cannot be used; another one is tried");
                return false;
            }
        };
        let stop = CancellationToken::new();
        given.by_port.insert(port, site.clone());
        given.by_site.insert(site.clone(), (port, stop.clone()));
        // The server ends only with the provider.
        let _ = self.listeners.send(NodeListener {
            site: site.clone(),
            listener,
            stop,
        });
        true
    }

    /// Closes the ports of sites that `exists` does not know.
    fn retain(&self, exists: impl Fn(&SiteName) -> bool) {
        let mut given = self.given();
        let gone: Vec<SiteName> = given.by_site.keys().filter(|s| !exists(s)).cloned().collect();
        for site in gone {
            if let Some((port, stop)) = given.by_site.remove(&site) {
                given.by_port.remove(&port);
                stop.cancel();
            }
        }
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// The port that a Node shows.
pub fn published(node: &Object) -> Option<u16> {
    let port = &node.value["status"]["daemonEndpoints"]["kubeletEndpoint"]["Port"];
    u16::try_from(port.as_u64()?).ok()
}

/// The port for a site, with what the cluster shows taken into account.
pub fn port_of(ports: &NodePorts, mirror: &Mirror, site: &SiteName) -> u16 {
    let known = mirror.named(Kind::Node, "", site.as_str());
    // Only looked at for a new site.
    let others = std::cell::OnceCell::new();
    let taken = |port: u16| {
        others
            .get_or_init(|| {
                let nodes = mirror.all(Kind::Node);
                let others = nodes.iter().filter(|node| node.name != site.as_str());
                others
                    .filter_map(|node| published(node))
                    .collect::<std::collections::HashSet<u16>>()
            })
            .contains(&port)
    };
    ports.port(site, known.as_deref().and_then(published), taken)
}

/// Listens on the ports that Nodes show already, and gives those of deleted Sites back, until `stop`.
pub async fn run(ports: Arc<NodePorts>, mirror: Arc<Mirror>, stop: CancellationToken) {
    mirror.synced().await;
    for node in mirror.all(Kind::Node) {
        let ours = node.value["metadata"]["labels"][SITE_LABEL].as_str() == Some(node.name.as_str());
        if let (true, Ok(site), Some(_)) = (ours, node.name.parse::<SiteName>(), published(&node)) {
            port_of(&ports, &mirror, &site);
        }
    }
    let mut sweep = tokio::time::interval(SWEEP);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = sweep.tick() => {}
        }
        ports.retain(|site| {
            let site = site.as_str();
            mirror.named(Kind::Site, "", site).is_some() || mirror.named(Kind::Node, "", site).is_some()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(name: &str) -> SiteName {
        name.parse().unwrap()
    }

    fn ports(size: u16) -> (NodePorts, mpsc::UnboundedReceiver<NodeListener>, u16) {
        // A range that is free now: below a port that the kernel has just given.
        let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let first = probe.local_addr().unwrap().port().saturating_sub(size + 100);
        let range = Some(first..=first + size - 1);
        let (ports, made) = NodePorts::new("127.0.0.1".parse().unwrap(), 10250, range);
        (ports, made, first)
    }

    #[tokio::test]
    async fn every_site_gets_a_port_of_its_own_and_keeps_it() {
        let (ports, mut made, _) = ports(20);
        let a = ports.port(&site("a"), None, |_| false);
        let b = ports.port(&site("b"), None, |_| false);
        assert_ne!(a, b);
        assert_eq!(ports.port(&site("a"), None, |_| false), a);
        for (name, port) in [("a", a), ("b", b)] {
            let one = made.recv().await.unwrap();
            assert_eq!(one.site, site(name));
            assert_eq!(one.listener.local_addr().unwrap().port(), port);
        }
    }

    #[tokio::test]
    async fn a_published_port_is_taken_again_and_another_nodes_port_never() {
        let (ports, _made, first) = ports(20);
        assert_eq!(ports.port(&site("a"), Some(first + 7), |_| false), first + 7);
        let b = ports.port(&site("b"), None, |port| port < first + 9);
        assert!(b >= first + 9);
        // Somebody else's, or out of the range.
        assert_ne!(ports.port(&site("c"), Some(first + 7), |_| false), first + 7);
        assert_ne!(ports.port(&site("d"), Some(80), |_| false), 80);
    }

    #[tokio::test]
    async fn a_site_that_is_gone_gives_its_port_back() {
        let (ports, mut made, first) = ports(20);
        let port = ports.port(&site("a"), Some(first), |_| false);
        let listener = made.recv().await.unwrap();
        ports.retain(|_| false);
        assert!(listener.stop.is_cancelled());
        drop(listener);
        assert_eq!(ports.port(&site("b"), Some(port), |_| false), port);
    }

    #[tokio::test]
    async fn without_a_range_or_a_free_port_the_shared_one_is_used() {
        let (none, _made) = NodePorts::new("127.0.0.1".parse().unwrap(), 10250, None);
        assert_eq!(none.port(&site("a"), None, |_| false), 10250);
        let (ports, _made, _) = ports(5);
        assert_eq!(ports.port(&site("a"), None, |_| true), 10250);
    }
}
