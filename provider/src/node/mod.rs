//! A site as a Node: registration, lease, status, taints, and the Site's own status.
//!
//! In: the site's measurements ([`status::apply`]), the state of its link, the Site object. Out: the Node, its Lease in
//! `kube-node-lease`, the Site's status.
//!
//! What must always hold:
//! * The Node appears with the first report of an enrolled site and stays until its Site is deleted (it is owned by
//!   it); a Node is never removed because a site is away.
//! * The lease is renewed only while the site is heard. A site that has been away for the link's deadline is said to be
//!   so: conditions become Unknown with the reason [`status::AWAY_REASON`].

mod conditions;
mod keeper;
mod schedule;
mod site_status;
pub mod status;
mod taint;
mod writes;

pub use keeper::{NodeDeps, run};
pub use writes::NodeWrites;
