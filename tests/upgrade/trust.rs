//! `virtioblkctl upgrade` starts no program and follows no option that a daemon names which may have been broken into: run
//! by root, it would lift that daemon's sandbox and its `--user`.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use kit::upgrade::{Disk, SIZE, contains, wait_until};
use rustix::process::Uid;
use rustix::thread::set_thread_res_uid;
use serde_json::{Value, json};

/// A user without a name.
const OTHER: u32 = 54321;
/// A user that every host has, `daemon`.
const NAMED: u32 = 1;
/// Stands for every user that a user namespace does not map.
const OVERFLOW: u32 = 65534;

/// A daemon that was broken into: it answers as it likes, as `user`, on a socket that root made. It names a program that
/// writes the file `proof`.
struct Evil {
    dir: tempfile::TempDir,
}

impl Evil {
    fn start(user: u32) -> Evil {
        let dir = tempfile::tempdir().unwrap();
        let open = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(dir.path(), open).unwrap();
        let evil = Evil { dir };
        let listener = UnixListener::bind(evil.path("control")).unwrap();
        let line = json!({
            "program": "/bin/sh",
            "arguments": ["-c", format!("id > {}", evil.path("proof").display())],
            "directory": "/",
            "notify-socket": evil.path("notify"),
        });
        // A thread has a user of its own as far as the kernel is concerned.
        std::thread::spawn(move || {
            let uid = Uid::from_raw(user);
            set_thread_res_uid(uid, uid, uid).unwrap();
            for stream in listener.incoming() {
                // The client goes when it likes.
                let _ = answer(stream.unwrap(), &line);
            }
        });
        evil
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn upgrade(&self, arguments: &[&str]) -> Output {
        let mut ctl = Command::new(env!("CARGO_BIN_EXE_virtioblkctl"));
        ctl.args(["--control".as_ref(), self.path("control").as_os_str()]).arg("upgrade").args(arguments);
        ctl.stdin(Stdio::null()).current_dir(&self.dir).output().unwrap()
    }
}

fn answer(mut stream: UnixStream, line: &Value) -> std::io::Result<()> {
    writeln!(stream, "{}", json!({"QMP": {"version": {"qemu": {}}, "capabilities": []}}))?;
    for request in BufReader::new(stream.try_clone()?).lines() {
        let request: Value = serde_json::from_str(&request?)?;
        let reply = match request["execute"].as_str() {
            Some("query-command-line") => json!({"return": line}),
            Some("query-status") => json!({"return": {"daemon": {"pid": 1}}}),
            Some("hand-over") => json!({"error": {"class": "GenericError", "code": "no-upgrade", "desc": "no"}}),
            _ => json!({"return": {}}),
        };
        writeln!(stream, "{reply}")?;
    }
    Ok(())
}

fn said(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn another_users_daemon_names_neither_program_nor_options() {
    if !kit::can_become_another_user() {
        return;
    }
    for user in [OTHER, OVERFLOW] {
        let evil = Evil::start(user);
        for arguments in [&[][..], &["--", "--cache", "unsafe"], &["--binary", "/bin/sh"]] {
            let said = said(&evil.upgrade(arguments));
            contains(&said, &[&format!("user {user},"), "neither to root nor to you", "--config FILE", "serves on"]);
            assert!(!evil.path("proof").exists(), "{arguments:?}: {said}");
        }
    }
}

/// A program that writes down what it was started with, in its directory.
fn recorder(dir: &Path) {
    let text = "#!/bin/sh\n{ pwd; echo \"$@\"; echo \"notify=$NOTIFY_SOCKET\"; } > \"$(dirname \"$0\")/started\"\n";
    kit::programs::make_script(&dir.join("recorder"), text);
}

#[test]
fn with_a_disk_file_nothing_of_another_users_daemon_is_taken() {
    if !kit::can_become_another_user() {
        return;
    }
    let evil = Evil::start(OTHER);
    recorder(evil.dir.path());
    said(&evil.upgrade(&["--binary", "./recorder", "--config", "disk.toml", "--", "--cache", "none"]));
    let started = std::fs::read_to_string(evil.path("started")).unwrap();
    let dir = evil.dir.path().display();
    let wanted = format!("{dir}\n--config {dir}/disk.toml --cache none --take-over {dir}/control\n");
    assert!(started.starts_with(&wanted), "{started}");
    assert!(!started.contains(&format!("{dir}/notify")), "{started}");
    assert!(!evil.path("proof").exists());
}

#[test]
fn the_program_is_never_the_daemons_choice() {
    // Its options are taken: it is our own user's. They are no options of virtioblkd's, which says so.
    let evil = Evil::start(rustix::process::geteuid().as_raw());
    contains(&said(&evil.upgrade(&[])), &["virtioblkd: ", "did not take over"]);
    assert!(!evil.path("proof").exists());
    recorder(evil.dir.path());
    said(&evil.upgrade(&["--binary", "./recorder"]));
    let started = std::fs::read_to_string(evil.path("started")).unwrap();
    contains(&started, &["/\n-c id >", "notify="]);
}

/// A daemon that became another user, on a socket that root made, as the shipped unit would have it.
#[test]
fn a_daemon_of_another_user_is_upgraded_by_its_disk_file() {
    if !kit::can_become_another_user() {
        return;
    }
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    std::fs::write(dir.path().join("disk.img"), vec![0; SIZE]).unwrap();
    std::os::unix::fs::chown(dir.path().join("disk.img"), Some(NAMED), Some(NAMED)).unwrap();
    // The directories above may be closed to that user, who opens the image by its name.
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = |name: &str| dir.path().join(name);
    let text = format!(
        "socket-path = {:?}\ncontrol-path = {:?}\npid-file = {:?}\nblk-file = {:?}\nuser = \"{NAMED}\"\ncache = \"none\"\n",
        path("vhost"),
        path("control"),
        path("pid"),
        path("disk.img")
    );
    std::fs::write(path("disk.toml"), text.clone()).unwrap();
    if !opens_as_other(&path("disk.img")) {
        return;
    }
    let log = std::fs::File::create(path("log")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
    let child = command.args(["--config", "disk.toml"]).current_dir(&dir).stderr(log).spawn().unwrap();
    let disk = Disk { dir, child };
    wait_until("the daemon serves", || disk.log().contains("serving on"));
    contains(&disk.refuses(&["--", "--cache", "writeback"]), &[&format!("user {NAMED},"), "--config FILE"]);
    std::fs::write(disk.path("disk.toml"), text.replace("none", "writeback")).unwrap();
    let output = disk.ctl(&["upgrade", "--config", "disk.toml"]);
    assert!(output.status.success(), "{output:?}\n{}", disk.log());
    assert_eq!(disk.status()["cache-mode"], "writeback");
    disk.ctl_ok(&["quit"]);
}

fn opens_as_other(image: &Path) -> bool {
    let opens = Command::new("test").arg("-r").arg(image).uid(NAMED).gid(NAMED).status().unwrap().success();
    if !opens {
        eprintln!("SKIPPED: the build's directory is closed to other users");
    }
    opens
}
