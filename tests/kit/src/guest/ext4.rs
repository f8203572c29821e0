//! An ext4 filesystem in an image, seen from the host without mounting it.

use std::path::Path;
use std::process::Command;

use super::{output, run};

/// A program of e2fsprogs, which a plain user's PATH has not.
pub fn e2fsprogs(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").env("LC_ALL", "C");
    command
}

/// Replays the journal and checks the filesystem: it must be without fault, not mended. Changes the image.
pub fn recover(image: &Path) {
    let replayed = output(e2fsprogs("e2fsck").args(["-y", "-E", "journal_only"]).arg(image));
    // 1: the journal was replayed.
    assert!(replayed.status.code().is_some_and(|status| status <= 1), "{}: {replayed:?}", image.display());
    run(e2fsprogs("e2fsck").args(["-f", "-n"]).arg(image));
}

/// The bytes of a file in its root. `None`: there is no such file.
pub fn read_file(image: &Path, name: &str) -> Option<Vec<u8>> {
    let copy = image.with_extension("file");
    let said = output(e2fsprogs("debugfs").arg("-R").arg(format!("dump {name} {}", copy.display())).arg(image));
    // debugfs ends well whatever happens.
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    if said.contains("File not found") {
        return None;
    }
    let bytes = std::fs::read(&copy).unwrap_or_else(|error| panic!("{name} of {}: {error}\n{said}", image.display()));
    std::fs::remove_file(copy).expect("ours");
    Some(bytes)
}
