//! The clauses of `src/backend/mod.rs` that hold for any back-end and are seen from its own side. The test program around
//! them has `each`, which runs a check against every back-end, and `each_that_stores`, against those whose reads return
//! what was written.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use virtioblkd::backend::{Backend, IoBuf, IoQueue, Op, OpId, Source, Wakeups};

use crate::backend::{Driver, Prng, WAIT_TIMEOUT, random_ops, some_buffer};

/// Runs a check against every back-end of a test program.
pub type Each = fn(&dyn Fn(&str, &dyn Backend));

/// The contract's tests, against the back-ends that the first function knows; those that need reads to return what was
/// written, against the second's.
#[macro_export]
macro_rules! backend_contract {
    ($each:path, $each_that_stores:path) => {
        $crate::backend_contract!(
            $each:
            clause_1_each_token_comes_back_once
            clause_6_what_has_finished_is_seen_without_a_system_call
            clause_6_wait_sees_every_event
            clause_6_a_kick_is_no_completion_and_ends_the_next_wait
            clause_6_events_among_completions
            clause_7_a_full_queue_hands_the_op_back
        );
        $crate::backend_contract!(
            $each_that_stores:
            clause_2_ok_means_every_byte
            clause_2_many_parts_and_long_transfers
            clause_3_dropping_a_queue_waits
        );
    };
    ($each:path: $($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                $crate::backend_contract::$name($each);
            }
        )*
    };
}

pub fn read_op(offset: u64) -> Op {
    Op::Read { offset, buf: IoBuf::owned(4096, 4096, 0) }
}

pub fn clause_1_each_token_comes_back_once(each: Each) {
    each(&|name, backend| {
        let mut driver = Driver::new(backend, 16);
        let mut prng = Prng::new(1);
        let mut out = HashSet::new();
        for _ in 0..50 {
            for turn in 0..16u64 {
                let offset = turn * 16384;
                let id = driver.push(match prng.below(5) {
                    0 => Op::Sync,
                    1 => Op::Discard { offset, len: 8192 },
                    2 => Op::WriteZeroes { offset, len: 4096, unmap: prng.below(2) == 0 },
                    3 => Op::Write { offset, buf: some_buffer(&mut prng, 4096), durable: false },
                    _ => Op::Read { offset, buf: some_buffer(&mut prng, 4096) },
                });
                assert!(out.insert(id));
            }
            while !out.is_empty() {
                for completion in driver.reap() {
                    assert!(out.remove(&completion.id), "{name}: {:?} came back, but was not out", completion.id);
                    assert_eq!(completion.result, Ok(()), "{name}");
                }
            }
        }
        let mut late = Vec::new();
        driver.queue.wait(Some(Duration::from_millis(20))).expect("wait");
        driver.queue.reap(&mut late);
        assert!(late.is_empty(), "{name}: something came back twice");
    });
}

pub fn clause_6_what_has_finished_is_seen_without_a_system_call(each: Each) {
    each(&|name, backend| {
        // What a copy delays comes back by a descriptor.
        if name.contains("(running)") {
            return;
        }
        let mut driver = Driver::new(backend, 4);
        for op in [read_op(0), Op::Write { offset: 0, buf: IoBuf::owned(4096, 4096, 0), durable: false }, Op::Sync] {
            let id = driver.push(op);
            driver.queue.submit().expect("submit");
            let (end, mut out) = (Instant::now() + WAIT_TIMEOUT, Vec::new());
            while !driver.queue.has_completions() {
                assert!(Instant::now() < end, "{name}: it does not show");
            }
            while out.is_empty() {
                driver.queue.wait(Some(Duration::ZERO)).expect("wait");
                driver.queue.reap(&mut out);
                assert!(Instant::now() < end, "{name}: news, but nothing to reap");
            }
            assert_eq!(out[0].id, id, "{name}");
        }
        assert!(!driver.queue.has_completions(), "{name}: news of nothing");
    });
}

pub fn clause_2_ok_means_every_byte(each: Each) {
    each(&|_, backend| {
        for seed in 1..4 {
            random_ops(backend, seed, 500);
        }
    });
}

pub fn clause_2_many_parts_and_long_transfers(each: Each) {
    each(&|name, backend| {
        let mut driver = Driver::new(backend, 4);
        let mut prng = Prng::new(7);
        // More parts than one system call takes, aligned and not; more bytes than one bounce buffer has.
        for parts in [vec![512; 6000], vec![4096; 700], [vec![500, 12], vec![512; 3999]].concat()] {
            let len = parts.iter().sum();
            let bytes = prng.bytes(len);
            let buf = IoBuf::owned_parts(&parts, 4096);
            buf.copy_from(0, &bytes);
            assert_eq!(driver.run(Op::Write { offset: 4096, buf, durable: false }), Ok(()), "{name}");
            assert!(driver.read(4096, len) == Ok(bytes.clone()), "{name}");
            let id = driver.push(Op::Read { offset: 4096, buf: IoBuf::owned_parts(&parts, 4096) });
            let completion = driver.finish(id);
            assert_eq!(completion.result, Ok(()), "{name}");
            let mut seen = vec![0; len];
            completion.buf.expect("the buffer").copy_to(0, &mut seen);
            assert!(seen == bytes, "{name}");
        }
    });
}

