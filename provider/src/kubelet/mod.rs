//! The kubelet HTTP API for every site: one HTTPS server with a port for all nodes and one for each.
//!
//! In come requests of the API server, of monitors and of people: logs, exec, attach, port-forward, measurements,
//! health. A pod path names namespace and pod, which [`PodDirectory`] turns into the site; a path about a node means
//! the node whose port it came in on, or that it names (`/nodes/<name>/...`). The bytes come from the edge through
//! [`Tunnels`](crate::link::tunnels::Tunnels). Paths, queries, statuses and texts are a kubelet's.
//!
//! * [`server`] accepts connections and answers, [`routes`] reads the request line, [`upgrade`] and [`logs`] serve
//!   the streams;
//! * [`ports`] gives each node its port; [`nodes`] answers about nodes, [`resource`] and [`cadvisor`] in the words of
//!   their metrics;
//! * [`authn`] says who asks, [`authz`] whether they may, [`reviews`] asks the API server about both;
//! * [`tls`] makes the server's TLS settings and finds the client CA; [`serving`] and [`csr`] get a certificate of the
//!   cluster's signer.
//!
//! What must always hold: no answer that depends on a pod is given before the request is authenticated and
//! authorised for the node that the pod is on.

mod authn;
mod authz;
mod cache;
mod cadvisor;
mod csr;
mod logs;
mod nodes;
pub mod ports;
mod resource;
mod reviews;
mod routes;
mod server;
pub mod serving;
mod tls;
mod upgrade;

use skerry_proto::SiteName;
use skerry_proto::object::Uid;

pub use authn::User;
pub use csr::ClusterIssuer;
pub use nodes::NodeDirectory;
pub use reviews::{KubeReviews, NodeAccess, ReviewError, Reviews};
pub use server::{KubeletDeps, KubeletServer};
pub use tls::{ClientCaError, load_client_ca, parse_bundle, server_config};

/// Where a pod is and what it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodLocation {
    /// The site, whose name is also that of the Node.
    pub site: SiteName,
    /// UID of the pod.
    pub uid: Uid,
    /// Names of its containers, init and ephemeral ones included.
    pub containers: Vec<String>,
}

/// Finds pods by name, in memory.
pub trait PodDirectory: Send + Sync + 'static {
    /// The pod, when it is bound to a site.
    fn locate(&self, namespace: &str, pod: &str) -> Option<PodLocation>;
}

pub(crate) use nodes::any_answer;
pub(crate) use upgrade::any_ready;
