//! Why a hand-over failed. The old daemon serves on, and its log and the new daemon get the text.

use std::fmt;
use std::io;

use crate::upgrade::GAVE_UP;
use crate::virtio::vhost_user::save_restore::HandOverError;

/// Why a hand-over failed.
#[derive(Debug)]
pub(super) enum HandOverFailure {
    /// No thread or descriptor is left to start it.
    OutOfResources(io::Error),
    /// No descriptor is left for the files that outlive this process.
    OutOfDescriptors(io::Error),
    /// The image ends with this process.
    ImageInProcess,
    /// The starter's pipe cannot be used.
    Starter(io::Error),
    /// The starter no longer wants the upgrade.
    StarterGaveUp,
    /// The new daemon does not read its messages.
    NotRead(io::Error),
    /// The new daemon sends nothing, or nothing that can be read.
    NotReceived(io::Error),
    /// The new daemon gave this reason and ends.
    NewDaemon(String),
    /// The new daemon sent a message that is not the next one.
    UnexpectedMessage,
    /// The image cannot be synced ahead.
    NotSynced(io::Error),
    /// The disk cannot be stopped and saved.
    Disk(HandOverError),
    /// The hand-over's thread panicked.
    Panicked,
}

impl fmt::Display for HandOverFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HandOverFailure::OutOfResources(error) => write!(f, "no thread or descriptor is left: {error}"),
            HandOverFailure::OutOfDescriptors(error) => write!(f, "no descriptor is left: {error}"),
            HandOverFailure::ImageInProcess => f.write_str("its image lives in this process and ends with it"),
            HandOverFailure::Starter(error) => error.fmt(f),
            HandOverFailure::StarterGaveUp => f.write_str(GAVE_UP),
            HandOverFailure::NotRead(error) => write!(f, "the new virtioblkd does not read its messages: {error}"),
            HandOverFailure::NotReceived(error) => write!(f, "the new virtioblkd: {error}"),
            HandOverFailure::NewDaemon(reason) => write!(f, "the new virtioblkd gives up: {reason}"),
            HandOverFailure::UnexpectedMessage => f.write_str(
                "the new virtioblkd sent a message out of turn; restart this daemon instead, and please report it as a defect",
            ),
            HandOverFailure::NotSynced(error) => write!(f, "the image cannot be synced: {error}; fix the storage"),
            HandOverFailure::Disk(error) => error.fmt(f),
            HandOverFailure::Panicked => f.write_str("its thread panicked; please report the lines above as a defect"),
        }
    }
}
