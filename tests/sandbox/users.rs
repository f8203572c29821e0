//! The user that the daemon becomes, and what it may remove at its end.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use kit::driver::{ALL, Driver};

use super::place::*;

#[test]
fn root_becomes_the_configured_user() {
    if !is_root() {
        return;
    }
    for sandbox in ["on", "off"] {
        let place = Place::new();
        place.give_to(NOBODY);
        let daemon = Daemon::start(place, &["--user", "nobody", "--sandbox", sandbox]);
        if sandbox == "on" {
            daemon.exercise();
        }
        for key in ["Uid", "Gid"] {
            assert!(daemon.each_thread(key).iter().all(|it| *it == [NOBODY.to_string().as_str(); 4].join(" ")));
        }
        assert!(daemon.each_thread("Groups").iter().all(|it| !it.split(' ').any(|group| group == "0")));
        assert!(daemon.each_thread("CapPrm").iter().all(|it| it.bytes().all(|digit| digit == b'0')));
        let (place, _) = daemon.end();
        assert_eq!(fs::read_dir(place.path("run")).unwrap().count(), 0, "sockets and pid file are removed");
    }
}

/// Root's directory, as /run is: what cannot be removed is left, is nobody's, and is taken over at the next start.
#[test]
fn a_user_that_may_not_remove_the_sockets_leaves_them_to_the_next_start() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    place.give_to(NOBODY);
    std::os::unix::fs::chown(place.path("run"), Some(0), Some(0)).unwrap();
    let (place, log) = Daemon::start(place, &["--user", "nobody"]).end();
    contains(&log, &["pid", "vhost", "cannot be removed"]);
    assert_eq!(fs::read_to_string(place.path("run/pid")).unwrap(), "", "no process is named");
    let daemon = Daemon::start(place, &["--user", "nobody"]);
    Driver::connect_soon(&daemon.place.path("run/vhost"), 1, 64, MIB, ALL);
    daemon.end();
}

#[test]
fn running_as_root_without_user_option_is_warned_of() {
    if !is_root() {
        return;
    }
    let (_, log) = Daemon::start_as_given(Place::new(), &[]).end();
    contains(&log, &[" warn: this daemon stays root", "--user"]);
    let (_, log) = Daemon::start_as_given(Place::new(), &["--user", "root"]).end();
    assert!(!log.contains("stays root"), "{log}");
}

/// A rule holds for all that is beneath a directory.
#[test]
fn sockets_are_left_where_others_have_directories_beneath() {
    let place = Place::new();
    fs::create_dir_all(place.path("run/others")).unwrap();
    let (place, log) = Daemon::start(place, &[]).end();
    contains(&log, &["--socket-path", "others", "a directory that contains no others", "cannot be removed"]);
    assert!(place.path("run/vhost").exists());
    Daemon::start(place, &[]).end();
}

#[test]
fn an_unknown_user_or_one_that_may_not_open_the_image_is_refused() {
    let place = Place::new();
    contains(&refused(&place, &["--user", "nobody-at-all"]), &["--user", "nobody-at-all", "getent"]);
    if !is_root() {
        return;
    }
    place.give_to(NOBODY);
    std::os::unix::fs::chown(place.path("images/disk"), Some(0), Some(0)).unwrap();
    fs::set_permissions(place.path("images/disk"), fs::Permissions::from_mode(0o644)).unwrap();
    let log = refused(&place, &["--user", "nobody"]);
    contains(&log, &["--user nobody", &place.text("images/disk"), "read and write it"]);
    Daemon::start(place, &["--user", "nobody", "--read-only"]).end();

    let place = Place::new();
    place.give_to(NOBODY);
    let mut command = Command::new("/proc/self/fd/0");
    // The build's directory may be closed to others.
    command.stdin(File::open(env!("CARGO_BIN_EXE_virtioblkd")).unwrap());
    let output = command.args(place.arguments()).args(["--user", "root"]).uid(NOBODY).gid(NOBODY).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    contains(&String::from_utf8_lossy(&output.stderr), &["--user root", "only root"]);
}
