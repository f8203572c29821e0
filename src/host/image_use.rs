//! Whether another process uses a file image. A process of its own asks the filesystem for QEMU's locks: a request for a lock may
//! never be answered (NFS), and libvirt waits for the hook.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::backend::file;
use crate::snapshot::child::{CommandEnd, output};

/// The subcommand of `virtioblkctl` that is this process.
pub const SUBCOMMAND: &str = "hook-image-use";
/// The word of it for a disk that only reads.
pub const READ_ONLY: &str = "--read-only";

/// Checks that no other process uses the image in a way that contradicts ours. `program`: virtioblkctl. The error says how to
/// fix it.
pub(super) fn check(program: &Path, image: &str, is_read_only: bool, deadline: Instant) -> Result<(), String> {
    let mut command = Command::new(program);
    command.arg(SUBCOMMAND).args(is_read_only.then_some(READ_ONLY)).arg("--").arg(image);
    match output(command, deadline, None) {
        Ok((CommandEnd::Status(status), ..)) if status.success() => Ok(()),
        Ok((CommandEnd::Status(status), _, said)) => {
            let reason = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
            Err(match reason.strip_prefix("virtioblkctl: ").unwrap_or(reason) {
                "" => format!("cannot check whether another process uses the image '{image}' ({status})"),
                reason => reason.to_owned(),
            })
        }
        Ok(_) => Err(format!(
            "whether another process uses the image '{image}' is not known, because its filesystem does not answer a request for \
             a lock: see whether the server's lock service runs, or give locking='off' if no other host uses the image"
        )),
        Err(error) => Err(format!("cannot run {}: {error}", program.display())),
    }
}

/// Does the work of [`SUBCOMMAND`].
pub fn check_here(image: &Path, is_read_only: bool) -> Result<(), String> {
    file::check_unused(image, is_read_only)
}
