#![no_main]

skerry_fuzz::target!(skerry_proto, "link_messages");
