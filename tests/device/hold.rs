//! An operator's hold over the rings: writes stay in them, reads go on, and everything acknowledged is synced.

use std::time::Duration;

use kit::front_end::*;
use kit::wait::wait_until;
use virtioblkd::disk::Disk;
use virtioblkd::engine::CacheMode;

use super::file_rig::*;

#[test]
fn blocked_writes_stay_in_the_ring_and_reads_continue() {
    let rig = rig(CacheMode::Writeback);
    let mut guest = connect(&rig, 2);
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
    let figures = rig.hold(1).unwrap();
    assert_eq!((figures.rings, figures.drained), (2, 0));
    assert_eq!(guest.read(0, 0, 512).0, OK, "reads go on");
    let held = guest.add(0, OUT, 0, &[2; 512], 0);
    let behind = guest.add(0, IN, 0, &[], 512);
    guest.kick(0);
    wait_until("the write is blocked", || rig.status().rings[0].held);
    assert_eq!(guest.used_within(0, Duration::from_millis(100)), None, "the write and what is behind it wait");
    assert_eq!(guest.status(0, held), UNANSWERED);
    assert_eq!(guest.read(1, 0, 512), (OK, vec![1; 512]), "another ring's reads go on, and nothing was written");
    rig.disk.open_gate();
    let mut answered = [guest.wait(0), guest.wait(0)];
    answered.sort();
    let mut expected = [(held, OK), (behind, OK)];
    expected.sort();
    assert_eq!(answered, expected, "no kick was needed");
    assert_eq!(guest.read(0, 0, 512), (OK, vec![2; 512]));
}

#[test]
fn a_hold_syncs_in_every_mode() {
    for mode in CacheMode::ALL {
        let rig = rig(mode);
        let mut guest = connect(&rig, 1);
        assert_eq!(guest.write(0, 0, &[1; 4096]), OK);
        let before = rig.disk.status().total.syncs;
        rig.hold(7).unwrap();
        assert_eq!(rig.disk.status().total.syncs, before + 1, "{mode}");
        rig.disk.open_gate();
        assert_eq!(guest.write(0, 0, &[1; 4096]), OK, "{mode}: goes on");
    }
}

#[test]
fn a_hold_needs_no_front_end_and_survives_a_disconnect() {
    let rig = rig(CacheMode::Writeback);
    assert_eq!(rig.hold(1).unwrap().rings, 0);
    let mut guest = connect(&rig, 1);
    let held = guest.add(0, OUT, 0, &[1; 512], 0);
    guest.kick(0);
    assert_eq!(guest.used_within(0, Duration::from_millis(50)), None, "born into the hold");
    drop(guest);
    let mut guest = connect(&rig, 1);
    assert_eq!(guest.read(0, 0, 512), (OK, vec![0; 512]), "nothing was written: {held}");
    rig.disk.open_gate();
    assert_eq!(guest.write(0, 0, &[1; 512]), OK);
}

#[test]
fn get_vring_base_during_a_hold_loses_no_request() {
    let rig = rig(CacheMode::None);
    let mut guest = connect(&rig, 1);
    rig.hold(1).unwrap();
    guest.add(0, OUT, 0, &[9; 512], 0);
    guest.add(0, OUT, 8, &[9; 512], 0);
    guest.kick(0);
    std::thread::sleep(Duration::from_millis(20));
    let base = guest.stop_ring(0);
    assert_eq!(base, 0, "held writes were not taken");
    rig.disk.open_gate();
    assert_eq!(guest.used_within(0, Duration::from_millis(50)), None, "stopped is stopped");
    // QEMU's `cont`: the same ring from the base on; the requests are still in it.
    let avail = guest.rings[0].avail;
    guest.start_ring(0, base);
    guest.rings[0].avail = avail;
    assert_eq!((guest.wait(0).1, guest.wait(0).1), (OK, OK));
    assert_eq!(guest.read(0, 8, 512), (OK, vec![9; 512]));
}
