//! Media that fail: what is kept from the guest and what is not, and that nothing waits for ever. In process, over a RAM
//! disk that fails on request; `tests/guest/full_filesystem.rs` is about one that is really full.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use kit::front_end::*;
use kit::rig::{Prng, Rig};
use kit::wait::wait_until;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use virtioblkd::backend::Errno;
use virtioblkd::backend::mem::{Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::disk::{Disk, Event, FailedRequest};
use virtioblkd::engine::{CacheMode, Kind, OnError};
use virtioblkd::virtio::{DeviceOptions, Tuning};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const OK: u8 = 0;
const IOERR: u8 = 1;
const EIO: Errno = Errno(5);
const ENOSPC: Errno = Errno(28);
const SIZE: u16 = 64;

/// A served RAM disk, which fails as it is told to.
fn served(on_error: OnError) -> (Arc<MemBackend>, Rig) {
    let disk = Arc::new(MemBackend::new(MemOptions::new(1 << 20)));
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 2, queue_size: SIZE, serial: String::new() };
    let rig = Rig::tuned(disk.clone(), &options, &Tuning { on_error, ..Tuning::default() });
    (disk, rig)
}

fn fail(disk: &MemBackend, op: MemOp, errno: Errno) {
    disk.fail(Fault { op, nth: 1, errno, transferred: 100 });
}

fn stopped(rig: &Rig) -> FailedRequest {
    rig.event(|event| if let Event::IoStopped(failed) = event { Some(failed) } else { None })
}

fn continued(rig: &Rig) -> u32 {
    rig.event(|event| if let Event::IoContinued { ring } = event { Some(ring) } else { None })
}

fn unanswered(guest: &mut FrontEnd, ring: usize) {
    assert_eq!(guest.used_within(ring, Duration::from_millis(30)), None);
}

fn is_held(rig: &Rig) -> bool {
    rig.status().total.held
}

#[test]
fn a_write_without_space_is_retained_and_reads_continue_until_it_is_retried() {
    let (disk, rig) = served(OnError::Enospc);
    let mut guest = FrontEnd::connect(&rig.path, 2, SIZE, ALL);
    assert_eq!(guest.write(0, 0, &[1; 1024]), OK);
    fail(&disk, MemOp::Write, ENOSPC);
    let failing = guest.add(0, OUT, 8, &[2; 1024], 0);
    guest.kick(0);
    let told = FailedRequest { kind: Kind::Write, ring: 0, offset: 4096, len: 1024, errno: ENOSPC };
    assert_eq!(stopped(&rig), told);
    unanswered(&mut guest, 0);
    // The event comes before the counters of its turn.
    wait_until("the write is counted", || rig.status().total.in_flight == 1);
    let status = rig.status();
    let why = status.stopped.expect("stopped");
    assert_eq!((why.operation.as_str(), why.errno, why.requests, why.ring), ("write", 28, 1, 0));
    assert_eq!((status.total.in_flight, status.total.kept, status.rings[0].kept), (1, 1, 1));
    assert!(status.last_errors[0].what.contains("virtioblkctl continue"), "{:?}", status.last_errors);
    // Reads pass, and other rings go on.
    assert_eq!(guest.read(0, 0, 1024), (OK, vec![1; 1024]));
    assert_eq!(guest.write(1, 32, &[3; 512]), OK);
    // What changes the disk waits in the ring.
    let next = guest.add(0, OUT, 16, &[4; 512], 0);
    let flush = guest.add(0, FLUSH, 0, &[], 0);
    guest.kick(0);
    wait_until("the next write waits", || is_held(&rig));
    unanswered(&mut guest, 0);
    assert_eq!((rig.status().total.in_flight, disk.volatile_image()[16 * 512]), (1, 0));
    assert_eq!(rig.disk.stopped_change(), Some(told));
    assert_eq!(rig.disk.continue_io(), 1);
    assert_eq!(continued(&rig), 0);
    assert_eq!([guest.wait(0), guest.wait(0), guest.wait(0)], [(failing, OK), (next, OK), (flush, OK)]);
    assert_eq!(guest.read(0, 8, 1024), (OK, vec![2; 1024]));
    let status = rig.status();
    assert_eq!((status.total.errors, status.total.kept, status.stopped.is_none()), (0, 0, true));
    assert_eq!((rig.disk.stopped_change(), rig.disk.continue_io()), (None, 0));
    assert!(rig.hold(1).is_ok());
}

