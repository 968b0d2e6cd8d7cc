//! Pods on their way back: status to the API, the end of a deletion, events, and protection from eviction.
//!
//! What must always hold:
//! * A status is written only to the pod with the reported UID.
//! * A pod object is deleted only after its site has said that nothing of it runs any more, with the UID as
//!   precondition.
//! * Conditions of other owners survive.

pub mod events;
pub mod mirrors;
pub mod status;
pub mod tolerations;
mod written;

pub use written::Written;
