//! The quiesce socket: QMP's dialect on a Unix socket, served by one thread.
//!
//! [`protocol::json_stream`] cuts bytes into JSON values and [`protocol`] turns those into commands and replies; [`quiesce`] decides who
//! holds the disk. All three are pure: no I/O, no clock of their own. `service` joins them to the [`crate::disk::Disk`];
//! `peer` and `socket` move the bytes, `image_notices` brings what the image's store says. The commands, their arguments, the
//! events and the error codes are listed at the head of [`protocol`].

mod access;
mod attend;
mod copies;
mod creds;
mod image_snapshots;
mod inbox;
mod peer;
pub mod proto;
pub mod quiesce;
mod service;
mod socket;
pub mod stream;
mod words;

pub use access::{Access, is_trusted};
pub use attend::AttendCommand;
pub use copies::CopyCommand;
pub use creds::Credentials;
pub use image_snapshots::ImageSnapshotCommand;
pub use inbox::ImageNotices;
pub use service::{CommandLine, Info, Upgrade};
pub use socket::{Server, Setup};
