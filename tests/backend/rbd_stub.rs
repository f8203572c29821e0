//! The RBD back-end over a librbd that does on request what a cluster cannot be made to do: errors of every kind at every
//! call, ops that hang, short reads, questions at any moment. What a real cluster does is in the other rbd tests.

use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use kit::backend::{Driver, WAIT_TIMEOUT, random_ops};
use kit::rbd_stub::{Stub, libraries};
use virtioblkd::backend::rbd::{Encryption, RbdBackend};
use virtioblkd::backend::{Backend, Errno, IoBuf, Notices, Op, OpId, QuiesceRequest};
use virtioblkd::engine::CacheMode;

pub(super) const EIO: Errno = Errno(libc::EIO);
pub(super) const EROFS: Errno = Errno(libc::EROFS);
pub(super) const ESHUTDOWN: Errno = Errno(libc::ESHUTDOWN);

/// What a back-end said.
#[derive(Debug, PartialEq)]
pub(super) enum Said {
    Resized(u64),
    Quiesce,
    Unquiesce,
    StateChanged,
}

/// Keeps what is said, and the questions until somebody answers.
pub(super) struct Listener {
    pub(super) said: Mutex<mpsc::Sender<Said>>,
    pub(super) asks: Mutex<Vec<QuiesceRequest>>,
}

impl Listener {
    pub(super) fn start(disk: &RbdBackend) -> (Arc<Listener>, mpsc::Receiver<Said>) {
        let (sender, said) = mpsc::channel();
        let listener = Arc::new(Listener { said: Mutex::new(sender), asks: Mutex::default() });
        disk.store().start_notices(listener.clone());
        (listener, said)
    }

    pub(super) fn say(&self, what: Said) {
        self.said.lock().unwrap().send(what).unwrap();
    }

    pub(super) fn ask(&self) -> QuiesceRequest {
        self.asks.lock().unwrap().pop().expect("somebody asked")
    }
}

impl Notices for Listener {
    fn resized(&self, size: u64) {
        self.say(Said::Resized(size));
    }

    fn quiesce(&self, ask: QuiesceRequest) {
        self.asks.lock().unwrap().push(ask);
        self.say(Said::Quiesce);
    }

    fn unquiesce(&self) {
        self.say(Said::Unquiesce);
    }

    fn state_changed(&self) {
        self.say(Said::StateChanged);
    }
}

pub(super) fn hears(said: &mpsc::Receiver<Said>, what: Said) {
    assert_eq!(said.recv_timeout(WAIT_TIMEOUT).expect("something is said"), what);
}

pub(super) fn hears_nothing_more(said: &mpsc::Receiver<Said>) {
    assert_eq!(said.recv_timeout(Duration::from_millis(50)).ok(), None);
}

pub(super) fn trouble(disk: &RbdBackend) -> Option<String> {
    let status = disk.info().image_status();
    assert_eq!(status.trouble.is_some(), status.trouble_detail.is_some());
    status.trouble
}

pub(super) fn write_op(offset: u64) -> Op {
    Op::Write { offset, buf: IoBuf::owned(4096, 4096, 0), durable: false }
}

// ---- I/O

#[test]
fn several_images_at_a_time_keep_to_themselves() {
    let stubs = [Stub::new(CacheMode::None), Stub::new(CacheMode::Writeback)];
    let disks = stubs.each_ref().map(Stub::open);
    thread::scope(|scope| {
        for (disk, seed) in disks.iter().zip(1..) {
            scope.spawn(move || random_ops(disk, seed, 300));
        }
    });
    assert_eq!(disks[0].geometry().size, 8 << 20);
    assert!(disks[0].describe().contains("with no cache") && disks[1].describe().contains("with its cache"));
}

#[test]
fn a_short_read_is_an_error() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let mut driver = Driver::new(&disk, 4);
    stub.tell("short 512");
    assert_eq!(driver.read(0, 4096), Err(EIO));
    assert_eq!(driver.read(0, 4096), Ok(vec![0; 4096]));
}

