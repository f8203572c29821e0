//! The quiesce socket: QMP's dialect on a Unix socket, served by one thread.
//!
//! [`protocol::json_stream`] cuts bytes into JSON values and [`protocol`] turns those into commands and replies;
//! [`quiesce`] decides who holds the disk. All three are pure: no I/O, no clock of their own. `service` joins them to the
//! [`crate::disk::Disk`]; `peer` and `socket` move the bytes, `image_notices` brings what the image's store reports. The
//! commands, their arguments, the events and the error codes are listed in `protocol/schema`.

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
