//! The commands for point-in-time copies and their arguments.

use std::path::PathBuf;

use super::{Args, Command, Error, MAX_WHO};
use crate::disk::CopyOptions;

/// The longest path, in bytes (PATH_MAX).
const MAX_PATH: usize = 4096;

/// A command for copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyCommand {
    /// `copy-prepare`: prepares a copy.
    Prepare {
        /// What to copy, and where to.
        options: CopyOptions,
        /// A copy that runs outlives the connection.
        detached: bool,
    },
    /// `copy-start`: fixes the instant.
    Start {
        /// The name of the copy.
        copy: String,
        /// The token of a hold that is granted.
        token: String,
    },
    /// `copy-cancel`: ends a copy and removes its file.
    Cancel {
        /// The name of the copy.
        copy: String,
    },
    /// `copy-bandwidth`: changes the limit.
    Bandwidth {
        /// The name of the copy.
        copy: String,
        /// Bytes a second; 0: none.
        bandwidth: u64,
    },
    /// `query-copies`: the copies and their progress.
    Query,
}

pub(super) fn parse_prepare(args: &mut Args) -> Result<Command, Error> {
    let Some(target) = args.text("target", MAX_PATH)? else {
        return Err(Error::argument("copy-prepare needs 'target', the absolute path of the new file"));
    };
    let target = PathBuf::from(target);
    if !target.is_absolute() {
        return Err(Error::argument("'target' must be an absolute path: the daemon's directory is not the client's"));
    }
    let bandwidth = args.bytes("bandwidth")?.unwrap_or(0);
    let digest = args.boolean("digest")?.unwrap_or(false);
    let detached = args.boolean("detached")?.unwrap_or(false);
    let options = CopyOptions { target, bandwidth, digest };
    Ok(Command::Copy(CopyCommand::Prepare { options, detached }))
}

pub(super) fn parse_start(args: &mut Args) -> Result<Command, Error> {
    let copy = named(args)?;
    match args.text("token", MAX_WHO)? {
        Some(token) => Ok(Command::Copy(CopyCommand::Start { copy, token })),
        None => Err(Error::argument("copy-start needs 'token', as quiesce returned it")),
    }
}

pub(super) fn parse_cancel(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::Copy(CopyCommand::Cancel { copy: named(args)? }))
}

pub(super) fn parse_bandwidth(args: &mut Args) -> Result<Command, Error> {
    let copy = named(args)?;
    match args.bytes("bandwidth")? {
        Some(bandwidth) => Ok(Command::Copy(CopyCommand::Bandwidth { copy, bandwidth })),
        None => Err(Error::argument("copy-bandwidth needs 'bandwidth', in bytes a second (0: no limit)")),
    }
}

pub(super) fn parse_query(_: &mut Args) -> Result<Command, Error> {
    Ok(Command::Copy(CopyCommand::Query))
}

fn named(args: &mut Args) -> Result<String, Error> {
    let copy = args.text("copy", MAX_WHO)?;
    copy.ok_or_else(|| Error::argument(format!("{} needs 'copy', as copy-prepare returned it", args.command)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::tests::parse_command;
    use serde_json::json;

    #[test]
    fn the_arguments_have_defaults() {
        let options = |bandwidth, digest| CopyOptions { target: "/b/vda.img".into(), bandwidth, digest };
        let plain = CopyCommand::Prepare { options: options(0, false), detached: false };
        assert_eq!(parse_command("copy-prepare", json!({"target": "/b/vda.img"})), Ok(Command::Copy(plain)));
        let all = json!({"target": "/b/vda.img", "bandwidth": 1u64 << 40, "digest": true, "detached": true});
        let full = CopyCommand::Prepare { options: options(1 << 40, true), detached: true };
        assert_eq!(parse_command("copy-prepare", all), Ok(Command::Copy(full)));
        let limit = CopyCommand::Bandwidth { copy: "copy-1".into(), bandwidth: 0 };
        assert_eq!(
            parse_command("copy-bandwidth", json!({"copy": "copy-1", "bandwidth": 0})),
            Ok(Command::Copy(limit))
        );
        assert_eq!(parse_command("query-copies", json!({})), Ok(Command::Copy(CopyCommand::Query)));
    }

    #[test]
    fn wrong_arguments_say_what_is_wrong() {
        let long = "/".repeat(5000);
        for (command, arguments, words) in [
            ("copy-prepare", json!({}), "target"),
            ("copy-prepare", json!({"target": "vda.img"}), "absolute"),
            ("copy-prepare", json!({"target": 7}), "a number"),
            ("copy-prepare", json!({"target": long}), "4096"),
            ("copy-prepare", json!({"target": "/x", "bandwidth": -1}), "bytes"),
            ("copy-prepare", json!({"target": "/x", "bandwidth": 1.5}), "1.5"),
            ("copy-prepare", json!({"target": "/x", "bandwidth": "1M"}), "a string"),
            ("copy-prepare", json!({"target": "/x", "digest": 1}), "digest"),
            ("copy-prepare", json!({"target": "/x", "speed": 1}), "speed"),
            ("copy-start", json!({"token": "x"}), "'copy'"),
            ("copy-start", json!({"copy": "copy-1"}), "'token'"),
            ("copy-cancel", json!({}), "'copy'"),
            ("copy-bandwidth", json!({"copy": "copy-1"}), "'bandwidth'"),
            ("query-copies", json!({"copy": "copy-1"}), "query-copies"),
        ] {
            let error = parse_command(command, arguments.clone()).unwrap_err();
            assert_eq!(error.code, "bad-argument", "{command} {arguments}: {error:?}");
            assert!(error.desc.contains(words), "{command} {arguments}: '{words}' is not in '{}'", error.desc);
        }
    }
}
