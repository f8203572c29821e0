//! Snapshots that others take of a served image, by `rbd snap create`, `rbd group snap create` and Ceph's Python binding
//! (as Cinder does): each holds the disk still, and lets it go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kit::ceph::{Cluster, Image, POOL, serve};
use kit::driver::load::{Load, PAGE, SIZE, holds};
use kit::driver::pairs::{BLOCK, PairWriter, are_of_one_instant, newest};
use kit::driver::{ALL, Driver};
use kit::guest::{Qmp, Server, tell, wait_until};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
const MODES: [&str; 5] = ["none", "directsync", "writeback", "writethrough", "unsafe"];

/// A figure of `rbd.quiesce` in the status.
fn figure(server: &Server, name: &str) -> u64 {
    let status = server.status();
    status["rbd"]["quiesce"][name].as_u64().unwrap_or_else(|| panic!("no rbd.quiesce.{name}: {status}"))
}

fn is_open(server: &Server) -> bool {
    server.status()["quiesce"]["closed-ms"] == Value::Null
}

fn take(image: &Image, name: &str, options: &[&str]) {
    let output = image.take_snapshot(name, options);
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_snapshot_by_anybody_holds_what_was_acknowledged_in_every_mode() {
    for mode in MODES {
        let image = Cluster::shared().image(SIZE as u64);
        let server = serve(&image, mode, &[]);
        let load = Load::start(&server.socket());
        load.wait_for(100);
        for round in 0..5u64 {
            let name = format!("snap-{round}");
            let before = load.acknowledged();
            if round % 2 == 0 {
                take(&image, &name, &[]);
            } else {
                // What Cinder's driver does.
                image.cluster.python(
                    "image = rbd.Image(io, sys.argv[1])\nimage.create_snap(sys.argv[2])\nimage.protect_snap(sys.argv[2])\nimage.close()",
                    &[image.name(), &name],
                );
            }
            assert_eq!((figure(&server, "asked"), figure(&server, "refused")), (round + 1, 0), "{mode}");
            wait_until("the disk goes on", || is_open(&server));
            load.wait_for(100);
            holds(&image.snapshot(&name), &before, mode);
        }
        take(&image, "unasked", &["--skip-quiesce"]);
        assert_eq!(figure(&server, "asked"), 5, "{mode}: nobody was to ask");
        let acknowledged = load.stop();
        let (status, log) = server.terminate();
        assert!(status.success(), "{mode}: {log}");
        holds(&image.content(), &acknowledged, mode);
    }
}

/// Two images in a group, each with its server.
struct Group<'a> {
    images: [Image<'a>; 2],
    servers: [Server; 2],
    name: String,
}

impl Group<'_> {
    fn new(name: &str, mode: &str, options: &[&str]) -> Group<'static> {
        let cluster = Cluster::shared();
        let images = [cluster.image(MIB), cluster.image(MIB)];
        let name = format!("{POOL}/{name}");
        cluster.rbd(&["group", "create", &name]);
        for image in &images {
            cluster.rbd(&["group", "image", "add", &name, &image.spec]);
        }
        let servers = images.each_ref().map(|image| serve(image, mode, options));
        Group { images, servers, name }
    }

    /// Takes a snapshot of the group; the newest i of each disk in it.
    fn snapshot(&self, snapshot: &str, options: &[&str]) -> [u64; 2] {
        let name = format!("{}@{snapshot}", self.name);
        self.images[0].cluster.rbd(&[&["group", "snap", "create", &name], options].concat());
        self.images.each_ref().map(|image| newest(&image.snapshot_of_group(snapshot)))
    }
}

#[test]
fn a_group_snapshot_over_two_servers_is_of_one_instant() {
    for mode in ["none", "writeback"] {
        let group = Group::new(&format!("group-{mode}"), mode, &[]);
        let writer = PairWriter::start(group.servers.each_ref().map(Server::socket));
        wait_until("the writer writes", || writer.written() > 50);
        for round in 0..12 {
            let before = writer.written();
            let pair = group.snapshot(&format!("held-{round}"), &[]);
            assert!(are_of_one_instant(pair), "{mode}: {pair:?}");
            assert!(pair[1] >= before, "{mode}: {before} was acknowledged before, {pair:?} is in the snapshot");
            wait_until("the writer goes on", || writer.written() > pair[0]);
        }
        for server in &group.servers {
            assert_eq!((figure(server, "asked"), figure(server, "expired")), (12, 0), "{mode}");
        }
        // The same reader sees two snapshots that are not of a group for what they are.
        let torn = (0..20).filter(|round| {
            let name = format!("single-{round}");
            let pair = group.images.each_ref().map(|image| {
                take(image, &name, &["--skip-quiesce"]);
                newest(&image.snapshot(&name))
            });
            !are_of_one_instant(pair)
        });
        let torn = torn.count();
        tell(&format!("{mode}: torn: 0 of 12 group snapshots, {torn} of 20 pairs of single ones"));
        assert!(torn > 0, "{mode}: the reader would not notice a torn pair");
    }
}

