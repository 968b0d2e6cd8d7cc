//! redb: the only module that touches it.
