#![no_main]

skerry_fuzz::target!(skerry_edge, "device_object");
