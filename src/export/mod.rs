//! The instant, read by others: an NBD server on one Unix socket, for the time of one export.
//!
//! `protocol` is the pure part. A thread accepts clients (`server`), and each client has a thread of its own (`session`), which
//! asks the instant's reader for bytes. None of them is waited for by a thread of the disk: a client that stalls, dies or lies
//! costs itself its connection. `client` is for `virtioblkctl`, which asks such a server.

pub mod client;
pub mod protocol;
mod server;
mod session;

pub use protocol::BASE_ALLOCATION;
pub use server::{ServerOptions, start};
pub use session::ClientTimeouts;
