#![no_main]

skerry_fuzz::target!(skerry_proto, "packed_object");
