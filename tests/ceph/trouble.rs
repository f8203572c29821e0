//! What goes wrong with a Ceph cluster, and who may have an image: each with the real thing. Whoever stops, fills or
//! fences something has a cluster of its own.

use std::fs;
use std::net::TcpListener;
use std::process::Output;
use std::time::Duration;

use kit::ceph;
use kit::ceph::{Cluster, POOL, refused, serve};
use kit::driver::load::{Load, SIZE, holds};
use kit::driver::{ALL, Driver};
use kit::guest;
use kit::guest::{Qmp, Server, wait_until};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const PAGE: usize = 4096;

fn connect(server: &Server) -> Driver {
    Driver::connect_soon(&server.socket(), 1, 64, 1 << 20, ALL)
}

fn write(guest: &mut Driver, offset: u64, byte: u8) -> i32 {
    guest.fill(0, &[byte; PAGE]);
    guest.one(0, |guest, id| guest.write(0, offset, 0, PAGE, id))
}

fn read(guest: &mut Driver, offset: u64) -> i32 {
    guest.one(0, |guest, id| guest.read(0, offset, 1 << 19, PAGE, id))
}

fn flush(guest: &mut Driver) -> i32 {
    guest.one(0, |guest, id| guest.flush(0, id))
}

/// Starts a write and does not wait for it.
fn begin_write(guest: &mut Driver, offset: u64, byte: u8) {
    guest.fill(0, &[byte; PAGE]);
    guest.write(0, offset, 0, PAGE, 7);
    guest.kick(0);
}

fn says(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no '{part}' in: {text}");
    }
}

#[test]
fn a_missing_pool_or_image_is_named() {
    let cluster = Cluster::shared();
    let image = cluster.image(MIB);
    contains(&refused(cluster, "nopool/disk", "none", &[]), &["nopool", "no such pool"]);
    contains(&refused(cluster, &format!("{POOL}/nodisk"), "none", &[]), &["nodisk", "rbd ls"]);
    contains(&refused(cluster, &format!("{POOL}/nospace/nodisk"), "none", &[]), &["nospace"]);
    contains(&refused(cluster, &image.at("nosnap"), "none", &[]), &["nosnap"]);
    contains(
        &refused(cluster, &image.spec, "none", &["--ceph-library-path", "/nowhere"]),
        &["librados.so.2", "/nowhere"],
    );
    let dir = tempfile::tempdir().expect("a directory");
    let conf = dir.path().join("missing.conf");
    let conf = conf.to_str().expect("a plain path");
    // The last one given counts.
    let said = guest::output(std::process::Command::new(guest::server::program("virtioblkd")).args([
        "--rbd",
        &image.spec,
        "--ceph-conf",
        conf,
        "--socket-path",
        dir.path().join("s").to_str().expect("a plain path"),
    ]));
    assert!(!said.status.success());
    contains(&says(&said), &["missing.conf", "--ceph-conf"]);
}

#[test]
fn the_cluster_is_found_where_cephs_own_commands_find_it() {
    let cluster = Cluster::shared();
    let image = cluster.image(MIB);
    let server = Server::start_as(|socket, control| {
        let mut command = guest::mortal(guest::server::program("virtioblkd"));
        command.args(["--rbd", &image.spec]).env("CEPH_CONF", cluster.conf());
        command.arg("--socket-path").arg(socket).arg("--control-path").arg(control);
        command
    });
    let mut guest = connect(&server);
    assert_eq!((write(&mut guest, 0, 1), flush(&mut guest)), (0, 0));
    assert!(image.content()[..PAGE] == [1; PAGE]);
}

#[test]
fn a_monitor_that_is_dead_is_given_up() {
    let cluster = Cluster::shared();
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a port").port();
    let mon_host = format!("mon_host=[v2:127.0.0.1:{port}/0]");
    let options = ["--rbd-option", mon_host.as_str(), "--rbd-option", "client_mount_timeout=2"];
    contains(&refused(cluster, "vms/disk", "none", &options), &["no monitor answers", "mon host", "--ceph-conf"]);
}

