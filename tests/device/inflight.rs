//! What a server that dies had taken and not answered: the next one does it again, in order, before anything new, unless
//! another driver has the device.

use std::time::Duration;

use kit::front_end::*;
use kit::wait::wait_until;
use vhost::vhost_user::VhostUserFrontend;
use virtioblkd::backend::mem::CompletionOrder;
use virtioblkd::disk::Disk;
use vm_memory::Bytes;

use super::tracking::*;

#[test]
fn in_flight_requests_are_resubmitted_in_order_before_new_ones() {
    let (first_disk, first) = server(CompletionOrder::OnRequest);
    let (second_disk, second) = server(CompletionOrder::InOrder);
    let _released = Released(first_disk.clone());
    let mut guest = Guest::new(&first);
    // Some are answered out of the ring's order: the RAM disk answers in order, but GET_ID at once.
    let write = |guest: &mut Guest, sector, byte| guest.front_end.add(0, OUT, sector, &[byte; SECTOR], 0);
    let taken = [write(&mut guest, 0, 1), write(&mut guest, 0, 2), write(&mut guest, 0, 3)];
    let id = guest.front_end.add(0, GET_ID, 0, &[], 20);
    let last = write(&mut guest, 0, 4);
    guest.front_end.kick(0);
    assert_eq!(guest.front_end.wait(0), (id, OK));
    // Its slot, and so its head, is used again; and one answered in the middle makes the heads' order differ.
    let again = write(&mut guest, 8, 5);
    guest.front_end.kick(0);
    assert_eq!(again, id);
    wait_until("the requests are taken", || first_disk.waiting() >= 5);
    first_disk.release(1);
    assert_eq!(guest.front_end.wait(0), (taken[0], OK));
    let _old = guest.reconnect(&second);
    let answered: Vec<_> = (0..4).map(|_| guest.front_end.wait(0)).collect();
    assert_eq!(answered, [(taken[1], OK), (taken[2], OK), (last, OK), (again, OK)]);
    assert_eq!(second_disk.volatile_image()[..SECTOR], [4; SECTOR], "the last one is the last one");
    assert_eq!(second_disk.counts().writes, 4);
    assert_eq!(guest.front_end.read(0, 8, SECTOR as u32), (OK, vec![5; SECTOR]), "and it goes on");
}

#[test]
fn blocked_requests_are_not_marked_in_flight() {
    let (first_disk, first) = server(CompletionOrder::OnRequest);
    let (second_disk, second) = server(CompletionOrder::InOrder);
    let _released = Released(first_disk.clone());
    let mut guest = Guest::new(&first);
    let taken = guest.front_end.add(0, OUT, 0, &[1; SECTOR], 0);
    guest.front_end.kick(0);
    wait_until("the requests are taken", || first_disk.waiting() >= 1);
    first.disk.close_gate(1);
    let held = guest.front_end.add(0, OUT, 8, &[2; SECTOR], 0);
    guest.front_end.kick(0);
    wait_until("the write is blocked", || first.status().rings[0].held);
    // The operator holds the next server, too, before the front-end comes.
    assert!(second.hold(1).is_ok());
    let _old = guest.reconnect(&second);
    assert_eq!(guest.front_end.used_within(0, Duration::from_millis(200)), None);
    assert_eq!(second_disk.counts().writes, 0, "a held disk was changed by what an earlier server owed");
    // Stopped and started while it is held: nothing is lost.
    let base = guest.front_end.stop_ring(0);
    let avail = guest.front_end.rings[0].avail;
    guest.front_end.restart_ring(0, base, avail);
    assert_eq!(guest.front_end.used_within(0, Duration::from_millis(100)), None);
    second.disk.open_gate();
    assert_eq!([guest.front_end.wait(0), guest.front_end.wait(0)], [(taken, OK), (held, OK)]);
    assert_eq!(second_disk.counts().writes, 2, "each once");
    first.disk.open_gate();
}

