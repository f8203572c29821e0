//! `block_set_io_throttle`, with QEMU's arguments.

use super::args::{Args, MAX_WHO};
use super::commands::Command;
use super::error::Error;
use crate::engine::throttle::{Limits, Words};

/// The arguments by which QEMU's clients name the disk. There is one here, so any name will do.
const DISK: [&str; 2] = ["device", "id"];

pub(super) fn parse(args: &mut Args) -> Result<Command, Error> {
    for name in DISK {
        args.text(name, MAX_WHO)?;
    }
    let mut limits = Limits::default();
    for name in Limits::names(Words::Qemu) {
        if let Some(value) = args.number(&name)? {
            limits.set(Words::Qemu, &name, value);
        }
    }
    limits.check(Words::Qemu).map_err(Error::argument)?;
    Ok(Command::SetIoThrottle(limits))
}
