//! Front-ends and guests that are hostile or wrong: descriptors that are no eventfds, messages out of order, malformed requests
//! by the thousand. The device continues, and each request is completed once. Random messages and chains: `random.rs`.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use kit::front_end::*;
use kit::rig::Rig;
use rustix::event::{EventfdFlags, eventfd};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use virtioblkd::backend::Errno;
use virtioblkd::backend::mem::{Fault, MemBackend, MemOp, MemOptions};
use virtioblkd::disk::{Event, EventBatch};
use vmm_sys_util::eventfd::EventFd;

use super::wire::*;

#[test]
fn a_descriptor_that_is_no_eventfd_is_refused() {
    let rig = memory_disk();
    let (_reader, pipe) = full_pipe();
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    let (socket, _peer) = UnixStream::pair().unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let zero = File::open("/dev/zero").unwrap();
    for what in [pipe.as_fd(), file.as_fd(), socket.as_fd(), epoll.as_fd(), zero.as_fd()] {
        for code in [code::SET_VRING_KICK, code::SET_VRING_CALL, code::SET_VRING_ERR] {
            let (_guest, wire) = connect(&rig);
            assert!(!accepted(&wire, code, &0u64.to_le_bytes(), &[what]), "{what:?} for {code}");
        }
    }
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let (guest, wire) = connect(&rig);
    for code in [code::SET_VRING_KICK, code::SET_VRING_CALL, code::SET_VRING_ERR] {
        assert!(accepted(&wire, code, &0u64.to_le_bytes(), &[event.as_fd()]), "{code}");
    }
    drop((guest, wire));
    serves(&rig);
}

#[test]
fn a_full_eventfd_blocks_no_thread() {
    let rig = memory_disk();
    let stream = UnixStream::connect(&rig.path).unwrap();
    let mut guest = FrontEnd::handshake(stream, 2, 64, ALL);
    for ring in &mut guest.rings {
        // Without EFD_NONBLOCK.
        ring.call = EventFd::new(0).unwrap();
        ring.call.write(u64::MAX - 1).unwrap();
    }
    (0..2).for_each(|ring| guest.start_ring(ring, 0));
    for ring in [0, 1, 0] {
        assert_eq!(guest.write(ring, 0, &[1; 512]), OK);
    }
    assert_eq!([0, 1].map(|ring| guest.stop_ring(ring)), [2, 1]);
    drop(guest);
    serves(&rig);
}

/// virtio-queue counts the answers since it last looked for a wish to be interrupted, in 16 bits, and looks only where
/// EVENT_IDX was negotiated.
#[test]
fn the_first_completion_after_event_idx_is_negotiated_interrupts_the_guest() {
    let rig = memory_disk();
    let mut guest = FrontEnd::connect(&rig.path, 1, 256, !F_EVENT_IDX);
    let mut left = u16::MAX;
    while left > 0 {
        let batch = left.min(60);
        for _ in 0..batch {
            guest.add(0, GET_ID, 0, &[], 20);
        }
        guest.kick(0);
        for _ in 0..batch {
            assert_eq!(guest.wait(0).1, OK);
        }
        left -= batch;
    }
    let features = guest.features | F_EVENT_IDX;
    guest.control.set_features(features).unwrap();
    consume(&guest.rings[0].call);
    assert_eq!(guest.read(0, 0, 512).0, OK);
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT), "the guest would wait for ever");
}

#[test]
fn a_broken_ring_signals_its_error_descriptor() {
    let rig = memory_disk();
    let (mut guest, _wire) = connect(&rig);
    let error = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    guest.control.set_vring_err(0, &error).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(!readable(&error, Duration::ZERO));
    // A head that no ring has.
    guest.make_available(0, 64);
    guest.kick(0);
    assert!(readable(&error, WAIT_TIMEOUT));
}