/// The server dies with requests in flight, and before the next one comes the guest is reset. QEMU gives the new driver
/// fresh memory; a front-end that does not must not have the new guest's memory written by what the old one asked for.
#[test]
fn requests_of_an_earlier_driver_are_dropped() {
    for keeps_the_region in [false, true] {
        let (first_disk, first) = server(CompletionOrder::OnRequest);
        let (second_disk, second) = server(CompletionOrder::InOrder);
        let _released = Released(first_disk.clone());
        let mut guest = Guest::new(&first);
        let read = guest.front_end.add(0, IN, 0, &[], SECTOR as u32);
        let written = guest.front_end.add(0, OUT, 8, &[1; SECTOR], 0);
        guest.front_end.kick(0);
        wait_until("the requests are taken", || first_disk.waiting() >= 2);
        // The reset: the new driver's ring lies where the old one did, and other things where its buffers were.
        let mine = [0x77; SECTOR];
        let places = [read, written].map(|slot| guest.front_end.data_at(0, slot));
        guest.front_end.reset_ring_memory(0);
        for place in places {
            guest.front_end.memory.write_slice(&mine, place).unwrap();
        }
        let mut front_end = handshake(&second);
        if !keeps_the_region {
            (guest.told, guest.region) = front_end.control.get_inflight_fd(&guest.told).unwrap();
        }
        drop(front_end);
        let _old = guest.reconnect(&second);
        assert_eq!(guest.front_end.used_within(0, Duration::from_millis(100)), None, "{keeps_the_region}");
        let counts = second_disk.counts();
        assert_eq!((counts.reads, counts.writes), (0, 0), "{keeps_the_region}");
        for place in places {
            let mut found = [0; SECTOR];
            guest.front_end.memory.read_slice(&mut found, place).unwrap();
            assert_eq!(found, mine, "{keeps_the_region}");
        }
        // The new driver is served, and tracked: the next server does what it asked for, and only that.
        assert_eq!(guest.front_end.write(0, 16, &[2; SECTOR]), OK);
        assert_eq!(guest.front_end.read(0, 8, SECTOR as u32), (OK, vec![0; SECTOR]));
    }
}

/// The same without a death: a ring that is stopped while an earlier server's requests are held leaves them in the region.
#[test]
fn blocked_requests_of_an_earlier_driver_are_dropped() {
    let (first_disk, first) = server(CompletionOrder::OnRequest);
    let (second_disk, second) = server(CompletionOrder::InOrder);
    let _released = Released(first_disk.clone());
    let mut guest = Guest::new(&first);
    guest.front_end.add(0, OUT, 0, &[1; SECTOR], 0);
    guest.front_end.kick(0);
    wait_until("the requests are taken", || first_disk.waiting() >= 1);
    assert!(second.hold(1).is_ok());
    let _old = guest.reconnect(&second);
    guest.front_end.stop_ring(0);
    // The driver is reset; the front-end says nothing of a region.
    guest.front_end.reset_ring_memory(0);
    guest.front_end.start_ring(0, 0);
    second.disk.open_gate();
    assert_eq!(guest.front_end.used_within(0, Duration::from_millis(100)), None);
    assert_eq!(second_disk.counts().writes, 0, "the earlier driver's write was done");
    assert_eq!(guest.front_end.write(0, 8, &[2; SECTOR]), OK);
}

#[test]
fn after_an_orderly_restart_nothing_is_resubmitted() {
    let (_, first) = server(CompletionOrder::Shuffled(7));
    let (second_disk, second) = server(CompletionOrder::Shuffled(8));
    let mut guest = Guest::new(&first);
    for round in 0..100u64 {
        for sector in 0..10 {
            guest.front_end.add(0, OUT, sector, &[round as u8; SECTOR], 0);
        }
        guest.front_end.kick(0);
        (0..10).for_each(|_| assert_eq!(guest.front_end.wait(0).1, OK));
    }
    guest.front_end.stop_ring(0);
    let old = guest.reconnect(&second);
    assert_eq!(guest.front_end.read(0, 0, SECTOR as u32).0, OK);
    assert_eq!(second_disk.counts().writes, 0);
    drop(old);
}
