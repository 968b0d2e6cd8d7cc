#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| skerry_proto::fuzzing::run(&skerry_provider::fuzzing::TARGETS, "tunnel_frame", bytes));
