#![no_main]

skerry_fuzz::target!(skerry_edge, "join_answer");
