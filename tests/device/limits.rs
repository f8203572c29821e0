//! Limits of the disk's rates: what must wait stays in the ring, and nothing but the guest waits for a limit.

use std::time::{Duration, Instant};

use kit::front_end::*;
use kit::wait::wait_until;
use virtioblkd::disk::Disk;
use virtioblkd::engine::CacheMode;
use virtioblkd::engine::throttle::{Limits, Words};
use virtioblkd::virtio::Tuning;

use super::file_rig::*;

/// A request of this size fills the bucket of [`SLOW`] for two minutes.
static LARGE: [u8; 64 << 10] = [7; 64 << 10];
const SLOW: u64 = 512;
/// How long to look for a completion that must not come.
const SOON: Duration = Duration::from_millis(100);

fn limits(values: &[(&str, u64)]) -> Limits {
    let mut limits = Limits::default();
    for (name, value) in values {
        assert!(limits.set(Words::Libvirt, name, *value), "{name}");
    }
    limits.check(Words::Libvirt).unwrap();
    limits
}

fn limited(values: &[(&str, u64)]) -> FileRig {
    rig_tuned(CacheMode::Writeback, |_| (), &Tuning { limits: limits(values), ..Tuning::default() })
}

/// A disk whose ring 0 has written once and whose next write, at this slot, must wait for two minutes.
fn waiting(name: &str) -> (FileRig, FrontEnd, u16) {
    let rig = limited(&[(name, SLOW)]);
    let mut guest = connect(&rig, 2);
    assert_eq!(guest.write(0, 0, &LARGE), OK, "the first one finds an empty bucket");
    let slot = guest.add(0, OUT, 128, &LARGE, 0);
    guest.kick(0);
    wait_until("the second one waits", || rig.status().rings[0].limited);
    (rig, guest, slot)
}

#[test]
fn a_limit_is_kept_and_what_waits_is_in_the_ring() {
    let rig = limited(&[("total-iops-sec", 50)]);
    let mut guest = connect(&rig, 1);
    let start = Instant::now();
    for _ in 0..60 {
        guest.add(0, IN, 0, &[], 512);
    }
    guest.kick(0);
    wait_until("the ring waits", || rig.status().rings[0].limited && rig.status().rings[0].in_flight == 0);
    for _ in 0..60 {
        assert_eq!(guest.wait(0).1, OK);
    }
    // A tenth of a second's worth and one more go at once: 54 are left, of which the last has gone after 1.06 s.
    assert!(start.elapsed() > Duration::from_secs(1), "{:?}", start.elapsed());
    assert!(!rig.status().total.limited && rig.status().total.reads == 60);
    // Each waits a fiftieth of a second as the foremost, or shorter if the machine was late.
    let latency = rig.disk.latency();
    let waited = &latency.limited;
    assert!((1..=59).contains(&waited.count()), "{waited:?}");
    assert!(waited.quantile(1.0) > Some(Duration::from_millis(10)), "{waited:?}");
    assert_eq!(latency.request.read.count(), 60);
    assert_eq!(rig.status().throttle.unwrap().limits(), limits(&[("total-iops-sec", 50)]));
}

#[test]
fn a_hold_and_a_stop_do_not_wait_for_a_limit() {
    let (rig, mut guest, slot) = waiting("total-bytes-sec");
    let figures = rig.hold(1).unwrap();
    assert_eq!((figures.rings, figures.drained), (2, 0));
    rig.disk.open_gate();
    assert_eq!(rig.status().rings[0].in_flight, 0);
    let base = guest.stop_ring(0);
    assert_eq!((base, guest.status(0, slot)), (1, UNANSWERED), "it was not taken");
    // What the stopped ring waited for is another ring's: nothing is counted for a request that will not go.
    let avail = guest.rings[0].avail;
    guest.start_ring(0, base);
    guest.rings[0].avail = avail;
    assert_eq!(guest.used_within(0, SOON), None, "it waits again");
    rig.disk.set_limits(Limits::default());
    assert_eq!(guest.wait(0), (slot, OK), "no kick was needed");
    assert_eq!(rig.status().throttle, None);
}

