//! Front-ends that take their memory away while the disk uses it: whoever touches what lay behind a file's new end gets
//! SIGBUS. Only that front-end's connection ends; the next one is served.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use kit::backend::open_file_or_skip;
use kit::front_end::*;
use kit::rig::Rig;
use rustix::fs::{MemfdFlags, memfd_create};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use virtioblkd::backend::file::{FileOptions, Locking};
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::disk::Disk;
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

const OK: u8 = 0;
const SIZE: u64 = 1 << 20;
/// In the reason why a connection ended.
const TAKEN: &str = "took away memory";

fn options() -> DeviceOptions {
    DeviceOptions { mode: CacheMode::None, num_queues: 4, queue_size: 256, serial: String::new() }
}

/// A disk whose back-end copies guest memory with the processor.
fn memory_disk() -> Rig {
    Rig::on(Arc::new(MemBackend::new(MemOptions::new(SIZE))), &options())
}

/// The file of all the guest's memory.
fn file_of(guest: &FrontEnd) -> File {
    let region = guest.memory.iter().next().unwrap();
    region.file_offset().unwrap().file().try_clone().unwrap()
}

fn connect(rig: &Rig) -> FrontEnd {
    FrontEnd::connect(&rig.path, 2, 64, ALL)
}

/// The connection ended for the right reason, and the next front-end finds a disk.
fn survives(rig: &Rig) {
    let why = rig.disconnected();
    assert!(why.contains(TAKEN), "{why}");
    let mut guest = connect(rig);
    assert_eq!(guest.write(0, 0, &[3; 4096]), OK);
    assert_eq!(guest.read(1, 0, 4096), (OK, vec![3; 4096]));
    assert_eq!(guest.flush(0), OK);
}

#[test]
fn a_ring_that_vanishes() {
    let rig = memory_disk();
    let guest = connect(&rig);
    file_of(&guest).set_len(0).unwrap();
    guest.kick(0);
    survives(&rig);
}

#[test]
fn all_rings_that_vanish_at_once() {
    let rig = memory_disk();
    for _ in 0..20 {
        let guest = FrontEnd::connect(&rig.path, 4, 64, ALL);
        file_of(&guest).set_len(0).unwrap();
        (0..4).for_each(|ring| guest.kick(ring));
        assert!(rig.disconnected().contains(TAKEN));
    }
    let guest = connect(&rig);
    file_of(&guest).set_len(0).unwrap();
    guest.kick(1);
    survives(&rig);
}

/// The ring stays; headers, data and status bytes go, each by itself.
#[test]
fn requests_that_vanish() {
    // What the request needs, and where its parts lie: header, data, status.
    for (kind, write, len) in [(OUT, true, 4096), (IN, false, 4096), (GET_ID, false, 20), (FLUSH, false, 0)] {
        for part in 0..3 {
            if part == 1 && len == 0 {
                continue;
            }
            let rig = memory_disk();
            let mut guest = connect(&rig);
            let (kept, gone) = (0x80_0000, REGION_BORDER + 0x80_0000);
            let at = |this: usize, offset: u64| if part == this { gone } else { kept } + offset;
            guest.put_header(at(0, 0), kind, 0);
            let mut parts = vec![(at(0, 0), 16, 0)];
            if len > 0 {
                parts.push((at(1, 4096), len, if write { 0 } else { WRITE }));
            }
            parts.push((at(2, 64), 1, WRITE));
            guest.put_chain(0, 0, &parts);
            guest.make_available(0, 0);
            file_of(&guest).set_len(REGION_BORDER).unwrap();
            guest.kick(0);
            survives(&rig);
        }
    }
}

#[test]
fn an_indirect_table_that_vanishes() {
    let rig = memory_disk();
    let mut guest = connect(&rig);
    guest.put_descriptor(0, 0, REGION_BORDER + 0x1000, 48, INDIRECT, 0);
    guest.make_available(0, 0);
    file_of(&guest).set_len(REGION_BORDER).unwrap();
    guest.kick(0);
    survives(&rig);
}

