//! Quiesce requests of a Ceph cluster over the librbd of [`kit::rbd_stub`]: a snapshot of another client waits until
//! the disk is held.

use std::thread;
use std::time::Duration;

use kit::backend::random_ops;
use kit::rbd_stub::{Stub, libraries};
use virtioblkd::backend::rbd::{RbdOptions, RbdQuiesce};
use virtioblkd::backend::{Backend, Errno};
use virtioblkd::engine::CacheMode;

use super::rbd_listener::*;

#[test]
fn a_snapshot_of_others_waits_until_the_disk_is_held() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let (listener, said) = Listener::start(&disk);
    let answers = [
        (Ok(()), 0),
        (Err(libc::EBUSY), -libc::EBUSY),
        (Err(libc::ETIMEDOUT), -libc::EAGAIN),
        (Err(libc::ERESTART), -libc::EIO),
        (Err(libc::EOPNOTSUPP), -libc::EIO),
        (Err(libc::ECANCELED), -libc::ECANCELED),
    ];
    let mut expected = Vec::new();
    for (answer, told) in answers {
        stub.tell("quiesce");
        hears(&said, Said::Quiesce);
        listener.ask().reply(answer.map_err(Errno));
        expected.push(told.to_string());
        assert_eq!(stub.tell(&format!("answers {}", expected.len())), expected.join(" "));
        stub.tell("unquiesce");
        hears(&said, Said::Unquiesce);
    }
    stub.tell("quiesce");
    hears(&said, Said::Quiesce);
    drop(listener.ask());
    expected.push((-libc::ECANCELED).to_string());
    assert_eq!(stub.tell("answers 7"), expected.join(" "));
    let status = disk.info().image_status().rbd.unwrap().quiesce.unwrap();
    assert!(status.watching);
    assert_eq!((status.asked, status.refused, status.expired), (7, 6, 0));
    hears_nothing_more(&said);
}

#[test]
fn a_quiesce_request_without_a_reply_is_answered_before_its_timeout() {
    let mut stub = Stub::new(CacheMode::None);
    stub.options.quiesce_timeout = Duration::from_secs(1);
    let disk = stub.open();
    let (listener, said) = Listener::start(&disk);
    stub.tell("quiesce");
    hears(&said, Said::Quiesce);
    assert_eq!(stub.tell("answers 1"), (-libc::EAGAIN).to_string());
    hears(&said, Said::Unquiesce);
    // Too late: a second answer aborts in librbd.
    listener.ask().reply(Ok(()));
    stub.tell("unquiesce");
    hears(&said, Said::Unquiesce);
    assert_eq!(disk.info().image_status().rbd.unwrap().quiesce.unwrap().refused, 1);
}

#[test]
fn pending_quiesce_requests_are_answered_at_the_end() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let (listener, said) = Listener::start(&disk);
    stub.tell("quiesce");
    hears(&said, Said::Quiesce);
    // The stub waits for the answer here, as librbd does.
    disk.store().stop_notices();
    assert_eq!(stub.tell("answers 1"), (-libc::ECANCELED).to_string());
    listener.ask().reply(Ok(()));
    disk.store().stop_notices();
    stub.tell("resize 4194304");
    hears_nothing_more(&said);
    assert!(!disk.info().image_status().rbd.unwrap().quiesce.unwrap().watching);
}

#[test]
fn quiesce_requests_and_the_end_may_come_at_any_moment() {
    for turn in 0..40 {
        let stub = Stub::new(CacheMode::None);
        let disk = stub.open();
        let (listener, said) = Listener::start(&disk);
        stub.tell("quiesce");
        hears(&said, Said::Quiesce);
        let ask = listener.ask();
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(Duration::from_micros(turn * 10));
                ask.reply(Ok(()));
            });
            disk.store().stop_notices();
        });
        let answer = stub.tell("answers 1");
        assert!(["0", "-125"].contains(&answer.as_str()), "{answer}");
    }
}

#[test]
fn a_quiesce_that_librbd_ends_early_is_counted() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let (listener, said) = Listener::start(&disk);
    stub.tell("quiesce");
    hears(&said, Said::Quiesce);
    listener.ask().reply(Ok(()));
    // What librbd does after 10 s.
    thread::sleep(Duration::from_secs(10));
    stub.tell("unquiesce");
    hears(&said, Said::Unquiesce);
    assert_eq!(disk.info().image_status().rbd.unwrap().quiesce.unwrap().expired, 1);
}

#[test]
fn no_quiesce_watch_is_set_where_it_is_off_or_impossible() {
    let mut stub = Stub::new(CacheMode::None);
    stub.options.quiesce = RbdQuiesce::Off;
    let disk = stub.open();
    let _listener = Listener::start(&disk);
    assert_eq!(disk.info().image_status().rbd.unwrap().quiesce, None);
    drop(disk);
    stub.options.quiesce = RbdQuiesce::On;
    stub.options.read_only = true;
    let disk = stub.open();
    let _listener = Listener::start(&disk);
    assert_eq!(disk.info().image_status().rbd.unwrap().quiesce, None);
    drop(disk);
    // A Ceph that is too old, and a watch that fails.
    stub.options.read_only = false;
    stub.options = RbdOptions { library_path: Some(libraries(true).to_path_buf()), ..stub.options.clone() };
    let disk = stub.open();
    let _listener = Listener::start(&disk);
    assert!(!disk.info().image_status().rbd.unwrap().quiesce.unwrap().watching);
    random_ops(&disk, 1, 50);
    disk.store().snapshots().unwrap().create("s").unwrap();
    assert_eq!(stub.count("snaps"), 1);
    drop(disk);
    stub.options = RbdOptions { library_path: Some(libraries(false).to_path_buf()), ..stub.options.clone() };
    let disk = stub.open();
    stub.tell("fail quiesce-watch 5 1");
    stub.tell("fail update-watch 5 1");
    let _listener = Listener::start(&disk);
    assert!(!disk.info().image_status().rbd.unwrap().quiesce.unwrap().watching);
}
