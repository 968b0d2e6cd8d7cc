#![no_main]

skerry_fuzz::target!(skerry_edge, "static_pod");
