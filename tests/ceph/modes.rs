//! What each cache mode promises on a real Ceph cluster: shown by librbd's own counters, and by killing the server after
//! writes were acknowledged. And the kinds of images there are: read-only, snapshots, encrypted, resized; options that
//! would break a promise are refused.

use std::fs;
use std::time::Duration;

use kit::ceph::{Cluster, Image, NAMESPACE, POOL, refused, serve, serve_spec};
use kit::driver::load::{Load, PAGE, PAGES, SIZE, holds};
use kit::driver::{ALL, Driver};
use kit::guest::{Server, tell};

const MIB: u64 = 1 << 20;
const MODES: [&str; 5] = ["none", "directsync", "writeback", "writethrough", "unsafe"];

fn connect(server: &Server) -> Driver {
    Driver::connect_soon(&server.socket(), 1, 64, 1 << 20, ALL)
}

fn write(guest: &mut Driver, offset: u64, byte: u8, len: usize) -> i32 {
    guest.fill(0, &vec![byte; len]);
    guest.one(0, |guest, id| guest.write(0, offset, 0, len, id))
}

fn flush(guest: &mut Driver) -> i32 {
    guest.one(0, |guest, id| guest.flush(0, id))
}

/// Reads and returns, or the error.
fn read(guest: &mut Driver, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
    match guest.one(0, |guest, id| guest.read(0, offset, 1 << 19, len, id)) {
        0 => Ok(guest.fetch(1 << 19, len)),
        error => Err(error),
    }
}

#[test]
fn librbd_sees_exactly_the_flushes_that_each_mode_promises() {
    const WRITES: u64 = 100;
    let mut table = format!("{WRITES} writes and 1 flush of a guest, as librbd counts them:\n");
    table += &format!("{:14}{:>8}{:>9}{:>12}\n", "mode", "writes", "flushes", "OSD writes");
    for mode in MODES {
        let image = Cluster::shared().image(4 * MIB);
        let server = serve(&image, mode, &[]);
        let mut guest = connect(&server);
        // The first write takes the lock and makes the object.
        assert_eq!((write(&mut guest, 0, 1, PAGE), flush(&mut guest)), (0, 0));
        let cluster = image.cluster;
        let figures = || {
            let counter = |name| cluster.image_counter(server.pid(), name);
            (counter("wr"), counter("flush"), cluster.osd_writes(server.pid()))
        };
        let before = figures();
        for turn in 0..WRITES {
            assert_eq!(write(&mut guest, turn * PAGE as u64, 2, PAGE), 0);
        }
        let after_writes = figures();
        assert_eq!(flush(&mut guest), 0);
        let after = figures();
        let [writes, flushes, osd] = [after.0 - before.0, after.1 - before.1, after.2 - before.2];
        table += &format!("{mode:14}{writes:>8}{flushes:>9}{osd:>12}\n");
        assert_eq!(writes, WRITES, "{mode}\n{table}");
        match mode {
            "none" | "writeback" => assert_eq!(flushes, 1, "{mode}\n{table}"),
            "directsync" | "writethrough" => {
                assert_eq!(after_writes.1 - before.1, WRITES, "{mode}: before each acknowledgement\n{table}");
            }
            _ => assert_eq!(flushes, 0, "{mode}\n{table}"),
        }
        if mode != "unsafe" {
            let content = image.content();
            assert!(content[..WRITES as usize * PAGE].iter().all(|&byte| byte == 2), "{mode}: not in the cluster");
        }
        if !matches!(mode, "writeback" | "unsafe") {
            assert!(after_writes.2 - before.2 >= WRITES, "{mode}: acknowledged before the OSD had it\n{table}");
        }
        drop(guest);
    }
    tell(&table);
}

