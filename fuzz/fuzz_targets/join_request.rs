#![no_main]

skerry_fuzz::target!(skerry_provider, "join_request");
