use std::collections::{HashSet, VecDeque};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// Each block has a region of its own, so no op waits for another's blocks.
const LARGE_BLOCK: u64 = 1 << REGION_BITS;

impl RangeLocks {
    /// Whether nothing is held and nothing waits.
    pub(super) fn is_idle(&self) -> bool {
        let state = self.state();
        let is_empty = state.waiting.is_empty() && state.claims.is_empty() && state.draining.is_empty();
        is_empty && self.closures.are_idle() && state.queues.iter().all(|inside| inside.is_idle())
    }
}

fn queue(locks: &Arc<RangeLocks>) -> (Arc<QueueLocks>, Arc<Mailbox>) {
    let mailbox = Arc::new(Mailbox::new().unwrap());
    (QueueLocks::new(Arc::clone(locks), Arc::clone(&mailbox)), mailbox)
}

fn granted(mailbox: &Mailbox) -> Vec<Option<ClaimId>> {
    let id = |mail| match mail {
        Mail::Granted(id) => Some(id),
        _ => panic!("only locks are asked for here"),
    };
    mailbox.take().into_iter().map(id).collect()
}

#[test]
fn locks_of_one_block_are_granted_in_the_order_of_arrival() {
    let locks = RangeLocks::new(4096);
    let (queue, mailbox) = queue(&locks);
    let (aligned, held) = queue.lock_written(0..8192);
    assert!(held);
    let (other, held) = queue.lock_written(4096..8192);
    assert!(held, "two aligned writes need no order");
    let (first, held) = queue.lock_written(4096..4608);
    assert!(!held, "two aligned writes of its block are under way");
    let (second, held) = queue.lock_written(4096..12288);
    assert!(!held, "it would overtake the one that waits");
    let (_elsewhere, held) = queue.lock_written(1 << 20..(1 << 20) + 512);
    assert!(held);
    drop(aligned);
    assert!(granted(&mailbox).is_empty());
    drop(other);
    assert_eq!(granted(&mailbox), [first.claim()]);
    drop(first);
    assert_eq!(granted(&mailbox), [second.claim()]);
}

#[test]
fn a_claim_that_gives_up_waiting_lets_the_next_pass() {
    let locks = RangeLocks::new(4096);
    let (queue, mailbox) = queue(&locks);
    let (aligned, _) = queue.lock_written(0..4096);
    let (waiting, held) = queue.lock_written(0..512);
    assert!(!held);
    let (behind, held) = queue.lock_written(0..4096);
    assert!(!held);
    drop(waiting);
    assert_eq!(granted(&mailbox), [behind.claim()]);
    drop((aligned, behind));
    assert!(locks.is_idle());
}

/// After a write has left a closed stripe, and before it takes the mutex, the stripe is opened, entered and closed again.
#[test]
fn a_late_notice_of_an_empty_gate_grants_nothing() {
    let locks = RangeLocks::new(4096);
    let (queue, mailbox) = queue(&locks);
    let stripe = StripeId::of_region(0);
    assert!(queue.inside.enter(stripe, &locks.closures));
    let (gives_up, held) = queue.lock_written(0..512);
    assert!(!held);
    assert!(queue.inside.leave(stripe, &locks.closures), "the last one that leaves a closed stripe must check");
    drop(gives_up);
    let (aligned, held) = queue.lock_written(0..4096);
    assert!(held);
    let (waiting, held) = queue.lock_written(0..512);
    assert!(!held);
    locks.stripe_drained(stripe);
    assert!(granted(&mailbox).is_empty(), "the aligned write is under way");
    drop(aligned);
    assert_eq!(granted(&mailbox), [waiting.claim()]);
}

#[test]
fn the_middle_of_a_long_write_excludes_no_aligned_write() {
    let locks = RangeLocks::new(4096);
    let (queue, mailbox) = queue(&locks);
    let (long, held) = queue.lock_written(512..(1 << 20) + 512);
    assert!(held);
    let (_middle, held) = queue.lock_written(512 << 10..516 << 10);
    assert!(held, "every byte of these blocks is overwritten, none is read");
    let (end, held) = queue.lock_written(1 << 20..(1 << 20) + 4096);
    assert!(!held, "the long write reads its last block");
    drop(long);
    assert_eq!(granted(&mailbox), [end.claim()]);
}

