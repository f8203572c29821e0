//! The commands of the protocol: each with its type, the access that it needs, and its arguments.

use std::time::Duration;

use serde_json::{Value, json};

use super::args::{Args, MAX_WHO};
use super::attend::{self, AttendCommand};
use super::copy::{self, CopyCommand};
use super::error::Error;
use super::export::{self, ExportCommand};
use super::image_snapshot::{self, ImageSnapshotCommand};
use super::throttle;
use crate::control::access::Access;
use crate::engine::throttle::Limits;

/// How long a quiesce may take when `timeout-ms` is not given.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a quiesce lasts when `lease-ms` is not given.
pub const DEFAULT_LEASE: Duration = Duration::from_secs(30);
/// The longest timeout and lease: an hour. To hold a guest's writes for longer is a mistake.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(3600);

/// A command of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `qmp_capabilities`: ends the negotiation.
    QmpCapabilities,
    /// `query-commands`: names the commands that the client may use.
    QueryCommands,
    /// `query-version`: the version that the greeting has.
    QueryVersion,
    /// `quiesce`: holds the disk still.
    Quiesce(QuiesceArgs),
    /// `renew-lease`: gives a hold more time.
    RenewLease {
        /// The token of the hold.
        token: String,
        /// How long the hold lasts from now on.
        lease: Duration,
    },
    /// `resume` with `token`: ends one hold.
    Resume {
        /// The token of the hold.
        token: String,
    },
    /// `resume` with `all`: ends every hold and refuses every quiesce that waits.
    ResumeAll,
    /// `query-qmp-schema`: the protocol as data.
    QueryQmpSchema,
    /// `query-status`: the disk, its holders and the daemon.
    QueryStatus,
    /// `query-stats`: the counters of the rings.
    QueryStats,
    /// A command for point-in-time copies.
    Copy(CopyCommand),
    /// A command for exports, or for the descriptors that they need.
    Export(ExportCommand),
    /// `continue`: retries the failed requests that are retained.
    Continue,
    /// `resize`: takes the image's size, which has changed.
    Resize {
        /// The bytes to grow the image to first.
        size: Option<u64>,
        /// Take the size even if it is smaller than before.
        force: bool,
    },
    /// `block_set_io_throttle`: replaces the limits of the disk's rates.
    SetIoThrottle(Limits),
    /// A command for snapshots that the image's store makes.
    ImageSnapshot(ImageSnapshotCommand),
    /// A command of an attendant.
    Attend(AttendCommand),
    /// `query-command-line`: how the daemon was started.
    QueryCommandLine,
    /// `hand-over`: another process takes over.
    HandOver {
        /// The version of the hand-over protocol that it speaks.
        version: u64,
    },
    /// `quit`: ends the daemon.
    Quit,
}

/// The arguments of `quiesce`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuiesceArgs {
    /// How long the request may wait until it fails.
    pub timeout: Duration,
    /// How long the hold lasts, from the reply on.
    pub lease: Duration,
    /// The hold outlives the connection.
    pub detached: bool,
    /// A name for the hold, given by the operator; for status, events and the log.
    pub who: Option<String>,
}

pub(super) type Parse = fn(&mut Args) -> Result<Command, Error>;