#[test]
fn a_group_snapshot_of_images_that_keep_their_locks_is_refused_and_the_disks_go_on() {
    let group = Group::new("locked", "none", &["--rbd-lock", "exclusive"]);
    let writer = PairWriter::start(group.servers.each_ref().map(Server::socket));
    wait_until("the writer writes", || writer.written() > 50);
    let name = format!("{}@refused", group.name);
    let cluster = group.images[0].cluster;
    assert_eq!(cluster.try_rbd(&["group", "snap", "create", &name]).status.code(), Some(libc::EROFS));
    assert!(!cluster.rbd(&["group", "snap", "ls", &group.name]).contains("refused"), "half a snapshot was left");
    let written = writer.written();
    wait_until("the writer goes on", || writer.written() > written);
    assert!(group.servers.iter().all(is_open));
}

/// Writes pairs of blocks in different objects, one soon after the other, as an application writes what belongs together;
/// and, when it is told so, finishes its pairs and waits: what a frozen guest does.
struct Application {
    asked: Arc<AtomicU64>,
    stands: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

const RUN: u64 = 0;
const PAUSE: u64 = 1;
const END: u64 = 2;
const PAIRS: u64 = 4;

impl Application {
    fn start(server: &Server) -> Application {
        let (asked, stands) = (Arc::new(AtomicU64::new(RUN)), Arc::new(AtomicU64::new(RUN)));
        let (order, state, socket) = (asked.clone(), stands.clone(), server.socket());
        let writer = std::thread::spawn(move || {
            let mut guest = Driver::connect_soon(&socket, 1, 64, 2 * PAGE * PAIRS as usize, ALL);
            for number in 1u64.. {
                while order.load(Ordering::SeqCst) == PAUSE {
                    state.store(PAUSE, Ordering::SeqCst);
                    std::thread::sleep(Duration::from_millis(1));
                }
                state.store(RUN, Ordering::SeqCst);
                if order.load(Ordering::SeqCst) == END {
                    return;
                }
                for half in 0..2 * PAIRS {
                    if half == PAIRS {
                        // An application takes its time: this is where a snapshot can come between.
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    let at = half as usize * PAGE;
                    guest.fill(at, &number.to_le_bytes().repeat(PAGE / 8));
                    // The halves of a pair are PAIRS objects apart.
                    guest.write(0, half * MIB, at, PAGE, half);
                    guest.kick(0);
                }
                let mut left = 2 * PAIRS as usize;
                while left > 0 {
                    left -= guest.wait(0).into_iter().inspect(|done| assert_eq!(done.1, 0)).count();
                }
            }
        });
        let (order, state, control) = (asked.clone(), stands.clone(), server.control());
        let mut attendant = Qmp::connect(&control);
        attendant.execute("attend", json!({"who": "an application"}));
        let attendant = std::thread::spawn(move || {
            while order.load(Ordering::SeqCst) != END {
                // Ended by the test with a snapshot of its own.
                let id = attendant.event("PREPARE")["data"]["id"].clone();
                if order.compare_exchange(RUN, PAUSE, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
                    wait_until("the pairs are whole", || state.load(Ordering::SeqCst) == PAUSE);
                }
                attendant.execute("prepared", json!({"id": id, "level": "application"}));
                attendant.event("RELEASED");
                // Where it was told to end it stays so.
                let _ = order.compare_exchange(PAUSE, RUN, Ordering::SeqCst, Ordering::SeqCst);
            }
        });
        Application { asked, stands, threads: vec![writer, attendant] }
    }

    fn end(self, image: &Image) {
        assert_ne!(self.stands.load(Ordering::SeqCst), END);
        self.asked.store(END, Ordering::SeqCst);
        take(image, "the-last", &[]);
        for thread in self.threads {
            thread.join().expect("no panic");
        }
    }
}

/// How many pairs of a snapshot are not whole.
fn torn_pairs(image: &Image, name: &str) -> usize {
    let bytes = image.snapshot(name);
    let half = |half: u64| &bytes[(half * MIB) as usize..(half * MIB) as usize + PAGE];
    (0..PAIRS).filter(|&pair| half(pair) != half(pair + PAIRS)).count()
}

#[test]
fn no_pair_is_torn_where_an_attendant_is_asked_and_some_are_where_nobody_is() {
    let mut table = format!("torn pairs of {PAIRS} in each snapshot:\n");
    for mode in ["none", "writeback", "writethrough"] {
        let image = Cluster::shared().image_in(POOL, 2 * PAIRS * MIB, &["--object-size", "1M"]);
        let server = serve(&image, mode, &[]);
        let application = Application::start(&server);
        std::thread::sleep(Duration::from_millis(200));
        for round in 0..10 {
            let name = format!("asked-{round}");
            take(&image, &name, &[]);
            assert_eq!(torn_pairs(&image, &name), 0, "{mode}, snapshot {round}");
        }
        assert_eq!((figure(&server, "asked"), figure(&server, "refused")), (10, 0), "{mode}");
        let (mut torn, mut taken) = (0, 0);
        while taken < 10 || (torn == 0 && taken < 100) {
            let name = format!("unasked-{taken}");
            take(&image, &name, &["--skip-quiesce"]);
            torn += torn_pairs(&image, &name);
            taken += 1;
        }
        table += &format!("{mode:14} asked: 0 of 10 snapshots; --skip-quiesce: {torn} in {taken} snapshots\n");
        assert!(torn > 0, "{mode}: the reader would not notice a torn pair");
        application.end(&image);
    }
    tell(&table);
}

#[test]
fn a_snapshot_beside_an_operators_hold_changes_nothing_of_it() {
    let image = Cluster::shared().image(SIZE as u64);
    let server = serve(&image, "writeback", &[]);
    let load = Load::start(&server.socket());
    load.wait_for(100);
    let token = server.ctl_ok(&["quiesce", "--lease", "120s"]);
    let held = image.content();
    take(&image, "meanwhile", &[]);
    assert!(image.snapshot("meanwhile") == held);
    // The snapshot's end is not the operator's.
    std::thread::sleep(Duration::from_millis(300));
    assert!(!is_open(&server) && image.content() == held, "the operator's hold ended with the snapshot");
    server.ctl_ok(&["resume", token.trim()]);
    load.wait_for(100);
    load.stop();
}

#[test]
fn a_disk_without_a_guest_and_one_without_the_watch() {
    let image = Cluster::shared().image(MIB);
    let server = serve(&image, "none", &[]);
    take(&image, "idle", &[]);
    assert_eq!((figure(&server, "asked"), figure(&server, "refused")), (1, 0));
    let mut guest = Driver::connect_soon(&server.socket(), 1, 16, BLOCK, ALL);
    guest.fill(0, &[1; PAGE]);
    assert_eq!(guest.one(0, |guest, id| guest.write(0, 0, 0, PAGE, id)), 0);
    take(&image, "busy", &[]);
    assert_eq!(figure(&server, "asked"), 2);
    assert!(image.snapshot("idle")[..PAGE] == [0; PAGE] && image.snapshot("busy")[..PAGE] == [1; PAGE]);

    let image = Cluster::shared().image(MIB);
    let server = serve(&image, "none", &["--rbd-quiesce", "off"]);
    take(&image, "unasked", &[]);
    let status = server.status();
    assert_eq!(status["rbd"]["quiesce"], Value::Null, "{status}");
}

#[test]
fn a_server_that_ends_in_the_middle_lets_the_snapshot_be_refused_or_taken_and_nobody_hangs() {
    for round in 0..6u64 {
        let image = Cluster::shared().image(SIZE as u64);
        let server = serve(&image, "writeback", &[]);
        let load = Load::start(&server.socket());
        load.wait_for(50);
        let mut snapshot = image.cluster.rbd_command(&["snap", "create", "--no-progress", &image.at("race")]);
        let mut snapshot = snapshot.spawn().expect("rbd");
        // Before it asks, while it asks, after.
        std::thread::sleep(Duration::from_millis(20 * round));
        let (status, log) = server.terminate();
        assert!(status.success(), "{log}");
        let mut ended = None;
        wait_until("rbd ends", || {
            ended = snapshot.try_wait().expect("our own child");
            ended.is_some()
        });
        let acknowledged = load.stop();
        holds(&image.content(), &acknowledged, "after the end");
        if ended.is_some_and(|status| status.success()) {
            let at_snapshot = image.snapshot("race");
            assert!(
                at_snapshot.chunks(PAGE).all(|page| page.chunks(8).all(|eight| eight == &page[..8])),
                "a torn page"
            );
        }
    }
}

#[test]
fn an_image_without_the_exclusive_lock_is_held_too() {
    let cluster = Cluster::shared();
    let image = cluster.image_in(POOL, SIZE as u64, &["--image-feature", "layering"]);
    // librbd has a cache of what was acknowledged, and the snapshot is taken by another process.
    let server = serve(&image, "unsafe", &[]);
    let load = Load::start(&server.socket());
    load.wait_for(300);
    for round in 0..5u64 {
        let name = format!("snap-{round}");
        let before = load.acknowledged();
        take(&image, &name, &[]);
        holds(&image.snapshot(&name), &before, &name);
        assert_eq!(figure(&server, "asked"), round + 1);
        load.wait_for(100);
    }
    load.stop();
}
