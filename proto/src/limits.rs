//! Sizes that both sides enforce before they allocate.

/// Largest API object on the link, uncompressed: etcd's own request limit of 1.5 MiB with room for JSON.
pub const MAX_OBJECT_BYTES: usize = 3 * 1024 * 1024;

/// Largest gRPC message on the link, either way: one object, badly compressible, with its envelope.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;

/// Longest word in a greeting: a site, a version, a boot, a store, a feature.
pub const MAX_WORD_BYTES: usize = 256;

/// Most features that a peer may name.
pub const MAX_FEATURES: usize = 64;

/// Longest message of an event; a kubelet's longest are the output of a failed probe, 10 KiB.
pub const MAX_EVENT_MESSAGE_BYTES: usize = 16 * 1024;

/// Bytes of reports of one site that the provider keeps while it works on them; one who sends more waits.
pub const MAX_REPORT_BYTES_UNDER_WAY: usize = 16 * 1024 * 1024;

/// Most entries in one `Inventory` part.
pub const INVENTORY_PART: usize = 2_000;

/// Most buckets that an inventory's digest is divided into.
pub const MAX_BUCKETS: u32 = 1_024;

/// Most changes that the provider sends ahead of the edge's acknowledgement.
pub const CHANGE_WINDOW: u64 = 256;

/// Most reports that the edge sends ahead of the provider's results.
pub const REPORT_WINDOW: usize = 256;

/// Most reports on the control stream that the edge sends ahead of the provider's results: few, for the stream must stay free.
pub const CONTROL_REPORT_WINDOW: usize = 16;

/// Most tunnels of one site at a time, pending ones included.
pub const MAX_TUNNELS_PER_SITE: usize = 512;

/// Bytes that one HTTP/2 stream of the link may have under way in one direction.
pub const LINK_STREAM_WINDOW: u32 = 256 * 1024;

/// Bytes that all streams of a connection may have under way: so many that tunnels whose readers have stopped never
/// take the last of it from the others.
pub const LINK_CONNECTION_WINDOW: u32 = (MAX_TUNNELS_PER_SITE as u32 + 64) * LINK_STREAM_WINDOW;

/// Largest data chunk in a tunnel frame.
pub const TUNNEL_CHUNK_BYTES: usize = 32 * 1024;

/// Largest answer to a query, packed or not: measurements of a node with several hundred containers.
pub const MAX_QUERY_ANSWER_BYTES: usize = 16 * 1024 * 1024;

/// A certificate of Skerry's CA is valid this long before it is made, for clocks that are behind. Who sees one that was
/// made a moment ago so knows the CA's time.
pub const CERTIFICATE_BACKDATE: std::time::Duration = std::time::Duration::from_secs(300);
