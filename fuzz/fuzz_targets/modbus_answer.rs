#![no_main]

skerry_fuzz::target!(skerry_edge, "modbus_answer");