#[test]
fn the_policy_decides_which_failed_requests_are_retained() {
    let table = [
        (OnError::Report, ENOSPC, [IOERR; 4]),
        (OnError::Enospc, EIO, [IOERR; 4]),
        (OnError::Enospc, Errno(122), [UNANSWERED; 4]),
        (OnError::Enospc, ENOSPC, [UNANSWERED; 4]),
        (OnError::Stop, EIO, [UNANSWERED; 4]),
    ];
    for (on_error, errno, expected) in table {
        for (number, (op, kind)) in
            [(MemOp::Read, IN), (MemOp::Write, OUT), (MemOp::Discard, DISCARD), (MemOp::WriteZeroes, WRITE_ZEROES)]
                .into_iter()
                .enumerate()
        {
            let (disk, rig) = served(on_error);
            let mut guest = FrontEnd::connect(&rig.path, 1, SIZE, ALL);
            assert_eq!(guest.write(0, 0, &[7; 4096]), OK);
            fail(&disk, op, errno);
            let range = [0u64.to_le_bytes().as_slice(), &8u32.to_le_bytes(), &[0; 4]].concat();
            let slot = match kind {
                IN => guest.add(0, IN, 0, &[], 4096),
                OUT => guest.add(0, OUT, 0, &[8; 4096], 0),
                kind => guest.add(0, kind, 0, &range, 0),
            };
            guest.kick(0);
            if expected[number] == IOERR {
                assert_eq!(guest.wait(0), (slot, IOERR), "{on_error} {errno:?} {op:?}");
                continue;
            }
            let told = stopped(&rig);
            assert_eq!((told.offset, told.len, told.errno, told.is_change()), (0, 4096, errno, kind != IN));
            unanswered(&mut guest, 0);
            assert_eq!(guest.status(0, slot), expected[number]);
            rig.disk.continue_io();
            assert_eq!(guest.wait(0), (slot, OK), "{on_error} {errno:?} {op:?}");
            let byte = match kind {
                IN => guest.memory.read_obj(guest.data_at(0, slot)).unwrap(),
                _ => disk.volatile_image()[4095],
            };
            assert_eq!(byte, [7, 8, 0xdb, 0][number], "{op:?}");
        }
    }
}

#[test]
fn a_retained_request_that_fails_again_is_retained_again() {
    let (disk, rig) = served(OnError::Stop);
    let mut guest = FrontEnd::connect(&rig.path, 1, SIZE, ALL);
    (1..=6).for_each(|nth| disk.fail(Fault { op: MemOp::Write, nth, errno: EIO, transferred: 0 }));
    // Together: once one of them has failed, a ring takes none that comes later.
    let slots = guest.add_writes(0, [(0, &[1; 512]), (8, &[2; 512]), (16, &[3; 512])]);
    guest.kick(0);
    for tries in 1..=2 {
        wait_until("all are kept", || disk.counts().writes == 3 * tries && rig.status().total.kept == 3);
        unanswered(&mut guest, 0);
        assert_eq!(rig.disk.continue_io(), 3);
    }
    assert_eq!([guest.wait(0), guest.wait(0), guest.wait(0)], [0, 1, 2].map(|n| (slots[n], OK)));
    assert_eq!(rig.status().total.errors, 0);
}

#[test]
fn a_failed_sync_is_final() {
    let (disk, rig) = served(OnError::Stop);
    let mut guest = FrontEnd::connect(&rig.path, 2, SIZE, ALL);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    fail(&disk, MemOp::Sync, EIO);
    assert_eq!(guest.flush(0), IOERR);
    // Both rings know: nobody could mend it.
    for ring in 0..2 {
        fail(&disk, MemOp::Write, EIO);
        assert_eq!(guest.write(ring, 0, &[2; 512]), IOERR);
    }
    assert_eq!((rig.status().stopped.is_none(), rig.status().sync_failed), (true, true));
    assert_eq!(guest.flush(1), IOERR);
}