/// The handler's own look at the used ring, in the vhost-user thread.
#[test]
fn memory_that_vanished_before_a_ring_is_set_up() {
    let rig = memory_disk();
    let stream = UnixStream::connect(&rig.path).unwrap();
    let guest = FrontEnd::handshake(stream, 1, 64, ALL);
    file_of(&guest).set_len(0).unwrap();
    start_in_vain(&guest);
    survives(&rig);
}

/// Starts ring 0. The connection ends before, or instead of, some answer.
fn start_in_vain(guest: &FrontEnd) {
    let ring = &guest.rings[0];
    let config = guest.ring_config(0);
    let _ = guest
        .control
        .set_vring_num(0, ring.size)
        .and_then(|()| guest.control.set_vring_addr(0, &config))
        .and_then(|()| guest.control.set_vring_kick(0, &ring.kick))
        .and_then(|()| guest.control.clone().set_vring_enable(0, true));
}

/// io_uring reads and writes guest memory by itself: there the request fails, and the answer is what faults.
#[test]
fn memory_that_vanishes_under_io_uring() {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(SIZE).unwrap();
    for mode in [CacheMode::None, CacheMode::Writeback] {
        let file = FileOptions { locking: Locking::Off, ..FileOptions::new(image.path(), mode.into()) };
        let Some(backend) = open_file_or_skip(&file, mode) else { continue };
        let rig = Rig::on(Arc::new(backend), &DeviceOptions { mode, ..options() });
        for round in 0..10 {
            let mut guest = connect(&rig);
            let memory = file_of(&guest);
            for sector in 0..14 {
                match sector % 2 {
                    0 => guest.add(0, IN, sector * 8, &[], 4096),
                    _ => guest.add(0, OUT, sector * 8, &[0; 4096], 0),
                };
            }
            guest.kick(0);
            // Now before, now after the requests were taken.
            std::thread::sleep(Duration::from_micros(round * 50));
            memory.set_len(0).unwrap();
            guest.kick(0);
            assert!(rig.disconnected().contains(TAKEN));
        }
        survives_after(&rig);
    }
}

fn survives_after(rig: &Rig) {
    let guest = connect(rig);
    file_of(&guest).set_len(0).unwrap();
    guest.kick(0);
    survives(rig);
}

/// A hold that is asked for meanwhile is answered, and the disk is let go.
#[test]
fn a_hold_outlives_the_memory() {
    let rig = memory_disk();
    let guest = connect(&rig);
    rig.hold(1).unwrap();
    file_of(&guest).set_len(0).unwrap();
    guest.kick(0);
    assert!(rig.disconnected().contains(TAKEN));
    rig.disk.open_gate();
    drop(guest);
    survives_after(&rig);
}

/// Requests in flight while their memory shrinks page by page, from their end.
#[test]
fn memory_that_shrinks_bit_by_bit_under_requests() {
    let rig = memory_disk();
    for _ in 0..10 {
        let mut guest = connect(&rig);
        let memory = file_of(&guest);
        let slots: Vec<u16> = (0..14).map(|sector| guest.add(0, OUT, sector, &[1; 512], 0)).collect();
        let first = slots.iter().map(|slot| guest.data_at(0, *slot).0).min().unwrap() - DATA_OFFSET;
        guest.kick(0);
        for len in (0..=14).rev().map(|slot| first + slot * SLOT_BYTES) {
            memory.set_len(len).unwrap();
        }
        memory.set_len(0).unwrap();
        guest.kick(0);
        assert!(rig.disconnected().contains(TAKEN));
    }
    survives_after(&rig);
}

/// One huge page of the largest size, of which no test machine has a free one.
const GIB: u64 = 1 << 30;

