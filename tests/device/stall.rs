//! I/O that hangs is seen, while it hangs.

use std::sync::Arc;
use std::time::Duration;

use kit::front_end::*;
use kit::rig::Rig;
use kit::wait::wait_until;
use virtioblkd::backend::mem::{CompletionOrder, MemBackend, MemOptions};
use virtioblkd::disk::Event;
use virtioblkd::engine::CacheMode;
use virtioblkd::virtio::{DeviceOptions, Tuning};

#[test]
fn requests_that_hang_are_counted_and_reported_when_they_hang_and_when_they_end() {
    let disk = Arc::new(MemBackend::new(MemOptions { order: CompletionOrder::OnRequest, ..MemOptions::new(1 << 20) }));
    let options = DeviceOptions { mode: CacheMode::None, num_queues: 8, queue_size: 256, serial: String::new() };
    let limit = Duration::from_millis(100);
    let rig = Rig::tuned(disk.clone(), &options, &Tuning { stall_after: limit, ..Tuning::default() });
    let mut guest = FrontEnd::connect(&rig.path, 2, 256, ALL);
    guest.add(1, OUT, 0, &[1; 512], 0);
    guest.add(1, IN, 0, &[], 512);
    guest.kick(1);
    let told = rig.event(|event| match event {
        Event::IoStalled { ring, requests, oldest } => Some((ring, requests, oldest)),
        Event::IoResumed { .. } => panic!("nothing was stalled"),
        _ => None,
    });
    // The second one may have been taken a moment later than the first.
    assert!(told.0 == 1 && (1..=2).contains(&told.1) && told.2 >= limit, "{told:?}");
    wait_until("both have waited for too long", || rig.status().total.stalled == 2);
    let status = rig.status();
    assert_eq!((status.total.stalled, status.rings[0].stalled, status.rings[1].stalled), (2, 0, 2));
    assert!(status.total.oldest_stalled_ms >= 100, "{status:?}");
    assert!(status.last_errors[0].what.contains("storage"), "{:?}", status.last_errors);
    // A ring that stops waits for them: they are seen all the same.
    let control = std::thread::spawn(move || {
        guest.stop_ring(1);
        guest
    });
    disk.release(1);
    wait_until("one of them is completed", || rig.status().total.stalled == 1);
    disk.release(2);
    rig.event(|event| matches!(event, Event::IoResumed { ring: 1 }).then_some(()));
    assert_eq!(rig.status().total.stalled, 0);
    disk.release(100);
    let mut guest = control.join().unwrap();
    assert_eq!([guest.wait(1).1, guest.wait(1).1], [0, 0]);
}
