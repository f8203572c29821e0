//! Front-ends that come while another is served, and connections that say nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use rustix::process::Signal;

use super::process::*;

/// GET_FEATURES; the reply is a header and eight bytes.
fn get_features() -> Vec<u8> {
    [1u32, 1, 0].map(u32::to_ne_bytes).concat()
}

fn asks_for_features(mut front_end: &UnixStream) -> std::io::Result<()> {
    front_end.write_all(&get_features())?;
    front_end.read_exact(&mut [0; 20])
}

/// A front-end that has spoken. On a loaded machine it may take longer than the two seconds in which it must say
/// something while another is there; then it comes again.
fn speaking_front_end(path: &Path) -> UnixStream {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        let front_end = connect(path);
        if asks_for_features(&front_end).is_ok() {
            return front_end;
        }
        assert!(Instant::now() < end, "no front-end is served");
    }
}

#[test]
fn a_second_front_end_is_turned_away_and_the_next_served() {
    let place = Place::new();
    let mut daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s")]);
    let first = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    let second = connect(&place.path("s"));
    assert!(closed_by_peer(&second));
    let line = daemon.wait_for("turned away");
    assert!(line.contains(&format!("pid {}", std::process::id())), "{line}");
    assert!(still_open(&first));
    drop(first);
    // Another test's child may hold the first connection open between its fork and its exec.
    daemon.wait_for("front-end disconnected");
    let third = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    assert!(still_open(&third));
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

/// Somebody who connects and says nothing, or not what a front-end says, does not keep a front-end out.
#[test]
fn a_silent_connection_gives_way_to_a_front_end() {
    let place = Place::new();
    let mut daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s")]);
    let silent = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    // A babbler that is too slow counts as silent: then another comes.
    while {
        let mut babbler = connect(&place.path("s"));
        let _ = babbler.write_all(b"{\"execute\":\"qmp_capabilities\"}\r\n");
        assert!(closed_by_peer(&babbler));
        let line = daemon.wait_for("turned away");
        assert!(line.contains("does not speak vhost-user") || line.contains("sent nothing for two seconds"), "{line}");
        !line.contains("does not speak vhost-user")
    } {}
    assert!(still_open(&silent));
    let front_end = speaking_front_end(&place.path("s"));
    daemon.wait_for("replaces it");
    daemon.wait_for("front-end connected");
    assert!(closed_by_peer(&silent));
    // One that has spoken stays, whatever comes.
    let mut late = connect(&place.path("s"));
    // It may be closed already.
    let _ = late.write_all(&get_features());
    assert!(closed_by_peer(&late));
    asks_for_features(&front_end).unwrap();
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

/// Nobody else wants the disk, but somebody should know why the guest has none.
#[test]
fn a_front_end_that_sends_nothing_is_logged_once() {
    let place = Place::new();
    let mut daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s")]);
    let silent = connect(&place.path("s"));
    let line = daemon.wait_for("has sent no message");
    assert!(line.contains(&format!("pid {}", std::process::id())) && line.contains("unplug"), "{line}");
    assert!(still_open(&silent));
    // One that sent something is not silent.
    drop(silent);
    daemon.wait_for("front-end disconnected");
    let _front_end = speaking_front_end(&place.path("s"));
    std::thread::sleep(std::time::Duration::from_secs(11));
    daemon.signal(Signal::TERM);
    let (status, log) = daemon.ended();
    assert!(status.success() && log.matches("has sent no message").count() == 1, "{status}: {log}");
}

/// Silent connections are bounded in number and in time, and cost no descriptors that a front-end needs.
#[test]
fn silent_connections_are_bounded_in_number_and_time() {
    let place = Place::new();
    let daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s")]);
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", daemon.child.id())).unwrap().count();
    let before = descriptors();
    let silent: Vec<_> = (0..100).map(|_| connect(&place.path("s"))).collect();
    // All but the first, which nobody challenges.
    assert!(silent[1..].iter().all(closed_by_peer));
    assert!(still_open(&silent[0]));
    assert!(descriptors() < before + 20, "{before}, then {}", descriptors());
    let _front_end = speaking_front_end(&place.path("s"));
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}
