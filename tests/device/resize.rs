//! A disk that grows and shrinks under its guest: what the front-end is told, and what requests may touch.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kit::front_end::*;
use kit::rig::Rig;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtioblkd::backend::file::{FileBackend, FileOptions};
use virtioblkd::backend::mem::{MemBackend, MemOptions};
use virtioblkd::backend::point_in_time::PointInTime;
use virtioblkd::disk::{Copies, CopyOptions, Disk, Events};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;

const MODE: CacheMode = CacheMode::Writeback;
const OK: u8 = 0;
const IOERR: u8 = 1;
const LARGE: u64 = 8 << 20;
const SMALL: u64 = 4 << 20;

/// A served RAM disk of which only the first half is there at first.
struct Half {
    disk: Arc<MemBackend>,
    rig: Rig,
}

impl Half {
    fn new() -> Half {
        let options = DeviceOptions { mode: CacheMode::None, num_queues: 8, queue_size: 256, serial: String::new() };
        let disk = Arc::new(MemBackend::new(MemOptions::new(LARGE)));
        disk.set_size(SMALL);
        Half { disk: disk.clone(), rig: Rig::on(disk, &options) }
    }

    fn resize(&self, bytes: u64) {
        self.disk.set_size(bytes);
        self.rig.device.resized(bytes);
    }
}

impl std::ops::Deref for Half {
    type Target = Rig;

    fn deref(&self) -> &Rig {
        &self.rig
    }
}

/// Connects with a channel for the daemon's requests; its other end.
fn connect(rig: &Rig) -> (FrontEnd, UnixStream) {
    let mut guest = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, 256, ALL);
    guest.also(VhostUserProtocolFeatures::BACKEND_REQ);
    let (theirs, ours) = UnixStream::pair().unwrap();
    guest.control.set_backend_request_fd(&ours).unwrap();
    (guest, theirs)
}

