//! A snapshot that somebody else takes of the image: its store asks, the disk is held still, and every ask is answered
//! once, with a number that the store's client takes well. In front of a fake disk.

use std::sync::mpsc::Receiver;
use std::time::Duration;

use kit::control::{Client, STORE_TIMEOUT, Served, Settle, WAIT_TIMEOUT, figures};
use serde_json::{Value, json};
use virtioblkd::backend::Notices;
use virtioblkd::disk::ImageStatus;
use virtioblkd::engine::Errno;

type Answer = Result<(), Errno>;

fn wait(answer: &Receiver<Answer>) -> Answer {
    answer.recv_timeout(WAIT_TIMEOUT).expect("an answer")
}

fn refused(errno: i32) -> Answer {
    Err(Errno(errno))
}

/// Nothing holds the disk, and the socket answers.
fn is_idle(served: &Served, client: &mut Client) {
    served.disk.wait_closed(false);
    assert_eq!(client.ask("query-status", json!({})).unwrap()["quiesce"]["holders"], json!([]));
}

#[test]
fn the_disk_is_held_from_the_reply_until_the_store_unquiesces() {
    let served = Served::new();
    let mut client = served.client();
    served.disk.set(Settle::ByHand);
    let answer = served.store_asks();
    let epoch = served.disk.wait_closed(true);
    assert!(answer.recv_timeout(Duration::from_millis(50)).is_err(), "not before everything is durable");
    served.disk.settle(epoch, Ok(figures()));
    assert_eq!(wait(&answer), Ok(()));
    let quiesced = client.event("QUIESCED");
    assert_eq!((&quiesced["who"], &quiesced["drained"]), (&json!("rbd snapshot"), &json!(12)));
    assert_eq!((&quiesced["pid"], &quiesced["uid"]), (&Value::Null, &Value::Null));
    let holders = client.ask("query-status", json!({})).unwrap()["quiesce"]["holders"].take();
    assert_eq!((holders.as_array().unwrap().len(), &holders[0]["who"]), (1, &json!("rbd snapshot")));
    assert_eq!(served.disk.closed(), Some(epoch));
    served.notices.unquiesce();
    let resumed = client.event("RESUMED");
    assert_eq!(
        (&resumed["who"], &resumed["reason"], &resumed["holders"]),
        (&json!("rbd snapshot"), &json!("resume"), &json!(0))
    );
    // Also after one that was refused, and without any.
    served.notices.unquiesce();
    is_idle(&served, &mut client);
}

#[test]
fn a_store_can_quiesce_without_a_control_socket() {
    let mut served = Served::start(None, STORE_TIMEOUT);
    for _ in 0..3 {
        let answer = served.store_asks();
        assert_eq!(wait(&answer), Ok(()));
        served.disk.wait_closed(true);
        served.notices.unquiesce();
        served.disk.wait_closed(false);
    }
    assert!(!served.path.exists());
    let answer = served.store_asks();
    assert_eq!(wait(&answer), Ok(()));
    served.stop();
    assert_eq!(served.disk.closed(), None);
}

#[test]
fn each_failure_has_its_errno() {
    let served = Served::new();
    let mut client = served.client();
    served.disk.set(Settle::Fail(Errno(libc::ENOSPC)));
    assert_eq!(wait(&served.store_asks()), refused(libc::EIO));
    assert_eq!(client.event("QUIESCE_FAILED")["code"], "sync-failed");
    // The store says that it is over also if it was refused.
    served.notices.unquiesce();
    let served = Served::start(Some(0o600), Duration::from_millis(50));
    let mut client = served.client();
    served.disk.set(Settle::ByHand);
    assert_eq!(wait(&served.store_asks()), refused(libc::EAGAIN));
    let failed = client.event("QUIESCE_FAILED");
    assert_eq!((&failed["code"], &failed["who"]), (&json!("timeout"), &json!("rbd snapshot")));
    served.notices.unquiesce();
    is_idle(&served, &mut client);
}

#[test]
fn a_quiesce_cancelled_by_operator_or_store_is_refused() {
    let served = Served::new();
    let mut client = served.client();
    served.disk.set(Settle::ByHand);
    let given_up = served.store_asks();
    served.disk.wait_closed(true);
    served.notices.unquiesce();
    assert_eq!(wait(&given_up), refused(libc::ECANCELED));
    served.disk.wait_closed(false);
    let cancelled = served.store_asks();
    served.disk.wait_closed(true);
    client.ask("resume", json!({"all": true})).unwrap();
    assert_eq!(wait(&cancelled), refused(libc::ECANCELED));
    served.notices.unquiesce();
    // Resumed by the operator while the snapshot is taken: what the store says after that is no news.
    served.disk.set(Settle::Well);
    assert_eq!(wait(&served.store_asks()), Ok(()));
    client.ask("resume", json!({"all": true})).unwrap();
    served.notices.unquiesce();
    is_idle(&served, &mut client);
}

