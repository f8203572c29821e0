//! What the tests of `virtioblkctl snapshot` share: disks served by the real program, and a guest's agent that does
//! what a test tells it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

pub use crate::guest::tell;
pub use crate::wait::{WAIT_TIMEOUT, wait_until};

mod agent;
mod mounted;

pub use agent::{Agent, Mood};
pub use mounted::Mounted;

pub fn ctl() -> Command {
    let mut command = Command::new(crate::programs::virtioblkctl());
    command.stdin(Stdio::null());
    command
}

/// A disk served by `virtioblkd`, killed when dropped.
pub struct Daemon {
    pub child: Child,
    pub image: PathBuf,
    // Its own directory: a socket's path must be short, and the build's may be long.
    dir: tempfile::TempDir,
}

impl Daemon {
    /// Serves `image`, which may be on any filesystem.
    pub fn start(image: &Path, mode: &str) -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let mut command = Command::new(crate::programs::virtioblkd());
        command
            .arg("--socket-path")
            .arg(dir.path().join("vhost"))
            .arg("--control-path")
            .arg(dir.path().join("control"));
        command.arg("--blk-file").arg(image).args(["--cache", mode]);
        command.arg("--copy-dir").arg(image.parent().expect("an absolute path"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut daemon = Daemon { child, image: image.to_owned(), dir };
        wait_until("virtioblkd serves", || {
            assert!(daemon.child.try_wait().unwrap().is_none(), "virtioblkd ended: {}", daemon.log());
            daemon.log().contains("serving on")
        });
        daemon
    }

    /// Serves a new image of `size` bytes in `dir`.
    pub fn with_image(dir: &Path, name: &str, size: u64) -> Daemon {
        let image = dir.join(name);
        File::create(&image).unwrap().set_len(size).unwrap();
        Daemon::start(&image, "writeback")
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Waits until the log contains all of `parts`, and returns it.
    pub fn wait_for_log(&self, parts: &[&str]) -> String {
        crate::log::wait_for(|| self.log(), parts)
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vhost")
    }

    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    pub fn is_held(&self) -> bool {
        is_held(&self.control())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail only if it is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- virtioblkd said:\n{}", self.log());
        }
    }
}

/// Whether somebody holds the disk, or waits to, behind this quiesce socket.
pub fn is_held(control: &Path) -> bool {
    let output = ctl().arg("--control").arg(control).args(["--json", "status"]).output().unwrap();
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    status["quiesce"]["closed-ms"] != Value::Null
}

/// A directory with hooks: shell scripts.
pub fn hooks(dir: &Path, freeze: &str, thaw: &str) -> PathBuf {
    let hooks = dir.join("hooks");
    fs::create_dir_all(&hooks).unwrap();
    for (name, body) in [("freeze", freeze), ("thaw", thaw)] {
        let path = hooks.join(name);
        crate::programs::make_script(&path, &format!("#!/bin/sh\n{body}\n"));
    }
    hooks
}

pub fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}
