//! The `virtioblkd` daemon.
fn main() {}
