//! What `virtioblkctl` needs to take snapshots.

pub mod spawn;
