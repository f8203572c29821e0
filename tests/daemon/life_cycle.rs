//! How the daemon ends, what it tells systemd and the journal, and where its options come from. The image is
//! `--backend null`.

use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixDatagram;
use std::process::Command;

use rustix::process::Signal;

use super::process::*;

#[test]
fn each_ending_signal_removes_what_was_made_and_ends_well() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        if signal == Signal::HUP && kit::ignores_sighup() {
            continue;
        }
        let place = Place::new();
        let args = [
            place.arg("socket-path", "s"),
            place.arg("control-path", "c"),
            place.arg("pid-file", "pid"),
            NULL.to_string(),
        ];
        let mut daemon = Daemon::serving(&args.each_ref().map(String::as_str));
        assert!(place.path("s").metadata().unwrap().file_type().is_socket());
        assert!(place.path("c").metadata().unwrap().file_type().is_socket());
        assert_eq!(std::fs::read_to_string(place.path("pid")).unwrap(), format!("{}\n", daemon.child.id()));

        let front_end = connect(&place.path("s"));
        daemon.wait_for("front-end connected");
        daemon.signal(signal);
        assert!(closed_by_peer(&front_end));
        let log = daemon.ends_well();
        assert!(log.contains("drained and synced"), "{log}");
        assert_eq!(std::fs::read_dir(place.0.path()).unwrap().count(), 0, "something was left behind");
    }
}

#[test]
fn an_ignored_sighup_stays_ignored() {
    let place = Place::new();
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' HUP; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_virtioblkd"), NULL]);
    let mut daemon = Daemon::spawn(command.arg(place.arg("socket-path", "s")));
    daemon.wait_for("serving on");
    daemon.signal(Signal::HUP);
    // A signal is looked at before a connection is.
    let _front_end = connect(&place.path("s"));
    daemon.wait_for("front-end connected");
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

#[test]
fn quit_on_the_control_socket_ends_the_daemon() {
    let place = Place::new();
    let mut daemon = Daemon::serving(&[NULL, &place.arg("socket-path", "s"), &place.arg("control-path", "c")]);
    let mut control = connect(&place.path("c"));
    control.write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n").unwrap();
    daemon.wait_for("sent quit");
    daemon.ends_well();
    assert!(!place.path("s").exists() && !place.path("c").exists());
}

#[test]
fn the_configuration_file_says_what_is_served_and_the_command_line_wins() {
    let place = Place::new();
    let text = format!(
        "socket-path = \"{}\"\nbackend = \"null\"\ncache = \"unsafe\"\npid-file = \"{}\"\n",
        place.path("file.sock").display(),
        place.path("pid").display()
    );
    std::fs::write(place.path("disk.toml"), text).unwrap();
    let mut daemon = Daemon::start(&[&place.arg("config", "disk.toml"), &place.arg("socket-path", "argument.sock")]);
    let line = daemon.wait_for("serving on");
    assert!(line.contains("cache mode unsafe"), "{line}");
    assert!(place.path("argument.sock").exists() && !place.path("file.sock").exists());
    assert!(place.path("pid").exists());
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

#[test]
fn systemd_is_notified_of_start_and_end() {
    let place = Place::new();
    let systemd = UnixDatagram::bind(place.path("notify")).unwrap();
    systemd.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_virtioblkd"));
    command.args([NULL, &place.arg("socket-path", "s")]).env("NOTIFY_SOCKET", place.path("notify"));
    let daemon = Daemon::spawn(&mut command);
    let told = || {
        let mut text = [0; 64];
        let length = systemd.recv(&mut text).expect("it tells");
        String::from_utf8(text[..length].to_vec()).expect("text")
    };
    assert_eq!(told(), "READY=1");
    assert!(place.path("s").exists(), "ready means that it listens");
    daemon.signal(Signal::TERM);
    assert_eq!(told(), "STOPPING=1");
    daemon.ends_well();
}

#[test]
fn the_limit_of_open_files_is_raised_to_the_hard_one() {
    let place = Place::new();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -Sn 64; exec \"$@\"", "sh", env!("CARGO_BIN_EXE_virtioblkd"), NULL]);
    let mut daemon = Daemon::spawn(command.arg(place.arg("socket-path", "s")));
    daemon.wait_for("serving on");
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", daemon.child.id())).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let limits: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(limits[0], limits[1]);
    assert_ne!(limits[0], "64");
    daemon.signal(Signal::TERM);
    daemon.ends_well();
}

#[test]
fn log_lines_below_the_level_are_left_out() {
    let place = Place::new();
    let daemon = Daemon::start(&[NULL, "--log-level=error", &place.arg("socket-path", "none/s")]);
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(1));
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains(" error: --socket-path: "), "{log}");
}

#[test]
fn the_journal_gets_priorities_instead_of_times() {
    let place = Place::new();
    let file = std::fs::File::create(place.path("journal")).unwrap();
    let stream = file.metadata().map(|stat| format!("{}:{}", stat.dev(), stat.ino())).unwrap();
    let status = Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
        .args([NULL, &place.arg("socket-path", "none/s")])
        .env("JOURNAL_STREAM", stream)
        .stderr(file)
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(1));
    let log = std::fs::read_to_string(place.path("journal")).unwrap();
    assert!(log.starts_with("<3>--socket-path: "), "{log}");
}