pub fn clause_3_dropping_a_queue_waits(each: Each) {
    each(&|name, backend| {
        for round in 1..20u8 {
            let mut queue = backend.open_queue(32).expect("a queue");
            for turn in 0..32u64 {
                // Odd ones are not aligned and go through a buffer of the queue's own.
                let buf = IoBuf::owned(16384, 4096, turn as usize % 2);
                buf.copy_from(0, &[round; 16384]);
                queue.push(Op::Write { offset: turn * 16384, buf, durable: false }, OpId(turn)).expect("room");
            }
            queue.submit().expect("submit");
            drop(queue);
            let seen = Driver::new(backend, 1).read(0, 32 * 16384).expect("a read");
            assert!(seen.iter().all(|&byte| byte == round), "{name}: a write outlived its queue");
        }
    });
}

fn event() -> Arc<rustix::fd::OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd"))
}

fn kick(fd: &rustix::fd::OwnedFd) {
    assert_eq!(rustix::io::write(fd, &1u64.to_ne_bytes()), Ok(8));
}

pub fn clause_6_wait_sees_every_event(each: Each) {
    each(&|name, backend| {
        let (kicked, woken, copied) = (event(), event(), event());
        let mut queue = backend.open_queue(4).expect("a queue");
        // Before it was watched at all.
        kick(&kicked);
        queue.watch(Source::Kick, kicked.as_fd()).expect("watch");
        queue.watch(Source::Wake, woken.as_fd()).expect("watch");
        // One copy in front of an image, not two.
        let is_copied = name.starts_with("point-in-time");
        assert_eq!(queue.watch(Source::Copy, copied.as_fd()).is_err(), is_copied, "{name}");
        let kick_only = Wakeups { kick: true, ..Wakeups::default() };
        let wake_only = Wakeups { wake: true, ..Wakeups::default() };
        let copy_only = Wakeups { copy: true, ..Wakeups::default() };
        assert_eq!(queue.wait(Some(WAIT_TIMEOUT)).expect("wait"), kick_only, "{name}: written before the watch");
        assert_eq!(queue.wait(Some(Duration::from_millis(1))).expect("wait"), Wakeups::default(), "{name}: nothing");
        assert_eq!(queue.wait(Some(Duration::ZERO)).expect("wait"), Wakeups::default(), "{name}: nothing");
        // While nobody waits, also between other calls.
        kick(&woken);
        queue.submit().expect("submit");
        queue.reap(&mut Vec::new());
        assert_eq!(queue.wait(Some(WAIT_TIMEOUT)).expect("wait"), wake_only, "{name}: written meanwhile");
        if !is_copied {
            kick(&copied);
            assert_eq!(queue.wait(Some(WAIT_TIMEOUT)).expect("wait"), copy_only, "{name}: the third source");
        }
        for _ in 0..100 {
            kick(&kicked);
            assert_eq!(queue.wait(Some(WAIT_TIMEOUT)).expect("wait"), kick_only, "{name}: again and again");
        }
        // While it sleeps.
        let later = Arc::clone(&kicked);
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(10));
            kick(&later);
        });
        assert_eq!(queue.wait(None).expect("wait"), kick_only, "{name}: written while asleep");
        thread.join().expect("the thread");
    });
}

/// Waits as a worker does until all of `wanted` was seen; an event lost hangs until the deadline and fails.
fn wait_for(queue: &mut dyn IoQueue, mut tokens: usize, mut kick: bool, name: &str) {
    let mut out = Vec::new();
    while tokens > 0 || kick {
        let start = std::time::Instant::now();
        let wakeups = queue.wait(Some(WAIT_TIMEOUT)).expect("wait");
        assert!(start.elapsed() < WAIT_TIMEOUT, "{name}: an event was lost");
        kick &= !wakeups.kick;
        queue.reap(&mut out);
        tokens -= out.drain(..).count();
    }
}

/// Who looks instead of sleeping looks at the guest's ring, too, and would look at a stale kick for ever.
pub fn clause_6_a_kick_is_no_completion_and_ends_the_next_wait(each: Each) {
    each(&|name, backend| {
        let kicked = event();
        let mut queue = backend.open_queue(4).expect("a queue");
        queue.watch(Source::Kick, kicked.as_fd()).expect("watch");
        for _ in 0..3 {
            kick(&kicked);
            assert!((0..1000).all(|_| !queue.has_completions()), "{name}");
            assert!(queue.wait(Some(WAIT_TIMEOUT)).expect("wait").kick, "{name}");
        }
    });
}

pub fn clause_6_events_among_completions(each: Each) {
    each(&|name, backend| {
        let kicked = event();
        let mut queue = backend.open_queue(8).expect("a queue");
        queue.watch(Source::Kick, kicked.as_fd()).expect("watch");
        for round in 0..200u64 {
            for turn in 0..8 {
                queue.push(read_op(turn * 4096), OpId(turn)).expect("room");
            }
            if round % 2 == 0 {
                queue.submit().expect("submit");
            }
            kick(&kicked);
            wait_for(&mut *queue, 8, true, name);
        }
    });
}

pub fn clause_7_a_full_queue_hands_the_op_back(each: Each) {
    each(&|name, backend| {
        for depth in [1, 3, 128] {
            let mut queue = backend.open_queue(depth).expect("a queue");
            for turn in 0..depth as u64 {
                assert!(queue.push(read_op(turn * 4096), OpId(turn)).is_ok(), "{name}: room for {depth}");
            }
            let Err(back) = queue.push(read_op(12288), OpId(999)) else { panic!("{name}: no end at {depth}") };
            assert!(matches!(back, Op::Read { offset: 12288, .. }), "{name}: another op came back");
            let mut out = Vec::new();
            while out.is_empty() {
                queue.wait(Some(WAIT_TIMEOUT)).expect("wait");
                queue.reap(&mut out);
            }
            assert!(queue.push(back, OpId(999)).is_ok(), "{name}: room again");
            wait_for(&mut *queue, depth + 1 - out.len(), false, name);
        }
    });
}