#[test]
fn a_second_quiesce_of_the_store_is_refused_as_busy() {
    let served = Served::new();
    let mut client = served.client();
    let first = served.store_asks();
    assert_eq!(wait(&first), Ok(()));
    assert_eq!(wait(&served.store_asks()), refused(libc::EBUSY));
    assert!(served.disk.closed().is_some(), "the first is not disturbed");
    served.notices.unquiesce();
    is_idle(&served, &mut client);
    assert_eq!(wait(&served.store_asks()), Ok(()));
}

#[test]
fn an_operators_hold_and_the_stores_nest() {
    let served = Served::new();
    let mut client = served.client();
    let token = client.quiesce(json!({}));
    let answer = served.store_asks();
    assert_eq!(wait(&answer), Ok(()), "the disk is still already");
    assert_eq!(served.disk.closings(), 1);
    served.notices.unquiesce();
    client.event("QUIESCED");
    client.event("QUIESCED");
    assert_eq!(client.event("RESUMED")["holders"], 1);
    assert!(served.disk.closed().is_some());
    assert_eq!(wait(&served.store_asks()), Ok(()));
    client.ask("resume", json!({"token": token})).unwrap();
    assert!(served.disk.closed().is_some(), "the store's is left");
    served.notices.unquiesce();
    is_idle(&served, &mut client);
}

#[test]
fn pending_store_requests_are_refused_at_the_end() {
    // While it settles: refused at once when the notices close, and a later one, too.
    let served = Served::new();
    served.disk.set(Settle::ByHand);
    let answer = served.store_asks();
    served.disk.wait_closed(true);
    served.notices.close();
    assert_eq!(wait(&answer), refused(libc::ECANCELED));
    served.disk.wait_closed(false);
    assert_eq!(wait(&served.store_asks()), refused(libc::ECANCELED));
    // Granted: held until the very end, for somebody's snapshot relies on it.
    let mut served = Served::new();
    assert_eq!(wait(&served.store_asks()), Ok(()));
    served.notices.close();
    served.client().ask("query-status", json!({})).unwrap();
    assert!(served.disk.closed().is_some());
    served.stop();
    assert_eq!(served.disk.closed(), None);
    // Without closing them first: the server's end is enough.
    let mut served = Served::new();
    served.disk.set(Settle::ByHand);
    let answer = served.store_asks();
    served.disk.wait_closed(true);
    served.stop();
    assert_eq!(wait(&answer), refused(libc::ECANCELED));
    assert_eq!(wait(&served.store_asks()), refused(libc::ECANCELED), "nobody reads any more");
}

#[test]
fn a_store_that_releases_early_is_reported() {
    let served = Served::new();
    let mut client = served.client();
    let answer = served.store_asks();
    assert_eq!(wait(&answer), Ok(()));
    client.event("QUIESCED");
    // As long as librbd waits for the others of a group.
    std::thread::sleep(Duration::from_millis(10_000));
    served.notices.unquiesce();
    let expired = client.event("QUIESCE_EXPIRED");
    assert_eq!(expired["who"], "rbd snapshot");
    assert!(expired["held-ms"].as_u64().unwrap() >= 9_900, "{expired}");
    client.event("RESUMED");
}

#[test]
fn the_images_size_and_state_are_passed_on() {
    let served = Served::new();
    let mut client = served.client();
    served.notices.resized(4096);
    let state = ImageStatus {
        trouble: Some("fenced".into()),
        trouble_detail: Some("another host took the image".into()),
        ..ImageStatus::default()
    };
    served.disk.set_image_status(state);
    served.notices.state_changed();
    assert_eq!(
        client.event("IMAGE_STATE"),
        json!({"trouble": "fenced", "trouble-detail": "another host took the image"})
    );
    assert_eq!(*served.sizes.lock().unwrap(), [4096]);
    assert_eq!(client.ask("query-status", json!({})).unwrap()["trouble"], "fenced");
    // Nothing changed: nothing is said.
    served.notices.state_changed();
    served.disk.set_image_status(ImageStatus::default());
    served.notices.state_changed();
    assert_eq!(client.event("IMAGE_STATE"), json!({"trouble": null, "trouble-detail": null}));
}

// Who is asked before.

fn attends(served: &Served, arguments: Value) -> Client {
    let mut client = served.client();
    client.ask("attend", arguments).unwrap();
    client
}

