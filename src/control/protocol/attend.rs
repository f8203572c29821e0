//! The commands of an attendant and their arguments.

use std::time::Duration;

use super::{Args, Command, Error, MAX_WHO};

/// What an attendant says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttendCommand {
    /// It wants to be asked from now on.
    Attend {
        /// Without its consent there is no snapshot.
        required: bool,
        /// For each `prepared`.
        timeout: Duration,
        /// In the operator's words.
        who: Option<String>,
    },
    /// The answer to a `PREPARE`.
    Prepared {
        /// Which.
        id: u64,
        /// The level that is reached, or why it is not.
        result: Result<Option<String>, String>,
    },
    /// It wants to be asked no more.
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
    let Some(id) = args.number("id")? else { return Err(Error::argument("prepared needs 'id', as PREPARE had it")) };
    let level = args.text("level", MAX_WHO)?;
    let result = match (args.text("error", MAX_COMPLAINT)?, level) {
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

/// The longest complaint of an attendant, in bytes.
const MAX_COMPLAINT: usize = 4096;