#[test]
fn an_error_is_of_its_op_alone_and_keeps_its_number() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let mut driver = Driver::new(&disk, 4);
    for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::ETIMEDOUT, libc::EINVAL] {
        for (what, op) in [
            ("write", write_op(0)),
            ("read", Op::Read { offset: 0, buf: IoBuf::owned(512, 512, 0) }),
            ("flush", Op::Sync),
            ("discard", Op::Discard { offset: 0, len: 65536 }),
            ("zeroes", Op::WriteZeroes { offset: 0, len: 512, unmap: true }),
            ("submit", write_op(4096)),
        ] {
            stub.tell(&format!("fail {what} {errno} 1"));
            let id = driver.push(op);
            let completion = driver.finish(id);
            assert_eq!(completion.result, Err(Errno(errno)), "{what}");
            assert_eq!(completion.buf.is_some(), matches!(what, "write" | "read" | "submit"), "{what}");
            assert_eq!(driver.write(0, &[1; 512]), Ok(()), "{what}");
            assert_eq!(trouble(&disk), None);
        }
    }
}

#[test]
fn an_op_outside_the_image_never_reaches_librbd() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let mut driver = Driver::new(&disk, 4);
    let end = disk.geometry().size;
    for offset in [end - 512, end, u64::MAX - 511] {
        assert_eq!(driver.run(write_op(offset)), Err(EIO));
        assert_eq!(driver.run(Op::Discard { offset, len: 1024 }), Err(EIO));
        assert_eq!(driver.run(Op::WriteZeroes { offset, len: u64::MAX, unmap: true }), Err(EIO));
        assert_eq!(driver.read(offset, 1024), Err(EIO));
    }
    assert_eq!(stub.tell("counts").split(" thick").next(), Some("reads=0 writes=0 flushes=0 discards=0 zeroes=0"));
    assert_eq!(driver.run(write_op(end - 4096)), Ok(()));
}

#[test]
fn write_zeroes_keeps_space_unless_it_may_go() {
    let mut stub = Stub::new(CacheMode::None);
    let thick = |stub: &Stub, unmap| {
        let disk = stub.open();
        let op = Op::WriteZeroes { offset: 512, len: 1024, unmap };
        assert_eq!(Driver::new(&disk, 1).run(op), Ok(()));
        stub.count("thick") == 1
    };
    assert!(thick(&stub, false));
    assert!(!thick(&stub, true));
    stub.options.discard_unmap = false;
    assert!(thick(&stub, true), "--discard ignore");
    let geometry = stub.open().geometry();
    assert!(geometry.discard.is_none() && !geometry.zeroes_may_unmap && geometry.write_zeroes.is_some());
}

#[test]
fn the_geometry_is_the_images() {
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_size", "1049088").set("rbd_discard_granularity_bytes", "131072");
    stub.options.logical_block_size = 4096;
    let geometry = stub.open().geometry();
    assert_eq!(geometry.size, 1 << 20, "whole blocks");
    assert_eq!((geometry.logical_block, geometry.physical_block, geometry.opt_io), (4096, 4096, 4 << 20));
    assert_eq!(geometry.discard.expect("discard").granularity, 131072);
    assert_eq!(Driver::new(&stub.open(), 1).read(0, 4096), Ok(vec![0; 4096]));
}

#[test]
fn a_queue_that_is_dropped_waits_for_ops_that_hang() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let mut queue = disk.open_queue(8).unwrap();
    stub.tell("hang");
    for turn in 0..8 {
        queue.push(write_op(turn * 4096), OpId(turn)).unwrap();
    }
    assert_eq!(stub.count("in-flight"), 8);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(50));
            stub.tell("go");
        });
        drop(queue);
        assert_eq!(stub.count("in-flight"), 0, "an op outlived its queue");
    });
}

// ---- Durability

