//! Filesystems of a test's own, mounted, for reflinks.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use super::err;
use crate::guest::tell;

/// A filesystem of its own in a file, mounted.
pub struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    /// `None`, said loudly, where that is not possible.
    pub fn xfs() -> Option<Mounted> {
        Mounted::new("XFS", Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]))
    }

    /// `None`, said loudly, where that is not possible.
    pub fn btrfs() -> Option<Mounted> {
        Mounted::new("btrfs", Command::new("mkfs.btrfs").arg("-q"))
    }

    fn new(kind: &str, make: &mut Command) -> Option<Mounted> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("filesystem");
        File::create(&file).unwrap().set_len(512 << 20).unwrap();
        fs::create_dir(dir.path().join("m")).unwrap();
        let mount = &mut Command::new("mount");
        if !(done(make.arg(&file)) && done(mount.args(["-o", "loop"]).arg(&file).arg(dir.path().join("m")))) {
            tell(&format!(
                "SKIPPED: no {kind} can be mounted here (root, its mkfs and loop devices are needed): no reflink tested"
            ));
            return None;
        }
        Some(Mounted { dir })
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("m")
    }

    /// Freezes or thaws it (`fsfreeze`): what would change it hangs in between.
    pub fn set_frozen(&self, frozen: bool) -> bool {
        done(Command::new("fsfreeze").arg(if frozen { "-f" } else { "-u" }).arg(self.path()))
    }
}

/// Whether the command succeeded; what it said otherwise.
fn done(command: &mut Command) -> bool {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    match command.env("PATH", path).output() {
        Ok(output) if output.status.success() => true,
        Ok(output) => {
            tell(&format!("{command:?}: {}", err(&output)));
            false
        }
        Err(error) => {
            tell(&format!("{command:?}: {error}"));
            false
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // In case that the test had it frozen.
            self.set_frozen(false);
        }
        // Lazily: a daemon that is ending may have it open.
        let status = Command::new("umount").arg("-l").arg(self.path()).status();
        assert!(status.is_ok_and(|status| status.success()) || std::thread::panicking(), "umount failed");
    }
}
