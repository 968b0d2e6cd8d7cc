#![no_main]

skerry_fuzz::target!(skerry_edge, "tunnel_order");
