//! Careless and hostile clients: many, silent, flooding, or not reading. None delays another.

use std::io::{Read, Write};
use std::time::Duration;

use kit::control::{Client, Served};
use serde_json::{Value, json};
use virtioblkd::disk::Event;

#[test]
fn of_a_hundred_connections_all_but_the_limit_are_refused() {
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

#[test]
fn clients_that_only_listen_do_not_keep_commands_out() {
    let served = Served::new();
    let mut holder = served.client();
    holder.quiesce(json!({"lease-ms": 60_000}));
    let mut listening: Vec<Client> = (0..31).map(|_| served.client()).collect();
    let end = std::time::Instant::now() + Duration::from_secs(60);
    // Not at once: each may be about to send a command.
    while Client::new(served.raw()).line()["QMP"].is_null() {
        assert!(std::time::Instant::now() < end, "the places stay taken");
        std::thread::sleep(Duration::from_millis(100));
    }
    // The newest of them has gone, and was told why.
    let mut newest = listening.pop().unwrap();
    let line = newest.reply();
    assert_eq!(line["error"]["code"], "too-many-clients", "{line}");
    newest.ends();
    // The others stay, and so does the client with a hold, which says nothing either.
    for client in &mut listening {
        client.ask("query-version", json!({})).unwrap();
    }
    assert_eq!(holder.ask("query-status", json!({})).unwrap()["quiesce"]["state"], "quiesced");
}