#[test]
fn a_hold_waits_for_retained_requests() {
    let (disk, rig) = served(OnError::Enospc);
    let mut guest = FrontEnd::connect(&rig.path, 1, SIZE, ALL);
    fail(&disk, MemOp::Write, ENOSPC);
    let slot = guest.add(0, OUT, 0, &[1; 512], 0);
    guest.kick(0);
    stopped(&rig);
    rig.disk.close_gate(1);
    std::thread::sleep(Duration::from_millis(30));
    let settled = |event: &Event| matches!(event, Event::HoldSettled { .. });
    assert!(!rig.events.take().events.iter().any(settled));
    rig.disk.continue_io();
    let settled = rig.event(|event| match event {
        Event::HoldSettled { epoch: 1, result } => Some(result),
        _ => None,
    });
    assert_eq!(settled.map(|figures| figures.drained), Ok(1));
    assert_eq!(guest.wait(0), (slot, OK));
    rig.disk.open_gate();
    // A read that is kept is no reason: nothing of it is in the image.
    fail(&disk, MemOp::Read, ENOSPC);
    let slot = guest.add(0, IN, 0, &[], 512);
    guest.kick(0);
    assert!(!stopped(&rig).is_change());
    assert_eq!(rig.disk.stopped_change(), None);
    assert!(rig.hold(2).is_ok());
    rig.disk.continue_io();
    assert_eq!(guest.wait(0), (slot, OK));
    rig.disk.open_gate();
}

#[test]
fn a_stopped_ring_retries_its_retained_requests_once() {
    for fails_again in [true, false] {
        let (disk, rig) = served(OnError::Enospc);
        let mut guest = FrontEnd::connect(&rig.path, 1, SIZE, ALL);
        fail(&disk, MemOp::Write, ENOSPC);
        let slot = guest.add(0, OUT, 0, &[1; 512], 0);
        guest.kick(0);
        stopped(&rig);
        let held = guest.add(0, OUT, 8, &[2; 512], 0);
        guest.kick(0);
        wait_until("the next write waits", || is_held(&rig));
        if fails_again {
            fail(&disk, MemOp::Write, ENOSPC);
        }
        let base = guest.stop_ring(0);
        assert_eq!(guest.wait(0), (slot, if fails_again { IOERR } else { OK }));
        assert_eq!((base, rig.status().stopped.is_none()), (1, true));
        guest.restart_ring(0, base, 2);
        assert_eq!(guest.wait(0), (held, OK));
    }
}

#[test]
fn a_ring_restarted_for_new_memory_keeps_its_retained_requests() {
    let (disk, rig) = served(OnError::Enospc);
    let mut guest = FrontEnd::connect(&rig.path, 2, SIZE, ALL);
    (1..=8).for_each(|nth| disk.fail(Fault { op: MemOp::Write, nth, errno: ENOSPC, transferred: 0 }));
    let slots = guest.add_writes(0, [(0, &[1; 512]), (8, &[2; 512])]);
    guest.kick(0);
    stopped(&rig);
    wait_until("both are kept", || rig.status().total.kept == 2);
    let next = guest.add(0, OUT, 16, &[3; 512], 0);
    guest.kick(0);
    // Memory is plugged: every ring is restarted, and tries again; what waits in the ring comes along.
    for writes in [5, 8] {
        guest.send_memory_table();
        wait_until("they are kept again", || disk.counts().writes == writes && rig.status().total.kept == 3);
    }
    unanswered(&mut guest, 0);
    rig.disk.continue_io();
    assert_eq!([guest.wait(0), guest.wait(0), guest.wait(0)], [(slots[0], OK), (slots[1], OK), (next, OK)]);
    assert_eq!(guest.write(1, 24, &[4; 512]), OK);
    let image = disk.volatile_image();
    assert_eq!([0, 8, 16, 24].map(|sector| image[sector * 512]), [1, 2, 3, 4]);
    assert_eq!(rig.status().total.errors, 0);
}

#[test]
fn retained_requests_without_an_inflight_region_fail_at_the_end() {
    let (disk, rig) = served(OnError::Stop);
    let mut guest = FrontEnd::connect(&rig.path, 1, SIZE, ALL);
    (1..=2).for_each(|nth| disk.fail(Fault { op: MemOp::Write, nth, errno: EIO, transferred: 0 }));
    let slot = guest.add(0, OUT, 0, &[1; 512], 0);
    guest.kick(0);
    stopped(&rig);
    rig.device.shutdown();
    assert_eq!(guest.wait(0), (slot, IOERR));
}

fn tracking(rig: &Rig) -> FrontEnd {
    let mut guest = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, SIZE, ALL);
    guest.also(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    guest
}