#[test]
fn a_sync_of_ours_waits_for_the_guests_first_flush() {
    let stub = Stub::new(CacheMode::Writeback);
    let disk = stub.open();
    let mut driver = Driver::new(&disk, 4);
    disk.sync().unwrap();
    driver.write(0, &[1; 512]).unwrap();
    disk.sync().unwrap();
    assert_eq!(stub.count("flushes"), 0, "until then a write is acknowledged when the cluster has it");
    assert_eq!(driver.run(Op::Sync), Ok(()));
    assert_eq!(stub.count("flushes"), 1);
    driver.write(0, &[2; 512]).unwrap();
    disk.sync().unwrap();
    assert_eq!(stub.count("flushes"), 2);
    disk.sync().unwrap();
    assert_eq!(stub.count("flushes"), 2, "nothing was written since");
    driver.read(0, 512).unwrap();
    driver.write(0, &[3; 512]).unwrap();
    disk.sync().unwrap();
    assert_eq!(stub.count("flushes"), 3);
}

#[test]
fn a_sync_of_ours_flushes_wherever_librbd_may_hold_something() {
    let mut cautious = Stub::new(CacheMode::Writeback);
    cautious.set("rbd_cache_writethrough_until_flush", "false").options.allow_override = true;
    let others = [CacheMode::None, CacheMode::Directsync, CacheMode::Unsafe].map(Stub::new);
    for stub in others.into_iter().chain([cautious]) {
        let disk = stub.open();
        let mut driver = Driver::new(&disk, 4);
        disk.sync().unwrap();
        assert_eq!(stub.count("flushes"), 0, "nothing was written");
        for op in [write_op(0), Op::Discard { offset: 0, len: 65536 }] {
            let before = stub.count("flushes");
            driver.run(op).unwrap();
            disk.sync().unwrap();
            assert_eq!(stub.count("flushes"), before + 1, "{}", stub.options.mode);
        }
    }
}

#[test]
fn a_flush_that_failed_is_final_with_a_cache() {
    let stub = Stub::new(CacheMode::Writeback);
    let disk = stub.open();
    let (mut one, mut other) = (Driver::new(&disk, 4), Driver::new(&disk, 4));
    one.write(0, &[1; 512]).unwrap();
    stub.tell("fail flush 5 1");
    assert_eq!(one.run(Op::Sync), Err(EIO));
    assert_eq!(one.run(Op::Sync), Err(EIO));
    assert_eq!(other.run(Op::Sync), Err(EIO));
    assert!(disk.sync().is_err());
    assert_eq!(disk.sync_failed(), Some(EIO));
    assert_eq!(other.write(0, &[1; 512]), Ok(()), "only durability is lost");
    assert_eq!(stub.count("flushes"), 1);
}

#[test]
fn a_flush_that_failed_without_a_cache_lost_nothing() {
    for mode in [CacheMode::None, CacheMode::Directsync] {
        let stub = Stub::new(mode);
        let disk = stub.open();
        let mut driver = Driver::new(&disk, 4);
        driver.write(0, &[1; 512]).unwrap();
        stub.tell("fail flush 5 2");
        assert_eq!(driver.run(Op::Sync), Err(EIO));
        assert!(disk.sync().is_err());
        assert_eq!(disk.sync_failed(), None);
        disk.sync().unwrap();
        assert_eq!(driver.run(Op::Sync), Ok(()));
    }
}

#[test]
fn a_sync_of_ours_that_failed_is_made_again() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    Driver::new(&disk, 4).write(0, &[1; 512]).unwrap();
    stub.tell("fail flush 5 1");
    assert!(disk.sync().is_err());
    disk.sync().unwrap();
    assert_eq!(stub.count("flushes"), 1);
}

// ---- Trouble

