//! Small filesystems in memory, and the two modes that most tests of files need.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use kit::backend::skip;
use virtioblkd::engine::CacheMode;

pub(super) const DIRECT: CacheMode = CacheMode::None;

pub(super) const CACHED: CacheMode = CacheMode::Writeback;

/// A small tmpfs, unmounted when dropped. None, said loudly, for those who may not mount.
pub(super) struct Tmpfs(pub(super) PathBuf);

impl Tmpfs {
    pub(super) fn mount(at: &Path, mount_options: &str) -> Option<Tmpfs> {
        fs::create_dir_all(at).expect("a directory");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", mount_options, "none"]).arg(at).output();
        match mount {
            Ok(output) if output.status.success() => Some(Tmpfs(at.into())),
            Ok(output) => skip(&format!("no mount: {}", String::from_utf8_lossy(&output.stderr).trim())),
            Err(error) => skip(&format!("no mount: {error}")),
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a loop device on it lets go a moment later.
        let status = Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(thread::panicking() || status.is_ok_and(|status| status.success()), "umount failed");
    }
}

pub(super) fn blocks(path: &Path) -> u64 {
    fs::metadata(path).expect("the image").blocks()
}
