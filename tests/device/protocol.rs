//! The device model, in process, under a front-end that sends control messages in any order: rings that start, stop,
//! break and are too small, and the end of a connection.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use kit::front_end::*;
use kit::rig::Rig;
use kit::wait::wait_until;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::disk::{Disk, Event};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::DeviceOptions;
use vm_memory::{Bytes, GuestAddress};

use super::file_rig::*;

/// Feature bits of VIRTIO_BLK_F_SEG_MAX and VIRTIO_RING_F_INDIRECT_DESC.
const F_SEG_MAX: u64 = 1 << 2;

const F_INDIRECT: u64 = 1 << 28;

/// A driver that puts each segment into a descriptor of the ring hangs when a request does not fit into it.
#[test]
fn a_ring_too_small_for_the_largest_request_is_reported() {
    for (size, mask, reported) in [
        (64, ALL & !F_INDIRECT, true),
        (64, ALL, false),
        (128, ALL & !F_INDIRECT, false),
        (64, !(F_INDIRECT | F_SEG_MAX), false),
    ] {
        let rig = rig(CacheMode::None);
        let mut guest = FrontEnd::connect(&rig.path, 2, size, mask);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK);
        assert_eq!(guest.write(1, 0, &[1; 512]), OK);
        let errors = rig.status().last_errors;
        assert_eq!(!errors.is_empty(), reported, "{size} descriptors, features {mask:x}: {errors:?}");
        assert!(errors.iter().all(|error| error.what.contains("--queue-size 64")), "{errors:?}");
    }
}

#[test]
fn a_ring_stopped_and_started_under_load_completes_each_request_once() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    let (mut sent, mut answered) = (0, 0);
    for round in 0..40 {
        for _ in 0..16 {
            guest.add(0, OUT, (sent % 1000) * 8, &pattern(round, 4096), 0);
            sent += 1;
        }
        guest.kick(0);
        let base = guest.stop_ring(0);
        while guest.used(0).is_some_and(|(head, _)| {
            let slot = (head / 4) as u16;
            assert_eq!(guest.status(0, slot), OK);
            guest.give_back(0, slot);
            true
        }) {
            answered += 1;
        }
        let avail = guest.rings[0].avail;
        assert_eq!(u64::from(base), answered % 65536, "what was taken was answered before the base was told");
        guest.restart_ring(0, base, avail);
        while answered < sent {
            assert_eq!(guest.wait(0).1, OK);
            answered += 1;
        }
    }
    assert_eq!(rig.disk.status().total.writes, sent);
}

#[test]
fn requests_complete_while_the_memory_table_changes() {
    let rig = rig(CacheMode::Writeback);
    let mut guest = connect(&rig, 2);
    for _ in 0..50 {
        for _ in 0..8 {
            guest.add(0, OUT, 0, &[3; 4096], 0);
            guest.add(1, IN, 0, &[], 4096);
        }
        guest.kick(0);
        guest.kick(1);
        guest.send_memory_table();
        for _ in 0..8 {
            assert_eq!(guest.wait(0).1, OK);
            assert_eq!(guest.wait(1).1, OK);
        }
    }
}

#[test]
fn a_disabled_ring_pops_nothing_and_continues_when_enabled() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    guest.control.set_vring_enable(0, false).unwrap();
    guest.add(0, OUT, 0, &[1; 512], 0);
    guest.kick(0);
    assert_eq!(guest.used_within(0, Duration::from_millis(50)), None);
    assert!(rig.disk.status().rings.is_empty(), "no thread for a ring at rest");
    guest.control.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.wait(0).1, OK);
}

/// Between SET_VRING_ADDR and the start of a ring its indices can still change: firmware hands its disk over to a system that
/// takes the ring up where it is.
#[test]
fn a_ring_continues_at_its_used_index() {
    let rig = rig(CacheMode::None);
    let mut front_end = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, 64, ALL);
    let config = front_end.ring_config(0);
    front_end.control.set_vring_num(0, 64).unwrap();
    front_end.control.set_vring_addr(0, &config).unwrap();
    let indices = [front_end.rings[0].avail_at(), front_end.rings[0].used_at()].map(|at| GuestAddress(at.0 + 2));
    let data = pattern(1, 512);
    // The second time as after a reset of the driver, of which only its memory tells.
    for round in 0..2 {
        indices.into_iter().for_each(|at| front_end.memory.write_obj(5u16, at).unwrap());
        (front_end.rings[0].avail, front_end.rings[0].used_seen) = (5, 5);
        front_end.control.set_vring_base(0, 5).unwrap();
        front_end.control.set_vring_kick(0, &front_end.rings[0].kick).unwrap();
        front_end.control.set_vring_call(0, &front_end.rings[0].call).unwrap();
        front_end.control.set_vring_enable(0, true).unwrap();
        assert_eq!(front_end.write(0, 0, &data), OK, "round {round}");
        assert_eq!(front_end.memory.read_obj::<u16>(indices[1]).unwrap(), 6, "round {round}");
        assert_eq!(front_end.stop_ring(0), 6, "round {round}");
    }
}

