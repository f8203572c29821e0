//! A front-end's conversation goes on with another process in the middle: all that it said before still counts, and all
//! that it says later is understood. With a front-end that does as it is told.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use kit::front_end::*;
use kit::guest::oracle::dirty_pages;
use kit::upgrade::{Disk, SIZE, contains, wait_until};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::json;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

const OK: u8 = 0;
const RING: u16 = 64;
const LOG_ALL: u64 = 1 << 26;

/// With every protocol feature there is. The stream is the front-end's, for messages of our own.
fn handshake(disk: &Disk, rings: usize) -> (FrontEnd, UnixStream) {
    let stream = UnixStream::connect(disk.path("vhost")).unwrap();
    let mut guest = FrontEnd::handshake(stream.try_clone().unwrap(), rings, RING, ALL);
    guest.also(
        VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::LOG_SHMFD,
    );
    (guest, stream)
}

/// The memory in which is marked what is in flight.
fn track(guest: &mut FrontEnd, rings: u16) -> File {
    let wanted = VhostUserInflight { num_queues: rings, queue_size: RING, ..VhostUserInflight::default() };
    let (told, region) = guest.control.get_inflight_fd(&wanted).unwrap();
    assert_eq!(told.mmap_offset, 0);
    guest.control.set_inflight_fd(&told, region.as_raw_fd()).unwrap();
    region
}

fn readable_soon(stream: &UnixStream) -> bool {
    let soon = Timespec { tv_sec: 0, tv_nsec: Duration::from_millis(200).subsec_nanos().into() };
    poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&soon)).unwrap() > 0
}

#[test]
fn the_front_ends_settings_survive_an_upgrade() {
    let disk = Disk::serve(&["--cache", "none"]);
    let (mut guest, stream) = handshake(&disk, 3);
    let (theirs, ours) = UnixStream::pair().unwrap();
    guest.control.set_backend_request_fd(&ours).unwrap();
    drop(ours);
    track(&mut guest, 3);
    let log: File = memfd_create("log", MemfdFlags::CLOEXEC).unwrap().into();
    log.set_len(4096).unwrap();
    let told = VhostUserDirtyLogRegion { mmap_size: 4096, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    guest.control.set_log_base(0, Some(told)).unwrap();
    assert_eq!(guest.config(8), (SIZE as u64 / 512).to_le_bytes());
    // The first runs, the second was handed back, the third was never set up.
    guest.start_ring(0, 0);
    guest.start_ring(1, 0);
    assert_eq!(guest.write(0, 0, &[1; 4096]), OK);
    assert_eq!(guest.write(1, 8, &[2; 4096]), OK);
    let base = guest.stop_ring(1);

    disk.upgrade(&[]);
    // Requests, and interrupts for them.
    consume(&guest.rings[0].call);
    assert_eq!(guest.read(0, 0, 4096), (OK, vec![1; 4096]));
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT));
    // The ring that was handed back goes on where it was, and the third begins.
    guest.start_ring(1, base);
    assert_eq!(guest.read(1, 8, 4096), (OK, vec![2; 4096]));
    guest.start_ring(2, 0);
    assert_eq!(guest.write(2, 16, &[3; 4096]), OK);
    // Answers are still acknowledged where that was wanted: each of these waits for it.
    guest.send_memory_table();
    assert_eq!(guest.control.get_queue_num().unwrap(), 256);
    assert_eq!(guest.config(8), (SIZE as u64 / 512).to_le_bytes());
    // The log that was handed over is switched on.
    guest.control.set_features(guest.features | LOG_ALL).unwrap();
    disk.upgrade(&[]);
    let mut bits = [0; 4096];
    log.read_exact_at(&mut bits, 0).unwrap();
    log.write_all_at(&[0; 4096], 0).unwrap();
    let slot = guest.add(0, IN, 0, &[], 4096);
    guest.kick(0);
    assert_eq!(guest.wait(0), (slot, OK));
    log.read_exact_at(&mut bits, 0).unwrap();
    let page = guest.data_at(0, slot).0 / 4096;
    assert!(bits[page as usize / 8] & 1 << (page % 8) != 0, "what a read stored is not in the log");
    // A resize reaches the front-end by the channel that it gave to the first process.
    assert!(!readable_soon(&theirs), "nothing changed");
    disk.ctl_ok(&["resize", "8M"]);
    assert!(readable_soon(&theirs));
    assert_eq!(guest.config(8), (8u64 << 11).to_le_bytes());
    // The front-end leaves, another one comes.
    drop((guest, stream));
    wait_until("it is gone", || disk.status()["connected"] == false);
    let (mut guest, _stream) = handshake(&disk, 1);
    guest.start_ring(0, 0);
    assert_eq!(guest.read(0, 16, 4096), (OK, vec![3; 4096]));
    drop(guest);
    disk.end();
}

