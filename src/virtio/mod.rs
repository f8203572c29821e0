//! The virtio-blk device model behind vhost-user. Knows no files.
//!
//! | file | idea |
//! |---|---|
//! | `features` | what is offered, from policy and geometry |
//! | `request` | descriptor chain -> checked request |
//! | `mapped` | guest memory as it is mapped here: addresses become pointers (unsafe) |
//! | `split_ring`, `chain` | a ring that runs: heads, descriptors, answers, wishes |
//! | `worker` | one a running ring: ring <-> engine <-> back-end queue |
//! | `queue_state` | a ring's two lives: stopped (the handler's) and running (a worker's) |
//! | `handler` | vhost-user messages; every change of a ring goes through `queue_state` |
//! | `descriptor` | a front-end's kick, call and error descriptors are eventfds |
//! | `inflight` | what a server that dies leaves to the next one |
//! | `dirty` | the dirty log of a live migration |
//! | `shared` | memory that the front-end shares for these two |
//! | `memory` | the front-end's memory table |
//! | `activation` | whether the image is ours to use |
//! | `claim` | who of us uses it: rings, or an operator's hold |
//! | `capacity` | the disk's size, and telling the front-end that it changed |
//! | `channel` | the front-end's channel for our requests |
//! | `hand_over` | the device gives its front-end to another process, or takes one |
//! | `moving` | a connection that another process goes on with, or we |
//! | `vanished` | memory that the front-end takes away ends its connection only (unsafe) |
//! | `rings` | what outlives a connection: the operator's hold, errors, status |
//! | `counters` | what a ring counts |
//! | `errors` | what the status keeps of errors, and what the log gets |
//! | `device` | one disk: serves one front-end after the other |

pub mod blk;
pub mod device;
pub(crate) mod hand_over;
#[cfg(all(test, feature = "model"))]
mod interleavings;
pub mod rings;
mod shared_memory;
pub(crate) mod vhost_user;
pub mod virtqueue;
mod worker;

pub use device::{Device, DeviceOptions, Tuning};