/// Messages that came by now; CONFIG_CHANGE_MSG is the only one there is.
fn messages(channel: &UnixStream) -> usize {
    let soon = Timespec { tv_sec: 0, tv_nsec: Duration::from_millis(50).subsec_nanos().into() };
    if poll(&mut [PollFd::new(channel, PollFlags::IN)], Some(&soon)).unwrap() == 0 {
        return 0;
    }
    let mut bytes = [0; 240];
    let len = std::io::Read::read(&mut &*channel, &mut bytes).unwrap();
    for message in bytes[..len].chunks(12) {
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
    len / 12
}

fn capacity(guest: &mut FrontEnd) -> u64 {
    u64::from_le_bytes(guest.config(60)[..8].try_into().unwrap()) * 512
}

#[test]
fn a_running_guest_is_informed_of_a_new_size_and_may_use_it() {
    let rig = Half::new();
    let (mut guest, channel) = connect(&rig);
    assert_eq!(capacity(&mut guest), SMALL);
    guest.start_ring(0, 0);
    assert_eq!(messages(&channel), 0);
    assert_eq!(guest.write(0, SMALL / 512 - 1, &[1; 1024]), IOERR);
    rig.resize(LARGE);
    rig.resize(LARGE);
    assert_eq!(messages(&channel), 1);
    assert_eq!(capacity(&mut guest), LARGE);
    assert_eq!(guest.write(0, SMALL / 512 - 1, &[1; 1024]), OK);
    assert_eq!(guest.write(0, LARGE / 512 - 1, &[2; 512]), OK);
    assert_eq!(rig.status().size, LARGE);
    // Not whole blocks: rounded down.
    rig.resize(SMALL + 100);
    assert_eq!(messages(&channel), 1);
    assert_eq!(capacity(&mut guest), SMALL);
    assert_eq!(guest.read(0, SMALL / 512, 512).0, IOERR);
    assert_eq!(guest.write(0, SMALL / 512 - 1, &[1; 1024]), IOERR);
    assert_eq!(guest.range(0, DISCARD, SMALL / 512, 8, 0), IOERR);
    assert_eq!(guest.read(0, SMALL / 512 - 1, 512), (OK, vec![1; 512]));
}

#[test]
fn a_size_changed_while_the_rings_were_stopped_is_announced_at_their_start() {
    let rig = Half::new();
    let (mut guest, channel) = connect(&rig);
    assert_eq!(capacity(&mut guest), SMALL);
    guest.start_ring(0, 0);
    let base = guest.stop_ring(0);
    rig.resize(LARGE);
    assert_eq!(messages(&channel), 0, "QEMU takes no notice now");
    guest.restart_ring(0, base, base);
    assert_eq!(messages(&channel), 1);
    drop((guest, channel));
    rig.disconnected();
    rig.resize(SMALL);
    // A reconnecting front-end does not read the configuration.
    let (mut guest, channel) = connect(&rig);
    guest.start_ring(0, 0);
    assert_eq!(messages(&channel), 1);
    assert_eq!(capacity(&mut guest), SMALL);
    assert_eq!(guest.read(0, SMALL / 512, 512).0, IOERR);
}

#[test]
fn a_front_end_that_reads_no_messages_delays_no_resize() {
    let rig = Half::new();
    let (mut guest, channel) = connect(&rig);
    guest.start_ring(0, 0);
    for _ in 0..10_000 {
        rig.resize(LARGE);
        rig.resize(SMALL);
    }
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert_eq!(rig.status().size, SMALL);
    drop(channel);
    rig.resize(LARGE);
    assert_eq!(guest.write(0, LARGE / 512 - 1, &[1; 512]), OK);
}

/// Resizes the file. Waits for storage that other tests keep busy for longer than an operator would wait.
fn resize(rig: &Rig, to: Option<u64>, force: bool) -> Result<u64, String> {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        match rig.disk.resize(to, force) {
            Err(why) if why.contains("storage does not answer") && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// A served file of `SMALL` bytes in a mode over the host's cache.
fn file() -> (tempfile::NamedTempFile, Rig) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SMALL).unwrap();
    let options = FileOptions { logical_block_size: Some(512), ..FileOptions::new(image.path(), MODE.into()) };
    let backend = PointInTime::new(Arc::new(FileBackend::open(&options).unwrap()), Arc::new(Events::new().unwrap()));
    let options = DeviceOptions { mode: MODE, num_queues: 8, queue_size: 256, serial: String::new() };
    (image, Rig::on(Arc::new(backend), &options))
}

#[test]
fn a_guest_writes_to_the_grown_part_of_a_file() {
    let (image, rig) = file();
    let (mut guest, channel) = connect(&rig);
    assert_eq!(capacity(&mut guest), SMALL);
    guest.start_ring(0, 0);
    assert_eq!(resize(&rig, None, false), Ok(SMALL));
    assert_eq!(messages(&channel), 0, "nothing changed");
    assert_eq!(resize(&rig, Some(LARGE), false), Ok(LARGE));
    assert_eq!(messages(&channel), 1);
    assert_eq!(image.as_file().metadata().unwrap().len(), LARGE);
    assert_eq!(guest.write(0, LARGE / 512 - 1, &[7; 512]), OK);
    let mut end = [0; 512];
    std::os::unix::fs::FileExt::read_exact_at(image.as_file(), &mut end, LARGE - 512).unwrap();
    assert_eq!(end, [7; 512]);
    // Grown by somebody else, and not by whole blocks.
    image.as_file().set_len(2 * LARGE + 5).unwrap();
    assert_eq!(resize(&rig, None, false), Ok(2 * LARGE));
    assert_eq!(guest.write(0, 2 * LARGE / 512 - 1, &[8; 512]), OK);
}

#[test]
fn a_smaller_image_is_refused_unless_forced() {
    let (image, rig) = file();
    let (mut guest, channel) = connect(&rig);
    assert_eq!(capacity(&mut guest), SMALL);
    guest.start_ring(0, 0);
    let refused = |to, force, words: [&str; 2]| {
        let why = resize(&rig, to, force).unwrap_err();
        assert!(words.iter().all(|word| why.contains(word)), "{why}");
    };
    refused(Some(SMALL / 2), true, ["never truncates", "truncate -s"]);
    refused(Some(SMALL + 5), false, ["whole blocks", "multiple"]);
    image.as_file().set_len(SMALL / 2).unwrap();
    refused(None, false, ["would lose", "--force"]);
    assert_eq!((messages(&channel), rig.status().size), (0, SMALL));
    assert_eq!(resize(&rig, None, true), Ok(SMALL / 2));
    assert_eq!(messages(&channel), 1);
    assert_eq!(guest.read(0, SMALL / 1024, 512).0, IOERR);
    image.as_file().set_len(0).unwrap();
    refused(None, true, ["empty", "stop its guest"]);
}

#[test]
fn a_copy_holds_the_image_as_it_was_prepared_and_started() {
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), vec![5; SMALL as usize]).unwrap();
    let options = FileOptions { logical_block_size: Some(512), ..FileOptions::new(image.path(), MODE.into()) };
    let disk = FileBackend::open(&options).unwrap();
    let events = Arc::new(Events::new().unwrap());
    let backend = Arc::new(PointInTime::new(Arc::new(disk), events.clone()));
    let options = DeviceOptions { mode: MODE, num_queues: 8, queue_size: 256, serial: String::new() };
    let rig = Rig::on(backend.clone(), &options);
    let mut guest = FrontEnd::connect(&rig.path, 1, 256, ALL);
    let dir = tempfile::tempdir().unwrap();
    let prepare = |name: &str| {
        // So slow that the guest is first.
        let options = CopyOptions { target: dir.path().join(name), bandwidth: 1 << 20, digest: false };
        backend.prepare(&options).unwrap()
    };
    let stale = prepare("stale");
    assert_eq!(resize(&rig, Some(LARGE), false), Ok(LARGE));
    let why = backend.start(&stale).unwrap_err();
    assert!(why.code == "busy" && why.message.contains("resized"), "{why:?}");
    backend.cancel(&stale).unwrap();
    let before = std::fs::read(image.path()).unwrap();
    let copy = prepare("copy");
    backend.start(&copy).unwrap();
    assert_eq!(resize(&rig, Some(2 * LARGE), false), Ok(2 * LARGE));
    // Inside, across the old end, and behind it.
    for sector in [0, LARGE / 512 - 1, LARGE / 512 + 100, 2 * LARGE / 512 - 2] {
        assert_eq!(guest.write(0, sector, &[9; 1024]), OK, "{sector}");
    }
    backend.set_bandwidth(&copy, 0).unwrap();
    let ended = loop {
        let status = backend.status().into_iter().find(|status| status.copy == copy).unwrap();
        if !["running", "syncing"].contains(&&*status.state) {
            break status;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!(ended.state, "completed", "{ended:?}");
    assert!(std::fs::read(dir.path().join("copy")).unwrap() == before);
}
