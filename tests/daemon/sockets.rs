//! Sockets and pid files: which are made, taken over, left alone, inherited, and refused.

use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::Signal;

use super::process::*;

#[test]
fn a_dead_servers_socket_and_pid_file_are_taken_over() {
    let place = Place::new();
    let args = [NULL, &place.arg("socket-path", "s"), &place.arg("pid-file", "pid")];
    let mut killed = Daemon::serving(&args);
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    assert!(place.path("s").exists() && place.path("pid").exists());
    let mut daemon = Daemon::serving(&args);
    assert_eq!(std::fs::read_to_string(place.path("pid")).unwrap(), format!("{}\n", daemon.child.id()));
    let _front_end = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    daemon.signal(Signal::TERM);
    daemon.ends_well();
    assert!(!place.path("s").exists() && !place.path("pid").exists());
}

#[test]
fn a_living_servers_socket_and_pid_file_are_left_alone() {
    let place = Place::new();
    let socket = place.arg("socket-path", "s");
    let pid_file = place.arg("pid-file", "pid");
    let control = place.arg("control-path", "c");
    let mut daemon = Daemon::serving(&[NULL, &socket, &pid_file, &control]);
    let path = place.path("s");
    Daemon::start(&[NULL, &socket]).fails(&["--socket-path", path.to_str().unwrap(), "already"]);
    let path = place.path("c");
    Daemon::start(&[NULL, &place.arg("socket-path", "s2"), &control]).fails(&[
        "--control-path",
        path.to_str().unwrap(),
        "already",
    ]);
    let path = place.path("pid");
    let pid = format!("pid {}", daemon.child.id());
    Daemon::start(&[NULL, &place.arg("socket-path", "s2"), &pid_file]).fails(&[path.to_str().unwrap(), &pid, "held"]);
    assert!(!place.path("s2").exists(), "a failed start leaves nothing");
    assert_eq!(std::fs::read_to_string(place.path("pid")).unwrap(), format!("{}\n", daemon.child.id()));

    // The first served all the while; the attempts above may have been its front-ends for a moment.
    drop(connect(&place.path("c")));
    daemon.signal(Signal::TERM);
    let log = daemon.ends_well();
    assert!(!log.contains("left alone"), "{log}");
    daemon = Daemon::serving(&[NULL, &socket]);
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

#[test]
fn files_that_replaced_our_sockets_are_not_removed() {
    let place = Place::new();
    let mut daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s"), &place.arg("pid-file", "pid")]);
    for name in ["s", "pid"] {
        std::fs::rename(place.path(name), place.path(&format!("{name}.old"))).unwrap();
        std::fs::write(place.path(name), "another's").unwrap();
    }
    daemon.signal(Signal::TERM);
    daemon.wait_for("no longer ours");
    daemon.ends_well();
    for name in ["s", "pid"] {
        assert_eq!(std::fs::read_to_string(place.path(name)).unwrap(), "another's");
    }
}

#[test]
fn a_path_that_cannot_be_a_socket_is_named_with_the_reason() {
    let place = Place::new();
    std::fs::write(place.path("file"), "precious").unwrap();
    let file = place.path("file");
    Daemon::start(&[NULL, &place.arg("socket-path", "file")]).fails(&[file.to_str().unwrap(), "not a socket"]);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    let long = "x".repeat(200);
    Daemon::start(&[NULL, &place.arg("socket-path", &long)]).fails(&["--socket-path", &long, "107"]);
    let nowhere = place.path("none/s");
    Daemon::start(&[NULL, &place.arg("socket-path", "none/s")]).fails(&[nowhere.to_str().unwrap(), "directory"]);
    Daemon::start(&[NULL, &place.arg("socket-path", "s"), &place.arg("control-path", "file")]).fails(&[
        "--control-path",
        file.to_str().unwrap(),
        "not a socket",
    ]);
    let link = place.path("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    Daemon::start(&[NULL, &place.arg("socket-path", "s"), &place.arg("pid-file", "link")])
        .fails(&["pid file", link.to_str().unwrap()]);
    assert!(!place.path("s").exists(), "a failed start leaves nothing");
}

#[test]
fn the_image_is_opened_before_anything_listens() {
    let place = Place::new();
    let image = place.path("none.img");
    let daemon = Daemon::start(&[
        &place.arg("socket-path", "none/s"),
        &place.arg("control-path", "none/c"),
        &place.arg("blk-file", "none.img"),
    ]);
    // Were a socket bound first, its missing directory would be the error.
    daemon.fails(&[image.to_str().unwrap(), "such file"]);
}

#[test]
fn the_socket_is_its_owners_unless_told_otherwise() {
    let place = Place::new();
    let ours = std::fs::metadata(place.0.path()).unwrap().gid();
    let group = format!("--socket-group={ours}");
    for (more, mode) in [
        (vec![], 0o600),
        (vec!["--socket-mode=0666"], 0o666),
        (vec![group.as_str()], 0o660),
        (vec![group.as_str(), "--socket-mode=0620"], 0o620),
    ] {
        let socket = place.arg("socket-path", "s");
        let daemon = Daemon::serving(&[&[NULL, &socket], &more[..]].concat());
        let metadata = place.path("s").metadata().unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, mode, "{more:?}");
        assert_eq!(metadata.gid(), ours);
        daemon.signal(Signal::TERM);
        daemon.ends_well();
    }
    Daemon::start(&[NULL, &place.arg("socket-path", "s"), "--socket-group=no-such-group"]).fails(&[
        "--socket-group",
        "'no-such-group'",
        "getent",
    ]);
}

/// A number that a child inherits, as long as the value lives.
fn inheritable<T: std::os::fd::AsFd + AsRawFd>(fd: &T) -> String {
    fcntl_setfd(fd, FdFlags::empty()).expect("ours");
    format!("--fd={}", fd.as_raw_fd())
}

#[test]
fn an_inherited_socket_is_served_and_left_where_it_is() {
    let place = Place::new();
    let listener = UnixListener::bind(place.path("s")).unwrap();
    let mut daemon = Daemon::serving(&[NULL, &inheritable(&listener)]);
    let front_end = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    daemon.signal(Signal::TERM);
    assert!(closed_by_peer(&front_end));
    daemon.ends_well();
    assert!(place.path("s").exists());
}

#[test]
fn an_inherited_descriptor_of_another_kind_is_refused() {
    let place = Place::new();
    let mend = "listen(2)";
    Daemon::start(&[NULL, "--fd=987"]).fails(&["--fd 987", "inherited", "Bad file descriptor", mend]);
    let file = std::fs::File::create(place.path("file")).unwrap();
    Daemon::start(&[NULL, &inheritable(&file)]).fails(&["not a socket", mend]);
    let (connected, _other) = UnixStream::pair().unwrap();
    Daemon::start(&[NULL, &inheritable(&connected)]).fails(&["does not listen", mend]);
    let datagram = UnixDatagram::bind(place.path("d")).unwrap();
    Daemon::start(&[NULL, &inheritable(&datagram)]).fails(&["not a Unix stream socket", mend]);
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    Daemon::start(&[NULL, &inheritable(&tcp)]).fails(&["not a Unix stream socket", mend]);
}
