//! The quiesce socket in front of a fake disk: commands, holds, events and hostile clients.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use kit::control::{Client, Served, Settle, WAIT_TIMEOUT, figures};
use serde_json::{Value, json};
use virtioblkd::disk::{Event, FailedRequest};
use virtioblkd::engine::{Errno, Kind};

const EIO: Errno = Errno(5);

// Talking.

#[test]
fn queries_need_negotiation() {
    let served = Served::new();
    let mut client = served.greeted();
    assert_eq!(client.ask("query-status", json!({})), Err("not-negotiated".into()));
    assert_eq!(client.ask("qmp_capabilities", json!({})), Ok(json!({})));
    assert_eq!(client.ask("qmp_capabilities", json!({})), Err("already-negotiated".into()));
    let names = client.ask("query-commands", json!({})).unwrap();
    assert!(names.as_array().unwrap().contains(&json!({"name": "quiesce"})));
    assert_eq!(client.ask("query-version", json!({})).unwrap()["package"], "virtioblkd 0.1.0");
    assert_eq!(client.ask("frobnicate", json!({})), Err("unknown-command".into()));
    let status = client.ask("query-status", json!({})).unwrap();
    assert_eq!(status["cache-mode"], "none");
    assert_eq!(status["rings"][1]["in-flight"], 3);
    assert_eq!(status["daemon"]["vhost-socket"], "/run/vhost.sock");
    let quiesce = json!({
        "state": "open", "closed-ms": null, "held-ms": 0, "max-hold-ms": null, "waiting": 0, "holders": [],
    });
    assert_eq!(status["quiesce"], quiesce);
    let stats = client.ask("query-stats", json!({})).unwrap();
    assert_eq!(stats["total"]["reads"], 3000);
    assert_eq!(stats["rings"][0]["written-bytes"], 2_048_000);
}

#[test]
fn bytes_may_come_in_any_pieces() {
    let served = Served::new();
    let mut client = served.greeted();
    client.send(r#"{"execute":"qmp_capabilities","id":1}{"execute":"query-version","id":{"a":[2]}}"#);
    assert_eq!(client.reply()["id"], 1);
    assert_eq!(client.reply()["id"], json!({"a": [2]}));
    for byte in br#" {"execute": "query-version", "id": "split"} "# {
        client.send([*byte]);
    }
    assert_eq!(client.reply()["id"], "split");
}

