#![no_main]

skerry_fuzz::target!(skerry_edge, "edge_config");
