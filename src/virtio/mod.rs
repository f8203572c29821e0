//! The virtio-blk device behind vhost-user. It opens no files.
//!
//! Each module uses only the modules below it (`tests/layering`):
//!
//! | module | what |
//! |---|---|
//! | `device` | one disk: serves one front-end after the other, and hands its front-end to another process |
//! | `vhost_user` | one connection: messages, and the rings that they set up |
//! | `worker` | one running ring: virtqueue <-> engine <-> back-end queue, in a thread of its own |
//! | `rings` | what outlives a connection: the operator's hold, errors, counters, status |
//! | `blk` | virtio-blk: features, configuration space, requests |
//! | `shared_memory` | memory that the front-end shares: memory table, in-flight region, dirty log |
//! | `virtqueue` | guest memory, the split ring, descriptor chains |

pub(crate) mod blk;
pub(crate) mod device;
#[cfg(all(test, feature = "model"))]
mod interleavings;
mod options;
pub(crate) mod rings;
mod shared_memory;
pub(crate) mod vhost_user;
pub(crate) mod virtqueue;
mod worker;

pub use device::Device;
pub use options::{DeviceOptions, Tuning};
pub use vhost_user::session_end::SessionEnd;
