//! provider
pub mod kubelet;
pub mod link;
