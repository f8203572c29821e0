//! The memory in which requests in flight are tracked: its size, and garbage in it.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use kit::front_end::*;
use kit::rig::{Prng, Rig};
use kit::wait::wait_until;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::disk::Event;
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{DeviceOptions, Tuning};

use super::tracking::*;

#[test]
fn a_region_for_more_rings_than_allowed_is_refused() {
    let (_disk, rig) = server(CompletionOrder::InOrder);
    for (queues, size) in [(3, SIZE), (1, 32769)] {
        let mut front_end = handshake(&rig);
        let wanted = VhostUserInflight { num_queues: queues, queue_size: size, ..VhostUserInflight::default() };
        assert!(front_end.control.get_inflight_fd(&wanted).is_err());
        drop(front_end);
        assert!(rig.disconnected().contains("protocol"));
    }
}

/// Of QEMU's default --queue-size.
fn large_server(order: CompletionOrder) -> (Arc<MemBackend>, Rig) {
    let disk = Arc::new(MemBackend::new(MemOptions { order, ..MemOptions::new(1 << 20) }));
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 2, queue_size: 1024, serial: String::new() };
    let tuning = Tuning { stall_after: Duration::from_secs(1000), ..Tuning::default() };
    (disk.clone(), Rig::tuned(disk, &options, &tuning))
}

/// QEMU 10.0.13 (Debian 13) asks for entries for its queue-size, 128, and sends that number back; then its firmware sets up
/// a ring of 256 descriptors and its Linux, after a reset, one of 1024.
#[test]
fn a_ring_larger_than_its_front_end_asked_for_runs_and_is_tracked() {
    let (_, firmware) = large_server(CompletionOrder::InOrder);
    for size in [256, 1024] {
        let (first_disk, first) = large_server(CompletionOrder::OnRequest);
        let (second_disk, second) = large_server(CompletionOrder::InOrder);
        let _released = Released(first_disk.clone());
        let mut guest = Guest::asking(&first, 128, size);
        // Heads beyond those asked for, too.
        let taken: Vec<u16> = (0..60).map(|sector| guest.front_end.add(0, OUT, sector, &[7; SECTOR], 0)).collect();
        assert!(taken.iter().any(|slot| slot * 4 >= 128));
        guest.front_end.kick(0);
        wait_until("the requests are taken", || first_disk.waiting() >= 60);
        assert!(!first.status().rings[0].untracked);
        let _old = guest.reconnect(&second);
        let answered: Vec<u16> = (0..60).map(|_| guest.front_end.wait(0).0).collect();
        assert_eq!(answered, taken);
        assert_eq!(second_disk.counts().writes, 60, "each once");
        assert!(!second.status().rings[0].untracked);
        guest.front_end.stop_ring(0);
        // The other order: what serves the firmware serves the reset driver.
        let mut guest = Guest::asking(&firmware, 128, size);
        assert_eq!(guest.front_end.write(0, 0, &[1; SECTOR]), OK);
    }
}

/// A region that another server made for smaller rings: the ring is served all the same, and the status says that it is
/// not tracked.
#[test]
fn a_ring_that_does_not_fit_the_region_of_another_server_is_served() {
    use std::os::fd::AsRawFd;
    let (_disk, rig) = large_server(CompletionOrder::InOrder);
    // 16 bytes a ring, 16 a descriptor (libvhost-user's vu_inflight_queue_size).
    let told = VhostUserInflight { mmap_size: 2112, mmap_offset: 0, num_queues: 1, queue_size: 128 };
    let region = bookkeeping(4096, rustix::fs::MemfdFlags::empty());
    let mut front_end = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, 1024, ALL);
    front_end.also(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    front_end.control.set_inflight_fd(&told, region.as_raw_fd()).unwrap();
    front_end.start_ring(0, 0);
    for sector in 0..200 {
        assert_eq!(front_end.write(0, sector, &[3; SECTOR]), OK);
    }
    assert!(rig.status().rings[0].untracked);
    let base = front_end.stop_ring(0);
    let avail = front_end.rings[0].avail;
    front_end.restart_ring(0, base, avail);
    assert_eq!(front_end.read(0, 0, SECTOR as u32), (OK, vec![3; SECTOR]));
    // A reset: a region of our own is large enough.
    let wanted = VhostUserInflight { num_queues: 1, queue_size: 128, ..VhostUserInflight::default() };
    front_end.stop_ring(0);
    let (told, region) = front_end.control.get_inflight_fd(&wanted).unwrap();
    front_end.control.set_inflight_fd(&told, region.as_raw_fd()).unwrap();
    front_end.reset_ring_memory(0);
    front_end.start_ring(0, 0);
    assert_eq!(front_end.read(0, 0, SECTOR as u32), (OK, vec![3; SECTOR]));
    assert!(!rig.status().rings[0].untracked);
}

#[test]
fn garbage_in_the_region_harms_its_ring_only() {
    let (_disk, rig) = server(CompletionOrder::InOrder);
    let mut prng = Prng::new(5);
    let mut stopped = 0;
    for round in 0..200 {
        let mut guest = Guest::new(&rig);
        assert_eq!(guest.front_end.write(0, 0, &[1; SECTOR]), OK);
        let used = guest.front_end.stop_ring(0);
        let len = usize::try_from(guest.told.mmap_size).unwrap();
        let mut bytes = vec![0; len];
        guest.region.read_exact_at(&mut bytes, 0).unwrap();
        // All of it, or only the marks and the orders.
        let from = if round % 2 == 0 { 0 } else { 16 };
        bytes[from..].iter_mut().for_each(|byte| *byte = prng.below(if round % 4 < 2 { 256 } else { 3 }) as u8);
        guest.region.write_all_at(&bytes, 0).unwrap();
        // A driver that waits for nothing is owed nothing.
        (0..8).for_each(|_| _ = guest.front_end.add(0, IN, 0, &[], SECTOR as u32));
        let avail = guest.front_end.rings[0].avail;
        guest.front_end.restart_ring(0, used, avail);
        // It may answer heads that nobody asked for, or nothing at all; the server lives.
        guest.front_end.kick(0);
        guest.front_end.used_within(0, Duration::from_millis(5));
        guest.front_end.stop_ring(0);
        drop(guest);
        rig.event(|event| match event {
            Event::ProtocolError(_) => {
                stopped += 1;
                None
            }
            Event::Disconnected(_) => Some(()),
            _ => None,
        });
    }
    assert!(stopped > 20, "{stopped} rings were stopped");
    let mut good = Guest::new(&rig);
    assert_eq!(good.front_end.write(0, 0, &[1; SECTOR]), OK);
}
