//! The cloud side of the link: sessions and tunnels.

pub mod tunnels;
