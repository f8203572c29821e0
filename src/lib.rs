//! virtioblkd: a vhost-user-blk server.
//!
//! **Policy is a small pure module; mechanisms plug into it.** [`engine`] decides what a cache mode promises, when a
//! write is admitted, which sync covers which writes and when a disk is quiet. It does no I/O and uses no memory of the
//! guest, file descriptor, thread or clock. All other modules move bytes.
//!
//! # How to write a server
//! | module | what it offers |
//! |---|---|
//! | [`backend`] | a [`Backend`](backend::Backend) is an opened image; an [`IoQueue`](backend::IoQueue) submits one ring's requests to it |
//! | [`virtio`] | a [`Device`](virtio::Device) serves a back-end to one vhost-user front-end after the other |
//! | [`engine`] | an [`Engine`](engine::Engine) is the policy of one ring; [`CacheMode`](engine::CacheMode) |
//! | [`disk`] | [`Disk`](disk::Disk): the status and the hold of a served disk; [`Events`](disk::Events): what happens to it |
//!
//! To serve storage of your own, implement the five methods of `Backend` that have no default, and `IoQueue`:
//! [`backend::null`] is the shortest example. What only some images can do (a lock, an upgrade in place, a store of their
//! own) is in [`backend::capabilities`]. `kit::backend_contract!` in `tests/kit` checks an implementation. [`backend`] has
//! back-ends for files and block devices, RBD images and RAM.
//!
//! This example is a server for a RAM disk of 16 MiB. A front-end, such as QEMU, connects to the socket and reads the
//! disk's size:
//!
//! ```
//! use std::{os::unix::net::UnixListener, sync::Arc, thread};
//! use vhost::VhostBackend;
//! use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
//! use vhost::vhost_user::{Frontend, VhostUserFrontend};
//! use virtioblkd::backend::mem::{MemBackend, MemOptions};
//! use virtioblkd::disk::Events;
//! use virtioblkd::engine::CacheMode;
//! use virtioblkd::virtio::{Device, DeviceOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let backend = Arc::new(MemBackend::new(MemOptions::new(16 << 20)));
//! let options = DeviceOptions { mode: CacheMode::Writeback, num_queues: 1, queue_size: 128, serial: "ram0".into() };
//! let device = Device::new(backend, &options, Arc::new(Events::new()?));
//!
//! let directory = tempfile::tempdir()?;
//! let path = directory.path().join("ram0.sock");
//! let listener = UnixListener::bind(&path)?;
//! let server = thread::spawn(move || {
//!     let (stream, _) = listener.accept()?;
//!     device.serve(stream) // Returns when the front-end has hung up. A daemon then accepts the next one.
//! });
//!
//! let mut front_end = Frontend::connect(&path, 1)?;
//! front_end.set_owner()?;
//! front_end.get_features()?;
//! front_end.get_protocol_features()?;
//! front_end.set_protocol_features(VhostUserProtocolFeatures::CONFIG)?;
//! let (_, capacity) = front_end.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])?;
//! assert_eq!(u64::from_le_bytes(capacity.as_slice().try_into()?), (16 << 20) / 512);
//!
//! drop(front_end);
//! server.join().expect("the server does not panic")?;
//! # Ok(())
//! # }
//! ```
//!
//! # Layers
//! `tests/layering` checks the imports: `engine` imports std only; `backend` never imports `virtio`; `virtio` never opens a
//! file by its name; `control` uses the rings only through the [`disk::Disk`] trait.

pub mod backend;
mod base;
mod config;
mod control;
pub mod disk;
pub mod engine;
mod export;
mod host;
mod sandbox;
mod server;
mod snapshot;
mod upgrade;
pub mod virtio;

/// Modules for the two programs, the tests, the fuzzers and the benchmarks. They may change without notice.
#[doc(hidden)]
#[rustfmt::skip]
pub mod internal {
    pub mod base { pub use crate::base::*; }
    pub mod config { pub use crate::config::*; }
    pub mod control { pub use crate::control::*; }
    pub mod export { pub use crate::export::*; }
    pub mod host { pub use crate::host::*; }
    pub mod sandbox { pub use crate::sandbox::*; }
    pub mod server { pub use crate::server::*; }
    pub mod snapshot { pub use crate::snapshot::*; }
    pub mod upgrade { pub use crate::upgrade::*; }
    pub mod blk { pub use crate::virtio::blk::*; }
    pub mod rings { pub use crate::virtio::rings::*; }
    pub mod virtqueue { pub use crate::virtio::virtqueue::*; }
}
