#![no_main]

skerry_fuzz::target!(skerry_edge, "identity_files");