#[test]
fn garbage_gets_an_error_and_the_connection_goes_on() {
    let served = Served::new();
    let mut client = served.client();
    let mut long = br#"{"execute":""#.to_vec();
    long.resize(1 << 20, b'x');
    long.extend_from_slice(br#""}"#);
    let deep = [b"{\"execute\":".to_vec(), vec![b'['; 5000], vec![b']'; 5000], b"}".to_vec()].concat();
    let cases: [(&[u8], &str); 6] = [
        (b"GET / HTTP/1.0\n", "'G'"),
        (b"\x00\n", "0x00"),
        (b"\x16\x03\x01\x02\n", "0x16"),
        (b"{\"a\":]}", "not valid JSON"),
        (&long, "longer than 65536"),
        (&deep, "deeper"),
    ];
    for (bytes, words) in cases {
        client.send(bytes);
        let reply = client.reply();
        assert_eq!(reply["error"]["code"], "parse-error");
        assert_eq!(reply["error"]["class"], "GenericError");
        let desc = reply["error"]["desc"].as_str().unwrap().to_owned();
        assert!(desc.contains(words), "{desc}");
        client.send(r#"{"execute":"query-version","id":"again"}"#);
        while client.reply()["id"] != "again" {}
    }
}

// Holding.

#[test]
fn a_quiesce_and_its_resume() {
    let served = Served::new();
    let (mut client, mut watcher) = (served.client(), served.client());
    let answer = client.ask("quiesce", json!({"who": "backup", "lease-ms": 60_000})).unwrap();
    let token = answer["token"].as_str().unwrap();
    assert_eq!(answer["drained"], 12);
    assert_eq!(answer["drain-us"], 1500);
    assert_eq!(answer["sync-us"], 3250);
    assert_eq!(answer["bytes-synced"], 8192);
    assert_eq!((&answer["rings"], &answer["holders"]), (&json!(2), &json!(1)));
    assert!(served.disk.closed().is_some());
    let told = watcher.event("QUIESCED");
    assert_eq!((&told["token"], &told["who"]), (&answer["token"], &json!("backup")));
    assert_eq!(told["pid"], std::process::id());
    let status = watcher.ask("query-status", json!({})).unwrap();
    let quiesce = &status["quiesce"];
    assert_eq!(quiesce["state"], "quiesced");
    assert!(quiesce["closed-ms"].is_u64());
    assert_eq!(quiesce["holders"][0]["who"], "backup");
    assert_eq!(quiesce["holders"][0]["uid"], rustix::process::geteuid().as_raw());
    let left = quiesce["holders"][0]["lease-left-ms"].as_u64().unwrap();
    assert!(0 < left && left <= 60_000);
    // Anybody on the socket may resume with the token.
    assert_eq!(watcher.ask("resume", json!({"token": token})), Ok(json!({"resumed": 1, "holders": 0})));
    assert!(served.disk.closed().is_none());
    let told = watcher.event("RESUMED");
    assert_eq!((&told["reason"], &told["holders"]), (&json!("resume"), &json!(0)));
    assert_eq!(client.ask("resume", json!({"token": token})), Err("not-held".into()));
    assert_eq!(client.ask("resume", json!({"token": "never"})), Err("not-quiesced".into()));
}

#[test]
fn nested_holds_end_with_the_last() {
    let served = Served::new();
    let (mut one, mut two) = (served.client(), served.client());
    let first = one.quiesce(json!({}));
    let answer = two.ask("quiesce", json!({})).unwrap();
    assert_eq!((&answer["drained"], &answer["holders"]), (&json!(0), &json!(2)), "quiet already");
    assert_ne!(answer["token"], first.as_str());
    assert_eq!(one.ask("resume", json!({"token": first})), Ok(json!({"resumed": 1, "holders": 1})));
    assert_eq!(one.ask("resume", json!({"token": "never"})), Err("unknown-token".into()));
    assert!(served.disk.closed().is_some(), "one still holds");
    assert_eq!(one.ask("resume", json!({"all": true})), Ok(json!({"resumed": 1, "holders": 0})));
    assert!(served.disk.closed().is_none());
    assert_eq!(one.ask("resume", json!({"all": true})), Ok(json!({"resumed": 0, "holders": 0})));
    assert_eq!(served.disk.closings(), 1);
}

#[test]
fn quiesces_that_come_while_one_drains_share_its_result() {
    let served = Served::new();
    served.disk.set(Settle::ByHand);
    let (mut one, mut two, mut three) = (served.client(), served.client(), served.client());
    one.send(r#"{"execute":"quiesce","id":"one"}"#);
    let epoch = served.disk.wait_closed(true);
    two.send(r#"{"execute":"quiesce","id":"two"}"#);
    while three.ask("query-status", json!({})).unwrap()["quiesce"]["waiting"] != 2 {}
    served.disk.settle(epoch + 1, Ok(figures()));
    served.disk.settle(epoch, Ok(figures()));
    for (client, name) in [(&mut one, "one"), (&mut two, "two")] {
        let reply = client.reply();
        assert_eq!((&reply["id"], &reply["return"]["drained"]), (&json!(name), &json!(12)));
    }
}

#[test]
fn a_quiesce_that_times_out_opens_the_gate_and_ignores_a_late_drain() {
    let served = Served::new();
    served.disk.set(Settle::ByHand);
    let mut client = served.client();
    assert_eq!(client.ask("quiesce", json!({"timeout-ms": 20})), Err("timeout".into()));
    assert!(served.disk.closed().is_none());
    assert_eq!(client.event("QUIESCE_FAILED")["code"], "timeout");
    client.send(r#"{"execute":"quiesce","id":2}"#);
    let epoch = served.disk.wait_closed(true);
    served.disk.settle(epoch - 1, Ok(figures()));
    served.disk.settle(epoch, Err(EIO));
    let reply = client.reply();
    assert_eq!((&reply["id"], &reply["error"]["code"]), (&json!(2), &json!("sync-failed")), "not the late good one");
    assert!(served.disk.closed().is_none());
}

#[test]
fn a_failed_sync_is_an_error_and_the_disk_goes_on() {
    let served = Served::new();
    served.disk.set(Settle::Fail(EIO));
    let mut client = served.client();
    client.send(r#"{"execute":"quiesce"}"#);
    let reply = client.reply();
    assert_eq!(reply["error"]["code"], "sync-failed");
    assert!(reply["error"]["desc"].as_str().unwrap().contains("Input/output error"));
    assert!(served.disk.closed().is_none());
}

#[test]
fn a_disk_that_stops_is_not_held_until_it_is_continued() {
    let served = Served::new();
    served.disk.set(Settle::ByHand);
    let mut client = served.client();
    let mut watcher = served.client();
    let failed = FailedRequest { kind: Kind::Write, ring: 1, offset: 4096, len: 512, errno: Errno(28) };
    // While a quiesce waits.
    client.send(r#"{"execute":"quiesce","arguments":{"timeout-ms":3600000}}"#);
    served.disk.wait_closed(true);
    // Answered when the quiesce has been seen to: it does not find the disk stopped already.
    watcher.ask("query-version", json!({})).unwrap();
    *served.disk.stopped.lock().unwrap() = Some(failed.clone());
    served.disk.events.send(Event::IoStopped(failed));
    let reply = client.reply();
    assert_eq!(reply["error"]["code"], "stopped");
    let why = reply["error"]["desc"].as_str().unwrap();
    assert!(why.contains("No space left") && why.contains("virtioblkctl continue"), "{why}");
    assert!(served.disk.closed().is_none());
    let told = watcher.event("IO_STOPPED");
    assert_eq!(told["message"], "No space left on device (os error 28)");
    assert_eq!((&told["operation"], &told["offset"], &told["ring"]), (&json!("write"), &json!(4096), &json!(1)));
    assert_eq!(watcher.event("QUIESCE_FAILED")["code"], "stopped");
    // And before.
    served.disk.set(Settle::Well);
    assert_eq!(client.ask("quiesce", json!({})), Err("stopped".into()));
    assert_eq!(watcher.event("QUIESCE_FAILED")["code"], "stopped");
    assert!(served.disk.closed().is_none());
    assert_eq!(watcher.ask("continue", json!({})), Ok(json!({"retried": 1})));
    assert_eq!(watcher.ask("continue", json!({})), Ok(json!({"retried": 0})));
    served.disk.events.send(Event::IoContinued { ring: 1 });
    assert_eq!(watcher.event("IO_CONTINUED")["ring"], 1);
    client.quiesce(json!({}));
}

#[test]
fn a_lease_ends_a_forgotten_hold_and_says_so() {
    let served = Served::new();
    let mut client = served.client();
    let token = client.quiesce(json!({"lease-ms": 50}));
    client.event("QUIESCED");
    assert_eq!(client.event("LEASE_EXPIRED")["token"], token.as_str());
    assert_eq!(client.event("RESUMED")["reason"], "lease-expired");
    assert!(served.disk.closed().is_none());
    assert_eq!(client.ask("resume", json!({"token": token})), Err("lease-expired".into()));
    assert_eq!(client.ask("renew-lease", json!({"token": token})), Err("lease-expired".into()));
    // On a loaded machine the lease may end before it is renewed.
    let end = Instant::now() + WAIT_TIMEOUT;
    let renewed = loop {
        let token = client.quiesce(json!({"lease-ms": 1000}));
        match client.ask("renew-lease", json!({"token": token, "lease-ms": 3_000_000})) {
            Ok(renewed) => break renewed,
            Err(code) => assert_eq!(code, "lease-expired"),
        }
        assert!(Instant::now() < end, "no lease is renewed");
    };
    assert_eq!(renewed, json!({"lease-ms": 3_000_000}));
    std::thread::sleep(Duration::from_millis(1100));
    assert!(served.disk.closed().is_some(), "renewed in time");
}

#[test]
fn holders_together_hold_the_disk_no_longer_than_its_bound() {
    let mut served = Served::new();
    served.stop();
    served.bound_holds(Duration::from_secs(10));
    served.restart();
    let start = Instant::now();
    let mut clients = [served.client(), served.client()];
    let first = clients[0].ask("quiesce", json!({"lease-ms": 60_000})).unwrap();
    assert!(first["lease-ms"].as_u64().unwrap() <= 10_000, "{first}");
    std::thread::sleep(Duration::from_millis(500));
    let second = clients[1].ask("quiesce", json!({"lease-ms": 60_000})).unwrap();
    assert!(second["lease-ms"].as_u64().unwrap() <= 9500, "what is left: {second}");
    let status = clients[0].ask("query-status", json!({})).unwrap();
    assert_eq!(status["quiesce"]["max-hold-ms"], 10_000);
    let waited = status["quiesce"]["held-ms"].as_u64().unwrap();
    assert!((500..=10_000).contains(&waited), "the sum of both: {status}");
    for _ in 0..2 {
        clients[0].event("QUIESCED");
    }
    clients[0].event("LEASE_EXPIRED");
    served.disk.wait_closed(false);
    assert!(start.elapsed() >= Duration::from_secs(10));
    assert_eq!(clients[0].ask("resume", json!({"token": second["token"]})), Err("lease-expired".into()));
    // Until writes have flowed the disk takes no holder, and then it does.
    let deadline = Instant::now() + WAIT_TIMEOUT;
    let again = loop {
        match clients[1].ask("quiesce", json!({"lease-ms": 1000})) {
            Ok(answer) => break answer,
            Err(code) => assert_eq!(code, "max-hold"),
        }
        assert!(Instant::now() < deadline, "it never takes a holder again");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(clients[1].ask("resume", json!({"token": again["token"]})).unwrap()["holders"], 0);
}

#[test]
fn a_hold_ends_with_its_connection_unless_detached() {
    let served = Served::new();
    let mut watcher = served.client();
    let mut holder = served.client();
    holder.quiesce(json!({"who": "mortal"}));
    drop(holder);
    served.disk.wait_closed(false);
    watcher.event("QUIESCED");
    assert_eq!(watcher.event("RESUMED")["reason"], "connection-closed");
    let mut holder = served.client();
    let token = holder.quiesce(json!({"detached": true}));
    drop(holder);
    // The server has seen that the connection ended when it has answered one that came after it.
    served.client().ask("query-version", json!({})).unwrap();
    assert!(served.disk.closed().is_some());
    assert_eq!(watcher.ask("resume", json!({"token": token})).unwrap()["holders"], 0);
}

#[test]
fn a_waiting_quiesce_ends_with_its_connection() {
    let served = Served::new();
    served.disk.set(Settle::ByHand);
    let mut client = served.client();
    client.send(r#"{"execute":"quiesce","arguments":{"detached":true,"timeout-ms":3600000}}"#);
    served.disk.wait_closed(true);
    drop(client);
    served.disk.wait_closed(false);
}

#[test]
fn a_client_that_only_closed_its_sending_side_still_gets_its_answers() {
    let served = Served::new();
    served.disk.set(Settle::ByHand);
    let mut client = served.greeted();
    client.send(r#"{"execute":"qmp_capabilities"}{"execute":"quiesce"}{"execute":"query-version","id":3}"#);
    client.reader.get_ref().shutdown(Shutdown::Write).unwrap();
    let epoch = served.disk.wait_closed(true);
    served.disk.settle(epoch, Ok(figures()));
    assert_eq!(client.reply()["return"], json!({}));
    assert!(client.reply()["return"]["token"].is_string());
    assert_eq!(client.reply()["id"], 3, "in order");
    client.ends();
    served.disk.wait_closed(false);
}

#[test]
fn replies_come_in_order_though_a_quiesce_takes_its_time() {
    let served = Served::new();
    served.disk.set(Settle::ByHand);
    let mut client = served.client();
    client.send(r#"{"execute":"quiesce","id":1}{"execute":"query-version","id":2}"#);
    let epoch = served.disk.wait_closed(true);
    served.client().ask("query-version", json!({})).expect("others are not held up");
    served.disk.settle(epoch, Ok(figures()));
    assert_eq!(client.reply()["id"], 1);
    assert_eq!(client.reply()["id"], 2);
}

#[test]
fn what_was_sent_before_a_close_is_carried_out() {
    let served = Served::new();
    let token = served.client().quiesce(json!({"detached": true}));
    let mut stream = served.raw();
    let resume = json!({"execute": "resume", "arguments": {"token": token}});
    write!(stream, r#"{{"execute":"qmp_capabilities"}}{resume}"#).unwrap();
    drop(stream);
    served.disk.wait_closed(false);
}

#[test]
fn too_many_holders_are_refused() {
    let served = Served::new();
    let mut client = served.client();
    for _ in 0..64 {
        client.quiesce(json!({}));
    }
    assert_eq!(client.ask("quiesce", json!({})), Err("too-many-holders".into()));
}

// The disk's news, and the end.

#[test]
fn the_disks_events_reach_those_who_negotiated() {
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
fn quit_is_answered_and_asked_once() {
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

// Hostile and clumsy clients.

#[test]
fn a_hundred_connections() {
    let served = Served::new();
    let mut first = served.client();
    let mut clients: Vec<Client> = (0..100).map(|_| Client::new(served.raw())).collect();
    let (mut greeted, mut refused) = (0, 0);
    for client in &mut clients {
        let line = client.line();
        if line["QMP"].is_object() {
            greeted += 1;
        } else {
            assert_eq!(line["error"]["code"], "too-many-clients");
            client.ends();
            refused += 1;
        }
    }
    assert_eq!((greeted, refused), (31, 69));
    first.ask("query-version", json!({})).unwrap();
    drop(clients);
    // Their places are free again as soon as the server has seen them go.
    served.greeted_soon();
}

#[test]
fn a_flood_does_not_starve_the_others() {
    let served = Served::new();
    let mut flood = served.client();
    let mut writer = flood.reader.get_ref().try_clone().unwrap();
    let requests: u64 = 400;
    let flooding = std::thread::spawn(move || {
        for id in 0..requests {
            // More than a socket holds, so this blocks: the flood waits, not the server.
            write!(writer, r#"{{"execute":"query-status","id":{id}}}"#).unwrap();
        }
    });
    let mut other = served.client();
    for _ in 0..20 {
        other.ask("query-version", json!({})).unwrap();
    }
    for id in 0..requests {
        assert_eq!(flood.reply()["id"], id, "delayed, not dropped");
    }
    flooding.join().unwrap();
}

#[test]
fn a_client_that_does_not_read_delays_no_other() {
    let served = Served::new();
    let mut lazy = served.client();
    lazy.reader.get_ref().set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    // Requests without reading: the server stops reading them, and keeps the connection.
    let request = br#"{"execute":"query-commands"}"#.repeat(100);
    let mut sent = 0;
    while sent < (4 << 20) {
        match lazy.reader.get_mut().write(&request) {
            Ok(count) => sent += count,
            Err(_) => break,
        }
    }
    assert!(sent < 4 << 20, "the server took everything");
    served.client().ask("query-version", json!({})).expect("others are served");
}

#[test]
fn a_watcher_that_does_not_read_is_cut_off() {
    let served = Served::new();
    let mut lazy = served.client();
    let mut busy = served.client();
    let long = "x".repeat(8000);
    for _ in 0..200 {
        // Errors are told 20 a second at most, disconnections always.
        served.disk.events.send(Event::Disconnected(long.clone()));
        busy.event("FRONTEND_DISCONNECTED");
    }
    let mut everything = Vec::new();
    match lazy.reader.read_to_end(&mut everything) {
        Ok(_) => assert!(everything.len() < 200 * 8000, "{} bytes, nothing was cut", everything.len()),
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
}

#[test]
fn half_a_request_delays_no_other_client() {
    let served = Served::new();
    let mut half = served.client();
    half.send(r#"{"execute":"quer"#);
    let mut other = served.client();
    other.ask("query-version", json!({})).unwrap();
    half.send(r#"y-version","id":5}"#);
    assert_eq!(half.reply()["id"], 5);
    half.send(r#"{"execute":"#);
    drop(half);
    other.ask("query-version", json!({})).unwrap();
}

#[test]
fn a_client_that_reads_nothing_and_leaves_is_forgotten() {
    let served = Served::new();
    for _ in 0..200 {
        let mut stream = served.raw();
        // The server may have turned us away and closed already.
        let _ = stream.write_all(br#"{"execute":"qmp_capabilities"}{"execute":"query-commands"}"#);
    }
    let mut client = served.greeted_soon();
    client.ask("qmp_capabilities", json!({})).unwrap();
    let status: Value = client.ask("query-status", json!({})).unwrap();
    assert_eq!(status["quiesce"]["holders"], json!([]));
}