#[test]
fn a_fenced_client_never_recovers() {
    let stub = Stub::new(CacheMode::Writeback);
    let disk = stub.open();
    let (listener, said) = Listener::start(&disk);
    let mut driver = Driver::new(&disk, 4);
    disk.claim().activate().unwrap();
    assert_eq!(trouble(&disk), None);
    // The cluster forgets it after an hour: only one op is refused by it.
    stub.tell("fail write 108 1");
    assert_eq!(driver.write(0, &[1; 512]), Err(ESHUTDOWN));
    hears(&said, Said::StateChanged);
    assert_eq!(trouble(&disk).as_deref(), Some("fenced"));
    let before = stub.tell("counts");
    assert_eq!(driver.read(0, 512), Err(ESHUTDOWN));
    assert_eq!(driver.run(Op::Sync), Err(ESHUTDOWN));
    assert_eq!(driver.run(write_op(0)), Err(ESHUTDOWN));
    assert_eq!(disk.sync().unwrap_err().raw_os_error(), Some(libc::ESHUTDOWN));
    disk.claim().deactivate();
    assert!(disk.claim().activate().unwrap_err().to_string().contains("fenced"));
    assert_eq!(stub.tell("counts"), before, "librbd was asked");
    hears_nothing_more(&said);
    drop(listener);
}

#[test]
fn a_fence_is_learned_from_every_call_that_reports_it() {
    for (order, act) in [
        ("read", (|disk| drop(Driver::new(disk, 1).read(0, 512))) as fn(&RbdBackend)),
        ("flush", |disk| assert_eq!(Driver::new(disk, 1).run(Op::Sync), Err(ESHUTDOWN))),
        ("submit", |disk| drop(Driver::new(disk, 1).read(0, 512))),
        ("lock", |disk| drop(disk.claim().activate())),
        ("invalidate", |disk| drop(disk.claim().activate())),
        ("snap", |disk| drop(disk.store().snapshots().unwrap().create("s"))),
    ] {
        let stub = Stub::new(CacheMode::None);
        let disk = stub.open();
        stub.tell(&format!("fail {order} 108 1"));
        act(&disk);
        assert_eq!(trouble(&disk).as_deref(), Some("fenced"), "{order}");
    }
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let (_listener, said) = Listener::start(&disk);
    stub.tell("fail size 108 1");
    stub.tell("resize 4194304");
    hears(&said, Said::StateChanged);
    assert_eq!(trouble(&disk).as_deref(), Some("fenced"));
}

// ---- Holes

/// What may hold data, as a copy asks for it.
pub(super) fn data(disk: &RbdBackend) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = disk.next_data(at).expect("a range") {
        assert!(start >= at && end > start, "no progress: {start}..{end} after {at}");
        ranges.push((start, end));
        at = end;
    }
    ranges
}

pub(super) fn covers(ranges: &[(u64, u64)], offset: u64, len: u64) -> bool {
    let held = |byte| ranges.iter().any(|(start, end)| (*start..*end).contains(&byte));
    held(offset) && held(offset + len - 1)
}

#[test]
fn holes_are_listed_and_data_never_missed() {
    let size = 256 << 20;
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_size", &size.to_string());
    let disk = stub.open();
    let holes = |ranges: &[(u64, u64)]| ranges.iter().map(|(start, end)| end - start).sum::<u64>() < 8 << 20;
    assert!(holes(&data(&disk)), "an empty image is read");
    let mut driver = Driver::new(&disk, 4);
    let written = [0, 4096, (4 << 20) - 512, 70 << 20, (70 << 20) + (600 << 10), 200 << 20, size - 512];
    for offset in written {
        driver.write(offset, &[1; 512]).unwrap();
    }
    let ranges = data(&disk);
    assert!(written.iter().all(|offset| covers(&ranges, *offset, 512)), "data was missed: {ranges:?}");
    assert!(holes(&ranges), "holes count as data: {ranges:?}");
    // What a guest is about to overwrite is asked for between, and does not disturb.
    let mut at = 0;
    let mut between = Vec::new();
    while let Some((start, end)) = disk.next_data(at).expect("a range") {
        between.push((start, end));
        for offset in written {
            let (start, end) = disk.next_data(offset).expect("a range").expect("data");
            assert!(start <= offset && end >= offset + 512, "{offset} is in {start}..{end}");
        }
        at = end;
    }
    assert!(written.iter().all(|offset| covers(&between, *offset, 512)), "data was missed: {between:?}");
}

