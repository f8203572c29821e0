//! The disk's events, the end of the server, and a defect in it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kit::control::{Served, Settle};
use serde_json::json;
use virtioblkd::disk::{Event, FailedRequest};
use virtioblkd::engine::{Errno, Kind};

const EIO: Errno = Errno(5);

#[test]
fn the_disks_events_reach_clients_that_negotiated() {
    let served = Served::new();
    let (mut client, mut silent) = (served.client(), served.greeted());
    let io_error =
        Event::IoError(FailedRequest { kind: Kind::Write, ring: 1, offset: 4096, len: 512, errno: Errno(28) });
    let events = [
        Event::Connected,
        Event::Disconnected("closed by the front-end".into()),
        io_error.clone(),
        Event::SyncError(EIO),
        Event::ProtocolError("descriptor loop".into()),
    ];
    events.into_iter().for_each(|event| served.disk.events.send(event));
    client.event("FRONTEND_CONNECTED");
    assert_eq!(client.event("FRONTEND_DISCONNECTED")["reason"], "closed by the front-end");
    let error = client.event("IO_ERROR");
    assert_eq!((&error["operation"], &error["offset"], &error["errno"]), (&json!("write"), &json!(4096), &json!(28)));
    assert_eq!(error["message"], "No space left on device (os error 28)");
    assert_eq!(client.event("SYNC_ERROR")["errno"], 5);
    assert_eq!(client.event("PROTOCOL_ERROR")["message"], "descriptor loop");
    assert_eq!(silent.ask("qmp_capabilities", json!({})), Ok(json!({})), "and no event before it");
    // A guest that provokes errors: some are told, the rest is counted.
    let total: u64 = 1000;
    let start = Instant::now();
    (0..total).for_each(|_| served.disk.events.send(io_error.clone()));
    std::thread::sleep(Duration::from_millis(1100));
    served.disk.events.send(io_error);
    let (mut told, mut suppressed) = (0, 0);
    while told + suppressed < total + 1 {
        told += 1;
        suppressed += client.event("IO_ERROR")["suppressed"].as_u64().unwrap();
    }
    assert!(told <= most_told(start), "{told}");
}

/// The most errors that are told since `start`: 20 at once, and 20 a second.
fn most_told(start: Instant) -> u64 {
    20 * (start.elapsed().as_secs() + 2)
}

#[test]
fn a_guest_that_provokes_errors_does_not_hide_the_disks_own() {
    let served = Served::new();
    let mut client = served.client();
    let start = Instant::now();
    (0..200).for_each(|_| served.disk.events.send(Event::ProtocolError("descriptor loop".into())));
    served.disk.events.send(Event::SyncError(EIO));
    let mut others = 0;
    loop {
        let line = client.line();
        if line["event"] == "SYNC_ERROR" {
            break;
        }
        assert_eq!(line["event"], "PROTOCOL_ERROR");
        others += 1;
    }
    assert!(others <= most_told(start), "{others}");
}

#[test]
fn quit_is_answered_each_time_and_carried_out_once() {
    let served = Served::new();
    let mut client = served.client();
    assert_eq!(client.ask("quit", json!({})), Ok(json!({})));
    assert_eq!(client.ask("quit", json!({})), Ok(json!({})));
    served.client().ask("query-version", json!({})).unwrap();
    assert_eq!(served.quits.load(Ordering::SeqCst), 1);
}

#[test]
fn a_server_that_stops_ends_its_holds_and_reports_it() {
    let mut served = Served::new();
    let (mut holder, mut waiting) = (served.client(), served.client());
    holder.quiesce(json!({"detached": true}));
    holder.event("QUIESCED");
    waiting.event("QUIESCED");
    served.stop();
    assert!(served.disk.closed().is_none());
    for client in [&mut holder, &mut waiting] {
        assert_eq!(client.event("RESUMED")["reason"], "shutdown");
        client.event("SHUTDOWN");
        client.ends();
    }
    let mut served = Served::new();
    served.disk.set(Settle::ByHand);
    let mut client = served.client();
    client.send(r#"{"execute":"quiesce"}"#);
    served.disk.wait_closed(true);
    served.stop();
    assert_eq!(client.reply()["error"]["code"], "shutting-down");
    assert!(served.disk.closed().is_none());
}

#[test]
fn a_defect_in_the_control_thread_does_not_freeze_the_guest() {
    let served = Served::new();
    let mut client = served.client();
    client.quiesce(json!({}));
    served.disk.panic_next();
    client.send(r#"{"execute":"query-status"}"#);
    served.disk.wait_closed(false);
}