#[test]
fn a_broken_ring_stops_no_other_ring() {
    type Break = fn(&mut FrontEnd);
    let breaks: [(&str, Break); 3] = [
        ("available index", |guest| {
            let at = guest.rings[0].avail_at().0 + 2;
            guest.memory.write_obj(1000u16, GuestAddress(at)).unwrap();
        }),
        ("made available twice", |guest| {
            // Held, so that the first is still in flight when the second comes.
            guest.put_header(0x80_0000, OUT, 0);
            for _ in 0..2 {
                let parts = [(0x80_0000, 16, 0), (0x90_0000, 512 << 10, 0), (0x80_0040, 1, WRITE)];
                guest.put_chain(0, 200, &parts);
                guest.make_available(0, 200);
            }
        }),
        ("outside the ring", |guest| guest.make_available(0, 256)),
    ];
    for (what, break_it) in breaks {
        let rig = rig(CacheMode::None);
        let mut guest = connect(&rig, 2);
        break_it(&mut guest);
        guest.kick(0);
        let why = rig.event(|event| match event {
            Event::ProtocolError(why) => Some(why),
            _ => None,
        });
        assert!(why.starts_with("queue 0 stopped"), "{what}: {why}");
        assert_eq!(guest.write(1, 0, &[1; 512]), OK, "{what}: the other ring goes on");
        // A hold still settles, and a reset ring works again.
        rig.hold(1).unwrap();
        rig.disk.open_gate();
        guest.stop_ring(0);
        guest.reset_ring_memory(0);
        guest.start_ring(0, 0);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK, "{what}: set up anew");
    }
}

#[test]
fn a_front_end_that_misbehaves_is_dropped_and_the_next_is_served() {
    let rig = rig(CacheMode::None);
    type Misbehave = fn(&mut FrontEnd) -> bool;
    let cases: [(&str, Misbehave); 6] = [
        ("too many rings", |guest| guest.control.set_vring_num(8, 64).is_err()),
        ("a ring too large", |guest| guest.control.set_vring_num(0, 512).is_err()),
        ("not a power of two", |guest| guest.control.set_vring_num(0, 100).is_err()),
        ("a feature never offered", |guest| guest.control.set_features(u64::MAX).is_err()),
        ("in-flight region", |guest| {
            let wanted = vhost::vhost_user::message::VhostUserInflight::default();
            guest.control.get_inflight_fd(&wanted).is_err()
        }),
        ("gone", |_| true),
    ];
    for (what, misbehave) in cases {
        let mut guest = connect(&rig, 1);
        assert!(misbehave(&mut guest), "{what}");
        drop(guest);
        let mut guest = connect(&rig, 1);
        assert_eq!(guest.write(0, 0, &[1; 512]), OK, "after: {what}");
    }
}

#[test]
fn config_space_cannot_be_written() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    let before = guest.config(60);
    let flags = vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE;
    guest.control.set_config(32, flags, &[0]).unwrap();
    assert_eq!(guest.config(60), before);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
}

/// QEMU reads the used index when it sees the server gone, and gives the next one what is not answered by then.
#[test]
fn a_front_end_sees_the_disconnect_after_the_last_completion() {
    let options = MemOptions { order: CompletionOrder::OnRequest, ..MemOptions::new(SIZE) };
    let backend = Arc::new(MemBackend::new(options));
    let device = DeviceOptions { mode: CacheMode::Writeback, num_queues: 1, queue_size: 64, serial: String::new() };
    let rig = Rig::on(backend.clone(), &device);
    let stream = UnixStream::connect(&rig.path).unwrap();
    let wire = stream.try_clone().unwrap();
    let mut guest = FrontEnd::handshake(stream, 1, 64, ALL);
    guest.start_ring(0, 0);
    guest.add(0, OUT, 0, &[1; 512], 0);
    guest.kick(0);
    wait_until("the write is in flight", || backend.waiting() > 0);
    let ended = |timeout| {
        let timeout = Timespec { tv_sec: 0, tv_nsec: timeout };
        poll(&mut [PollFd::new(&wire, PollFlags::RDHUP)], Some(&timeout)).unwrap() > 0
    };
    std::thread::scope(|scope| {
        scope.spawn(|| rig.device.shutdown());
        let early = ended(300_000_000);
        // The write, and the sync at the end.
        backend.release(2);
        while !ended(1_000_000) {}
        assert!(!early, "a request is in flight");
        assert!(guest.used(0).is_some(), "answered before");
    });
}
