//! Devices on the Kubernetes side.
//!
//! In: Devices and Nodes from the API server, status reports from the sites. Out: each Device's status. A Device is
//! judged (condition `Accepted`, by the same code that runs it on the edge) and bound to one site's Node (`Bound`,
//! `status.nodeName`); the room that mirrors objects to sites follows `status.nodeName`.
//!
//! Three writers share a Device's status by server-side apply, each under its own field manager, so that none can undo
//! another: [`run`] owns binding and judgement, [`apply_report`] what the site measured, [`site_reachable`] the
//! condition `EdgeReachable`. Nothing is written that would change nothing.
//!
//! Must always hold: a site reports only Devices that are bound to it, matched by UID.

mod api;
mod binding;
mod controller;
mod judge;
mod reachable;
mod report;

pub use controller::run;
pub use reachable::tell;
pub(crate) use report::any_reported;
pub use report::apply_report;
