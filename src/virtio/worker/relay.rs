//! The threads of a running virtqueue. One serves it. If that thread does not return from a call that may block, another
//! thread continues.
//!
//! The thread that serves the virtqueue holds the lock of all its state, and releases it only around such a call
//! ([`IoQueue::next_call`](crate::backend::IoQueue::next_call)). The connection's watch checks `calls` now and then
//! ([`Relay::check_call`]). When it finds the same call twice, a new thread takes the lock and serves on. The thread that
//! returns later finds the lock taken and another thread in charge, hands in its result, and ends.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::{Arc, TryLockError};
use std::time::{Duration, Instant};

use super::stopped_ring::StoppedRing;
use super::{Setup, Worker};
use crate::backend::{BlockingCall, Caller};
use crate::base::rate_limit::LogLimit;
use crate::base::sync::mpsc::Sender;
use crate::base::sync::{Mutex, MutexGuard, reused, thread};
use crate::virtio::rings::{RingJoined, RingThreads};
use crate::virtio::virtqueue::split_ring::SplitRing;

/// How often to log that no thread can serve a ring.
const STRANDED_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// The threads of one virtqueue, from its start to its stop.
pub(in super::super) struct Relay {
    index: u32,
    /// `None` before the virtqueue runs and after it has stopped.
    served: Mutex<Option<Served>>,
    /// The number of calls begun plus the number of calls returned: odd while the thread in charge is in a call. Only that
    /// thread writes it.
    calls: AtomicU64,
    /// The value of `calls` at the last check.
    checked: AtomicU64,
    /// The number of the thread in charge, counted from zero. It changes with the lock held.
    in_charge: AtomicU64,
    /// Limits the line that no thread can serve the virtqueue.
    stranded: LogLimit,
}

struct Served {
    worker: Worker,
    stopped: StoppedRing,
    /// Gets the virtqueue when it has stopped.
    ended: Sender<StoppedRing>,
}

type Guard<'a> = MutexGuard<'a, Option<Served>>;

/// What the thread in charge serves.
#[inline]
fn served<'g>(guard: &'g mut Guard<'_>) -> &'g mut Served {
    guard.as_mut().expect("the virtqueue runs while this thread is in charge")
}

impl Relay {
    /// The threads of a virtqueue that does not run yet.
    pub(in super::super) fn new(index: u32) -> Arc<Relay> {
        Arc::new(Relay {
            index,
            served: Mutex::new(None),
            calls: AtomicU64::new(0),
            checked: AtomicU64::new(0),
            in_charge: AtomicU64::new(0),
            stranded: LogLimit::of(1, STRANDED_LOG_INTERVAL),
        })
    }

    /// Serves the virtqueue until [`super::WorkerCommand::Stop`], in this thread or in others after it, and sends it to
    /// `ended` with everything completed but [`StoppedRing::resubmit`].
    pub(in super::super) fn run(
        &self,
        setup: Setup,
        ring: SplitRing,
        mut stopped: StoppedRing,
        joined: RingJoined,
        ended: Sender<StoppedRing>,
    ) {
        let hold = joined.hold;
        let mut worker = Worker::new(setup, ring, &stopped, joined);
        if let Some(epoch) = hold {
            worker.close_gate(epoch);
        }
        worker.recover(std::mem::take(&mut stopped.resubmit));
        let mut guard = self.served.lock().expect("no panic while held");
        *guard = Some(Served { worker, stopped, ended });
        self.serve(guard, 0);
    }

    /// Serves on in a new thread, unless `call` has returned.
    fn take_over(&self, call: u64) {
        // The thread that made the call holds the lock: the call has returned.
        let Ok(mut guard) = self.served.try_lock() else { return };
        if self.calls.load(Acquire) != call {
            return;
        }
        let Some(served) = &mut *guard else { return };
        if let Err(error) = served.worker.backend.io.change_thread() {
            return self.log_stranded(&error);
        }
        log::debug!("queue {}: a write does not return; another thread serves the queue", self.index);
        let number = self.in_charge.load(Relaxed) + 1;
        self.in_charge.store(number, Release);
        self.calls.store(call + 1, Release);
        self.serve(guard, number);
    }

    fn log_stranded(&self, error: &std::io::Error) {
        if let Some(line) = self.stranded_line(error, Instant::now()) {
            log::error!("{line}");
        }
    }

