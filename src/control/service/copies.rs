//! The commands for point-in-time copies: their arguments, who asked for which copy, and what becomes of it when that
//! connection ends. The copies themselves are made behind [`crate::disk::Copies`].

use std::collections::HashMap;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::control::protocol::{Args, Command, Error, LONGEST_WHO};
use crate::control::quiesce::PeerId;
use crate::disk::{Copies, CopyError, CopyOptions, Disk};

/// The longest path, in bytes (PATH_MAX).
const LONGEST_PATH: usize = 4096;

/// What a client may ask about copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyCommand {
    /// Make everything ready.
    Prepare {
        /// What and where to.
        options: CopyOptions,
        /// Once it runs it outlives the connection.
        detached: bool,
    },
    /// Fix the instant.
    Start {
        /// Which.
        copy: String,
        /// Of a hold that is granted.
        token: String,
    },
    /// End it and remove its file.
    Cancel {
        /// Which.
        copy: String,
    },
    /// Another limit.
    Bandwidth {
        /// Which.
        copy: String,
        /// Bytes a second; 0: none.
        bandwidth: u64,
    },
    /// How far they are.
    Query,
}

pub(in crate::control) fn parse_prepare(args: &mut Args) -> Result<Command, Error> {
    let Some(target) = args.text("target", LONGEST_PATH)? else {
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

pub(in crate::control) fn parse_start(args: &mut Args) -> Result<Command, Error> {
    let copy = named(args)?;
    match args.text("token", LONGEST_WHO)? {
        Some(token) => Ok(Command::Copy(CopyCommand::Start { copy, token })),
        None => Err(Error::argument("copy-start needs 'token', as quiesce returned it")),
    }
}

pub(in crate::control) fn parse_cancel(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::Copy(CopyCommand::Cancel { copy: named(args)? }))
}

pub(in crate::control) fn parse_bandwidth(args: &mut Args) -> Result<Command, Error> {
    let copy = named(args)?;
    match args.bytes("bandwidth")? {
        Some(bandwidth) => Ok(Command::Copy(CopyCommand::Bandwidth { copy, bandwidth })),
        None => Err(Error::argument("copy-bandwidth needs 'bandwidth', in bytes a second (0: no limit)")),
    }
}

pub(in crate::control) fn parse_query(_: &mut Args) -> Result<Command, Error> {
    Ok(Command::Copy(CopyCommand::Query))
}

fn named(args: &mut Args) -> Result<String, Error> {
    let copy = args.text("copy", LONGEST_WHO)?;
    copy.ok_or_else(|| Error::argument(format!("{} needs 'copy', as copy-prepare returned it", args.command)))
}

/// Which connection prepared which copy.
#[derive(Default)]
pub(in crate::control) struct CopyOwners {
    /// By the copy's name: the connection, and whether the copy outlives it once it runs.
    owners: HashMap<String, (PeerId, bool)>,
}

impl CopyOwners {
    /// Carries a command out. `is_held`: whether a token's hold is granted now.
    pub(in crate::control) fn answer(
        &mut self,
        disk: &dyn Disk,
        peer: PeerId,
        command: CopyCommand,
        is_held: impl FnOnce(&str) -> bool,
    ) -> Result<Value, Error> {
        let Some(copies) = disk.copies() else {
            return match command {
                CopyCommand::Query => Ok(json!([])),
                _ => Err(Error::new("no-copies", "this disk's daemon makes no copies; take the snapshot another way")),
            };
        };
        match command {
            CopyCommand::Prepare { options, detached } => {
                let copy = copies.prepare(&options).map_err(refused)?;
                self.owners.insert(copy.clone(), (peer, detached));
                return Ok(json!({"copy": copy}));
            }
            CopyCommand::Start { copy, token } => {
                if !is_held(&token) {
                    return Err(Error::new(
                        "not-held",
                        "the hold of this token is not granted, or has ended: quiesce, and start before its lease ends",
                    ));
                }
                copies.start(&copy)
            }
            CopyCommand::Cancel { copy } => copies.cancel(&copy),
            CopyCommand::Bandwidth { copy, bandwidth } => copies.set_bandwidth(&copy, bandwidth),
            CopyCommand::Query => return Ok(json!(copies.status())),
        }
        .map(|()| json!({}))
        .map_err(refused)
    }

    /// A connection ended: what it prepared goes, and what it started unless that is detached.
    pub(in crate::control) fn peer_gone(&mut self, disk: &dyn Disk, peer: PeerId) {
        let Some(copies) = disk.copies() else { return };
        self.owners.retain(|copy, &mut (owner, detached)| {
            if owner != peer {
                return true;
            }
            if !detached || is_prepared(copies, copy) {
                log::info!("{copy} is cancelled: the connection that asked for it ended");
                // It may have ended meanwhile: its event tells everybody how.
                if let Err(error) = copies.cancel(copy) {
                    log::debug!("{copy}: {}", error.message);
                }
            }
            false
        });
    }

    /// A copy ended.
    pub(in crate::control) fn ended(&mut self, copy: &str) {
        self.owners.remove(copy);
    }
}

fn is_prepared(copies: &dyn Copies, copy: &str) -> bool {
    copies.status().iter().any(|status| status.copy == copy && status.state == "prepared")
}

fn refused(error: CopyError) -> Error {
    Error::new(error.code, error.message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::access::Access;
    use crate::control::protocol::parse;

    fn ask(command: &str, arguments: Value) -> Result<Command, Error> {
        parse(json!({"execute": command, "arguments": arguments}), true, Access::All).command
    }

    #[test]
    fn the_arguments_have_defaults() {
        let options = |bandwidth, digest| CopyOptions { target: "/b/vda.img".into(), bandwidth, digest };
        let plain = CopyCommand::Prepare { options: options(0, false), detached: false };
        assert_eq!(ask("copy-prepare", json!({"target": "/b/vda.img"})), Ok(Command::Copy(plain)));
        let all = json!({"target": "/b/vda.img", "bandwidth": 1u64 << 40, "digest": true, "detached": true});
        let full = CopyCommand::Prepare { options: options(1 << 40, true), detached: true };
        assert_eq!(ask("copy-prepare", all), Ok(Command::Copy(full)));
        let limit = CopyCommand::Bandwidth { copy: "copy-1".into(), bandwidth: 0 };
        assert_eq!(ask("copy-bandwidth", json!({"copy": "copy-1", "bandwidth": 0})), Ok(Command::Copy(limit)));
        assert_eq!(ask("query-copies", json!({})), Ok(Command::Copy(CopyCommand::Query)));
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
            let error = ask(command, arguments.clone()).unwrap_err();
            assert_eq!(error.code, "bad-argument", "{command} {arguments}: {error:?}");
            assert!(error.desc.contains(words), "{command} {arguments}: '{words}' is not in '{}'", error.desc);
        }
    }
}
