//! provider

pub mod devices;
