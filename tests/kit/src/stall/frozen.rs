//! A filesystem on a loop device that can be frozen: writes wait until it is thawed, reads go on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::guest::{output, sparse_image};

/// A mounted one; thawed and unmounted when dropped.
pub struct Freezable {
    path: PathBuf,
}

impl Freezable {
    /// `kind`: as mkfs and mount know it. `Err`: why there can be none here.
    pub fn mount(dir: &Path, kind: &str) -> Result<Freezable, String> {
        // The smallest that mkfs.xfs makes is 300 MiB; sparse.
        let image = sparse_image(dir, 1 << 29);
        let path = dir.join("mounted");
        fs::create_dir(&path).expect("room");
        let steps = [
            Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"),
            Command::new("mount").args(["-t", kind, "-o", "loop"]).arg(&image).arg(&path),
        ]
        .map(output);
        match steps.iter().find(|step| !step.status.success()) {
            Some(failed) => Err(String::from_utf8_lossy(&failed.stderr).trim().replace('\n', " ")),
            None => Ok(Freezable { path }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn freeze(&self) {
        let done = self.fsfreeze("--freeze");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    pub fn thaw(&self) {
        let done = self.fsfreeze("--unfreeze");
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    fn fsfreeze(&self, how: &str) -> Output {
        output(Command::new("fsfreeze").arg(how).arg(&self.path).env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"))
    }
}

impl Drop for Freezable {
    fn drop(&mut self) {
        // Where a test failed; otherwise it is thawed, and this fails.
        self.fsfreeze("--unfreeze");
        output(Command::new("umount").arg("--lazy").arg(&self.path));
    }
}
