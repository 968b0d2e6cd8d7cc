#![no_main]

skerry_fuzz::target!(skerry_edge, "pull_secret");