/// What the old process finishes last is durable before the new one has the disk, in `unsafe` too; and what the new one
/// has in flight is marked for whoever comes after it.
#[test]
fn the_last_writes_are_synced_and_the_next_ones_marked() {
    // Of three writes two are kept back: until after the sync that comes before the pause.
    let disk = Disk::serve(&["--backend", "slow:800", "--cache", "unsafe"]);
    let (mut guest, _stream) = handshake(&disk, 1);
    let region = track(&mut guest, 1);
    guest.start_ring(0, 0);
    let write = |guest: &mut FrontEnd| {
        let slots = [0, 8, 16].map(|sector| guest.add(0, OUT, sector, &[5; 4096], 0));
        guest.kick(0);
        slots
    };
    let finish = |guest: &mut FrontEnd| (0..3).for_each(|_| assert_eq!(guest.wait(0).1, OK));
    write(&mut guest);
    disk.upgrade(&[]);
    finish(&mut guest);
    assert_eq!(dirty_pages(&disk.path("disk.img")).unwrap_or(0), 0, "the last writes are in the cache alone");

    // After the ring's header of 16 bytes, 16 for each head (vhost-user.rst, DescStateSplit).
    let is_marked = |slot: u16| {
        let mut mark = [0];
        region.read_exact_at(&mut mark, 16 + u64::from(slot) * 4 * 16).unwrap();
        mark[0] == 1
    };
    let [first, ..] = write(&mut guest);
    wait_until("it is marked", || is_marked(first));
    finish(&mut guest);
    // A head is unmarked after it is in the used ring.
    wait_until("it is not marked any more", || !is_marked(first));
}

/// Between a front-end's first word and its rings, and without any of its features.
#[test]
fn a_front_end_may_continue_its_handshake_after_an_upgrade() {
    let disk = Disk::serve(&[]);
    let stream = UnixStream::connect(disk.path("vhost")).unwrap();
    wait_until("it is connected", || disk.status()["connected"] == true);
    disk.upgrade(&[]);
    let mut guest = FrontEnd::handshake(stream, 1, RING, ALL);
    disk.upgrade(&[]);
    guest.start_ring(0, 0);
    assert_eq!(guest.write(0, 0, &[7; 512]), OK);
    disk.upgrade(&["--cache", "writeback"]);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![7; 512]));
}

/// Half a message cannot be handed over; a whole one that nobody has read waits for the new daemon.
#[test]
fn each_message_is_read_whole_by_one_process() {
    let disk = Disk::serve(&["--backend", "slow:300"]);
    let (mut guest, mut stream) = handshake(&disk, 1);
    guest.start_ring(0, 0);
    let message = [1u32, 1, 0].map(u32::to_ne_bytes).concat();
    stream.write_all(&message[..5]).unwrap();
    contains(&disk.refuses(&[]), &["middle of a message"]);
    stream.write_all(&message[5..]).unwrap();
    let features = guest.features;
    let mut reply = [0; 20];
    std::io::Read::read_exact(&mut stream, &mut reply).unwrap();
    assert_eq!(u64::from_ne_bytes(reply[12..].try_into().unwrap()) & features, features);
    // While the old one waits for slow writes the front-end asks: whoever reads it answers once.
    for round in 0..3 {
        let slots: Vec<u16> = (0..8).map(|at| guest.add(0, OUT, at * 8, &[round; 4096], 0)).collect();
        guest.kick(0);
        std::thread::scope(|scope| {
            let upgrade = scope.spawn(|| disk.upgrade(&[]));
            while !upgrade.is_finished() {
                assert_eq!(guest.config(8), (SIZE as u64 / 512).to_le_bytes());
                std::thread::sleep(Duration::from_millis(10));
            }
            upgrade.join().unwrap();
        });
        let mut answered: Vec<u16> = slots.iter().map(|_| guest.wait(0)).map(|(slot, _)| slot).collect();
        answered.sort_unstable();
        let mut slots = slots;
        slots.sort_unstable();
        assert_eq!(answered, slots);
    }
    assert!(!readable_soon(&stream), "an answer too many");
}

