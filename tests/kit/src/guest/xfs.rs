//! A filesystem that can share blocks between files: XFS on a loop device, mounted for one test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{output, sparse_image, tell};

/// Unmounted when dropped.
pub struct Xfs {
    path: PathBuf,
}

impl Xfs {
    /// Makes one under `dir`. `None` (said aloud) where that is not allowed, as for a plain user and in most containers.
    pub fn mount(dir: &Path) -> Option<Xfs> {
        // The smallest that mkfs.xfs makes is 300 MiB; sparse.
        let image = sparse_image(dir, 1 << 30);
        let path = dir.join("xfs");
        fs::create_dir(&path).expect("room");
        let steps = [
            Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image).env("PATH", "/usr/sbin:/sbin"),
            Command::new("mount").args(["-t", "xfs", "-o", "loop"]).arg(&image).arg(&path),
        ]
        .map(output);
        if let Some(failed) = steps.iter().find(|step| !step.status.success()) {
            let why = String::from_utf8_lossy(&failed.stderr).trim().replace('\n', " ");
            tell(&format!("SKIPPED: no XFS can be mounted here ({why}): no snapshot was taken by reflink"));
            return None;
        }
        Some(Xfs { path })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        // Lazily: a test that fails may leave a process behind for a moment.
        let unmounted = output(Command::new("umount").arg("--lazy").arg(&self.path));
        if !unmounted.status.success() {
            tell(&format!("{} could not be unmounted", self.path.display()));
        }
    }
}
