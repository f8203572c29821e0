//! `--check` finds what would keep the daemon from serving, and starts nothing.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use kit::guest::{Server, tell};
use kit::programs;
use virtioblkd::engine::CacheMode;

fn check(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_virtioblkd")).arg("--check").args(arguments).output().expect("the program starts")
}

/// Checks that are refused with this status, and with these words on standard error.
fn refused(status: i32, arguments: &[&str], words: &[&str]) {
    let output = check(arguments);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {text}");
    assert!(output.stdout.is_empty(), "{arguments:?}: {output:?}");
    for word in words {
        assert!(text.contains(word), "{arguments:?}: '{word}' is missing in {text}");
    }
}

struct Disk {
    directory: tempfile::TempDir,
}

impl Disk {
    fn new() -> Disk {
        let directory = programs::disk_dir();
        fs::write(directory.path().join("disk.raw"), vec![0; 1 << 20]).expect("room");
        Disk { directory }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    /// A configuration file with these lines in addition to the socket and the image.
    fn configuration(&self, more: &str) -> String {
        let text = format!("socket-path = '{}'\nblk-file = '{}'\n{more}\n", self.path("d.sock"), self.path("disk.raw"));
        let path = self.path("disk.toml");
        fs::write(&path, text).expect("room");
        path
    }
}

#[test]
fn a_good_configuration_passes_and_nothing_is_left() {
    let disk = Disk::new();
    let control = format!("control-path = '{}'\npid-file = '{}'", disk.path("d.ctl"), disk.path("d.pid"));
    let output = check(&["--config", &disk.configuration(&control)]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("text");
    for word in ["disk.raw", "1048576 bytes", "cache mode none", "d.sock"] {
        assert!(text.contains(word), "{text}");
    }
    let mut left: Vec<_> =
        fs::read_dir(disk.directory.path()).expect("ours").map(|file| file.expect("ours").file_name()).collect();
    left.sort();
    assert_eq!(left, ["disk.raw", "disk.toml"]);
}

#[test]
fn what_cannot_be_served_is_refused_with_the_status_of_the_start() {
    let disk = Disk::new();
    let good = disk.configuration("");
    refused(2, &["--config", &disk.configuration("cahce = 'none'")], &["disk.toml:3", "'cahce'", "'cache'"]);
    disk.configuration("");
    let (socket, image) = (disk.path("d.sock"), disk.path("disk.raw"));
    refused(1, &["--socket-path", &socket, "--blk-file", &disk.path("missing")], &["missing", "no such file"]);
    refused(
        1,
        &["--config", &good, "--socket-path", &disk.path("no/d.sock")],
        &["--socket-path", "/no'", "No such file"],
    );
    refused(1, &["--config", &good, "--socket-path", &format!("/tmp/{}", "a".repeat(200))], &["--socket-path", "107"]);
    refused(1, &["--config", &good, "--pid-file", &disk.path("no/pid")], &["--pid-file", "No such file"]);
    fs::create_dir(disk.path("dir")).expect("room");
    let directory = disk.path("dir");
    for option in ["--socket-path", "--control-path"] {
        refused(1, &["--config", &good, option, &directory], &[option, "is a directory, not a socket"]);
        fs::write(disk.path("file"), "").expect("room");
        refused(1, &["--config", &good, option, &disk.path("file")], &[option, "is a file, not a socket"]);
    }
    refused(1, &["--config", &good, "--pid-file", &directory], &["--pid-file", "not a regular file"]);
    for option in ["--copy-dir", "--scratch"] {
        refused(1, &["--config", &good, option, &disk.path("no")], &[option, "No such file", "create it"]);
        refused(1, &["--config", &good, option, &image], &[option, "not a directory"]);
    }
    refused(1, &["--config", &good, "--socket-group", "no-such-group"], &["--socket-group", "no-such-group"]);
    refused(1, &["--config", &good, "--user", "no-such-user"], &["--user", "no-such-user"]);
    refused(2, &["--config", &good, "--run", "true"], &["--check", "--run"]);
    fs::write(&image, b"odd").expect("room");
    refused(1, &["--config", &good], &["disk.raw"]);
}

#[test]
fn a_user_that_may_not_open_the_image_is_found() {
    if !rustix::process::geteuid().is_root() {
        return tell("SKIPPED: not root: no user can be changed to");
    }
    let disk = Disk::new();
    fs::set_permissions(disk.path("disk.raw"), std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("ours");
    refused(1, &["--config", &disk.configuration("user = 'nobody'")], &["--user nobody", "setfacl"]);
}

#[test]
fn a_daemon_that_serves_the_image_is_not_disturbed() {
    let directory = programs::disk_dir();
    let image = directory.path().join("disk.raw");
    fs::write(&image, vec![0; 1 << 20]).expect("room");
    let server = Server::start(&image, CacheMode::None, &[]);
    let text = |path: PathBuf| path.into_os_string().into_string().expect("UTF-8");
    let output = check(&["--socket-path", &text(server.socket()), "--blk-file", &text(image)]);
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("unless another process uses"), "{output:?}");
    assert!(server.socket().exists());
    assert!(server.ctl_ok(&["status"]).contains("raw file"));
}
