//! What strangers send us, one target a kind. Each takes any bytes, and panics if what we make of them is not what we
//! promise. Run by `cargo fuzz` (make fuzz), and by tests/fuzz_replay/main.rs on the kept inputs and on mutations of them.

pub mod chain;
pub mod config_space;
pub mod control;
pub mod options;
pub mod vhost_user;
