//! PURE. The commands for exports, and for the descriptors that clients pass.

use std::path::PathBuf;
use std::time::Duration;

use super::args::{Args, MAX_WHO};
use super::commands::Command;
use super::error::Error;
use crate::disk::ExportOptions;

/// How long an export may be without a client when `idle-ms` is not given.
pub const DEFAULT_IDLE: Duration = Duration::from_secs(60);

/// A command for exports, or for descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExportCommand {
    /// `getfd`: names the descriptor that came with it, as in QEMU.
    GetFd {
        /// The name.
        name: String,
    },
    /// `closefd`: closes a named descriptor.
    CloseFd {
        /// The name.
        name: String,
    },
    /// `export-prepare`: prepares an export to the clients of a socket.
    Prepare {
        /// The name of the listening socket, given by `getfd`.
        fdname: String,
        /// Its options. The target is known once the socket is looked at.
        options: ExportOptions,
        /// The export outlives the connection.
        detached: bool,
    },
}

pub(super) fn parse_getfd(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::Export(ExportCommand::GetFd { name: fdname(args)? }))
}

pub(super) fn parse_closefd(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::Export(ExportCommand::CloseFd { name: fdname(args)? }))
}

pub(super) fn parse_prepare(args: &mut Args) -> Result<Command, Error> {
    let fdname = fdname(args)?;
    let Some(name) = args.text("name", MAX_WHO)?.filter(|name| !name.is_empty()) else {
        return Err(Error::argument("export-prepare needs 'name', the name of the export, such as vda"));
    };
    let options = ExportOptions {
        name,
        target: PathBuf::new(),
        scratch_size: args.bytes("scratch-size")?,
        bandwidth: args.bytes("bandwidth")?.unwrap_or(0),
        idle: args.milliseconds("idle-ms")?.unwrap_or(DEFAULT_IDLE),
    };
    let detached = args.boolean("detached")?.unwrap_or(false);
    Ok(Command::Export(ExportCommand::Prepare { fdname, options, detached }))
}

fn fdname(args: &mut Args) -> Result<String, Error> {
    let name = args.text("fdname", MAX_WHO)?;
    name.ok_or_else(|| Error::argument(format!("{} needs 'fdname', the name of a descriptor", args.command)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::tests::parse_command;
    use serde_json::json;

    #[test]
    fn the_arguments_have_defaults() {
        let prepare =
            |options, detached| Ok(Command::Export(ExportCommand::Prepare { fdname: "nbd".into(), options, detached }));
        let plain = ExportOptions {
            name: "vda".into(),
            target: PathBuf::new(),
            scratch_size: None,
            bandwidth: 0,
            idle: DEFAULT_IDLE,
        };
        assert_eq!(
            parse_command("export-prepare", json!({"fdname": "nbd", "name": "vda"})),
            prepare(plain.clone(), false)
        );
        let full = ExportOptions { scratch_size: Some(1 << 30), bandwidth: 5, idle: Duration::from_millis(7), ..plain };
        let all = json!({"fdname": "nbd", "name": "vda", "scratch-size": 1 << 30, "bandwidth": 5, "idle-ms": 7, "detached": true});
        assert_eq!(parse_command("export-prepare", all), prepare(full, true));
        assert_eq!(
            parse_command("getfd", json!({"fdname": "nbd"})),
            Ok(Command::Export(ExportCommand::GetFd { name: "nbd".into() }))
        );
    }

    #[test]
    fn wrong_arguments_say_what_is_wrong() {
        for (command, arguments, words) in [
            ("getfd", json!({}), "fdname"),
            ("closefd", json!({"fdname": 7}), "a number"),
            ("export-prepare", json!({"name": "vda"}), "fdname"),
            ("export-prepare", json!({"fdname": "nbd"}), "'name'"),
            ("export-prepare", json!({"fdname": "nbd", "name": ""}), "'name'"),
            ("export-prepare", json!({"fdname": "nbd", "name": "vda", "idle-ms": 0}), "idle-ms"),
            ("export-prepare", json!({"fdname": "nbd", "name": "vda", "scratch-size": "1G"}), "a string"),
            ("export-prepare", json!({"fdname": "nbd", "name": "vda", "writable": true}), "writable"),
        ] {
            let error = parse_command(command, arguments.clone()).unwrap_err();
            assert_eq!(error.code, "bad-argument", "{command} {arguments}: {error:?}");
            assert!(error.desc.contains(words), "{command} {arguments}: '{words}' is not in '{}'", error.desc);
        }
    }
}
