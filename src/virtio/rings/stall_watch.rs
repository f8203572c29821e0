//! One thread a connection watches for what hangs: requests that are in flight for too long, and calls of a ring's thread
//! that do not return. Where no ring makes calls it sleeps for as long as the requests allow.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::Rings;
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};

/// Between two looks at the rings' calls: one that is found twice has not returned for at least this long.
const CALLS_INTERVAL: Duration = Duration::from_millis(250);

/// How the rings wake the watch when they begin to make calls.
#[derive(Default)]
pub(in crate::virtio) struct CallWatch {
    /// It does not look at calls.
    sleeps: AtomicBool,
    /// To a watch, if there is one.
    wake: Mutex<Option<mpsc::Sender<()>>>,
}

impl CallWatch {
    /// A ring's thread begins a call: costs a look at one variable, but for the first call in a while.
    ///
    /// No fence stands between the caller's note that it is in a call and this look; one would cost every call. So the
    /// processor may look first, while the watch goes to sleep and does not see the note yet: then neither wakes the
    /// other. The watch looks at all calls after each of its sleeps, whoever ends them, so such a call is found after
    /// at most a quarter of `stall_after` instead of [`CALLS_INTERVAL`], and is handled from then on as any other.
    #[inline]
    pub(in crate::virtio) fn call_begins(&self) {
        if self.sleeps.load(Relaxed) {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        if self.sleeps.swap(false, SeqCst)
            && let Some(wake) = &*self.wake.lock().expect("no panic while held")
        {
            // One that has just ended looks no more.
            let _ = wake.send(());
        }
    }

    fn set(&self, wake: Option<mpsc::Sender<()>>) {
        *self.wake.lock().expect("no panic while held") = wake;
    }
}

/// Of one connection, which it does not outlive.
pub(in crate::virtio) struct Watch {
    rings: Arc<Rings>,
    until: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watch {
    /// Watches until the value returned is dropped, in a thread of its own: the vhost-user thread may itself wait for a ring
    /// to stop.
    pub(in crate::virtio) fn start(rings: &Arc<Rings>) -> Watch {
        let (until, woken) = mpsc::channel();
        rings.call_watch().set(Some(until.clone()));
        let work = {
            let rings = rings.clone();
            move || watch(&rings, &woken)
        };
        let thread = thread::Builder::new().name("stall-watch".into()).spawn(work);
        let thread = thread.inspect_err(|error| {
            log_limited!(
                FRONT_END_LOG,
                Warn,
                "no thread to watch for I/O that hangs: {error}; raise the limit on threads"
            )
        });
        Watch { rings: rings.clone(), until: Some(until), thread: thread.ok() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Both senders: then the thread ends.
        self.rings.call_watch().set(None);
        drop(self.until.take());
        if let Some(thread) = self.thread.take() {
            // A panic has told of itself, and where we are unwinding another would hide the first.
            let _ = thread.join();
        }
    }
}

fn watch(rings: &Rings, woken: &mpsc::Receiver<()>) {
    let interval = rings.tuning().stall_after / 4;
    let mut last = Instant::now();
    let mut calls = false;
    loop {
        if !calls {
            rings.call_watch().sleeps.store(true, SeqCst);
            // One that began just before this has woken nobody. See `call_begins` for one that is not seen here either.
            calls = rings.look_at_calls();
        }
        let timeout = if calls { CALLS_INTERVAL.min(interval) } else { interval };
        if woken.recv_timeout(timeout) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
        calls = rings.look_at_calls();
        if last.elapsed() >= interval {
            last = Instant::now();
            rings.look_for_stalls();
        }
    }
}
