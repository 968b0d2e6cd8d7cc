#![no_main]

skerry_fuzz::target!(skerry_edge, "proxy_answer");
