#![no_main]

skerry_fuzz::target!(skerry_edge, "cloud_bulk");