#[test]
fn a_client_without_permission_is_told_which_is_missing() {
    let cluster = Cluster::start(&["--cephx"]);
    let image = cluster.image(4 * MIB);
    let keyring = |user: &str, osd: &str, mon: &str| {
        let path = cluster.dir().join(user);
        let name = format!("client.{user}");
        fs::write(&path, cluster.ceph(&["auth", "get-or-create", &name, "mon", mon, "osd", osd])).expect("a keyring");
        format!("keyring={}", path.display())
    };
    let poor = keyring("poor", "allow r pool=other", "allow r");
    let said = refused(&cluster, &image.spec, "none", &["--ceph-user", "poor", "--rbd-option", &poor]);
    contains(&said, &[&image.spec, "client.poor", "profile rbd"]);
    // Nobody's key, and somebody else's.
    let said = refused(&cluster, &image.spec, "none", &["--ceph-user", "nobody"]);
    contains(&said, &["client.nobody", "keyring"]);
    let said = refused(&cluster, &image.spec, "none", &["--ceph-user", "nobody", "--rbd-option", &poor]);
    contains(&said, &["client.nobody", "keyring"]);
    // What the documentation asks for is enough.
    let guests = keyring("guests", &format!("profile rbd pool={POOL}"), "profile rbd");
    let server = serve(&image, "writeback", &["--ceph-user", "guests", "--rbd-option", &guests]);
    let mut guest = connect(&server);
    assert_eq!((write(&mut guest, 0, 1), flush(&mut guest), read(&mut guest, 0)), (0, 0, 0));
    assert!(image.content()[..PAGE] == [1; PAGE]);
}

#[test]
fn a_full_pool_makes_writes_wait_and_a_quiesce_fail_cleanly() {
    let cluster = Cluster::start(&[]);
    for mode in ["none", "writeback"] {
        let image = cluster.image(8 * MIB);
        let server = serve(&image, mode, &[]);
        let mut guest = connect(&server);
        let mut client = Qmp::connect(&server.control());
        assert_eq!((write(&mut guest, 0, 1), flush(&mut guest)), (0, 0));
        cluster.full(true);
        begin_write(&mut guest, 4 * MIB, 2);
        // In writeback the write is acknowledged by the cache, and the flush is what waits.
        guest.flush(0, 8);
        guest.kick(0);
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!guest.completed(0).iter().any(|done| done.0 == 8), "{mode}: a flush went through a full cluster");
        let status = server.status();
        assert!(status["total"]["in-flight"].as_u64().expect("a number") > 0, "{mode}: {status}");
        let reader = serve(&image, "none", &["--read-only"]);
        assert_eq!(read(&mut connect(&reader), 0), 0, "{mode}: others read on");

        let refused = server.ctl(&["quiesce", "--timeout", "2s"]);
        assert!(!refused.status.success(), "{mode}: held still with a write in flight");
        let status = server.status();
        assert_eq!(status["quiesce"]["state"], "open", "{mode}: {status}");
        // Ten seconds make it worth an event.
        client.event("IO_STALLED");
        assert!(server.total("stalled") > 0, "{mode}");

        cluster.full(false);
        let mut answered = Vec::new();
        wait_until("what waited is answered", || {
            answered.extend(guest.completed(0));
            answered.iter().any(|done| done.0 == 8)
        });
        assert!(answered.iter().all(|done| done.1 == 0), "{mode}: {answered:?}");
        client.event("IO_RESUMED");
        assert_eq!((write(&mut guest, PAGE as u64, 3), flush(&mut guest)), (0, 0), "{mode}: it goes on");
        let held = server.ctl_ok(&["quiesce"]);
        server.ctl_ok(&["resume", held.trim()]);
        let content = image.content();
        let at = 4 << 20;
        assert!(content[at..at + PAGE] == [2; PAGE] && content[PAGE..2 * PAGE] == [3; PAGE], "{mode}");
    }
}

#[test]
fn an_osd_that_goes_and_comes_back_loses_nothing() {
    let cluster = Cluster::start(&[]);
    for mode in ["none", "writethrough"] {
        let image = cluster.image(SIZE as u64);
        let server = serve(&image, mode, &[]);
        let load = Load::start(&server.socket());
        load.wait_for(300);
        cluster.osd_down();
        let before = load.acknowledged();
        std::thread::sleep(Duration::from_secs(1));
        let waiting = load.acknowledged();
        std::thread::sleep(Duration::from_secs(1));
        assert_eq!(load.acknowledged(), waiting, "{mode}: acknowledged without an OSD");
        cluster.osd_up();
        load.wait_for(300);
        let acknowledged = load.stop();
        assert!(acknowledged.iter().max() > before.iter().max());
        let (status, log) = server.terminate();
        assert!(status.success(), "{mode}: {log}");
        holds(&image.content(), &acknowledged, mode);
    }
}

fn trouble(server: &Server) -> Value {
    server.status()["trouble"].clone()
}