/// Another thread holds the mutex meanwhile.
#[test]
fn an_aligned_write_takes_no_mutex() {
    let locks = RangeLocks::new(4096);
    let (queue, _mailbox) = queue(&locks);
    let (_elsewhere, held) = queue.lock_written(1 << 30..(1 << 30) + 512);
    assert!(held);
    let taken = locks.state();
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..1000 {
                let (ticket, held) = queue.lock_written(number * 4096..(number + 2) * 4096);
                assert!(held);
                drop(ticket);
            }
            drop(queue.lock_inside(512..1 << 20));
            drop(done);
        });
        let outcome = is_done.recv_timeout(Duration::from_secs(60));
        drop(taken);
        assert_eq!(outcome, Err::<(), _>(mpsc::RecvTimeoutError::Disconnected), "it waits for the mutex");
    });
}

/// Two claims exclude each other if one of them is of a part of a block.
fn exclude(one: &Blocks, other: &Blocks) -> bool {
    let touches = |blocks: &Blocks, block| blocks.whole.contains(&block) || blocks.partial().any(|part| part == block);
    one.partial().any(|block| touches(other, block)) || other.partial().any(|block| touches(one, block))
}

/// Locks drawn at random, in the order of their arrival, of which each can be compared with all before it.
struct Plain {
    ticket: LockTicket,
    blocks: Blocks,
    granted: bool,
}

fn is_excluded(entries: &[Plain], at: usize) -> bool {
    entries[..at].iter().any(|earlier| exclude(&earlier.blocks, &entries[at].blocks))
}

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }

    /// Bytes near the start of an image: aligned, or with one or two partial blocks.
    fn bytes(&mut self, block: u64) -> Range<u64> {
        let sectors = block / 512;
        let mut start = self.below(40) * sectors;
        let mut end = start + (1 + self.below(6) * self.below(6)) * sectors;
        match self.below(5) {
            0 => start += self.below(sectors),
            1 => end -= self.below(sectors),
            2 => (start, end) = (start + 1, start + 2),
            3 => (start, end) = (start + 1, end + 1),
            _ => {}
        }
        start * 512..end * 512
    }
}

/// Takes and drops locks at random. `check`: all that are held or wait, by arrival, and the claims that were granted by
/// what happened last.
fn take_and_drop(locks: &Arc<RangeLocks>, mut check: impl FnMut(&mut [Plain], Vec<Option<ClaimId>>, u64)) {
    let mut random = Random(7);
    let queues = [queue(locks), queue(locks)];
    let mut entries: Vec<Plain> = Vec::new();
    for step in 0..5000 {
        if random.below(100) < if step / 250 % 2 == 0 { 60 } else { 40 } || entries.is_empty() {
            let bytes = random.bytes(1 << locks.block_bits);
            let blocks = Blocks::written(bytes.clone(), locks.block_bits);
            let (ticket, granted) = queues[random.below(2) as usize].0.lock_written(bytes);
            entries.push(Plain { ticket, blocks, granted });
        } else {
            // Held or waiting.
            drop(entries.remove(random.below(entries.len() as u64) as usize));
        }
        let grants = queues.iter().flat_map(|(_, mailbox)| granted(mailbox)).collect();
        check(&mut entries, grants, step);
    }
    drop(entries);
    assert!(locks.is_idle());
}

/// Where no two regions share a stripe, and each block is a region, a lock is granted exactly when none before it excludes it.
fn compare_each_with_all(max_regions: u64) {
    let mut locks = RangeLocks::new(LARGE_BLOCK as u32);
    Arc::get_mut(&mut locks).unwrap().max_regions = max_regions;
    let stripes: HashSet<_> = (0..80).map(StripeId::of_region).collect();
    assert_eq!(stripes.len(), 80, "regions of the test share no stripe");
    take_and_drop(&locks, |entries, grants, step| {
        for at in 0..entries.len() {
            entries[at].granted |= grants.contains(&entries[at].ticket.claim()) && entries[at].ticket.claim.is_some();
            assert_eq!(entries[at].granted, !is_excluded(entries, at), "step {step}, entry {at}");
        }
    });
}

