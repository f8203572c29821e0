//! What goes wrong while somebody else takes a snapshot of a served image, or just before: a full cluster, an OSD that
//! goes away, a watch that is lost, a disk of a group that is late. The command ends, with an error where nothing can be
//! promised; the disk goes on; and whoever watches is told. Each with a real cluster of its own.

use std::process::{Child, Command, Output};

use kit::ceph::{Cluster, Image, POOL, serve};
use kit::driver::load::{Load, SIZE, holds};
use kit::guest::{Qmp, Server, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

/// A figure of `rbd.quiesce` in the status.
fn figure(server: &Server, name: &str) -> u64 {
    let status = server.status();
    status["rbd"]["quiesce"][name].as_u64().unwrap_or_else(|| panic!("no rbd.quiesce.{name}: {status}"))
}

fn is_open(server: &Server) -> bool {
    server.status()["quiesce"]["closed-ms"] == Value::Null
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Somebody who is asked before each snapshot and lets the test do something meanwhile.
struct Attendant(Qmp);

impl Attendant {
    fn of(server: &Server) -> Attendant {
        let mut client = Qmp::connect(&server.control());
        client.execute("attend", json!({"who": "the test", "timeout-ms": 20_000}));
        Attendant(client)
    }

    /// Until a snapshot waits for us.
    fn asked(&mut self) -> Value {
        self.0.event("PREPARE")["data"]["id"].take()
    }

    fn consent(&mut self, id: &Value) {
        self.0.execute("prepared", json!({"id": id}));
    }
}

fn start(mut command: Command) -> Child {
    command.stderr(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().expect("rbd")
}

/// Somebody begins a snapshot of a disk under load, and before the disk is held still the storage breaks off, so that its
/// writes do not end. Then the storage is mended.
fn interrupt(image: &Image, mode: &str, breaks: impl Fn(), mends: impl Fn()) {
    let server = serve(image, mode, &["--rbd-quiesce-timeout", "12"]);
    let load = Load::start(&server.socket());
    load.wait_for(300);
    let mut attendant = Attendant::of(&server);
    let taking = start(image.cluster.rbd_command(&["snap", "create", "--no-progress", &image.at("no")]));
    let id = attendant.asked();
    breaks();
    wait_until("requests wait", || server.total("in-flight") > 0 && load.stands_still());
    attendant.consent(&id);
    let event = attendant.0.event("QUIESCE_FAILED");
    assert_eq!((&event["data"]["who"], &event["data"]["code"]), (&json!("rbd snapshot"), &json!("timeout")));
    attendant.0.event("RELEASED");
    assert!(is_open(&server), "the gate is open again, though nothing is written still");
    attendant.0.execute("unattend", json!({}));
    // One that begins now waits inside Ceph, and reaches us when there is something to take a snapshot of.
    let later = start(image.cluster.rbd_command(&["snap", "create", "--no-progress", &image.at("yes")]));
    mends();
    load.wait_for(300);
    let refused = taking.wait_with_output().expect("our own child");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    // It ends by itself: it was not killed for asking again and again.
    assert!(refused.status.code().is_some_and(|code| code != 0 && code != 137), "{}: {said}", refused.status);
    assert!(said.contains("failed to create snapshot"), "{said}");
    succeeds(&later.wait_with_output().expect("our own child"));
    assert_eq!((figure(&server, "asked"), figure(&server, "refused")), (2, 1));
    let listed = image.cluster.rbd(&["snap", "ls", &image.spec]);
    assert!(listed.contains("yes") && !listed.contains("no"), "{listed}");
    load.wait_for(100);
    let acknowledged = load.stop();
    let (status, log) = server.terminate();
    assert!(status.success(), "{log}");
    holds(&image.content(), &acknowledged, mode);
}

#[test]
fn a_cluster_that_fills_up_makes_the_snapshot_fail_and_the_disk_goes_on() {
    let cluster = Cluster::start(&[]);
    // Here the snapshot is made by our librbd, which has the image's lock; there by the command's. And in writeback writes
    // are acknowledged until the cache is full, and what waits is the sync.
    let locked = cluster.image(SIZE as u64);
    interrupt(&locked, "none", || cluster.full(true), || cluster.full(false));
    let plain = cluster.image_in(POOL, SIZE as u64, &["--image-feature", "layering"]);
    interrupt(&plain, "writeback", || cluster.full(true), || cluster.full(false));
}

#[test]
fn an_osd_that_goes_away_makes_the_snapshot_fail_and_the_disk_goes_on() {
    let cluster = Cluster::start(&[]);
    interrupt(&cluster.image(SIZE as u64), "none", || cluster.osd_down(), || cluster.osd_up());
}

/// A snapshot holds the disk still, and a new size is seen: both go by the image's watch.
fn is_watched(server: &Server, image: &Image, load: &Load, name: &str) {
    let (asked, before) = (figure(server, "asked"), load.acknowledged());
    succeeds(&image.take_snapshot(name, &[]));
    assert_eq!((figure(server, "asked"), figure(server, "refused")), (asked + 1, 0), "{name}");
    holds(&image.snapshot(name), &before, name);
    wait_until("the disk goes on", || is_open(server));
    load.wait_for(100);
    let size = server.status()["size"].as_u64().expect("a number") + MIB;
    image.cluster.rbd(&["resize", "--no-progress", "--size", &format!("{}M", size / MIB), &image.spec]);
    wait_until("the new size is seen", || server.status()["size"] == size);
}

#[test]
fn a_watch_that_was_lost_is_back_and_what_it_missed_is_seen() {
    let cluster = Cluster::start(&[]);
    // With the image's lock, and without the feature.
    for options in [&[][..], &["--image-feature", "layering"]] {
        let image = cluster.image_in(POOL, SIZE as u64, options);
        let server = serve(&image, "writeback", &[]);
        let load = Load::start(&server.socket());
        load.wait_for(100);
        is_watched(&server, &image, &load, "at-first");
        // Of somebody else: the map of the cluster changes, and nothing for us.
        cluster.ceph(&["osd", "blocklist", "add", "127.0.0.9:0/12345", "600"]);
        is_watched(&server, &image, &load, "another-fenced");
        cluster.osd_down();
        cluster.osd_up();
        load.wait_for(100);
        is_watched(&server, &image, &load, "osd-restarted");
        if !options.is_empty() {
            // Whoever resized an image whose lock we have would fence us for this. A watcher that says nothing for 30 s
            // (osd_client_watch_timeout) is dropped. Not made shorter here: clients say something every 5 s
            // (objecter_tick_interval), so one that lives would be dropped, too, and a snapshot then asks nobody.
            let is_watching = || cluster.rbd(&["status", "--format", "json", &image.spec]).contains("address");
            let pid = Pid::from_raw(server.pid() as i32).expect("a process");
            kill_process(pid, Signal::STOP).expect("our own child");
            wait_until("the watcher is dropped", || !is_watching());
            image.cluster.rbd(&["resize", "--no-progress", "--size", "64M", &image.spec]);
            kill_process(pid, Signal::CONT).expect("our own child");
            wait_until("what was missed is seen", || server.status()["size"] == 64 * MIB);
            wait_until("it watches again", is_watching);
            load.wait_for(100);
            is_watched(&server, &image, &load, "watch-lost");
        }
        load.stop();
        let (status, log) = server.terminate();
        assert!(status.success(), "{log}");
    }
}

#[test]
fn a_disk_that_its_store_lets_go_before_another_is_ready_says_so() {
    let cluster = Cluster::shared();
    let group = format!("{POOL}/late");
    cluster.rbd(&["group", "create", &group]);
    let images = [cluster.image(SIZE as u64), cluster.image(SIZE as u64)];
    for image in &images {
        cluster.rbd(&["group", "image", "add", &group, &image.spec]);
    }
    let [early, late] = images.each_ref().map(|image| serve(image, "none", &[]));
    let mut watcher = Qmp::connect(&early.control());
    let load = Load::start(&early.socket());
    load.wait_for(100);
    let mut attendant = Attendant::of(&late);
    let taking = start(cluster.rbd_command(&["group", "snap", "create", &format!("{group}@one")]));
    let id = attendant.asked();
    watcher.event("QUIESCED");
    // librbd waits for 10 s, and then no longer: the first disk goes on while the second is still being prepared.
    let expired = watcher.event("QUIESCE_EXPIRED");
    assert!(expired["data"]["held-ms"].as_u64().is_some_and(|held| held >= 9900), "{expired}");
    wait_until("the first goes on", || is_open(&early));
    attendant.consent(&id);
    // Ceph calls it a success.
    succeeds(&taking.wait_with_output().expect("our own child"));
    load.wait_for(100);
    assert_eq!((figure(&early, "expired"), figure(&late, "expired")), (1, 0));
    early.wait_for_log(&["may not be of one instant"]);
    let shown = early.ctl_ok(&["status"]);
    assert!(shown.contains("snapshots by others: 1 requested, 0 refused, 1 RELEASED EARLY"), "{shown}");
    attendant.0.event("RELEASED");
    // The next one is in time.
    attendant.0.execute("unattend", json!({}));
    cluster.rbd(&["group", "snap", "create", &format!("{group}@two")]);
    assert_eq!((figure(&early, "expired"), figure(&late, "expired")), (1, 0));
    wait_until("both go on", || is_open(&early) && is_open(&late));
    load.wait_for(100);
    load.stop();
}

#[test]
fn a_daemon_that_ends_while_its_disk_is_held_closes_its_image() {
    let cluster = Cluster::shared();
    for (mode, round) in [("none", 1), ("writeback", 1), ("none", 2), ("writeback", 2)] {
        let image = cluster.image(SIZE as u64);
        let server = serve(&image, mode, &[]);
        let load = Load::start(&server.socket());
        load.wait_for(100);
        server.ctl_ok(&["quiesce"]);
        let (status, log) = server.terminate();
        assert!(status.success(), "{mode}: {status}: {log}");
        // An image that is not closed keeps its watch for half a minute.
        let left = cluster.rbd(&["status", "--format", "json", &image.spec]);
        assert!(!left.contains("address"), "{mode}, round {round}: {left}\n{log}");
        load.stop();
    }
}