#[test]
fn retained_requests_are_carried_out_by_the_next_server() {
    let (first_disk, first) = served(OnError::Enospc);
    let (second_disk, second) = served(OnError::Enospc);
    let mut guest = tracking(&first);
    let wanted = VhostUserInflight { num_queues: 1, queue_size: SIZE, ..VhostUserInflight::default() };
    let (told, region) = guest.control.get_inflight_fd(&wanted).unwrap();
    guest.control.set_inflight_fd(&told, region.as_raw_fd()).unwrap();
    guest.start_ring(0, 0);
    assert_eq!(guest.write(0, 0, &[9; 512]), OK);
    fail(&first_disk, MemOp::Write, ENOSPC);
    let slots = guest.add_writes(0, [(0, &[1; 512]), (8, &[2; 512])]);
    guest.kick(0);
    stopped(&first);
    assert_eq!(guest.wait(0), (slots[1], OK), "it was taken with the other one");
    // A change of the memory table first: what is kept is still known afterwards.
    fail(&first_disk, MemOp::Write, ENOSPC);
    guest.send_memory_table();
    stopped(&first);
    first.device.shutdown();
    unanswered(&mut guest, 0);
    // As QEMU does when its server is gone.
    fail(&second_disk, MemOp::Write, ENOSPC);
    let mut next = tracking(&second);
    next.memory = guest.memory.clone();
    next.send_memory_table();
    std::mem::swap(&mut next.rings, &mut guest.rings);
    next.rings[0].kick = EventFd::new(EFD_NONBLOCK).unwrap();
    next.control.set_inflight_fd(&told, region.as_raw_fd()).unwrap();
    let used: u16 = next.memory.read_obj(GuestAddress(next.rings[0].used_at().0 + 2)).unwrap();
    let avail = next.rings[0].avail;
    next.restart_ring(0, used, avail);
    assert_eq!(stopped(&second).offset, 0);
    unanswered(&mut next, 0);
    second.disk.continue_io();
    assert_eq!(next.wait(0), (slots[0], OK));
    assert_eq!(second_disk.volatile_image()[0], 1);
}

/// Requests of every kind on two rings that fail at random, while rings are restarted and the operator lets them go on:
/// each is answered once and well, and the image is what was written.
#[test]
fn every_request_is_completed_once_whatever_fails() {
    for seed in 1..=20 {
        let (disk, rig) = served(OnError::Stop);
        let mut guest = FrontEnd::connect(&rig.path, 2, SIZE, ALL);
        let mut prng = Prng::new(seed);
        let mut expected = vec![0; 1 << 20];
        for round in 0..40u8 {
            let mut sent = [Vec::new(), Vec::new()];
            for sector in 0..8u64 {
                let ring = prng.below(2) as usize;
                let (place, byte) = ((round % 4) as u64 * 8 + sector, round * 3 + sector as u8);
                let errno = if prng.below(2) == 0 { EIO } else { ENOSPC };
                let op = [MemOp::Write, MemOp::Read][prng.below(2) as usize];
                disk.fail(Fault { op, nth: 1 + prng.below(12), errno, transferred: prng.below(512) as usize });
                sent[ring].push(if prng.below(4) == 0 {
                    guest.add(ring, IN, place, &[], 512)
                } else {
                    expected[place as usize * 512..][..512].fill(byte);
                    guest.add(ring, OUT, place, &[byte; 512], 0)
                });
                guest.kick(ring);
            }
            match prng.below(6) {
                0 => guest.send_memory_table(),
                1 => rig.disk.close_gate(u64::from(round) + 1),
                _ => {}
            }
            for (ring, slots) in sent.iter_mut().enumerate() {
                while !slots.is_empty() {
                    if let Some((head, _)) = guest.used_within(ring, Duration::from_millis(2)) {
                        let slot = (head / 4) as u16;
                        guest.give_back(ring, slot);
                        assert_eq!(guest.status(ring, slot), OK, "seed {seed}");
                        let at = slots.iter().position(|sent| *sent == slot).expect("answered once");
                        slots.remove(at);
                    }
                    rig.disk.continue_io();
                    rig.disk.open_gate();
                }
            }
        }
        assert!(disk.volatile_image() == expected, "seed {seed}");
        // The last answer comes before its count.
        wait_until("nothing is in flight", || rig.status().total.in_flight == 0);
        assert_eq!(rig.status().total.errors, 0);
    }
}
