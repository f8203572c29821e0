//! Directories for copies: copies go there and nowhere else.

use std::fs::{self};
use std::process::Command;

use kit::driver::{ALL, Driver};
use serde_json::json;

use super::calls::has_landlock;
use super::place::*;

#[test]
fn a_copy_outside_the_copy_dirs_is_refused() {
    if !has_landlock() {
        return;
    }
    let daemon = Daemon::start(Place::new(), &[]);
    let mut client = daemon.client();
    for target in ["elsewhere/copy", "images/copy", "run/copy"] {
        let arguments = json!({"target": daemon.place.path(target)});
        client.send(json!({"execute": "copy-prepare", "arguments": arguments}).to_string());
        contains(&client.reply().to_string(), &["permission denied", "--copy-dir"]);
        assert!(!daemon.place.path(&format!("{target}.partial")).exists());
    }
    fs::create_dir(daemon.place.path("copies/beneath")).unwrap();
    client.prepare_copy(json!({"target": daemon.place.path("copies/beneath/copy")}));
    daemon.end();
}

/// Only the image decides whether the disk is served.
#[test]
fn a_directory_for_copies_that_cannot_be_opened_is_warned_about() {
    let place = Place::new();
    let file = place.text("images/disk");
    let late = place.text("late");
    let more = ["--copy-dir", &file, "--copy-dir", &late, "--scratch", &late].map(str::to_owned);
    let daemon = Daemon::start(place, &more.each_ref().map(String::as_str));
    daemon.wait_for_log(&["--copy-dir", &more[1], "is not a directory", &more[3], "does not exist", "is served"]);
    daemon.wait_for_log(&["--scratch", "copies make do without it"]);
    let mut guest = Driver::connect_soon(&daemon.place.path("run/vhost"), 1, 64, MIB, ALL);
    assert_eq!(guest.one(0, |guest, id| guest.flush(0, id)), 0);
    drop(guest);
    fs::create_dir(&more[3]).unwrap();
    let mut client = daemon.client();
    let arguments = json!({"target": daemon.place.path("late/copy")});
    client.send(json!({"execute": "copy-prepare", "arguments": arguments}).to_string());
    if has_landlock() {
        contains(&client.reply().to_string(), &["does not exist when virtioblkd started", "virtioblkctl upgrade"]);
    }
    drop(client);
    daemon.end();
}

#[test]
fn a_filesystem_mounted_over_a_directory_for_copies_is_named() {
    if !has_landlock() {
        return;
    }
    let place = Place::new();
    let over = place.path("copies");
    let daemon = Daemon::start(place, &[]);
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tmpfs"]).arg(&over).status();
    if !mount.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: no tmpfs can be mounted");
        return;
    }
    let mut client = daemon.client();
    client.send(json!({"execute": "copy-prepare", "arguments": {"target": over.join("copy")}}).to_string());
    let reply = client.reply().to_string();
    let unmounted = Command::new("umount").arg(&over).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    contains(&reply, &["mounted over it", "virtioblkctl upgrade", "a directory above the mount point"]);
    client.prepare_copy(json!({"target": over.join("copy")}));
    drop(client);
    daemon.end();
}
