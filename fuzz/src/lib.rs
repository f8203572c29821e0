//! The fuzz targets, one for each kind of untrusted input. Each takes any bytes, and panics if the code under test breaks a
//! promise. `cargo fuzz` (make fuzz) runs them, and tests/fuzz_replay/main.rs runs them on the recorded inputs and on
//! mutations of these.

pub mod chain;
pub mod config_space;
pub mod control;
pub mod nbd;
pub mod options;
pub mod vhost_user;
