//! The commands of an attendant and their arguments.

use std::time::Duration;

use super::{Args, Command, Error, MAX_WHO};

/// A command of an attendant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttendCommand {
    /// `attend`: the connection is the attendant from now on.
    Attend {
        /// Snapshots that other hosts take need the attendant's consent.
        required: bool,
        /// How long the attendant may take to send each `prepared`.
        timeout: Duration,
        /// A name for the attendant, given by the operator.
        who: Option<String>,
    },
    /// `prepared`: the reply to a `PREPARE`.
    Prepared {
        /// The id of the `PREPARE`.
        id: u64,
        /// The level that the guest reached (`None`: not given), or why the guest was not prepared.
        result: Result<Option<String>, String>,
    },
    /// `unattend`: the connection is the attendant no longer.
    Unattend,
}

pub(super) fn parse_attend(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::Attend(AttendCommand::Attend {
        required: args.boolean("required")?.unwrap_or(true),
        timeout: args.milliseconds("timeout-ms")?.unwrap_or(DEFAULT_TIMEOUT),
        who: args.text("who", MAX_WHO)?,
    }))
}

pub(super) fn parse_prepared(args: &mut Args) -> Result<Command, Error> {
    let Some(id) = args.number("id")? else {
        return Err(Error::argument("prepared needs 'id', the one of its PREPARE"));
    };
    let level = args.text("level", MAX_WHO)?;
    let result = match (args.text("error", MAX_ERROR)?, level) {
        (None, level) => Ok(level),
        (Some(error), None) => Err(error),
        (Some(_), Some(_)) => return Err(Error::argument("prepared takes 'level' or 'error', not both")),
    };
    Ok(Command::Attend(AttendCommand::Prepared { id, result }))
}

pub(super) fn parse_unattend(_: &mut Args) -> Result<Command, Error> {
    Ok(Command::Attend(AttendCommand::Unattend))
}

/// How long an attendant may take when `timeout-ms` is not given.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest `error` of an attendant, in bytes.
const MAX_ERROR: usize = 4096;
