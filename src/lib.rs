//! virtioblkd: a vhost-user-blk server.
//!
//! **Policy is a small pure module; mechanisms plug into it.** What a cache mode promises, when a write is admitted,
//! which sync covers which writes and when a disk is quiet are decided in [`engine`], which does no I/O and knows no
//! memory, file descriptor, thread or clock. Everything else moves bytes.
//!
//! Directions, kept by `tests/layering.rs`: `engine` imports std only; `backend` never imports `virtio`; `virtio`
//! never names a file; `control` reaches the rings only through the [`disk::Disk`] trait.

pub mod backend;
mod base64;
mod chance;
pub mod client;
pub mod config;
pub mod control;
pub mod disk;
pub mod engine;
pub mod listen;
pub mod logging;
pub mod pidfile;
mod publish;
pub mod sandbox;
pub mod server;
pub mod signals;
pub mod snapshot;
mod sync;
mod sys;
pub mod text;
mod throttle;
mod trust;
pub mod units;
pub mod upgrade;
pub mod virtio;