/// Every command with the access that it needs, in the order in which `query-commands` names them.
pub(super) const COMMANDS: &[(&str, Access, Parse)] = &[
    ("qmp_capabilities", Access::ReadOnly, parse_capabilities),
    ("query-commands", Access::ReadOnly, |_| Ok(Command::QueryCommands)),
    ("query-version", Access::ReadOnly, |_| Ok(Command::QueryVersion)),
    ("query-qmp-schema", Access::ReadOnly, |_| Ok(Command::QueryQmpSchema)),
    ("query-status", Access::ReadOnly, |_| Ok(Command::QueryStatus)),
    ("query-stats", Access::ReadOnly, |_| Ok(Command::QueryStats)),
    ("quiesce", Access::Operate, parse_quiesce),
    ("renew-lease", Access::Operate, parse_renew),
    ("resume", Access::Operate, parse_resume),
    ("copy-prepare", Access::Operate, copy::parse_prepare),
    ("copy-start", Access::Operate, copy::parse_start),
    ("copy-cancel", Access::Operate, copy::parse_cancel),
    ("copy-bandwidth", Access::Operate, copy::parse_bandwidth),
    ("getfd", Access::All, export::parse_getfd),
    ("closefd", Access::All, export::parse_closefd),
    ("export-prepare", Access::All, export::parse_prepare),
    ("query-copies", Access::ReadOnly, copy::parse_query),
    ("continue", Access::Operate, |_| Ok(Command::Continue)),
    ("resize", Access::Operate, parse_resize),
    ("block_set_io_throttle", Access::All, throttle::parse),
    ("image-snapshot", Access::Operate, image_snapshot::parse_create),
    ("image-snapshot-keep", Access::Operate, image_snapshot::parse_keep),
    ("image-snapshot-remove", Access::Operate, image_snapshot::parse_remove),
    ("attend", Access::Operate, attend::parse_attend),
    ("prepared", Access::Operate, attend::parse_prepared),
    ("unattend", Access::Operate, attend::parse_unattend),
    ("query-command-line", Access::All, |_| Ok(Command::QueryCommandLine)),
    ("hand-over", Access::All, parse_hand_over),
    ("quit", Access::All, |_| Ok(Command::Quit)),
];

/// The reply to `query-commands`: the commands that a client with `access` may use.
pub fn command_list(access: Access) -> Value {
    COMMANDS.iter().filter(|(_, needed, _)| access >= *needed).map(|(name, ..)| json!({"name": name})).collect()
}

fn parse_capabilities(args: &mut Args) -> Result<Command, Error> {
    match args.given.remove("enable") {
        None => Ok(Command::QmpCapabilities),
        Some(Value::Array(list)) if list.is_empty() => Ok(Command::QmpCapabilities),
        Some(Value::Array(_)) => Err(Error::argument("'enable' must be empty: this server offers no capabilities")),
        Some(_) => Err(Error::argument("'enable' must be a list")),
    }
}

fn parse_quiesce(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::Quiesce(QuiesceArgs {
        timeout: args.milliseconds("timeout-ms")?.unwrap_or(DEFAULT_TIMEOUT),
        lease: args.milliseconds("lease-ms")?.unwrap_or(DEFAULT_LEASE),
        detached: args.boolean("detached")?.unwrap_or(false),
        who: args.text("who", MAX_WHO)?,
    }))
}

fn parse_renew(args: &mut Args) -> Result<Command, Error> {
    let lease = args.milliseconds("lease-ms")?.unwrap_or(DEFAULT_LEASE);
    match args.text("token", MAX_WHO)? {
        Some(token) => Ok(Command::RenewLease { token, lease }),
        None => Err(Error::argument("renew-lease needs 'token', as quiesce returned it")),
    }
}

fn parse_resume(args: &mut Args) -> Result<Command, Error> {
    let all = args.boolean("all")?.unwrap_or(false);
    match (args.text("token", MAX_WHO)?, all) {
        (Some(token), false) => Ok(Command::Resume { token }),
        (None, true) => Ok(Command::ResumeAll),
        (Some(_), true) => Err(Error::argument("resume takes 'token' or 'all', not both")),
        (None, false) => Err(Error::argument("resume needs 'token', as quiesce returned it, or 'all': true")),
    }
}

fn parse_resize(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::Resize { size: args.bytes("size")?, force: args.boolean("force")?.unwrap_or(false) })
}

fn parse_hand_over(args: &mut Args) -> Result<Command, Error> {
    let version = args.number("version")?;
    let version =
        version.ok_or_else(|| Error::argument("hand-over needs 'version', the version of the hand-over protocol"))?;
    Ok(Command::HandOver { version })
}