/// A front-end with one ring that has its in-flight region in `region`; the ring is not started.
fn tracking(rig: &Rig, region: &File, len: u64) -> FrontEnd {
    let mut guest = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, 64, ALL);
    guest.also(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    let told = VhostUserInflight { mmap_size: len, mmap_offset: 0, num_queues: 1, queue_size: 64 };
    let set = guest.control.set_inflight_fd(&told, region.as_raw_fd());
    // The daemon reads the region when it is set: where no page is behind it the connection ends already.
    assert!(set.is_ok() || len == GIB, "{set:?}");
    guest
}

/// Before its ring starts, before a request is taken, and before one is answered.
#[test]
fn an_in_flight_region_that_vanishes() {
    const LEN: u64 = 4096;
    for step in 0..3 {
        let disk = Arc::new(MemBackend::new(MemOptions { order: CompletionOrder::OnRequest, ..MemOptions::new(SIZE) }));
        let rig = Rig::on(disk.clone(), &options());
        let region = bookkeeping(LEN, MemfdFlags::empty());
        let mut guest = tracking(&rig, &region, LEN);
        if step == 0 {
            region.set_len(0).unwrap();
            start_in_vain(&guest);
        } else {
            guest.start_ring(0, 0);
            guest.add(0, OUT, 0, &[1; 512], 0);
            if step == 1 {
                region.set_len(0).unwrap();
                guest.kick(0);
            } else {
                guest.kick(0);
                wait_for_request(&disk);
                region.set_len(0).unwrap();
            }
            // The stop of the ring waits for what is in flight.
            wait_for_request(&disk);
            disk.release(1);
        }
        let why = rig.disconnected();
        assert!(why.contains(TAKEN), "step {step}: {why}");
        drop(guest);
        let mut next = connect(&rig);
        let slot = next.add(0, OUT, 0, &[3; 512], 0);
        next.kick(0);
        wait_for_request(&disk);
        disk.release(1);
        assert_eq!(next.wait(0), (slot, OK), "step {step}");
    }
}

/// Until the disk has a request.
fn wait_for_request(disk: &MemBackend) {
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while disk.waiting() == 0 {
        assert!(std::time::Instant::now() < end, "no request came");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Sealed, so that it cannot be cut, and yet not there: no page was kept for it.
#[test]
fn an_in_flight_region_of_huge_pages_that_do_not_exist() {
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_1GB;
    if memfd_create("huge", MemfdFlags::CLOEXEC | flags).is_err() {
        eprintln!("SKIPPED: this kernel has no pages of 1 GiB");
        return;
    }
    let free = "/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages";
    if std::fs::read_to_string(free).is_ok_and(|free| free.trim() != "0") {
        eprintln!("SKIPPED: there are free pages of 1 GiB, so none is missing");
        return;
    }
    let rig = memory_disk();
    let guest = tracking(&rig, &bookkeeping(GIB, flags), GIB);
    start_in_vain(&guest);
    survives(&rig);
}

/// Before a ring starts with it, and under a ring that runs.
#[test]
fn a_dirty_log_that_vanishes() {
    // Bytes of log for all of the guest's memory.
    const LEN: u64 = 4096;
    for running in [false, true] {
        let rig = memory_disk();
        let mut guest = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, 64, ALL);
        guest.also(VhostUserProtocolFeatures::LOG_SHMFD);
        guest.start_ring(0, 0);
        let log = bookkeeping(LEN, MemfdFlags::empty());
        let told = VhostUserDirtyLogRegion { mmap_size: LEN, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
        guest.control.set_log_base(0, Some(told)).unwrap();
        let features = guest.features | F_LOG_ALL;
        if running {
            guest.control.set_features(features).unwrap();
            assert_eq!(guest.read(0, 0, 4096).0, OK);
            log.set_len(0).unwrap();
        } else {
            log.set_len(0).unwrap();
            // The ring starts and touches the log: the connection may end before this is answered, or after.
            let _ = guest.control.set_features(features);
        }
        guest.add(0, IN, 0, &[], 4096);
        guest.kick(0);
        survives(&rig);
    }
}