#[test]
fn messages_out_of_order_end_only_their_connection() {
    let rig = memory_disk();
    let zero = 0u64.to_le_bytes();
    let connected = || {
        let wire = UnixStream::connect(&rig.path).unwrap();
        wire.set_read_timeout(Some(WAIT_TIMEOUT)).unwrap();
        wire
    };
    // Addresses before memory: the connection ends.
    let wire = connected();
    send(&wire, code::SET_VRING_ADDR, 0, &[0; 40], &[]).unwrap();
    assert_eq!((&wire).read(&mut [0; 1]).unwrap(), 0);
    // The base of a ring that never was is zero.
    let wire = connected();
    send(&wire, code::GET_VRING_BASE, 0, &zero, &[]).unwrap();
    let mut reply = [0; 20];
    (&wire).read_exact(&mut reply).unwrap();
    assert_eq!(reply[12..], [0; 8]);
    drop(wire);
    // The configuration space from anywhere, as much as a message holds; a size that is none is answered with nothing.
    for (offset, size) in [(0u32, 60u32), (0, 256), (59, 1), (60, 196), (0x100, 60), (255, 1), (4095, 1), (4095, 2)] {
        let wire = connected();
        let features = (1u64 << 30).to_le_bytes();
        send(&wire, code::GET_FEATURES, 0, &[], &[]).unwrap();
        (&wire).read_exact(&mut [0; 20]).unwrap();
        send(&wire, code::SET_FEATURES, 0, &features, &[]).unwrap();
        send(&wire, code::SET_PROTOCOL_FEATURES, 0, &(1u64 << 9).to_le_bytes(), &[]).unwrap();
        let mut body: Vec<u8> = [offset, size, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        body.resize(12 + size as usize, 0);
        send(&wire, code::GET_CONFIG, 0, &body, &[]).unwrap();
        let mut answer = vec![0; 24 + size as usize];
        if offset + size <= 4096 {
            (&wire).read_exact(&mut answer).unwrap();
        } else {
            // Past what the protocol allows.
            assert_eq!((&wire).read(&mut answer).unwrap(), 0, "{offset} {size}");
        }
    }
    // Without protocol features the rings need no SET_VRING_ENABLE, also if that is settled late.
    let (mut guest, wire) = connect(&rig);
    guest.control.set_vring_enable(0, false).unwrap();
    let features = guest.features & !F_PROTOCOL;
    guest.control.set_features(features).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    drop((guest, wire));
    serves(&rig);
}

#[test]
fn a_connection_that_ends_within_a_message_is_a_disconnect() {
    let rig = memory_disk();
    for bytes in [&[][..], &[1], &[2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0], &[5, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0, 1, 2, 3]]
    {
        let mut wire = UnixStream::connect(&rig.path).unwrap();
        wire.write_all(bytes).unwrap();
        drop(wire);
        rig.disconnected();
    }
    let long: Vec<u8> = [2u32, 1, u32::MAX].iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut wire = UnixStream::connect(&rig.path).unwrap();
    wire.write_all(&long).unwrap();
    assert!(rig.disconnected().contains("broke the protocol"));
    serves(&rig);
}

#[test]
fn thousands_of_malformed_requests_fill_neither_log_nor_status() {
    let disk = Arc::new(MemBackend::new(MemOptions::new(1 << 20)));
    let rig = Rig::on(disk.clone(), &options());
    let (mut guest, _wire) = connect(&rig);
    let failed_write = |guest: &mut FrontEnd| {
        disk.fail(Fault { op: MemOp::Write, nth: 1, errno: Errno(28), transferred: 0 });
        assert_eq!(guest.write(0, 0, &[1; 512]), 1);
    };
    failed_write(&mut guest);
    for _ in 0..500 {
        for slot in 0..10u16 {
            guest.put_chain(0, slot, &[(0x80_0000, 3, 0)]);
            guest.make_available(0, slot);
        }
        guest.kick(0);
        for _ in 0..10 {
            guest.used_within(0, WAIT_TIMEOUT).expect("returned");
        }
    }
    failed_write(&mut guest);
    let status = rig.status();
    assert_eq!(status.last_errors.len(), 8);
    let first = &status.last_errors[0].what;
    assert!(first.contains("No space left"), "the guest hid the disk's own error: {status:?}");
    let EventBatch { events, dropped } = rig.events.take();
    assert!(events.len() <= 256 && dropped > 0, "{} events, {dropped} dropped", events.len());
    assert!(matches!(events.last(), Some(Event::IoError(_))), "{:?}", events.last());
}
