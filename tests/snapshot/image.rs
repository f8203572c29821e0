//! Snapshots that an image's own store makes (`--to rbd`), of one disk and of several, in front of fake disks: all are
//! made at one instant or none is left, whatever fails or dies.

use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use kit::control::{FakeStore, Served};
use kit::snapshot::{Daemon, ctl, err, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

fn snapshot(disks: &[&std::path::Path], more: &[&str]) -> Command {
    let mut command = ctl();
    command.args(["--json", "snapshot", "--level", "crash"]).args(more);
    for disk in disks {
        command.arg("--disk").arg(disk);
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn two() -> ([Served; 2], [Arc<FakeStore>; 2]) {
    let disks = [Served::new(), Served::new()];
    let stores = [disks[0].with_store(), disks[1].with_store()];
    (disks, stores)
}

fn receipt(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn an_image_snapshot_needs_a_hold_and_outlives_its_connection_only_if_kept() {
    let served = Served::new();
    let mut client = served.client();
    assert_eq!(client.ask("image-snapshot", json!({"name": "a", "token": "t"})), Err("no-image-snapshots".into()));
    assert_eq!(client.ask("query-status", json!({})).unwrap()["image-snapshots"], false);
    let store = served.with_store();
    assert_eq!(client.ask("query-status", json!({})).unwrap()["image-snapshots"], true);
    assert_eq!(client.ask("image-snapshot", json!({"name": "a", "token": "t"})), Err("not-quiesced".into()));
    assert_eq!(client.ask("image-snapshot", json!({"token": "t"})), Err("bad-argument".into()));
    let token = client.quiesce(json!({"detached": true}));
    let made = client.ask("image-snapshot", json!({"name": "a", "token": token})).unwrap();
    assert_eq!(made, json!({"snapshot": "pool/image@a"}));
    client.ask("image-snapshot-keep", json!({"name": "a"})).unwrap();
    client.ask("image-snapshot", json!({"name": "b", "token": token})).unwrap();
    client.ask("image-snapshot-remove", json!({"name": "b"})).unwrap();
    assert_eq!(store.made(), ["a"]);
    client.ask("image-snapshot", json!({"name": "c", "token": token})).unwrap();
    drop(client);
    wait_until("what was not kept is removed", || store.made() == ["a"]);
    let mut client = served.client();
    assert_eq!(client.ask("image-snapshot-remove", json!({"name": "a"})), Err("no-such-snapshot".into()));
    store.fail(true);
    assert_eq!(client.ask("image-snapshot", json!({"name": "d", "token": token})), Err("store".into()));
}

#[test]
fn a_slow_store_delays_no_other_client_and_its_late_snapshot_is_removed() {
    let served = Served::new();
    let store = served.with_store();
    store.hang(true);
    let mut client = served.client();
    let token = client.quiesce(json!({"detached": true}));
    client.send(json!({"execute": "image-snapshot", "arguments": {"name": "a", "token": token}}).to_string());
    store.wait_creating();
    let mut other = served.client();
    assert_eq!(other.ask("image-snapshot", json!({"name": "b", "token": token})), Err("busy".into()));
    other.ask("resume", json!({"token": token})).unwrap();
    store.hang(false);
    let reply = client.reply();
    assert_eq!(reply["error"]["code"], "not-held", "it is of no instant: {reply}");
    wait_until("it is removed", || store.made().is_empty());
    // Its asker is gone before it is made.
    store.hang(true);
    let token = other.quiesce(json!({}));
    client.send(json!({"execute": "image-snapshot", "arguments": {"name": "c", "token": token}}).to_string());
    store.wait_creating();
    drop(client);
    wait_until("the connection's end is known", || other.ask("query-status", json!({})).is_ok());
    store.hang(false);
    wait_until("it is made and removed", || {
        store.made().is_empty() && other.ask("image-snapshot", json!({"name": "d", "token": token})).is_ok()
    });
    assert_eq!(store.made(), ["d"]);
}

#[test]
fn two_images_share_a_name_and_an_instant() {
    let (disks, stores) = two();
    let output = snapshot(&[&disks[0].path, &disks[1].path], &[]).output().unwrap();
    let receipt = receipt(&output);
    let name = stores[0].made().pop().unwrap();
    assert!(name.starts_with("virtioblk-2") && name.ends_with('Z'), "{name}");
    assert_eq!(stores[1].made(), [name.as_str()]);
    for disk in receipt["disks"].as_array().unwrap() {
        assert_eq!((&disk["way"], &disk["target"]), (&json!("rbd"), &json!(format!("pool/image@{name}"))));
    }
    let output = snapshot(&[&disks[0].path, &disks[1].path], &["--to", "rbd:monday"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(stores.iter().all(|store| store.made()[1] == "monday"));
    assert!(disks.iter().all(|disk| disk.disk.closed().is_none() && disk.disk.closings() == 2));
}

#[test]
fn if_one_image_snapshot_fails_all_are_removed() {
    let (disks, stores) = two();
    let dir = tempfile::tempdir().unwrap();
    let file = Daemon::with_image(dir.path(), "a.raw", 1 << 20);
    let copy = format!("copy:{}", dir.path().join("copy").display());
    let all = [disks[0].path.as_path(), &disks[1].path, &file.control()];
    stores[1].fail(true);
    let output = snapshot(&all, &["--to", "rbd:x", "--to", "rbd:x", "--to", &copy]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(err(&output).contains("the pool is full: add space"), "{output:?}");
    wait_until("nothing is left", || stores.iter().all(|store| store.made().is_empty()));
    wait_until("no copy is left", || std::fs::read_dir(dir.path()).unwrap().count() == 1);
    assert!(disks.iter().all(|disk| disk.disk.closed().is_none()) && !file.is_held());
    // And together they do well: files and a store's images, one instant.
    stores[1].fail(false);
    let output = snapshot(&all, &["--to", "rbd:x", "--to", "rbd:y", "--to", &copy]).output().unwrap();
    let receipt = receipt(&output);
    let ways: Vec<_> = receipt["disks"].as_array().unwrap().iter().map(|disk| disk["way"].clone()).collect();
    assert_eq!(ways, ["rbd", "rbd", "copy"]);
    assert_eq!((stores[0].made(), stores[1].made()), (vec!["x".to_owned()], vec!["y".to_owned()]));
    assert_eq!(std::fs::metadata(dir.path().join("copy")).unwrap().len(), 1 << 20);
}

#[test]
fn a_copy_published_just_as_another_disk_fails_is_removed() {
    let (disks, stores) = two();
    let copied = Served::new();
    let copies = copied.with_copies();
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("copy");
    stores[1].fail(true);
    let all = [disks[0].path.as_path(), &disks[1].path, &copied.path];
    let copy = format!("copy:{}", target.display());
    let output = snapshot(&all, &["--to", "rbd:x", "--to", "rbd:x", "--to", &copy]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(err(&output).contains("the pool is full"), "{output:?}");
    // Once more when its connection ends, whoever notices that first.
    assert!(copies.cancels() >= 2, "{output:?}");
    assert!(!target.exists() && stores.iter().all(|store| store.made().is_empty()), "{output:?}");
}

#[test]
fn a_killed_or_late_command_leaves_no_image_snapshot() {
    let (disks, stores) = two();
    stores[1].hang(true);
    for how in [Signal::KILL, Signal::TERM] {
        let mut child = snapshot(&[&disks[0].path, &disks[1].path], &["--to", "rbd:x"]).spawn().unwrap();
        stores[1].wait_creating();
        wait_until("the first is made", || stores[0].made() == ["x"]);
        kill_process(Pid::from_child(&child), how).unwrap();
        assert!(!child.wait().unwrap().success());
        wait_until("the first is removed", || stores[0].made().is_empty());
        wait_until("the disks go on", || disks.iter().all(|disk| disk.disk.closed().is_none()));
        stores[1].hang(false);
        let mut client = disks[1].client();
        let token = client.quiesce(json!({}));
        wait_until("the second is made and removed", || {
            client.ask("image-snapshot", json!({"name": "next", "token": token})).is_ok()
        });
        client.ask("image-snapshot-remove", json!({"name": "next"})).unwrap();
        assert!(stores[1].made().is_empty());
        stores[1].hang(true);
    }
    let output = snapshot(&[&disks[0].path, &disks[1].path], &["--to", "rbd:x", "--lease", "500ms"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    wait_until("the first is removed", || stores[0].made().is_empty());
    stores[1].hang(false);
    wait_until("the second, too", || disks[1].disk.closed().is_none() && stores[1].made().is_empty());
}

#[test]
fn a_disk_that_is_no_image_of_a_store_is_named() {
    let served = Served::new();
    for (more, words) in [(&["--to", "rbd:x"][..], "no Ceph RBD image"), (&[], "give --to")] {
        let output = snapshot(&[&served.path], more).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(
            err(&output).contains(words) && err(&output).contains(&served.path.display().to_string()),
            "{output:?}"
        );
    }
    assert_eq!(served.disk.closings(), 0);
}