#[test]
fn locks_are_granted_as_by_comparing_all() {
    compare_each_with_all(MAX_REGIONS);
}

#[test]
fn claims_alone_are_granted_as_by_comparing_all() {
    compare_each_with_all(0);
}

/// Many blocks in a region: a lock may wait for writes beside its blocks, but never for a later one.
#[test]
fn locks_of_one_region_are_granted_in_turn() {
    let locks = RangeLocks::new(4096);
    take_and_drop(&locks, |entries, grants, step| {
        for at in 0..entries.len() {
            entries[at].granted |= grants.contains(&entries[at].ticket.claim()) && entries[at].ticket.claim.is_some();
            assert!(!entries[at].granted || !is_excluded(entries, at), "step {step}, entry {at}");
        }
        assert!(entries.first().is_none_or(|oldest| oldest.granted), "step {step}: the oldest waits for a later one");
    });
}

/// Steps of a lock and its release on average, with so many in flight. `bytes`: what the lock of this number is of.
fn steps_of(count: u64, bytes: impl Fn(u64) -> Range<u64>, newest_first: bool) -> u64 {
    let locks = RangeLocks::new(4096);
    let (queue, _mailbox) = queue(&locks);
    let mut tickets: Vec<_> = (0..count).map(|number| queue.lock_written(bytes(number)).0).collect();
    if newest_first {
        tickets.reverse();
    }
    tickets.into_iter().for_each(drop);
    assert!(locks.is_idle());
    let steps = locks.state().claims.steps;
    steps / count
}

/// As many as a guest can have in flight, in the shapes that cost most. A long range alone takes up to a hundred steps.
#[test]
fn a_lock_costs_the_same_however_many_are_in_flight() {
    const MANY: u64 = 10_000;
    type Shape = fn(u64) -> Range<u64>;
    let shapes: [(&str, Shape); 5] = [
        ("one block", |_| 0..512),
        ("a block each", |number| number * 4096..number * 4096 + 512),
        ("a length each", |number| 512..1024 + number * 4096),
        ("a start and a length each", |number| number * 4096..(30_000 + number * 2) * 4096 + 512),
        ("long and short in turn", |number| match number % 2 {
            0 => number * 4096..number * 4096 + 512,
            _ => 0..MANY * 4096 - number / 2 * 4096,
        }),
    ];
    for (shape, bytes) in shapes {
        for newest_first in [false, true] {
            let (few, many) = (steps_of(MANY / 20, bytes, newest_first), steps_of(MANY, bytes, newest_first));
            println!("{shape}, newest first {newest_first}: {few} steps each of few, {many} of many");
            assert!(many <= 2 * few + 100, "{shape}: {few} steps each of few, {many} of many");
        }
    }
}

/// What a lock and its release cost: `cargo test --release --lib range_locks::tests::measure -- --ignored --nocapture`.
#[test]
#[ignore = "prints a table; asserts nothing"]
fn measure() {
    type Shape = fn(u64) -> Range<u64>;
    let shapes: [(&str, Shape); 4] = [
        ("aligned, 4 KiB", |block| block * 4096..(block + 1) * 4096),
        ("one sector", |block| block * 4096 + 512..block * 4096 + 1024),
        ("unaligned, 64 KiB", |block| block * 4096 + 512..(block + 16) * 4096 + 512),
        ("unaligned, 1 MiB", |block| block * 4096 + 512..(block + 256) * 4096 + 512),
    ];
    for (name, shape) in shapes {
        for in_flight in [1, 128, 9600] {
            let locks = RangeLocks::new(4096);
            let (queue, mailbox) = queue(&locks);
            let mut random = Random(7);
            let mut lock = || queue.lock_written(shape(random.below(1 << 24)));
            let mut held: VecDeque<_> = (1..in_flight).map(|_| lock()).collect();
            const LOCKS: u32 = 100_000;
            let start = Instant::now();
            for _ in 0..LOCKS {
                held.push_back(lock());
                held.pop_front();
            }
            let each = start.elapsed() / LOCKS;
            mailbox.take();
            println!("{name:17} {in_flight:5} in flight: {:5} ns", each.as_nanos());
        }
    }
}
