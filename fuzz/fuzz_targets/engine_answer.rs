#![no_main]

skerry_fuzz::target!(skerry_edge, "engine_answer");