#[test]
fn a_fenced_server_says_so_fails_every_request_and_ends_when_told() {
    let cluster = Cluster::start(&[]);
    let image = cluster.image(4 * MIB);
    let server = serve(&image, "writeback", &[]);
    let mut guest = connect(&server);
    assert_eq!((write(&mut guest, 0, 1), flush(&mut guest)), (0, 0));
    assert_eq!(trouble(&server), Value::Null);
    let mut client = Qmp::connect(&server.control());
    cluster.fence(&image);
    wait_until("the guest sees errors", || write(&mut guest, 0, 2) != 0 || flush(&mut guest) != 0);
    assert_eq!(client.event("IMAGE_STATE")["data"]["trouble"], "fenced");
    assert_eq!(trouble(&server), "fenced");
    assert_eq!(write(&mut guest, 0, 2), -libc::EIO);
    assert_eq!(read(&mut guest, 0), -libc::EIO);
    assert_eq!(flush(&mut guest), -libc::EIO);
    assert!(server.ctl_ok(&["status"]).contains("fenced"), "for people, too");
    assert!(!server.ctl(&["quiesce", "--timeout", "5s"]).status.success(), "nothing can be promised");
    // Not even when the cluster would have it back.
    cluster.forgive();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(write(&mut guest, 0, 2), -libc::EIO);
    drop(guest);
    let (_, log) = server.terminate();
    contains(&log, &["fenced"]);
    assert!(image.content()[..PAGE] == [1; PAGE]);
    // Whoever starts it again has a disk again.
    let server = serve(&image, "writeback", &[]);
    let mut guest = connect(&server);
    assert_eq!((write(&mut guest, 0, 3), flush(&mut guest)), (0, 0));
}

#[test]
fn exclusive_without_the_feature_is_refused() {
    let cluster = Cluster::shared();
    let image = cluster.image_in(POOL, MIB, &["--image-feature", "layering"]);
    contains(
        &refused(cluster, &image.spec, "none", &["--rbd-lock", "exclusive"]),
        &["exclusive-lock", "rbd feature enable"],
    );
    let server = serve(&image, "none", &["--rbd-lock", "auto"]);
    server.wait_for_log(&["exclusive-lock"]);
    let mut guest = connect(&server);
    assert_eq!((write(&mut guest, 0, 1), flush(&mut guest)), (0, 0));
}

/// What the status says of the lock.
fn lock(server: &Server) -> Value {
    server.status()["rbd"]["lock"].clone()
}

/// Disables the feature exclusive-lock, and those that need it.
fn disable_lock(image: &ceph::Image) {
    image.cluster.rbd(&["feature", "disable", &image.spec, "fast-diff", "object-map", "exclusive-lock"]);
}

fn enable_lock(image: &ceph::Image) {
    image.cluster.rbd(&["feature", "enable", &image.spec, "exclusive-lock"]);
}

#[test]
fn a_disabled_exclusive_lock_stops_writes_until_it_is_enabled_again() {
    let cluster = Cluster::shared();
    let image = cluster.image(4 * MIB);
    let server = serve(&image, "none", &["--rbd-lock", "exclusive"]);
    let mut guest = connect(&server);
    assert_eq!((write(&mut guest, 0, 1), flush(&mut guest)), (0, 0));
    let mut client = Qmp::connect(&server.control());
    disable_lock(&image);
    assert_eq!(client.event("IMAGE_STATE")["data"]["rbd"]["lock"], "none");
    wait_until("trouble", || trouble(&server) == "lock-lost");
    assert_eq!((write(&mut guest, 0, 2), read(&mut guest, 0), flush(&mut guest)), (-libc::EIO, 0, 0));
    assert!(image.content()[..PAGE] == [1; PAGE], "a write reached an image that any host may write");
    enable_lock(&image);
    wait_until("the lock is taken again", || lock(&server) == "held" && trouble(&server) == Value::Null);
    assert_eq!((write(&mut guest, 0, 3), flush(&mut guest)), (0, 0));
    assert!(image.content()[..PAGE] == [3; PAGE]);
    let stranger =
        cluster.try_rbd(&["bench", "--io-type", "write", "--io-total", "4K", "--io-size", "4K", &image.spec]);
    assert!(!stranger.status.success(), "another client wrote to a locked image");
}

#[test]
fn a_disabled_exclusive_lock_is_warned_of_by_auto_and_taken_when_enabled_again() {
    let cluster = Cluster::shared();
    let image = cluster.image(4 * MIB);
    let server = serve(&image, "writeback", &[]);
    let mut guest = connect(&server);
    assert_eq!((write(&mut guest, 0, 1), flush(&mut guest), lock(&server)), (0, 0, "held".into()));
    disable_lock(&image);
    wait_until("the status says so", || lock(&server) == "none");
    server.wait_for_log(&["its feature exclusive-lock was disabled", "rbd feature enable"]);
    assert_eq!((write(&mut guest, 0, 2), flush(&mut guest), trouble(&server)), (0, 0, Value::Null));
    enable_lock(&image);
    wait_until("the lock is taken again", || lock(&server) == "held" && trouble(&server) == Value::Null);
    assert_eq!((write(&mut guest, 0, 3), flush(&mut guest)), (0, 0));
    assert!(image.content()[..PAGE] == [3; PAGE]);
}

