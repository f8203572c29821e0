//! The control room's part of an upgrade in place: when a hand-over may begin, what is refused while it lasts, and whose
//! the clients are.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use kit::control::*;
use serde_json::{Value, json};
use virtioblkd::backend::Notices;
use virtioblkd::engine::Errno;
use virtioblkd::internal::control::protocol::return_types::TookOver;

fn hand_over(client: &mut Client) -> Result<Value, String> {
    client.ask("hand-over", json!({"version": 1}))
}

/// The connection that is passed on, right after its reply; and whether an attendant is relied on.
fn passed_on(served: &Served) -> (UnixStream, bool) {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        if let Some(passed_on) = served.handed_over.lock().unwrap().pop() {
            return passed_on;
        }
        assert!(Instant::now() < end, "the connection is not passed on");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_hand_over_begins_only_without_holds_copies_and_snapshots() {
    let served = Served::new();
    let (mut client, mut other) = (served.client(), served.client());
    assert_eq!(client.ask("hand-over", json!({})), Err("bad-argument".into()));
    assert_eq!(client.ask("hand-over", json!({"version": 0})), Err("no-upgrade".into()));
    let token = other.quiesce(json!({}));
    assert_eq!(hand_over(&mut client), Err("not-now".into()));
    other.ask("resume", json!({"token": token})).unwrap();
    // A hold that is only asked for.
    served.disk.set(Settle::ByHand);
    other.send(json!({"execute": "quiesce", "arguments": {"timeout-ms": 5000}}).to_string());
    served.disk.wait_closed(true);
    assert_eq!(hand_over(&mut client), Err("not-now".into()));
    assert_eq!(other.reply()["error"]["code"], "timeout");
    served.disk.set(Settle::Well);
    // Somebody else's snapshot.
    let answer = served.store_asks();
    assert_eq!(answer.recv_timeout(WAIT_TIMEOUT), Ok(Ok(())));
    assert_eq!(hand_over(&mut client), Err("not-now".into()));
    served.notices.unquiesce();
    served.disk.wait_closed(false);
    assert!(served.handed_over.lock().unwrap().is_empty());
    assert_eq!(hand_over(&mut client), Ok(json!({})));
}

#[test]
fn a_hand_over_refuses_new_holds_copies_and_snapshots() {
    let served = Served::new();
    served.with_store();
    let (mut client, mut other) = (served.client(), served.client());
    assert_eq!(hand_over(&mut client), Ok(json!({})));
    other.event("UPGRADE");
    // The connection is the other process's way in now.
    let (mut stream, relied_on) = passed_on(&served);
    assert!(!relied_on);
    client.reader.get_mut().write_all(b"from the new one").unwrap();
    stream.set_nonblocking(false).unwrap();
    let mut bytes = [0; 16];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"from the new one");
    for (command, arguments) in [
        ("quiesce", json!({})),
        ("hand-over", json!({"version": 1})),
        ("resize", json!({})),
        ("attend", json!({})),
        ("block_set_io_throttle", json!({"iops": 5})),
        ("copy-prepare", json!({"target": "/copy"})),
        ("image-snapshot", json!({"name": "x", "token": "y"})),
    ] {
        assert_eq!(other.ask(command, arguments), Err("upgrading".into()), "{command}");
    }
    let answer = served.store_asks();
    assert_eq!(answer.recv_timeout(WAIT_TIMEOUT), Ok(Err(Errno(libc::EBUSY))));
    assert_eq!(served.disk.closings(), 0);
    assert!(other.ask("query-status", json!({})).is_ok());
    // It came to nothing.
    served.upgrading.0.store(false, SeqCst);
    let token = other.quiesce(json!({}));
    other.ask("resume", json!({"token": token})).unwrap();
}

#[test]
fn a_client_that_connects_while_a_hand_over_is_decided_waits() {
    let served = Served::new();
    let mut before = served.client();
    served.upgrading.1.store(true, SeqCst);
    let mut client = Client::new(served.raw());
    let silent = |client: &mut Client| {
        let stream = client.reader.get_mut();
        stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let read = stream.read(&mut [0]);
        stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
        read.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
    };
    assert!(silent(&mut client), "it is greeted by a process that may end");
    assert!(before.ask("query-status", json!({})).is_ok(), "who was there is answered");
    served.upgrading.1.store(false, SeqCst);
    assert!(client.line()["QMP"].is_object());
}

/// An attendant that the process before us relied on must be back before there is a snapshot by others.
#[test]
fn the_new_process_requires_the_attendant_of_the_old_one() {
    let served = Served::new();
    let (mut attendant, mut client) = (served.client(), served.client());
    attendant.ask("attend", json!({"who": "vm1"})).unwrap();
    assert_eq!(hand_over(&mut client), Ok(json!({})));
    assert!(passed_on(&served).1, "it is not told");

    let next = Served::start(None, STORE_TIMEOUT);
    next.took_over(TookOver { from_pid: 3, pause_us: 7, drained_us: Some(5) }, true);
    let mut watcher = next.client();
    let status = watcher.ask("query-status", json!({})).unwrap();
    assert_eq!(status["daemon"]["took-over"], json!({"from-pid": 3, "pause-us": 7, "drained-us": 5}));
    assert_eq!(status["attendant"]["present"], false);
    assert_eq!(next.store_asks().recv_timeout(WAIT_TIMEOUT), Ok(Err(Errno(libc::EBUSY))));
    let mut attendant = next.client();
    attendant.ask("attend", json!({})).unwrap();
    let answer = next.store_asks();
    let id = attendant.event("PREPARE")["id"].take();
    attendant.ask("prepared", json!({"id": id})).unwrap();
    assert_eq!(answer.recv_timeout(WAIT_TIMEOUT), Ok(Ok(())));
}
