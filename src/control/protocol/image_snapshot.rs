//! The commands for snapshots that the image's own store makes, and their arguments.

use super::{Args, Command, Error, MAX_WHO};

/// A command for these snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSnapshotCommand {
    /// `image-snapshot`: makes a snapshot.
    Create {
        /// The name of the snapshot.
        name: String,
        /// The token of a hold that is granted.
        token: String,
    },
    /// `image-snapshot-keep`: the snapshot outlives the connection.
    Keep {
        /// The name of the snapshot.
        name: String,
    },
    /// `image-snapshot-remove`: removes a snapshot.
    Remove {
        /// The name of the snapshot.
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
