//! The commands for snapshots that the image's own store makes, and their arguments.

use super::{Args, Command, Error, MAX_WHO};

/// What a client may ask about them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSnapshotCommand {
    /// Make one.
    Create {
        /// Its name.
        name: String,
        /// Of a hold that is granted.
        token: String,
    },
    /// It outlives the connection.
    Keep {
        /// Which.
        name: String,
    },
    /// It is not wanted after all.
    Remove {
        /// Which.
        name: String,
    },
}

pub(super) fn parse_create(args: &mut Args) -> Result<Command, Error> {
    let name = named(args)?;
    match args.text("token", MAX_WHO)? {
        Some(token) => Ok(Command::ImageSnapshot(ImageSnapshotCommand::Create { name, token })),
        None => Err(Error::argument("image-snapshot needs 'token', as quiesce returned it")),
    }
}

pub(super) fn parse_keep(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::ImageSnapshot(ImageSnapshotCommand::Keep { name: named(args)? }))
}

pub(super) fn parse_remove(args: &mut Args) -> Result<Command, Error> {
    Ok(Command::ImageSnapshot(ImageSnapshotCommand::Remove { name: named(args)? }))
}

fn named(args: &mut Args) -> Result<String, Error> {
    let name = args.text("name", MAX_WHO)?.filter(|name| !name.is_empty());
    name.ok_or_else(|| Error::argument(format!("{} needs 'name', the snapshot's", args.command)))
}