/// librbd keeps what it read in these modes; in writeback only if it is told to.
#[test]
fn what_another_host_wrote_without_the_lock_is_read_once_the_lock_is_taken_again() {
    let cluster = Cluster::shared();
    let keep_reads = ["--rbd-option", "rbd_cache_policy=writeback"];
    for (mode, more) in [("writeback", &keep_reads[..]), ("writethrough", &[]), ("unsafe", &[])] {
        let image = cluster.image(4 * MIB);
        let server = serve(&image, mode, more);
        let mut guest = connect(&server);
        assert_eq!((write(&mut guest, 0, 1), flush(&mut guest), lock(&server)), (0, 0, "held".into()));
        let mut first_byte = || {
            assert_eq!(read(&mut guest, 0), 0);
            let page = guest.fetch(1 << 19, PAGE);
            assert!(page.iter().all(|byte| *byte == page[0]), "{mode}: a torn page");
            page[0]
        };
        disable_lock(&image);
        wait_until("the lock is gone", || lock(&server) == "none");
        assert_eq!(first_byte(), 1);
        let program = "image = rbd.Image(io, sys.argv[1])\nimage.write(b'\\2' * 4096, 0)\nimage.close()";
        cluster.python(program, &[image.name()]);
        assert_eq!(first_byte(), 1, "{mode}: librbd keeps nothing, so this test shows nothing");
        enable_lock(&image);
        wait_until("the lock is taken again", || lock(&server) == "held");
        wait_until("the other host's write is read", || first_byte() == 2);
    }
}

#[test]
fn one_server_hands_an_image_to_the_next_as_a_migration_does() {
    let cluster = Cluster::shared();
    for mode in ["none", "writeback", "writethrough", "unsafe"] {
        let image = cluster.image(4 * MIB);
        let source = serve(&image, mode, &["--rbd-lock", "exclusive"]);
        let target = serve(&image, mode, &["--rbd-lock", "exclusive"]);
        assert_eq!(lock(&target), "released");
        let mut on_source = connect(&source);
        assert_eq!((write(&mut on_source, 0, 1), flush(&mut on_source)), (0, 0));
        assert_eq!(lock(&source), "held", "{mode}");
        assert!(source.ctl_ok(&["status"]).contains("exclusive lock: held"), "{mode}");
        // While the source's rings run, nobody else writes.
        let stranger =
            cluster.try_rbd(&["bench", "--io-type", "write", "--io-total", "4K", "--io-size", "4K", &image.spec]);
        assert!(!stranger.status.success(), "{mode}: another client wrote to a locked image");
        for round in 2..6u8 {
            let (from, to) = if round % 2 == 0 { (&source, &target) } else { (&target, &source) };
            // Acknowledged and, perhaps, only in the cache: it must be there for the next.
            assert_eq!(write(&mut on_source, 8192, round), 0);
            drop(on_source);
            wait_until("the lock is let go", || lock(from) == "released");
            let mut next = connect(to);
            assert_eq!(read(&mut next, 8192), 0, "{mode}");
            assert_eq!(
                next.fetch(1 << 19, PAGE),
                [round; PAGE],
                "{mode}: a write was left behind, or read from a stale cache"
            );
            assert_eq!(lock(to), "held", "{mode}");
            on_source = next;
        }
    }
}

#[test]
fn a_killed_servers_successor_takes_over_and_keeps_what_was_acknowledged() {
    let cluster = Cluster::shared();
    let dir = tempfile::tempdir().expect("a directory");
    let state = dir.path().join("state");
    let with_file = ["--rbd-lock", "exclusive", "--rbd-state-file", state.to_str().expect("a plain path")];
    for options in [&with_file[..], &["--rbd-lock", "exclusive"]] {
        let image = cluster.image(SIZE as u64);
        let server = serve(&image, "none", options);
        let load = Load::start(&server.socket());
        load.wait_for(300);
        drop(server);
        std::thread::sleep(Duration::from_millis(20));
        holds(&image.content(), &load.stop(), "after the kill");
        let next = serve(&image, "none", options);
        // A dead client keeps its lock for half a minute, unless it is known to be dead.
        let load = Load::start(&next.socket());
        load.wait_for(300);
        let acknowledged = load.stop();
        let (status, log) = next.terminate();
        assert!(status.success(), "{log}");
        assert_eq!(log.contains("took the lock"), options.len() > 2, "{log}");
        holds(&image.content(), &acknowledged, "the successor's");
    }
}
