//! The kubelet HTTP API for every site, on one HTTPS listener.
//!
//! In come requests of the API server and of people: logs, exec, attach, port-forward, health. A pod path names
//! namespace and pod, which [`PodDirectory`] turns into the site; the bytes come from the edge through
//! [`Tunnels`](crate::link::tunnels::Tunnels). Paths, queries, statuses and texts are a kubelet's.
//!
//! * [`server`] accepts connections and answers, [`routes`] reads the request line, [`upgrade`] and [`logs`] serve
//!   the streams;
//! * [`authn`] says who asks, [`authz`] whether they may, [`reviews`] asks the API server about both;
//! * [`tls`] makes the server's TLS settings and finds the client CA.
//!
//! What must always hold: no answer that depends on a pod is given before the request is authenticated and
//! authorised for the node that the pod is on.

mod authn;
mod authz;
mod cache;
mod logs;
mod reviews;
mod routes;
mod server;
mod tls;
mod upgrade;

use skerry_proto::SiteName;
use skerry_proto::object::Uid;

pub use authn::User;
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
