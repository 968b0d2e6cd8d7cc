#![no_main]

skerry_fuzz::target!(skerry_provider, "site_report");