/// Pages of 4 KiB, one acknowledged write each, then SIGKILL. How many are lost.
fn lost_after_sigkill(mode: &str, flush_first: bool) -> usize {
    let image = Cluster::shared().image(SIZE as u64);
    let server = serve(&image, mode, &[]);
    let mut guest = Driver::connect_soon(&server.socket(), 1, 64, 1 << 20, ALL);
    if flush_first {
        // From its first flush on a guest is trusted to flush, and writeback acknowledges early.
        assert_eq!((write(&mut guest, 0, 1, PAGE), flush(&mut guest)), (0, 0));
    }
    for page in 0..PAGES as u64 {
        assert_eq!(write(&mut guest, page * PAGE as u64, 7, PAGE), 0, "{mode}");
    }
    // Dropped means killed.
    drop(server);
    image.content().chunks(PAGE).filter(|page| page.iter().any(|&byte| byte != 7)).count()
}

#[test]
fn a_kill_after_acknowledged_writes_loses_nothing_that_was_promised() {
    let mut table = format!("SIGKILL after {PAGES} acknowledged writes of 4 KiB, lost:\n");
    for mode in MODES {
        // What is on its way at the kill still arrives, and a timer writes the cache out after a second or so: of
        // `writeback` the last few are lost, or none, and the dice have to be thrown again.
        let promised = matches!(mode, "none" | "directsync" | "writethrough");
        let mut lost = 0;
        for _ in 0..30 {
            lost = lost_after_sigkill(mode, mode != "unsafe");
            if promised || lost > 0 {
                break;
            }
        }
        table += &format!("{mode:14}{lost:>6}\n");
        assert_eq!(lost > 0, !promised, "{mode}\n{table}");
    }
    // A guest that never flushes is not trusted to: librbd writes through.
    assert_eq!(lost_after_sigkill("writeback", false), 0, "writeback, before the guest's first flush");
    tell(&table);
}

#[test]
fn a_kill_under_load_keeps_what_was_acknowledged() {
    for mode in ["none", "directsync", "writethrough"] {
        let image = Cluster::shared().image(SIZE as u64);
        let server = serve(&image, mode, &[]);
        let load = Load::start(&server.socket());
        load.wait_for(400);
        drop(server);
        std::thread::sleep(Duration::from_millis(20));
        let acknowledged = load.stop();
        holds(&image.content(), &acknowledged, mode);
    }
}

#[test]
fn an_orderly_end_keeps_everything_in_every_mode() {
    for mode in MODES {
        let image = Cluster::shared().image(4 * MIB);
        let server = serve(&image, mode, &[]);
        let mut guest = connect(&server);
        for page in 0..64 {
            assert_eq!(write(&mut guest, page * PAGE as u64, 9, PAGE), 0);
        }
        let (status, log) = server.terminate();
        assert!(status.success(), "{mode}: {status}\n{log}");
        assert!(image.content()[..64 * PAGE].iter().all(|&byte| byte == 9), "{mode}");
    }
}

#[test]
fn options_that_break_the_mode_are_refused_unless_allowed() {
    let cluster = Cluster::shared();
    let image = cluster.image(MIB);
    image.configure("rbd_cache", "true");
    for mode in ["none", "directsync"] {
        let said = refused(cluster, &image.spec, mode, &[]);
        for part in [image.spec.as_str(), "rbd_cache", "image"] {
            assert!(said.contains(part), "{mode}: no '{part}' in: {said}");
        }
        let server = serve(&image, mode, &["--rbd-allow-override"]);
        server.wait_for_log(&["rbd_cache"]);
    }
    drop(serve(&image, "writeback", &[]));

    // Writethrough and unsafe need more than the cache.
    let image = cluster.image(MIB);
    image.configure("rbd_cache_policy", "writearound");
    for mode in ["writethrough", "unsafe"] {
        let said = refused(cluster, &image.spec, mode, &[]);
        assert!(said.contains("rbd_cache_policy"), "{mode}: {said}");
    }
    // A pool's own options.
    cluster.ceph(&["osd", "pool", "create", "cached"]);
    cluster.rbd(&["pool", "init", "cached"]);
    cluster.rbd(&["config", "pool", "set", "cached", "rbd_cache", "true"]);
    let image = cluster.image_in("cached", MIB, &[]);
    let said = refused(cluster, &image.spec, "none", &[]);
    assert!(said.contains("pool") && said.contains("rbd_cache"), "{said}");
    // And what would hang a guest is refused in any case.
    let image = cluster.image(MIB);
    image.configure("rbd_disable_zero_copy_writes", "false");
    let said = refused(cluster, &image.spec, "none", &["--rbd-allow-override"]);
    assert!(said.contains("rbd_disable_zero_copy_writes"), "{said}");
}

