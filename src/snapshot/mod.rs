//! `virtioblkctl snapshot`: a snapshot of one disk or many, at one instant, that holds exactly what its level promises.
//!
//! The order matters: prepare what can be prepared -> hooks, guest freeze -> all gates close, all disks are still ->
//! the instant -> all disks resumed -> thaw, hooks -> what is slow. A freeze after a closed gate would hang, and so
//! would a thaw before the gates open, because both write. If a step fails, the earlier ones are undone in the opposite
//! order. If this process is killed, the daemons (a hold ends with its connection) and the [`guard`] undo them.
//!
//! This code runs in `virtioblkctl`, in its only thread; the daemon does not use it.
//!
//! | file | what |
//! |---|---|
//! | `plan`, `take`, `receipt` | PURE: the options; one snapshot from start to end; what it really reached |
//! | `disks` | the disks, held together or not at all |
//! | `freeze`, `guard`, `hooks` | freezes and thaws the guest and calls the hooks; a process that thaws if this one is killed |
//! | `guest`, `agent`, `libvirt`, `bounded` | the guest's agent: its commands, its socket, virsh instead of the socket, bounds for its replies |
//! | `copies`, `exports`, `images` | the methods that the daemon carries out: `copy`, `nbd`, `rbd` |
//! | `reflink`, `cloner` | the method `reflink`, and the process that makes the call |
//! | `attend` | freezes a guest for snapshots that other clients take |
//! | `child`, `spawn`, `wait` | commands within a time limit; their signal mask (UNSAFE); a wait that can be cancelled |

pub mod agent;
pub mod attend;
pub mod bounded;
pub mod child;
pub mod cloner;
pub mod copies;
pub mod disks;
pub mod exports;
pub mod freeze;
pub mod guard;
pub mod guest;
pub mod hooks;
pub mod images;
pub mod libvirt;
pub mod plan;
pub mod receipt;
pub mod reflink;
pub mod spawn;
mod take;
pub mod wait;

pub use take::{USAGE, take};
