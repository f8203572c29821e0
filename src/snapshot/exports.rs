//! The method `nbd`: the daemon fixes the instant and serves it to the clients of a socket, while the guest goes on. This
//! module makes the socket and passes it to the daemon, which in its sandbox could not make one, and then treats the export
//! as a copy.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::copies::DiskCopy;
use super::disks::Disks;
use super::plan::{Method, SnapshotPlan};
use crate::base::unix_listener::bind_unix;
use crate::control::client::{Failure, REPLY_TIMEOUT};

/// The name under which the socket is passed.
const FDNAME: &str = "nbd";

/// Root and the user that takes the snapshot may connect.
const SOCKET_MODE: u32 = 0o600;

/// A socket that this process has made. Dropping it removes its file.
pub struct Socket {
    path: PathBuf,
    /// Device and inode.
    file: (u64, u64),
    keep: bool,
}

impl Socket {
    /// The export outlives this process: the file stays. The next socket of its path replaces it.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let is_ours = std::fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.file);
        if !self.keep
            && is_ours
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            crate::base::logging::message(format_args!("'{}' cannot be removed: {error}", self.path.display()));
        }
    }
}

/// Makes the socket and has the daemon prepare the export. The daemon ends what is prepared when our connection ends.
pub fn prepare(
    disks: &mut Disks,
    disk: usize,
    path: &Path,
    plan: &SnapshotPlan,
) -> Result<(DiskCopy, Socket), Failure> {
    let listener = bind_unix(path, SOCKET_MODE).map_err(|error| Failure::new("target", error.to_string()))?;
    let made = std::fs::symlink_metadata(path)
        .map_err(|error| Failure::new("target", format!("'{}' is gone: {error}", path.display())))?;
    let socket = Socket { path: path.to_owned(), file: (made.dev(), made.ino()), keep: false };
    let disk_at = &mut disks.list[disk];
    let name = export_name(plan, disk);
    let mut arguments = json!({"fdname": FDNAME, "name": name, "idle-ms": plan.idle.as_millis() as u64});
    if let Some(size) = plan.scratch_size {
        arguments["scratch-size"] = json!(size);
    }
    if plan.bandwidth != 0 {
        arguments["bandwidth"] = json!(plan.bandwidth);
    }
    if plan.background {
        arguments["detached"] = json!(true);
    }
    let client = disk_at.client()?;
    let passed = client.pass_descriptor("getfd", json!({"fdname": FDNAME}), listener.as_fd(), REPLY_TIMEOUT);
    let prepared = passed.and_then(|_| client.execute("export-prepare", arguments, REPLY_TIMEOUT));
    let prepared = prepared.map_err(|failure| match failure.code.as_str() {
        "unknown-command" => Failure::new(
            "unknown-command",
            format!("the daemon behind '{}' is too old for nbd: upgrade it", disk_at.control.display()),
        ),
        _ => disk_at.blame("cannot be exported", failure),
    })?;
    let copy = prepared["copy"].as_str().unwrap_or_default().to_owned();
    Ok((DiskCopy::new(disk, copy, path), socket))
}

/// The name of a disk's export. A client that names none gets it, too.
fn export_name(plan: &SnapshotPlan, disk: usize) -> &str {
    plan.export_names.get(disk).map(String::as_str).filter(|name| !name.is_empty()).unwrap_or("disk")
}

/// Reports where the instant can be read now.
pub fn report(copies: &[DiskCopy], plan: &SnapshotPlan, methods: &[Method]) {
    for copy in copies {
        if let Method::Nbd(path) = &methods[copy.disk] {
            crate::base::logging::message(format_args!(
                "the instant is at {}",
                uri(export_name(plan, copy.disk), path)
            ));
        }
    }
}

/// The URI of an export (NetworkBlockDevice/nbd, doc/uri.md).
fn uri(name: &str, path: &Path) -> String {
    format!("nbd+unix:///{}?socket={}", escaped(name.as_bytes()), escaped(path.as_os_str().as_bytes()))
}

fn escaped(bytes: &[u8]) -> String {
    let escape = |&byte: &u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' => (byte as char).to_string(),
        byte => format!("%{byte:02X}"),
    };
    bytes.iter().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_uri_escapes_what_is_special() {
        assert_eq!(uri("vda", Path::new("/run/b.sock")), "nbd+unix:///vda?socket=/run/b.sock");
        assert_eq!(uri("a b", Path::new("/r%&?\u{e9}")), "nbd+unix:///a%20b?socket=/r%25%26%3F%C3%A9");
    }
}
