//! The control socket: a dialect of QMP on a Unix socket, served by one thread.
//!
//! [`protocol::json_stream`] cuts bytes into JSON values, and [`protocol`] turns those into commands and replies;
//! [`quiesce`] decides who holds the disk. All three are pure: they do no I/O and have no clock of their own. `service`
//! connects them to the [`crate::disk::Disk`], `peer` and `socket` transfer the bytes, and `image_notices` passes on
//! the notices of the image's back-end. The commands, their arguments, the events and the error codes are listed in
//! `protocol/schema`.

mod access;
pub mod client;
mod creds;
mod image_notices;
mod peer;
pub mod protocol;
pub mod quiesce;
mod service;
mod socket;

pub use access::{Access, is_trusted};
pub use creds::Credentials;
pub use image_notices::ImageNotices;
pub use protocol::return_types::CommandLine;
pub use protocol::{AttendCommand, CopyCommand, ImageSnapshotCommand};
pub use service::{DaemonInfo, Upgrade};
pub use socket::{Server, Setup};
