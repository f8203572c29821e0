//! Everything that a daemon is for works in the sandbox, and every thread has given up what it does not need.

use std::fs::{self};
use std::time::Instant;

use kit::control::WAIT_TIMEOUT;
use kit::driver::{ALL, Driver};
use kit::wait::wait_until;
use serde_json::json;

use super::calls::has_landlock;
use super::place::*;

#[test]
fn no_thread_keeps_privileges_and_every_feature_works() {
    let daemon = Daemon::start(Place::new(), &["--cache", "writeback"]);
    daemon.exercise();
    let _guest = Driver::connect_soon(&daemon.place.path("run/vhost"), 4, 64, MIB, ALL);
    let _client = daemon.client();
    wait_until("main, control, vhost-user and four rings run", || daemon.each_thread("Pid").len() >= 7);
    assert!(daemon.each_thread("NoNewPrivs").iter().all(|it| it == "1"));
    assert!(daemon.each_thread("Seccomp").iter().all(|it| it == "2"));
    // Of root's, the three that reach the files of others: DAC_OVERRIDE, DAC_READ_SEARCH, IPC_LOCK.
    let capabilities = daemon.each_thread("CapPrm");
    assert!(capabilities.iter().all(|it| u64::from_str_radix(it, 16).unwrap() & !0x4006 == 0), "{capabilities:?}");
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.child.id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().collect::<Vec<_>>()[4..6], ["0", "0"]);
    let log = daemon.wait_for_log(&["sandbox: ", "seccomp"]);
    assert!(log.contains("Landlock V") || !has_landlock(), "{log}");
    let (place, _) = daemon.end();
    assert_eq!(fs::read_dir(place.path("run")).unwrap().count(), 0, "sockets and pid file are removed");
}

#[test]
fn every_cache_mode_works() {
    for cache in ["none", "directsync", "writeback", "writethrough", "unsafe"] {
        // On a filesystem that has O_DIRECT.
        let place = Place::in_directory(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
        let daemon = Daemon::start(place, &["--cache", cache]);
        daemon.exercise();
        daemon.end();
    }
}

/// No io_uring is made in the sandbox: those that were made at the start are used again and again.
#[test]
fn queues_start_again_as_often_as_front_ends_and_copies_come() {
    let daemon = Daemon::start(Place::new(), &["--num-queues", "2"]);
    for count in 1..=25 {
        daemon.exercise();
        // The next one would be turned away while this one is drained.
        wait_until("the front-end is gone", || daemon.log().matches("front-end disconnected").count() >= count);
    }
    // Both queues' threads, the copy's, the control thread's, and main: others are ending.
    wait_until("no threads are left over", || daemon.each_thread("Pid").len() <= 10);
    daemon.end();
}

/// The io_urings that are made at the start have room for fewer commands than a deep queue has requests.
#[test]
fn a_queue_deeper_than_its_io_uring_completes_every_request() {
    const BLOCKS: usize = MIB / 4096;
    let place = Place::in_directory(tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap());
    let daemon = Daemon::start(place, &["--cache", "none", "--num-queues", "40"]);
    // One of the first io_urings, and one of those that only many queues use.
    let mut guest = Driver::connect_soon(&daemon.place.path("run/vhost"), 32, 1024, 2 * MIB, ALL);
    for queue in [0, 31] {
        guest.fill(0, &vec![queue as u8 + 3; MIB]);
        for _ in 0..8 {
            for block in 0..BLOCKS {
                guest.write(queue, 4096 * block as u64, 4096 * block, 4096, block as u64);
            }
            for read in 0..80 {
                guest.read(queue, 4096 * read as u64, MIB + 4096 * read, 4096, (BLOCKS + read) as u64);
            }
            guest.kick(queue);
            let (mut completed, end) = (0, Instant::now() + WAIT_TIMEOUT);
            while completed < BLOCKS + 80 {
                assert!(Instant::now() < end, "{completed} of {}: {}", BLOCKS + 80, daemon.log());
                let some = guest.wait(queue);
                assert!(some.iter().all(|(_, status)| *status == 0), "{some:?}");
                completed += some.len();
            }
        }
        assert_eq!(fs::read(daemon.place.path("images/disk")).unwrap(), vec![queue as u8 + 3; MIB]);
    }
    daemon.end();
}

#[test]
fn each_level_of_the_sandbox_gives_up_what_it_says() {
    let daemon = Daemon::start(Place::new(), &["--sandbox", "no-filter"]);
    assert!(daemon.each_thread("Seccomp").iter().all(|it| it == "0"));
    assert!(daemon.each_thread("NoNewPrivs").iter().all(|it| it == "1"));
    daemon.wait_for_log(&["system calls are not filtered"]);
    let prepared = daemon.client().ask("copy-prepare", json!({"target": daemon.place.path("elsewhere/copy")}));
    assert_eq!(prepared.is_err(), has_landlock());
    daemon.end();

    let daemon = Daemon::start(Place::new(), &["--sandbox", "off"]);
    assert!(daemon.each_thread("NoNewPrivs").iter().all(|it| it == "0"));
    daemon.wait_for_log(&["the sandbox is off"]);
    let mut client = daemon.client();
    client.prepare_copy(json!({"target": daemon.place.path("elsewhere/copy")}));
    daemon.end();
}
