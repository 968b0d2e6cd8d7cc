//! The Device API as both sides read it.
