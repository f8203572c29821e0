//! The quiesce socket in front of a fake disk: negotiation, requests in pieces, replies in order.

use std::io::Write;
use std::net::Shutdown;

use kit::control::{Served, Settle, figures};
use serde_json::json;

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
