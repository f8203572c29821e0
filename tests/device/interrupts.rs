//! Interrupts: on the descriptor that there is, and only when the driver wants them.

use std::time::Duration;

use kit::front_end::*;
use vhost::VhostBackend;
use virtioblkd::engine::CacheMode;
use vm_memory::Bytes;

use super::file_rig::*;

#[test]
fn a_running_ring_uses_its_new_call_descriptor() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT), "an interrupt");
    guest.rings[0].call = vmm_sys_util::eventfd::EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
    guest.control.set_vring_call(0, &guest.rings[0].call).unwrap();
    consume(&guest.rings[0].call);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT), "an interrupt on the new descriptor");
}

#[test]
fn a_completion_before_set_vring_call_is_signalled_with_it() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    let base = guest.stop_ring(0);
    let avail = guest.rings[0].avail;
    // GET_VRING_BASE took the descriptor away; QEMU's `cont` starts the ring and sends a new one last.
    guest.restart_ring_without_call(0, base, avail);
    consume(&guest.rings[0].call);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(!readable(&guest.rings[0].call, Duration::from_millis(20)));
    guest.control.set_vring_call(0, &guest.rings[0].call).unwrap();
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT));
}

#[test]
fn without_event_idx_the_no_interrupt_flag_is_honoured() {
    let rig = rig(CacheMode::None);
    let mut guest = FrontEnd::connect(&rig.path, 1, 64, !F_EVENT_IDX);
    let flags_at = guest.rings[0].avail_at();
    guest.memory.write_obj(1u16, flags_at).unwrap();
    consume(&guest.rings[0].call);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(!readable(&guest.rings[0].call, Duration::from_millis(50)));
    guest.memory.write_obj(0u16, flags_at).unwrap();
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    assert!(readable(&guest.rings[0].call, WAIT_TIMEOUT));
}
