#![no_main]

skerry_fuzz::target!(skerry_edge, "pod_record");