#[test]
fn holes_that_cannot_be_listed_count_as_data_without_delay() {
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_size", &(64 << 20).to_string());
    let all = |ranges: &[(u64, u64)]| ranges.iter().map(|(start, end)| end - start).sum::<u64>() == 64 << 20;
    let disk = stub.open();
    stub.tell("fail diff 95 -1");
    assert!(all(&data(&disk)));
    drop(disk);
    let disk = stub.open();
    stub.tell("diff-hangs");
    let start = std::time::Instant::now();
    assert!(all(&data(&disk)));
    assert!(start.elapsed() < Duration::from_secs(30), "each range waited for a cluster that does not answer");
    assert_eq!(stub.count("diffs"), 1);
    stub.tell("diff-goes");
    // librbd lists what is stored, which is elsewhere in an encrypted image.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("passphrase");
    std::fs::write(&file, "open sesame").unwrap();
    let mut secret = Stub::new(CacheMode::None);
    secret.set("stub_passphrase", "open sesame").options.encryption = Some((Encryption::Luks2, file));
    let secret = secret.open();
    assert_eq!(data(&secret), [(0, secret.geometry().size)]);
    let mut moved = Stub::new(CacheMode::None);
    moved.set("stub_features", &(61 + 512).to_string());
    assert_eq!(data(&moved.open()).iter().map(|(start, end)| end - start).sum::<u64>(), 8 << 20);
}

// ---- Size, snapshots

#[test]
fn a_new_size_is_told_once_and_bounds_every_op() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let (_listener, said) = Listener::start(&disk);
    let mut driver = Driver::new(&disk, 4);
    for size in [16 << 20, 4 << 20, (8 << 20) + 512] {
        stub.tell(&format!("resize {size}"));
        hears(&said, Said::Resized(size));
        // A snapshot changes the header too.
        stub.tell(&format!("resize {size}"));
        assert_eq!(disk.geometry().size, size);
        assert_eq!(driver.run(write_op(size - 4096)), Ok(()));
        assert_eq!(driver.run(write_op(size - 3584)), Err(EIO));
    }
    stub.tell(&format!("resize {}", (8 << 20) + 1000));
    hears_nothing_more(&said);
}

#[test]
fn snapshots_and_what_keeps_them_from_being_made() {
    let stub = Stub::new(CacheMode::None);
    let disk = stub.open();
    let snapshots = disk.store().snapshots().unwrap();
    let full = snapshots.full_name("monday");
    assert_eq!(full, format!("{}@monday", stub.options.name));
    snapshots.create("monday").unwrap();
    snapshots.remove("monday").unwrap();
    assert_eq!((stub.count("snaps"), stub.count("removed")), (1, 1));
    let error = snapshots.create("taken").unwrap_err();
    assert_eq!(error.code, "exists");
    assert!(error.message.contains("@taken"), "{}", error.message);
    for (errno, code, part) in [
        (libc::EBUSY, "busy", "try again"),
        (libc::EROFS, "store", "rbd lock ls"),
        (libc::EDQUOT, "store", "full"),
        (libc::EPERM, "store", "profile rbd"),
        (libc::EIO, "store", "ceph status"),
    ] {
        stub.tell(&format!("fail snap {errno} 1"));
        let error = snapshots.create("s").unwrap_err();
        assert_eq!(error.code, code);
        assert!(error.message.contains(part), "'{part}' is missing in: {}", error.message);
    }
    for name in ["", "a@b", "a/b", "a\0b"] {
        assert_eq!(snapshots.create(name).unwrap_err().code, "store", "{name:?}");
    }
    assert_eq!(snapshots.remove("missing").unwrap_err().code, "store");
    assert_eq!(stub.count("snaps"), 1);
}

