//! Sizes that both sides enforce before they allocate.

/// Largest API object on the link, uncompressed: etcd's own request limit of 1.5 MiB with room for JSON.
pub const MAX_OBJECT_BYTES: usize = 3 * 1024 * 1024;

/// Largest gRPC message on the link, either way: one object, badly compressible, with its envelope.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Most entries in one `Inventory` part.
pub const INVENTORY_PART: usize = 2_000;

/// Most changes that the provider sends ahead of the edge's acknowledgement.
pub const CHANGE_WINDOW: u64 = 256;

/// Most reports that the edge sends ahead of the provider's results.
pub const REPORT_WINDOW: usize = 256;

/// Largest data chunk in a tunnel frame.
pub const TUNNEL_CHUNK_BYTES: usize = 32 * 1024;