#[test]
fn the_attendant_prepares_before_the_gate_closes_and_is_released_after_it_opens() {
    let served = Served::new();
    let mut watcher = served.client();
    let mut attendant = attends(&served, json!({"who": "vm1", "timeout-ms": 3_600_000}));
    let status = watcher.ask("query-status", json!({})).unwrap()["attendant"].take();
    assert_eq!((&status["who"], &status["present"], &status["required"]), (&json!("vm1"), &json!(true), &json!(true)));
    assert_eq!(served.client().ask("attend", json!({})), Err("attended".into()));
    let answer = served.store_asks();
    let prepare = attendant.event("PREPARE");
    assert_eq!((&prepare["who"], &prepare["timeout-ms"]), (&json!("rbd snapshot"), &json!(13_333)), "of 20 s");
    assert_eq!(served.disk.closed(), None, "the guest is frozen while its disks take writes");
    assert!(answer.try_recv().is_err());
    assert_eq!(watcher.ask("query-status", json!({})).unwrap()["attendant"]["preparing"], true);
    assert_eq!(watcher.ask("prepared", json!({"id": prepare["id"]})), Err("not-asked".into()));
    attendant.ask("prepared", json!({"id": prepare["id"], "level": "filesystem"})).unwrap();
    assert_eq!(wait(&answer), Ok(()));
    assert!(served.disk.closed().is_some());
    assert_eq!(watcher.event("PREPARED")["level"], "filesystem", "PREPARE is the attendant's alone");
    watcher.event("QUIESCED");
    attendant.event("PREPARED");
    attendant.event("QUIESCED");
    // An operator's hold goes on: a guest cannot be thawed yet.
    let token = watcher.quiesce(json!({}));
    served.notices.unquiesce();
    attendant.event("QUIESCED");
    attendant.event("RESUMED");
    watcher.ask("resume", json!({"token": token})).unwrap();
    attendant.event("RESUMED");
    assert_eq!(attendant.event("RELEASED")["id"], prepare["id"]);
    assert_eq!(attendant.ask("prepared", json!({"id": prepare["id"]})), Err("not-asked".into()));
}

#[test]
fn a_snapshot_without_the_consent_of_a_required_attendant_is_refused() {
    let served = Served::new();
    for required in [true, false] {
        // It says no; it says nothing.
        for says in [true, false] {
            // It has time enough to say no.
            let timeout = if says { 3_600_000 } else { 100 };
            let mut attendant = attends(&served, json!({"required": required, "timeout-ms": timeout}));
            let answer = served.store_asks();
            let id = attendant.event("PREPARE")["id"].take();
            if says {
                attendant.ask("prepared", json!({"id": id, "error": "the agent is silent\u{1b}"})).unwrap();
            }
            assert_eq!(wait(&answer), if required { refused(libc::EBUSY) } else { Ok(()) });
            let failed = attendant.event("PREPARE_FAILED");
            assert_eq!(failed["required"], required);
            assert!(failed["message"].as_str().unwrap().contains(if says { "silent" } else { "100 ms" }), "{failed}");
            if required {
                assert_eq!(attendant.event("QUIESCE_FAILED")["code"], "not-prepared");
            } else {
                attendant.event("QUIESCED");
            }
            served.notices.unquiesce();
            if !required {
                attendant.event("RESUMED");
            }
            assert_eq!(attendant.event("RELEASED")["id"], id, "it may have begun");
            assert_eq!(attendant.ask("prepared", json!({"id": id})), Err("not-asked".into()), "too late");
            served.disk.wait_closed(false);
            attendant.ask("unattend", json!({})).unwrap();
        }
    }
    assert_eq!(served.disk.closings(), 2);
}

#[test]
fn a_lost_attendant_blocks_snapshots_and_one_that_unattends_does_not() {
    let served = Served::new();
    let mut watcher = served.client();
    let mut attendant = attends(&served, json!({"who": "vm1"}));
    let answer = served.store_asks();
    attendant.event("PREPARE");
    drop(attendant);
    assert_eq!(wait(&answer), refused(libc::EBUSY), "it died at work");
    assert_eq!(wait(&served.store_asks()), refused(libc::EBUSY), "and is not back");
    assert_eq!(served.disk.closings(), 0);
    let status = watcher.ask("query-status", json!({})).unwrap()["attendant"].take();
    assert_eq!((&status["who"], &status["present"]), (&json!("vm1"), &json!(false)));
    // The operator's own quiesce asks nobody.
    let token = watcher.quiesce(json!({}));
    watcher.ask("resume", json!({"token": token})).unwrap();
    let mut back = attends(&served, json!({}));
    let answer = served.store_asks();
    back.event("PREPARE");
    back.ask("unattend", json!({})).unwrap();
    assert_eq!(wait(&answer), refused(libc::EBUSY), "it left in the middle");
    assert_eq!(wait(&served.store_asks()), Ok(()), "nobody attends");
    assert_eq!(back.ask("unattend", json!({})), Err("not-attending".into()));
    assert_eq!(watcher.ask("query-status", json!({})).unwrap()["attendant"], Value::Null);
}

#[test]
fn a_store_that_gives_up_or_a_daemon_that_ends_does_not_wait_for_the_attendant() {
    let mut served = Served::new();
    let mut attendant = attends(&served, json!({}));
    for _ in 0..2 {
        let answer = served.store_asks();
        let id = attendant.event("PREPARE")["id"].take();
        served.notices.unquiesce();
        assert_eq!(wait(&answer), refused(libc::ECANCELED));
        attendant.event("QUIESCE_FAILED");
        assert_eq!(attendant.event("RELEASED")["id"], id);
    }
    let answer = served.store_asks();
    attendant.event("PREPARE");
    served.stop();
    assert_eq!(wait(&answer), refused(libc::ECANCELED));
    attendant.event("QUIESCE_FAILED");
    attendant.event("RELEASED");
    attendant.event("SHUTDOWN");
    assert_eq!(served.disk.closings(), 0);
}