// ---- Opening

#[test]
fn a_snapshot_is_read_only() {
    let mut stub = Stub::new(CacheMode::None);
    stub.options.name.snapshot = Some("s".into());
    let disk = stub.open();
    let geometry = disk.geometry();
    assert!(geometry.read_only && geometry.discard.is_none() && geometry.write_zeroes.is_none());
    assert!(disk.store().snapshots().is_none());
    assert!(disk.describe().ends_with("read-only"));
    disk.claim().activate().unwrap();
    assert_eq!(stub.count("locks"), 0);
    let mut driver = Driver::new(&disk, 1);
    assert_eq!(driver.read(0, 512), Ok(vec![0; 512]));
    assert_eq!(driver.run(write_op(0)), Err(EROFS));
    assert_eq!(trouble(&disk), None, "nobody has taken anything away");
}

#[test]
fn an_encrypted_image_is_smaller_and_opens_with_its_passphrase_only() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("passphrase");
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_passphrase", "open sesame");
    for (text, format, part) in [
        ("open sesame\n", Encryption::Luks2, None),
        ("open sesame", Encryption::Luks, None),
        ("open sesame\n", Encryption::Luks1, Some("--rbd-encryption")),
        ("wrong", Encryption::Luks, Some("passphrase is wrong")),
        ("open sesame\n\n", Encryption::Luks2, Some("passphrase is wrong")),
        ("\n", Encryption::Luks2, Some("empty")),
    ] {
        std::fs::write(&file, text).unwrap();
        stub.options.encryption = Some((format, file.clone()));
        match (stub.try_open(), part) {
            (Ok(disk), None) => assert_eq!(disk.geometry().size, (8 << 20) - 4096),
            (Err(error), Some(part)) => assert!(error.to_string().contains(part), "{text:?}: {error}"),
            (Ok(_), Some(_)) => panic!("{text:?} opened it"),
            (Err(error), None) => panic!("{text:?}: {error}"),
        }
    }
    std::fs::remove_file(&file).unwrap();
    assert!(stub.try_open().err().expect("refused").to_string().contains("--rbd-passphrase-file"));
    std::fs::write(&file, "x").unwrap();
    stub.options.library_path = Some(libraries(true).to_path_buf());
    assert!(stub.try_open().err().expect("refused").to_string().contains("--rbd-passphrase-file"));
}

#[test]
fn options_that_override_the_mode_are_refused_unless_allowed() {
    for (mode, wrong) in [
        (CacheMode::None, "rbd_cache=true"),
        (CacheMode::Directsync, "rbd_cache=true"),
        (CacheMode::Writeback, "rbd_cache=false"),
        (CacheMode::Writethrough, "rbd_cache_policy=writeback"),
        (CacheMode::Unsafe, "rbd_cache_writethrough_until_flush=true"),
    ] {
        for place in ["pool", "image"] {
            let mut stub = Stub::new(mode);
            stub.set("stub_override", &format!("{place}:{wrong}"));
            let error = stub.try_open().err().expect("refused").to_string();
            for part in [place, wrong.split('=').next().unwrap(), "--rbd-allow-override", mode.name()] {
                assert!(error.contains(part), "'{part}' is missing in: {error}");
            }
            stub.options.allow_override = true;
            stub.open();
        }
    }
    let mut stub = Stub::new(CacheMode::None);
    stub.set("rbd_cache", "true");
    assert!(stub.try_open().err().expect("refused").to_string().contains("--rbd-option"));
    let mut stub = Stub::new(CacheMode::Writeback);
    stub.set("stub_override", "image:rbd_disable_zero_copy_writes=false").options.allow_override = true;
    assert!(stub.try_open().err().expect("refused").to_string().contains("hang the disk"));
}

