#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtioblkd_fuzz::nbd::run(data));
