//! Containers as supervised processes of the host.
