//! What every target has in common. The decoders and their seeds are in the `fuzzing` rooms of the crates.

use std::path::PathBuf;

use skerry_proto::fuzzing::{Target, write_seeds};

/// Before the first input: writes the target's seeds to `$SKERRY_FUZZ_SEEDS/NAME`, where libFuzzer then looks for them.
///
/// # Panics
/// When they cannot be written, or there is no such target.
pub fn begin(targets: &[Target], name: &str) {
    // libfuzzer-sys aborts in its hook at every panic, also at one that is caught. Only one that reaches the fuzzer counts.
    drop(std::panic::take_hook());
    let target = targets.iter().find(|target| target.name == name);
    let target = target.expect("a target of that name");
    if let Some(dir) = std::env::var_os("SKERRY_FUZZ_SEEDS") {
        write_seeds(target, &PathBuf::from(dir)).expect("the seeds can be written");
    }
}

/// The program of one target of a crate.
#[macro_export]
macro_rules! target {
    ($room:ident, $name:literal) => {
        libfuzzer_sys::fuzz_target!(
            init: $crate::begin(&$room::fuzzing::TARGETS, $name),
            |bytes: &[u8]| skerry_proto::fuzzing::run(&$room::fuzzing::TARGETS, $name, bytes)
        );
    };
}
