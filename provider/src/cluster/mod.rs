//! The provider's picture of the cluster: shared informers, and per site the set of objects that it must hold.
//!
//! In: watches on Pods, ConfigMaps, Secrets, Services, Nodes, Sites and Devices. Out: [`Mirror::desired`], everything
//! that one site should have now, and a counter per site that moves when that may have changed.
//!
//! What must always hold:
//! * Before [`Mirror::synced`] says so nothing may be concluded from an object's absence.
//! * An object is in a site's set only if it is a pod or device bound to that site, or a pod of that set refers to it.

mod index;
mod mirror;
mod object;
mod restored;
mod watch;

pub use mirror::{Desired, DesiredToken, Mirror};
pub use object::Object;
pub use restored::restored;
pub use watch::run;