#[test]
fn a_changed_limit_takes_effect_for_a_request_that_waits() {
    let (rig, mut guest, slot) = waiting("write-bytes-sec");
    rig.disk.set_limits(limits(&[("total-iops-sec", 1000)]));
    assert_eq!(guest.wait(0), (slot, OK));
    assert_eq!(guest.read(0, 128, LARGE.len() as u32), (OK, LARGE.to_vec()));
}

#[test]
fn reads_and_flushes_pass_a_write_that_waits_for_a_limit_of_writes() {
    let (rig, mut guest, slot) = waiting("write-bytes-sec");
    let next = guest.add(0, OUT, 256, &LARGE, 0);
    assert_eq!(guest.read(0, 128, 512), (OK, vec![0; 512]), "behind both writes");
    assert_eq!(guest.flush(0), OK);
    assert_eq!((rig.hold(1).unwrap().drained, rig.status().rings[0].in_flight), (0, 0));
    rig.disk.open_gate();
    assert_eq!(guest.used_within(0, SOON), None);
    // What was set aside cannot be handed back to the front-end, so a stop has it done without the limit.
    assert_eq!(guest.stop_ring(0), 5);
    assert_eq!((guest.status(0, slot), guest.status(0, next)), (OK, OK));
}

#[test]
fn writes_pass_a_read_that_waits_for_a_limit_of_reads() {
    let rig = limited(&[("read-bytes-sec", SLOW), ("write-iops-sec", 1000)]);
    let mut guest = connect(&rig, 1);
    assert_eq!(guest.read(0, 0, LARGE.len() as u32).0, OK);
    let read = guest.add(0, IN, 0, &[], 512);
    assert_eq!(guest.write(0, 0, &LARGE), OK, "behind the read");
    assert_eq!(guest.used_within(0, SOON), None);
    rig.disk.set_limits(Limits::default());
    assert_eq!(guest.wait(0), (read, OK));
}

#[test]
fn a_write_whose_time_comes_during_a_hold_waits_for_the_hold() {
    let rig = limited(&[("total-iops-sec", 5)]);
    let mut guest = connect(&rig, 1);
    assert_eq!((guest.write(0, 0, &[1; 512]), rig.hold(1).unwrap().drained), (OK, 0));
    let held = guest.add(0, OUT, 0, &[2; 512], 0);
    guest.kick(0);
    wait_until("the write is blocked", || rig.status().rings[0].held && !rig.status().rings[0].limited);
    assert_eq!(guest.used_within(0, SOON), None);
    rig.disk.open_gate();
    assert_eq!(guest.wait(0), (held, OK));
}

#[test]
fn rings_share_a_limit_evenly() {
    let rig = limited(&[("total-iops-sec", 40)]);
    let mut guest = connect(&rig, 2);
    for ring in [0, 1] {
        for _ in 0..60 {
            guest.add(ring, IN, 0, &[], 512);
        }
    }
    // The first ring has as much as the bucket holds at once before the second one comes.
    guest.kick(0);
    guest.kick(1);
    wait_until("60 are done", || rig.status().total.reads >= 60);
    let rings = rig.status().rings;
    let (one, other) = (rings[0].reads, rings[1].reads);
    assert!(one.abs_diff(other) <= 8, "{one} and {other}");
}

#[test]
fn discards_count_as_operations_without_bytes() {
    let rig = limited(&[("total-bytes-sec", SLOW)]);
    let mut guest = connect(&rig, 1);
    for _ in 0..3 {
        assert_eq!(guest.range(0, DISCARD, 0, 2048, 0), OK);
    }
    assert_eq!(guest.range(0, WRITE_ZEROES, 0, 128, 0), OK);
    let slot = guest.add(0, IN, 0, &[], 512);
    guest.kick(0);
    assert_eq!((guest.used_within(0, SOON), guest.status(0, slot)), (None, UNANSWERED));
}
