//! Entries for hostile bytes: what a client of exec, attach or port-forward may send, and what a log file may hold.

use bytes::Bytes;
use skerry_proto::link::StreamTarget;

use super::{lines, process, relay, spdy, websocket};

/// The first byte chooses what the others are.
pub(crate) fn any_client(bytes: &[u8]) {
    let Some((choice, rest)) = bytes.split_first() else {
        return;
    };
    match choice % 5 {
        0 => spdy::decode_any(rest),
        1 => websocket::decode_any(Bytes::copy_from_slice(rest)),
        2 => websocket::read_any(rest),
        3 => relay::any_head(rest),
        _ => {
            for line in rest.split(|byte| *byte == b'\n') {
                let _ = lines::parse(line);
            }
        }
    }
}

pub(crate) fn client_seeds() -> Vec<Vec<u8>> {
    let with = |choice: u8, rest: Vec<u8>| [vec![choice], rest].concat();
    let mut seeds = vec![
        with(1, [&[4_u8][..], br#"{"Width":80,"Height":24}"#].concat()),
        with(1, vec![255, 0]),
        with(2, vec![0x82, 0x85, 1, 2, 3, 4, 1, 2, 3, 4, 5]),
        with(
            3,
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: SPDY/3.1\r\nX-A: b".to_vec(),
        ),
        with(
            4,
            b"2026-01-01T00:00:00.5Z stdout F text\n2026-01-01T00:00:00Z stderr P x".to_vec(),
        ),
    ];
    seeds.extend(spdy::seeds().into_iter().map(|seed| with(0, seed)));
    seeds
}

/// The headers of a client's upgrade request.
pub(crate) fn any_target(target: &StreamTarget) {
    let _ = websocket::handshake(target);
    let _ = process::list(&target.headers, "X-Stream-Protocol-Version");
    let _ = process::header(&target.headers, "Upgrade");
}
