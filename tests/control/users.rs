//! Which commands which user may use: a user beside root and the daemon's can neither take the guest over nor end the
//! daemon, nor keep root out.

use std::io::IoSlice;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kit::control::{Client, Served, WAIT_TIMEOUT};
use kit::stall::fuse::Stalling;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::thread::set_thread_res_uid;
use serde_json::json;
use virtioblkd::internal::control::Access;

/// A user without a name.
const OTHER: u32 = 54321;
/// Stands for every user that a user namespace does not map; `nobody`, too.
const OVERFLOW: u32 = 65534;

/// What `user` meets on the socket. A thread has a user of its own as far as the kernel is concerned.
fn connect_as(user: u32, served: &Served) -> UnixStream {
    let path = served.path.clone();
    let connect = move || {
        let uid = rustix::process::Uid::from_raw(user);
        set_thread_res_uid(uid, uid, uid).unwrap();
        UnixStream::connect(path).unwrap()
    };
    let stream = std::thread::spawn(connect).join().unwrap();
    stream.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    stream.set_write_timeout(Some(WAIT_TIMEOUT)).unwrap();
    stream
}

fn client_of(user: u32, served: &Served) -> Client {
    let mut client = Client::new(connect_as(user, served));
    assert!(client.line()["QMP"].is_object());
    client.ask("qmp_capabilities", json!({})).unwrap();
    client
}

/// The commands that only root and the daemon's user may use.
const RESERVED: [(&str, &str); 7] = [
    ("query-command-line", "{}"),
    ("hand-over", r#"{"version": 1}"#),
    ("resize", r#"{"force": true}"#),
    ("quit", "{}"),
    ("getfd", r#"{"fdname": "a"}"#),
    ("closefd", r#"{"fdname": "a"}"#),
    ("export-prepare", r#"{"fdname": "a", "name": "a"}"#),
];

/// Close(2) of a received descriptor waits for its filesystem, which may be the client's own and never answer.
#[test]
fn a_descriptor_of_another_user_does_not_stop_the_control_thread() {
    if !kit::can_become_another_user() {
        return;
    }
    let Ok(stalling) = Stalling::mount(vec![0; 4096]) else {
        eprintln!("SKIPPED: this machine mounts no FUSE filesystem");
        return;
    };
    stalling.stall_closes();
    let file = ManuallyDrop::new(std::fs::File::open(stalling.image()).unwrap());
    // Nothing ends a thread that waits in close(2), so a failure lets it go.
    let (stalling, is_stuck) = (Arc::new(stalling), Arc::new(AtomicBool::new(false)));
    let (weak, stuck) = (Arc::downgrade(&stalling), is_stuck.clone());
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(20));
        if let Some(stalling) = weak.upgrade() {
            stuck.store(true, Ordering::SeqCst);
            stalling.let_go();
        }
    });
    for access in [Access::ReadOnly, Access::Operate] {
        let served = Served::new().let_others(access);
        let stream = connect_as(OTHER, &served);
        let descriptors = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let text = b"{\"execute\": \"qmp_capabilities\"}\n{\"execute\": \"query-status\"}\n";
        sendmsg(&stream, &[IoSlice::new(text)], &mut ancillary, SendFlags::empty()).unwrap();
        let mut client = Client::new(stream);
        assert!(client.line()["QMP"].is_object());
        assert!(client.reply()["return"].is_object());
        assert!(client.reply()["return"].is_object(), "{access}");
        served.client().ask("query-status", json!({})).unwrap();
        assert_eq!(stalling.waiting(), 0, "{access}");
        assert!(!is_stuck.load(Ordering::SeqCst), "{access}: the control thread closed the descriptor");
    }
    stalling.let_go();
    drop(ManuallyDrop::into_inner(file));
}

#[test]
fn another_user_cannot_take_the_guest_over_or_end_the_daemon() {
    if !kit::can_become_another_user() {
        return;
    }
    let served = Served::new().let_others(Access::Operate);
    for user in [OTHER, OVERFLOW] {
        let mut client = client_of(user, &served);
        for (command, arguments) in RESERVED {
            let arguments: serde_json::Value = serde_json::from_str(arguments).unwrap();
            assert_eq!(client.ask(command, arguments), Err("not-allowed".into()), "{command} of {user}");
        }
        client.send(json!({"execute": "quit"}).to_string());
        let error = client.reply()["error"]["desc"].take();
        assert!(error.as_str().unwrap().contains("quit is for root and the daemon's user"), "{error}");
        let names = client.ask("query-commands", json!({})).unwrap().to_string();
        assert!(!names.contains("hand-over") && !names.contains("quit\"") && names.contains("resize"), "{names}");
        // It may still do an operator's work.
        let token = client.quiesce(json!({}));
        client.ask("resume", json!({"token": token})).unwrap();
        client.ask("query-status", json!({})).unwrap();
        client.ask("continue", json!({})).unwrap();
    }
    assert!(served.handed_over.lock().unwrap().is_empty());
    assert_eq!(served.quits.load(Ordering::SeqCst), 0);
    // Root may.
    let mut root = served.client();
    assert!(root.ask("query-commands", json!({})).unwrap().to_string().contains("hand-over"));
    root.ask("quit", json!({})).unwrap();
}

#[test]
fn a_user_who_may_only_ask_changes_nothing() {
    if !kit::can_become_another_user() {
        return;
    }
    let served = Served::new().let_others(Access::ReadOnly);
    let mut client = client_of(OTHER, &served);
    for (command, arguments) in [
        ("quiesce", json!({})),
        ("resume", json!({"all": true})),
        ("continue", json!({})),
        ("resize", json!({})),
        ("attend", json!({})),
        ("copy-prepare", json!({"target": "/copy"})),
        ("image-snapshot", json!({"name": "x", "token": "y"})),
        ("quit", json!({})),
    ] {
        assert_eq!(client.ask(command, arguments), Err("not-allowed".into()), "{command}");
    }
    client.send(json!({"execute": "quiesce"}).to_string());
    let error = client.reply()["error"]["desc"].take();
    assert!(error.as_str().unwrap().contains("--control-access operate"), "{error}");
    for query in ["query-status", "query-stats", "query-copies", "query-version"] {
        assert!(client.ask(query, json!({})).is_ok() || query == "query-copies", "{query}");
    }
    assert_eq!(served.disk.closings(), 0);
    // It hears what happens.
    served.client().quiesce(json!({}));
    client.event("QUIESCED");
}

#[test]
fn other_users_do_not_keep_root_out() {
    if !kit::can_become_another_user() {
        return;
    }
    let served = Served::new().let_others(Access::Operate);
    let mut others: Vec<Client> = (0..28).map(|_| client_of(OTHER, &served)).collect();
    let mut refused = Client::new(connect_as(OTHER, &served));
    let error = refused.line()["error"].take();
    assert_eq!(error["code"], "too-many-clients");
    assert!(error["desc"].as_str().unwrap().contains("28 clients"), "{error}");
    let mut roots: Vec<Client> = (0..4).map(|_| served.client()).collect();
    for root in &mut roots {
        root.ask("query-status", json!({})).unwrap();
    }
    let mut refused = Client::new(served.raw());
    assert!(refused.line()["error"]["desc"].as_str().unwrap().contains("32 clients"));
    // A place of another user's is free again for one.
    drop(others.pop());
    let end = std::time::Instant::now() + WAIT_TIMEOUT;
    while Client::new(connect_as(OTHER, &served)).line()["QMP"].is_null() {
        assert!(std::time::Instant::now() < end, "the place stays taken");
    }
}