/// What failed and is kept from the guest is tried again by the new daemon, whether the front-end keeps marks or not.
#[test]
fn retained_requests_are_retried_by_the_new_daemon() {
    for marks in [true, false] {
        let disk = Disk::serve(&["--cache", "writeback", "--on-error", "stop"]);
        let (mut guest, _stream) = handshake(&disk, 1);
        let wanted = VhostUserInflight { num_queues: 1, queue_size: RING, ..VhostUserInflight::default() };
        let (told, region) = guest.control.get_inflight_fd(&wanted).unwrap();
        if marks {
            guest.control.set_inflight_fd(&told, region.as_raw_fd()).unwrap();
        }
        guest.start_ring(0, 0);
        // Storage that loses its end for a while.
        let image = File::options().write(true).open(disk.path("disk.img")).unwrap();
        image.set_len(SIZE as u64 / 2).unwrap();
        let slot = guest.add(0, IN, SIZE as u64 / 512 - 8, &[], 4096);
        guest.kick(0);
        wait_until("it is kept", || disk.status()["stopped"].is_object());
        contains(&disk.refuses(&[]), &["bytes", "resize"]);
        image.set_len(SIZE as u64).unwrap();
        wait_until("it is kept still", || disk.status()["stopped"].is_object());
        assert_eq!(guest.status(0, slot), UNANSWERED);
        disk.upgrade(&[]);
        assert_eq!(guest.wait(0), (slot, OK), "marks: {marks}");
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        assert!(disk.status()["stopped"].is_null());
    }
}

/// systemd's socket and its notes: whoever was given a socket gives it on, and says which process is the service's now.
#[test]
fn the_new_daemon_gets_the_inherited_socket_and_sends_its_main_pid() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let listener = UnixListener::bind(dir.path().join("vhost")).unwrap();
    let notes = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    notes.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
    let note = || {
        let mut text = [0; 64];
        let length = notes.recv(&mut text).unwrap();
        String::from_utf8(text[..length].to_vec()).unwrap()
    };
    std::fs::write(dir.path().join("disk.img"), vec![0; SIZE]).unwrap();
    let path = |name: &str| dir.path().join(name).into_os_string().into_string().unwrap();
    let command = format!(
        "exec {} --fd 3 --blk-file {} --control-path {} --pid-file {} 3<&0 0</dev/null",
        env!("CARGO_BIN_EXE_virtioblkd"),
        path("disk.img"),
        path("control"),
        path("pid"),
    );
    let log = File::create(dir.path().join("log")).unwrap();
    let child = Command::new("sh")
        .args(["-c", &command])
        .env("NOTIFY_SOCKET", path("notify"))
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(listener)))
        .stderr(log)
        .spawn()
        .unwrap();
    let mut last = child.id();
    let disk = Disk { dir, child };
    assert_eq!(note(), "READY=1");
    let mut guest = FrontEnd::connect(&disk.path("vhost"), 1, RING, ALL);
    assert_eq!(guest.write(0, 0, &[5; 512]), OK);
    for _ in 0..2 {
        let figures = disk.upgrade(&[]);
        assert_eq!(figures["from-pid"], json!(last));
        last = disk.pid().as_raw_nonzero().get() as u32;
        let mut told = [note(), note()];
        told.sort_unstable();
        assert_eq!(told, [format!("MAINPID={last}"), "READY=1".into()]);
        assert_eq!(guest.read(0, 0, 512), (OK, vec![5; 512]));
    }
    drop(guest);
    wait_until("it is gone", || disk.status()["connected"] == false);
    let mut guest = FrontEnd::connect(&disk.path("vhost"), 1, RING, ALL);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![5; 512]));
}
