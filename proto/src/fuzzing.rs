//! Hostile bytes for decoders: what `cargo test` feeds to the targets of `fuzz/` on every run.
//!
//! A target takes any bytes; it may refuse them, but must neither panic, nor hang, nor allocate beyond its limits. The
//! functions are the same for libFuzzer (`hack/fuzz`, nightly) and for [`pound`], which makes its inputs out of valid ones
//! with a seeded generator: the same on every machine.

use crate::link::{
    CloudBulk, CloudControl, EdgeBulk, EdgeControl, JoinRequest, JoinResponse, RenewRequest, TunnelFrame,
};
use crate::object::{ContentHash, decompress, unpack};
use prost::Message;

/// A decoder's entry.
pub struct Target {
    /// Its name, also that of its file in `fuzz/fuzz_targets`.
    pub name: &'static str,
    /// Takes any bytes.
    pub run: fn(&[u8]),
    /// Valid inputs to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// The decoders of this crate.
pub const TARGETS: [Target; 2] = [
    Target {
        name: "link_messages",
        run: link_messages,
        seeds: || vec![EdgeControl::default().encode_to_vec(), vec![10, 4, 8, 1, 16, 2]],
    },
    Target {
        name: "packed_object",
        run: packed_object,
        seeds: || {
            let object = serde_json::json!({"metadata": {"name": "a"}, "status": {"phase": "Failed"}});
            crate::object::pack(&object).into_iter().collect()
        },
    },
];

/// Every message of the link, either way.
pub fn link_messages(bytes: &[u8]) {
    let _ = EdgeControl::decode(bytes);
    let _ = CloudControl::decode(bytes);
    let _ = EdgeBulk::decode(bytes);
    let _ = CloudBulk::decode(bytes);
    let _ = TunnelFrame::decode(bytes);
    let _ = JoinRequest::decode(bytes);
    let _ = JoinResponse::decode(bytes);
    let _ = RenewRequest::decode(bytes);
}

/// An object as it travels: zstd around JSON.
pub fn packed_object(bytes: &[u8]) {
    if let Ok(value) = unpack::<serde_json::Value>(bytes) {
        let _ = ContentHash::of(&value);
    }
    const SMALL: usize = 1000;
    if let Ok(text) = decompress(bytes, SMALL) {
        assert!(text.len() <= SMALL, "a limit is kept");
    }
}

/// Cuts an input into messages: each after its length, two bytes, little-endian.
pub fn parts(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = bytes.split_first_chunk::<2>()?;
        let (part, rest) = rest.split_at_checked(u16::from_le_bytes(*length).into())?;
        bytes = rest;
        Some(part)
    })
}

/// Puts messages together as [`parts`] takes them apart. Those that are too long are left out.
pub fn joined(messages: &[Vec<u8>]) -> Vec<u8> {
    let lengths = messages.iter().filter_map(|message| {
        let length = u16::try_from(message.len()).ok()?;
        Some([&length.to_le_bytes()[..], message].concat())
    });
    lengths.flatten().collect()
}

/// Gives the bytes to the target of that name.
///
/// # Panics
/// When there is none, or it panics.
#[allow(clippy::panic)]
pub fn run(targets: &[Target], name: &str, bytes: &[u8]) {
    match targets.iter().find(|target| target.name == name) {
        Some(target) => (target.run)(bytes),
        None => panic!("there is no target {name}"),
    }
}

/// Feeds a target its seeds, cut and changed in `rounds` ways, and bytes without any sense. `SKERRY_FUZZ_SECONDS=N`
/// goes on for N seconds instead, and `SKERRY_FUZZ_TARGET=NAME` leaves out the others.
///
/// # Panics
/// When the target does; the message then names the input.
pub fn pound(target: &Target, rounds: usize) {
    let only = std::env::var("SKERRY_FUZZ_TARGET").unwrap_or_default();
    if !only.is_empty() && only != target.name {
        return;
    }
    let seconds = std::env::var("SKERRY_FUZZ_SECONDS");
    let seconds = seconds.ok().and_then(|text| text.parse().ok());
    let until = seconds.map(|seconds| std::time::Instant::now() + std::time::Duration::from_secs(seconds));
    let mut chance = Chance::new(target.name);
    let mut corpus = (target.seeds)();
    corpus.extend(regressions(target.name));
    corpus.push(Vec::new());
    let mut round = 0;
    while until.map_or(round < rounds, |until| std::time::Instant::now() < until) {
        let seed = &corpus[round % corpus.len()];
        let input = if round < corpus.len() {
            seed.clone()
        } else {
            chance.change(seed, &corpus)
        };
        let run = std::panic::AssertUnwindSafe(|| (target.run)(&input));
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("{} fails in round {round} on {input:02x?}", target.name);
            std::panic::resume_unwind(panic);
        }
        // What was accepted and is new in length may lead deeper.
        if corpus.len() < 64 && round % 97 == 0 {
            corpus.push(input);
        }
        round += 1;
    }
}

/// Inputs that once broke the target: files in `fuzz/regressions/NAME`.
fn regressions(name: &str) -> Vec<Vec<u8>> {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/regressions");
    let files = std::fs::read_dir(dir.join(name)).into_iter().flatten().flatten();
    let mut files: Vec<_> = files.map(|file| file.path()).collect();
    files.sort();
    files.iter().filter_map(|file| std::fs::read(file).ok()).collect()
}

/// Writes the target's seeds into `dir/NAME`, for libFuzzer to start from.
pub fn write_seeds(target: &Target, dir: &std::path::Path) -> std::io::Result<()> {
    let dir = dir.join(target.name);
    std::fs::create_dir_all(&dir)?;
    for (number, seed) in (target.seeds)().iter().enumerate() {
        std::fs::write(dir.join(format!("seed-{number}")), seed)?;
    }
    Ok(())
}

/// A small generator: splitmix64.
struct Chance(u64);

impl Chance {
    fn new(name: &str) -> Self {
        let seed = name
            .bytes()
            .fold(7, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        // The remainder of a 64-bit number below a length fits.
        usize::try_from(self.next() % (limit.max(1) as u64)).unwrap_or(0)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn change(&mut self, seed: &[u8], corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut input = seed.to_vec();
        for _ in 0..=self.below(6) {
            let at = self.below(input.len() + 1);
            match self.below(8) {
                0 => input.truncate(at),
                1 => input.insert(at, self.byte()),
                2 if at < input.len() => input[at] ^= 1 << self.below(8),
                3 if at < input.len() => input[at] = [0, 0x7f, 0x80, 0xff, b'{', b'"'][self.below(6)],
                4 if at < input.len() => {
                    let end = at + self.below(input.len() - at);
                    let piece = input[at..end].to_vec();
                    input.splice(at..at, piece);
                }
                5 => {
                    let other = &corpus[self.below(corpus.len())];
                    input.extend_from_slice(&other[self.below(other.len())..]);
                }
                6 if at < input.len() => drop(input.drain(at..at + self.below(input.len() - at))),
                _ => {
                    for _ in 0..self.below(40) {
                        input.insert(at, self.byte());
                    }
                }
            }
        }
        input.truncate(1 << 16);
        input
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_bytes_break_a_decoder_of_the_link() {
        for target in &TARGETS {
            pound(target, 5_000);
        }
    }

    #[test]
    #[should_panic(expected = "reached")]
    fn a_target_that_panics_is_noticed() {
        let target = Target {
            name: "x",
            run: |bytes| assert!(!bytes.starts_with(b"se"), "reached"),
            seeds: || vec![b"seed".to_vec()],
        };
        pound(&target, 100);
    }
}
