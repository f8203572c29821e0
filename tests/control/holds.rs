//! Holds: quiesces, their leases, their bound, and the connections and failures that end them.

use std::time::{Duration, Instant};

use kit::control::{Served, Settle, WAIT_TIMEOUT, figures};
use serde_json::json;
use virtioblkd::disk::{Event, FailedRequest};
use virtioblkd::engine::{Errno, Kind};

const EIO: Errno = Errno(5);

#[test]
fn a_quiesce_holds_the_disk_until_its_resume() {
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
fn too_many_holders_are_refused() {
    let served = Served::new();
    let mut client = served.client();
    for _ in 0..64 {
        client.quiesce(json!({}));
    }
    assert_eq!(client.ask("quiesce", json!({})), Err("too-many-holders".into()));
}
