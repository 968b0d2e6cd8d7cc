#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| skerry_proto::fuzzing::run(&skerry_edge::fuzzing::TARGETS, "local_question", bytes));