#[test]
fn an_open_error_names_its_cause() {
    let table: [(&str, i32, &[&str]); 10] = [
        ("stub_connect", libc::ETIMEDOUT, &["cluster", "mon host", "--ceph-conf"]),
        ("stub_connect", libc::EPERM, &["client.admin", "--ceph-user"]),
        ("stub_connect", libc::ENOENT, &["keyring"]),
        ("stub_connect", libc::EIO, &["cluster"]),
        ("stub_pool", libc::ENOENT, &["pool pool", "ceph osd pool ls"]),
        ("stub_pool", libc::EIO, &["pool pool"]),
        ("stub_open", libc::ENOENT, &["pool/image", "rbd ls pool"]),
        ("stub_open", libc::EPERM, &["pool/image", "profile rbd"]),
        ("stub_open", libc::ESHUTDOWN, &["pool/image", "blocklist"]),
        ("stub_open", libc::EIO, &["pool/image", "ceph status"]),
    ];
    for (option, errno, parts) in table {
        let mut stub = Stub::new(CacheMode::None);
        let error = stub.set(option, &errno.to_string()).try_open().err().expect("refused").to_string();
        for part in parts {
            assert!(error.contains(part), "'{part}' is missing in: {error}");
        }
    }
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_unknown", "rbd_speed").set("rbd_speed", "high");
    let error = stub.try_open().err().expect("refused").to_string();
    assert!(error.contains("rbd_speed=high") && error.contains("no option"), "{error}");
    let mut stub = Stub::new(CacheMode::None);
    stub.options.conf = Some("/missing.conf".into());
    let error = stub.try_open().err().expect("refused").to_string();
    assert!(error.contains("/missing.conf") && error.contains("--ceph-conf"), "{error}");
    let mut stub = Stub::new(CacheMode::None);
    stub.set("stub_size", "511");
    assert!(stub.try_open().err().expect("refused").to_string().contains("rbd resize"));
}

#[test]
fn the_program_says_what_is_missing_and_ends_with_status_1() {
    let dir = tempfile::tempdir().unwrap();
    let run = |libraries: &std::path::Path, more: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
            .arg("--socket-path")
            .arg(dir.path().join("socket"))
            .arg("--ceph-library-path")
            .arg(libraries)
            .args(["--rbd=pool/image"])
            .args(more)
            .output()
            .expect("the program starts");
        assert_eq!(output.status.code(), Some(1));
        assert!(!dir.path().join("socket").exists(), "a socket for a disk that is not there");
        String::from_utf8(output.stderr).unwrap()
    };
    let text = run(dir.path(), &[]);
    assert!(text.contains("librados.so.2") && text.contains("--ceph-library-path"), "{text}");
    let text = run(libraries(false), &["--rbd-option=stub_open=2", "--ceph-user=qemu"]);
    assert!(text.contains("RBD image pool/image") && text.contains("rbd ls pool"), "{text}");
    let text = run(libraries(false), &["--rbd-option=rbd_cache=true"]);
    assert!(text.contains("cache mode none") && text.contains("--rbd-allow-override"), "{text}");
}

/// A cluster that is gone for good must not keep the process: everything is synced by then.
#[test]
fn a_second_signal_ends_a_program_whose_image_does_not_close() {
    use std::io::BufRead;
    use std::os::unix::process::ExitStatusExt;
    let dir = tempfile::tempdir().unwrap();
    let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_virtioblkd"))
        .arg("--socket-path")
        .arg(dir.path().join("socket"))
        .arg("--ceph-library-path")
        .arg(libraries(false))
        .args(["--rbd=pool/image", "--rbd-option=stub_close=hangs"])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut log = std::io::BufReader::new(program.stderr.take().unwrap()).lines();
    let mut until = |words: &str| assert!(log.any(|line| line.unwrap().contains(words)), "it never said: {words}");
    let pid = rustix::process::Pid::from_child(&program);
    until("serving on");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    until("drained and synced");
    assert_eq!(program.try_wait().unwrap(), None, "the image closed");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(program.wait().unwrap().signal(), Some(15));
}
