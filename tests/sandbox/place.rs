//! The directories of a daemon, each for one purpose, and a daemon there.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use kit::control::{Client, WAIT_TIMEOUT};
use kit::driver::{ALL, Driver};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

pub(super) const MIB: usize = 1 << 20;

pub(super) const NOBODY: u32 = 65534;

pub(super) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: only root can become somebody else");
    }
    root
}

/// The directories of a daemon, each for one purpose.
pub(super) struct Place {
    pub(super) root: PathBuf,
    /// Removed with it; `None`: somebody else's.
    pub(super) dir: Option<tempfile::TempDir>,
}

impl Place {
    pub(super) fn new() -> Place {
        Place::in_directory(tempfile::tempdir().unwrap())
    }

    pub(super) fn in_directory(dir: tempfile::TempDir) -> Place {
        let place = Place { root: dir.path().to_owned(), dir: Some(dir) };
        for name in ["images", "run", "copies", "elsewhere"] {
            fs::create_dir(place.path(name)).unwrap();
        }
        for name in ["disk", "another"] {
            fs::write(place.path(&format!("images/{name}")), vec![1; MIB]).unwrap();
        }
        place
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(super) fn text(&self, name: &str) -> String {
        self.path(name).into_os_string().into_string().unwrap()
    }

    pub(super) fn arguments(&self) -> Vec<String> {
        [
            ("--blk-file", "images/disk"),
            ("--socket-path", "run/vhost"),
            ("--control-path", "run/control"),
            ("--pid-file", "run/pid"),
            ("--copy-dir", "copies"),
        ]
        .into_iter()
        .flat_map(|(option, name)| [option.to_string(), self.text(name)])
        .collect()
    }

    /// Everything belongs to this user.
    pub(super) fn give_to(&self, user: u32) {
        let give = |path: &Path| std::os::unix::fs::chown(path, Some(user), Some(user)).unwrap();
        fs::set_permissions(&self.root, fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["images", "images/disk", "run", "copies"] {
            give(&self.path(name));
        }
    }
}

pub(super) struct Daemon {
    pub(super) child: Child,
    pub(super) place: Place,
}

impl Daemon {
    pub(super) fn start(place: Place, more: &[&str]) -> Daemon {
        // Root has to say that it wants to stay.
        let stays = rustix::process::geteuid().is_root() && !more.contains(&"--user");
        let user: &[&str] = if stays { &["--user", "root"] } else { &[] };
        Daemon::start_as_given(place, &[user, more].concat())
    }

    pub(super) fn start_as_given(place: Place, more: &[&str]) -> Daemon {
        let log = File::create(place.path("log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
        let child = command.args(place.arguments()).args(more).stdin(Stdio::null()).stderr(log).spawn().unwrap();
        let mut daemon = Daemon { child, place };
        let end = Instant::now() + WAIT_TIMEOUT;
        while !daemon.log().contains("serving on") {
            assert!(daemon.child.try_wait().unwrap().is_none(), "it ended: {}", daemon.log());
            assert!(Instant::now() < end, "it does not serve: {}", daemon.log());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        daemon
    }

    pub(super) fn log(&self) -> String {
        fs::read_to_string(self.place.path("log")).unwrap()
    }

    /// Waits until the log contains all of `parts`, and returns it.
    pub(super) fn wait_for_log(&self, parts: &[&str]) -> String {
        kit::log::wait_for(|| self.log(), parts)
    }

    /// A line of /proc/PID/task/TID/status, of each thread.
    pub(super) fn each_thread(&self, key: &str) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let line = |status: String| {
            let found = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            found.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
        };
        // A thread may have ended since.
        tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok()).map(line).collect()
    }

    pub(super) fn client(&self) -> Client {
        let stream = UnixStream::connect(self.place.path("run/control")).unwrap();
        Client::negotiated(stream)
    }

    /// A front-end that writes, reads, discards and flushes, a held disk, and a copy of it.
    pub(super) fn exercise(&self) {
        let mut guest = Driver::connect_soon(&self.place.path("run/vhost"), 2, 64, MIB, ALL);
        guest.fill(0, &[7; 8192]);
        assert_eq!(guest.one(0, |guest, id| guest.write(0, 4096, 0, 8192, id)), 0);
        assert_eq!(guest.one(1, |guest, id| guest.read(1, 4096, 65536, 8192, id)), 0);
        assert_eq!(guest.fetch(65536, 8192), [7; 8192]);
        assert_eq!(guest.one(0, |guest, id| guest.flush(0, id)), 0);
        assert_eq!(guest.one(0, |guest, id| guest.discard(0, 65536, 65536, id)), 0);
        assert_eq!(guest.one(1, |guest, id| guest.write_zeroes(1, 131_072, 65536, true, id)), 0);
        let mut client = self.client();
        let target = self.place.path("copies/copy");
        let copy = client.prepare_copy(json!({"target": target, "digest": true}));
        let token = client.quiesce(json!({}));
        client.ask("copy-start", json!({"copy": copy, "token": token})).unwrap();
        client.ask("resume", json!({"token": token})).unwrap();
        let end = Instant::now() + WAIT_TIMEOUT;
        let completed = |client: &mut Client| {
            let copies = client.ask("query-copies", json!({})).unwrap();
            copies.as_array().unwrap().iter().any(|it| it["copy"] == *copy && it["state"] == "completed")
        };
        while !completed(&mut client) {
            assert!(Instant::now() < end, "{}", self.log());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(fs::read(&target).unwrap(), fs::read(self.place.path("images/disk")).unwrap());
        fs::remove_file(target).unwrap();
        assert!(self.log().lines().all(|line| !line.contains(" warn: ")), "{}", self.log());
    }

    /// Ends it well. Returns its place and what it said.
    pub(super) fn end(mut self) -> (Place, String) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        let log = self.log();
        assert!(status.success(), "{status}: {log}");
        (Place { root: self.place.root.clone(), dir: self.place.dir.take() }, log)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Ended already, in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) fn refused(place: &Place, more: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
    let output = command.args(place.arguments()).args(more).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

pub(super) fn contains(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}