    /// The log line that no thread can serve the virtqueue, when it is due. Each check of a call that does not return tries
    /// again to start a thread.
    fn stranded_line(&self, error: &std::io::Error, now: Instant) -> Option<String> {
        let line = format_args!(
            "queue {}: a write does not return from the image's storage, and no thread can serve the queue meanwhile: \
             {error}; raise the limits on threads and files",
            self.index
        );
        self.stranded.admit(line, now)
    }

    /// Runs turn after turn, as the thread of this number, until the virtqueue has stopped or another thread is in charge.
    fn serve<'a>(&'a self, mut guard: Guard<'a>, number: u64) {
        let mut caller = served(&mut guard).worker.backend.io.caller();
        loop {
            served(&mut guard).worker.begin_turn();
            guard = match self.make_calls(guard, number, &mut caller) {
                Ok(guard) => guard,
                Err(call) => return caller.expect("it made the call").leave(call),
            };
            let Served { worker, stopped, .. } = served(&mut guard);
            worker.end_turn(stopped);
            if worker.has_stopped() {
                break;
            }
            worker.sleep(stopped);
        }
        let Served { worker, stopped, ended } = guard.take().expect("the virtqueue ran until now");
        // The handler waits for it, or a panic is ending the process.
        let _ = ended.send(worker.leave(stopped));
    }

    /// Makes all calls of this turn. `Err`: another thread took over during this call.
    #[inline]
    fn make_calls<'a>(
        &'a self,
        mut guard: Guard<'a>,
        number: u64,
        caller: &mut Option<Box<dyn Caller>>,
    ) -> Result<Guard<'a>, BlockingCall> {
        let Some(caller) = caller else {
            served(&mut guard).worker.drain_completions();
            return Ok(guard);
        };
        loop {
            let worker = &mut served(&mut guard).worker;
            let call = worker.backend.io.next_call().or_else(|| {
                worker.drain_completions();
                // What completed may have let further writes through.
                worker.backend.io.next_call()
            });
            let Some(call) = call else { return Ok(guard) };
            guard = self.make_call(guard, number, caller, call)?;
        }
    }

    /// Makes one call, with the lock released. `Err`: another thread serves the virtqueue by now.
    #[inline]
    fn make_call<'a>(
        &'a self,
        mut guard: Guard<'a>,
        number: u64,
        caller: &mut Box<dyn Caller>,
        mut call: BlockingCall,
    ) -> Result<Guard<'a>, BlockingCall> {
        let begun = self.calls.load(Relaxed) + 1;
        self.calls.store(begun, Release);
        served(&mut guard).worker.setup.rings.call_begins();
        drop(guard);
        caller.make(&mut call);
        let Some(mut guard) = self.lock_if_in_charge(number) else { return Err(call) };
        self.calls.store(begun + 1, Release);
        served(&mut guard).worker.backend.io.call_made(call);
        Ok(guard)
    }

    /// Takes the lock if the thread of this number is still in charge.
    #[inline]
    fn lock_if_in_charge(&self, number: u64) -> Option<Guard<'_>> {
        loop {
            match self.served.try_lock() {
                Ok(guard) => return (self.in_charge.load(Relaxed) == number).then_some(guard),
                Err(TryLockError::Poisoned(_)) => panic!("another thread of the queue panicked"),
                Err(TryLockError::WouldBlock) if self.in_charge.load(Acquire) != number => return None,
                // A thread that wants to take over holds the lock while it checks whether it may.
                Err(TryLockError::WouldBlock) => thread::yield_now(),
            }
        }
    }
}

impl RingThreads for Relay {
    fn check_call(self: Arc<Self>) -> bool {
        let calls = self.calls.load(Acquire);
        let checked = self.checked.swap(calls, Relaxed);
        let in_call = calls % 2 == 1;
        if in_call && checked == calls {
            let relay = self.clone();
            let body = move || relay.take_over(calls);
            if let Err(error) = reused::spawn(format!("ring {}", self.index), body) {
                self.log_stranded(&error);
            }
        }
        in_call || checked != calls
    }

    fn was_taken_over(&self) -> bool {
        self.in_charge.load(Acquire) > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_that_no_thread_can_serve_is_logged_again_with_a_count() {
        let (relay, start) = (Relay::new(3), Instant::now());
        let error = std::io::Error::from_raw_os_error(libc::EAGAIN);
        let line = |after| relay.stranded_line(&error, start + after);
        assert!(line(Duration::ZERO).unwrap().starts_with("queue 3: a write does not return"));
        // The session's watch checks four times a second.
        assert!((1..40).all(|at| line(Duration::from_millis(250) * at).is_none()));
        assert!(line(STRANDED_LOG_INTERVAL).unwrap().ends_with("(left out before it: 39 like it)"));
    }
}
