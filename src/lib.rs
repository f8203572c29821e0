//! virtioblkd: a vhost-user-blk server.
//!
//! **Policy is a small pure module; mechanisms plug into it.** What a cache mode promises, when a write is admitted,
//! which sync covers which writes and when a disk is quiet are decided in [`engine`], which does no I/O and knows no
//! memory, file descriptor, thread or clock. Everything else moves bytes.
//!
//! Directions, kept by `tests/layering`: `engine` imports std only; `backend` never imports `virtio`; `virtio`
//! never names a file; `control` reaches the rings only through the [`disk::Disk`] trait.

pub mod backend;
pub mod base;
pub mod config;
pub mod control;
pub mod disk;
pub mod engine;
pub mod sandbox;
pub mod server;
pub mod snapshot;
pub mod upgrade;
pub mod virtio;
