//! Guest memory that is not shared with virtioblkd is reported with the fix.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use kit::front_end::*;
use kit::rig::Rig;
use kit::wait::wait_until;
use vhost::VhostBackend;
use virtioblkd::backend::mem::{MemBackend, MemOptions};
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{DeviceOptions, Tuning};
use vm_memory::{Bytes, GuestAddress};

use super::file_rig::*;

/// QEMU without a shared memory back-end sends no region, sets up its ring, is refused, and connects again at once.
#[test]
fn guest_memory_that_is_not_shared_is_reported_once_with_the_fix() {
    let rig = rig(CacheMode::None);
    for _ in 0..5 {
        let guest = FrontEnd::handshake(UnixStream::connect(&rig.path).unwrap(), 1, 128, ALL);
        let mut place = guest.ring_config(0);
        place.desc_table_addr = 0x1000;
        guest.control.set_vring_num(0, 128).unwrap();
        guest.control.set_vring_addr(0, &place).unwrap_err();
        drop(guest);
        rig.disconnected();
    }
    let errors = rig.status().last_errors;
    assert_eq!((errors.len(), errors[0].times), (1, 5), "{errors:?}");
    for part in ["memory-backend-memfd", "share=on", "<access mode='shared'/>"] {
        assert!(errors[0].what.contains(part), "{errors:?}");
    }
    assert_eq!(connect(&rig, 1).write(0, 0, &[1; 512]), OK, "memory that is shared is served");
}

/// A device whose rings are looked at often.
fn watched_rig() -> Rig {
    let backend = Arc::new(MemBackend::new(MemOptions::new(SIZE)));
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 2, queue_size: 256, serial: String::new() };
    let tuning = Tuning { stall_after: Duration::from_millis(400), ..Tuning::default() };
    Rig::tuned(backend, &options, &tuning)
}

/// With share=off in QEMU the guest's writes do not reach the file that virtioblkd maps: all of it stays zero for us.
#[test]
fn memory_that_the_guest_writes_privately_is_reported_with_the_fix() {
    let rig = watched_rig();
    let guest = connect(&rig, 2);
    guest.kick(0);
    guest.kick(1);
    wait_until("the memory is reported", || !rig.status().last_errors.is_empty());
    std::thread::sleep(Duration::from_secs(1));
    let errors = rig.status().last_errors;
    assert_eq!(errors.len(), 1, "{errors:?}");
    for part in ["share=off", "memory-backend-memfd", "share=on", "<access mode='shared'/>"] {
        assert!(errors[0].what.contains(part), "{errors:?}");
    }
}

/// A driver may kick when there is nothing: at its start, before it makes a request available, and at any later time.
#[test]
fn kicks_of_an_empty_ring_in_shared_memory_are_not_reported() {
    let rig = watched_rig();
    let mut guest = connect(&rig, 2);
    // Something that the guest wrote long before it found its disk.
    guest.memory.write_obj(0xf000_ff53_u32, GuestAddress(0x40)).unwrap();
    guest.kick(0);
    guest.kick(1);
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    for _ in 0..50 {
        guest.kick(0);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    let errors = rig.status().last_errors;
    assert!(errors.is_empty(), "{errors:?}");
}