#[test]
fn options_from_the_command_line_reach_librbd() {
    let image = Cluster::shared().image(MIB);
    let server = serve(&image, "writethrough", &["--rbd-option", "rbd_cache_size=1048576"]);
    let seen = image.cluster.ask_client(server.pid(), "config show");
    assert_eq!(seen["rbd_cache_size"], "1048576");
    assert_eq!(seen["rbd_cache"], "true");
    assert_eq!(seen["rbd_disable_zero_copy_writes"], "true");
    drop(server);
    let said = refused(image.cluster, &image.spec, "none", &["--rbd-option", "no_such_option=1"]);
    assert!(said.contains("no_such_option"), "{said}");
}

#[test]
fn discards_and_zeroes_in_every_mode() {
    for mode in MODES {
        let image = Cluster::shared().image(8 * MIB);
        let server = serve(&image, mode, &[]);
        let mut guest = connect(&server);
        for at in 0..16 {
            assert_eq!(write(&mut guest, at << 19, 5, 1 << 19), 0);
        }
        // An object of 4 MiB is gone afterwards, as `rbd du` or an export of what exists shows.
        assert_eq!(guest.one(0, |guest, id| guest.discard(0, 4 * MIB, 4 * MIB, id)), 0, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write_zeroes(0, 512, 1024, false, id)), 0, "{mode}");
        assert_eq!(guest.one(0, |guest, id| guest.write_zeroes(0, MIB, MIB, true, id)), 0, "{mode}");
        assert_eq!(flush(&mut guest), 0);
        let mut expected = vec![5; 8 << 20];
        expected[512..1536].fill(0);
        expected[1 << 20..2 << 20].fill(0);
        assert!(read(&mut guest, 0, 4096) == Ok(expected[..4096].to_vec()), "{mode}");
        let (status, log) = server.terminate();
        assert!(status.success(), "{mode}: {log}");
        let content = image.content();
        assert!(content[..4 << 20] == expected[..4 << 20], "{mode}");
        assert!(content[4 << 20..].iter().all(|&byte| byte == 0), "{mode}: whole objects were discarded");
    }
}

#[test]
fn read_only_and_snapshots_are_read_and_nothing_else() {
    let cluster = Cluster::shared();
    let image = cluster.image_in(&format!("{POOL}/{NAMESPACE}"), MIB, &[]);
    let server = serve(&image, "none", &[]);
    let mut guest = connect(&server);
    assert_eq!((write(&mut guest, 0, 1, PAGE), flush(&mut guest)), (0, 0));
    let taken = image.take_snapshot("monday", &["--skip-quiesce"]);
    assert!(taken.status.success(), "{}", String::from_utf8_lossy(&taken.stderr));
    assert_eq!((write(&mut guest, 0, 2, PAGE), flush(&mut guest)), (0, 0));

    for (spec, options, holds) in [(image.at("monday"), &[][..], 1), (image.spec.clone(), &["--read-only"][..], 2)] {
        for mode in MODES {
            // Beside the writer: readers take no lock.
            let reader = serve_spec(cluster, &spec, mode, options);
            let mut guest = connect(&reader);
            assert_eq!(read(&mut guest, 0, PAGE), Ok(vec![holds; PAGE]), "{spec}, {mode}");
            assert_eq!(write(&mut guest, 0, 9, PAGE), -libc::EIO, "{spec}, {mode}");
            assert_eq!(guest.one(0, |guest, id| guest.discard(0, 0, MIB, id)), -libc::ENOTSUP, "{spec}, {mode}");
            assert_eq!(flush(&mut guest), 0, "{spec}, {mode}");
        }
    }
    assert_eq!(write(&mut guest, 0, 3, PAGE), 0, "the writer is not disturbed");
    let said = refused(cluster, &image.at("tuesday"), "none", &[]);
    assert!(said.contains("tuesday"), "{said}");
}

