//! One ring through the deaths of its servers, its operator's holds, failures, stops and resets, in an order drawn at random.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kit::front_end::*;
use kit::rig::{Prng, Rig};
use virtioblkd::backend::Errno;
use virtioblkd::backend::mem::{CompletionOrder, Fault, MemBackend, MemOp};
use virtioblkd::disk::Disk;
use vm_memory::{Bytes, GuestAddress};

use super::tracking::*;

const STEPS: usize = 80;

/// Slots of a ring of 64 descriptors, less some.
const MAX_ASKED: usize = 12;

/// One ring through the deaths of its servers, its operator's holds, failures, stops and resets, in an order drawn at
/// random.
struct Walk {
    prng: Prng,
    guest: Guest,
    /// What was made available and not answered, by slot: its kind.
    asked: BTreeMap<u16, u32>,
    /// The hold's epoch, and the writes that the disk had when it was still.
    held: Option<u64>,
    epochs: u64,
    /// A failure of such a kind was planted into this server's disk.
    fails: bool,
    old: Vec<FrontEnd>,
    /// Those that died, and the one that serves.
    servers: Vec<(Released, Arc<MemBackend>, Rig)>,
}

impl Walk {
    fn new(seed: u64) -> Walk {
        let (disk, rig) = server(CompletionOrder::OnRequest);
        let guest = Guest::new(&rig);
        Walk {
            prng: Prng::new(seed),
            guest,
            asked: BTreeMap::new(),
            held: None,
            epochs: 0,
            fails: false,
            old: Vec::new(),
            servers: vec![(Released(disk.clone()), disk, rig)],
        }
    }

    fn disk(&self) -> Arc<MemBackend> {
        self.servers[self.servers.len() - 1].1.clone()
    }

    fn rig(&self) -> &Rig {
        &self.servers[self.servers.len() - 1].2
    }

    fn step(&mut self) {
        match self.prng.below(20) {
            0..=8 => self.ask(),
            9..=12 => self.disk().release(1 + self.prng.below(4)),
            13 => self.plant(),
            14 => self.hold(),
            15 => self.let_go(),
            16 => self.stop(false),
            17 => self.stop(true),
            18 => self.die(),
            _ => self.guest.front_end.kick(0),
        }
        self.collect();
    }

    fn ask(&mut self) {
        if self.asked.len() == MAX_ASKED {
            return;
        }
        let front_end = &mut self.guest.front_end;
        let sector = self.prng.below(64);
        let (kind, slot) = match self.prng.below(4) {
            0 => (IN, front_end.add(0, IN, sector, &[], SECTOR as u32)),
            1 => (FLUSH, front_end.add(0, FLUSH, 0, &[], 0)),
            _ => (OUT, front_end.add(0, OUT, sector, &[7; SECTOR], 0)),
        };
        assert_eq!(self.asked.insert(slot, kind), None, "a slot that is in use was free");
        if self.prng.below(3) > 0 {
            front_end.kick(0);
        }
    }

    /// Each answer is one that is owed, and right.
    fn collect(&mut self) {
        while let Some((head, _)) = self.guest.front_end.used(0) {
            let slot = (head / 4) as u16;
            let kind = self.asked.remove(&slot).expect("answered once, and only if asked");
            let status = self.guest.front_end.status(0, slot);
            assert!(status == OK || (self.fails && status == 1), "kind {kind}: status {status}");
            self.guest.front_end.give_back(0, slot);
        }
    }

    fn plant(&mut self) {
        let op = [MemOp::Write, MemOp::Read][self.prng.below(2) as usize];
        self.disk().fail(Fault { op, nth: 1 + self.prng.below(3), errno: Errno(libc::EIO), transferred: 0 });
        self.fails = true;
    }

    /// `work`, which waits for what is in flight.
    fn while_released<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let (disk, over) = (self.disk(), Arc::new(AtomicBool::new(false)));
        let until = over.clone();
        let releasing = std::thread::spawn(move || {
            while !until.load(Ordering::Acquire) {
                disk.release(16);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let result = work(self);
        over.store(true, Ordering::Release);
        releasing.join().unwrap();
        result
    }

    fn hold(&mut self) {
        if self.held.is_none() {
            self.epochs += 1;
            let epoch = self.epochs;
            self.while_released(|walk| walk.rig().hold(epoch).expect("a hold"));
            self.held = Some(self.disk().counts().writes);
        }
    }

    fn let_go(&mut self) {
        if let Some(writes) = self.held.take() {
            assert_eq!(self.disk().counts().writes, writes, "a held disk was written");
            self.rig().disk.open_gate();
        }
    }

    /// GET_VRING_BASE, and on; or a driver that is reset and begins anew.
    fn stop(&mut self, reset: bool) {
        let base = self.while_released(|walk| walk.guest.front_end.stop_ring(0));
        self.collect();
        let avail = self.guest.front_end.rings[0].avail;
        // What a hold keeps from being done again stays marked, and counts as taken.
        if self.held.is_none() {
            assert_eq!(usize::from(avail.wrapping_sub(base)), self.asked.len(), "taken and not answered");
        }
        if reset {
            self.asked.clear();
            self.guest.front_end.reset_ring_memory(0);
            self.guest.front_end.start_ring(0, 0);
        } else {
            self.guest.front_end.restart_ring(0, base, avail);
        }
    }

    /// The server dies, and the next one goes on with an image of its own. The dead one lives on here, so first it must
    /// have nothing left to do.
    fn die(&mut self) {
        self.guest.front_end.kick(0);
        let (end, mut still) = (Instant::now() + WAIT_TIMEOUT, (0, None));
        while still.0 < 3 {
            let (ring, waiting) = (self.rig().status().rings[0].clone(), self.disk().waiting());
            let front_end = &self.guest.front_end;
            let used: u16 = front_end.memory.read_obj(GuestAddress(front_end.rings[0].used_at().0 + 2)).unwrap();
            let open = u64::from(front_end.rings[0].avail.wrapping_sub(used));
            let has_all = ring.in_flight == open || ring.held;
            let now = (has_all && (waiting > 0 || ring.in_flight == 0)).then_some((ring.in_flight, waiting, used));
            still = if now.is_some() && now == still.1 { (still.0 + 1, now) } else { (0, now) };
            assert!(Instant::now() < end, "it does not take what is available: {ring:?}, {waiting} of {open}");
            std::thread::sleep(Duration::from_micros(300));
        }
        self.collect();
        let (disk, rig) = server(CompletionOrder::OnRequest);
        self.old.push(self.guest.reconnect(&rig));
        self.servers.push((Released(disk.clone()), disk, rig));
        (self.held, self.fails) = (None, false);
    }

    /// Nothing is owed any more, and the ring is as good as new.
    fn end(mut self) {
        self.let_go();
        self.guest.front_end.kick(0);
        let end = Instant::now() + WAIT_TIMEOUT;
        while !self.asked.is_empty() {
            self.disk().release(16);
            self.collect();
            assert!(Instant::now() < end, "never answered: {:?}", self.asked);
        }
        // A failure that was planted and not met yet may meet these.
        let answers = self.while_released(|walk| [1, 2].map(|byte| walk.guest.front_end.write(0, 0, &[byte; SECTOR])));
        assert!(answers.iter().all(|&status| status == OK || self.fails), "{answers:?}");
    }
}

#[test]
fn requests_in_any_order_are_completed_once() {
    for seed in 1..=40 {
        let mut walk = Walk::new(seed);
        (0..STEPS).for_each(|_| walk.step());
        walk.end();
    }
}
