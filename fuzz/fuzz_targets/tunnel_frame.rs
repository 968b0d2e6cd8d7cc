#![no_main]

skerry_fuzz::target!(skerry_provider, "tunnel_frame");