#[test]
fn an_encrypted_image_is_clear_to_the_guest_alone() {
    let cluster = Cluster::shared();
    let dir = tempfile::tempdir().expect("a directory");
    let passphrase = dir.path().join("passphrase");
    fs::write(&passphrase, "open sesame\n").expect("a passphrase");
    // What rbd reads is the whole file.
    let for_rbd = dir.path().join("for-rbd");
    fs::write(&for_rbd, "open sesame").expect("a passphrase");
    let wrong = dir.path().join("wrong");
    fs::write(&wrong, "open barley\n").expect("a passphrase");
    for format in ["luks1", "luks2"] {
        let image = cluster.image(32 * MIB);
        let for_rbd = for_rbd.to_str().expect("a plain path");
        cluster.rbd(&["encryption", "format", &image.spec, format, for_rbd]);
        let options = |file: &std::path::Path| {
            ["--rbd-encryption".into(), format.to_string(), "--rbd-passphrase-file".into(), file.display().to_string()]
        };
        let given = options(&passphrase);
        let given = given.each_ref().map(String::as_str);
        for round in 1..=2u8 {
            let server = serve(&image, "none", &given);
            let size = server.status()["size"].as_u64().expect("a size");
            assert!(size < 32 * MIB && size > 8 * MIB, "{format}: {size} bytes without the header");
            let mut guest = connect(&server);
            if round == 2 {
                assert_eq!(read(&mut guest, size - 4096, 4096), Ok(vec![0x5a; 4096]), "{format}");
            } else {
                assert_eq!((write(&mut guest, size - 4096, 0x5a, 4096), flush(&mut guest)), (0, 0));
            }
            assert_eq!(
                guest.one(0, |guest, id| guest.read(0, size, 0, 4096, id)),
                -libc::EIO,
                "{format}: past the end"
            );
        }
        let stored = image.content();
        assert!(!stored.windows(64).any(|bytes| bytes == [0x5a; 64]), "{format}: it is stored in clear");
        let given = options(&wrong);
        let said = refused(cluster, &image.spec, "none", &given.each_ref().map(String::as_str));
        assert!(said.contains("passphrase"), "{format}: {said}");
    }
    let plain = cluster.image(32 * MIB);
    let given = ["--rbd-encryption", "luks2", "--rbd-passphrase-file", passphrase.to_str().expect("a plain path")];
    let said = refused(cluster, &plain.spec, "none", &given);
    assert!(said.contains("not encrypted"), "{said}");
}

#[test]
fn several_disks_of_one_guest() {
    let cluster = Cluster::shared();
    let images: Vec<Image> = (0..4).map(|_| cluster.image(MIB)).collect();
    let servers: Vec<Server> = images.iter().zip(MODES).map(|(image, mode)| serve(image, mode, &[])).collect();
    let mut guests: Vec<Driver> = servers.iter().map(connect).collect();
    for round in 0..16 {
        for (number, guest) in guests.iter_mut().enumerate() {
            assert_eq!(write(guest, round * PAGE as u64, number as u8 + 1, PAGE), 0);
        }
    }
    for (number, (guest, image)) in guests.iter_mut().zip(&images).enumerate() {
        assert_eq!(flush(guest), 0);
        assert!(image.content()[..16 * PAGE].iter().all(|&byte| byte == number as u8 + 1));
    }
}
