//! Watches one session for what hangs, in a thread of its own: requests that are in flight for too long, and calls of a
//! ring's thread that do not return. While no ring makes calls, the thread wakes up only for the requests.

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::Rings;
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};

/// How often the rings' calls are checked. A call that is found twice has not returned for at least this long.
const CALLS_INTERVAL: Duration = Duration::from_millis(250);

/// How the rings wake the watch when they begin to make calls.
#[derive(Default)]
pub(in crate::virtio) struct CallWatch {
    /// The watch does not check calls.
    sleeps: AtomicBool,
    /// Wakes the watch, if there is one.
    wake: Mutex<Option<mpsc::Sender<()>>>,
}

impl CallWatch {
    /// Notes that a ring's thread begins a call. This reads one variable, and wakes the watch for the first call in a while.
    ///
    /// There is no fence between the caller's own record of the call and this read; a fence would cost every call. So the
    /// processor may read first, while the watch goes to sleep and does not see the record yet: then neither wakes the
    /// other. The watch checks all calls after each of its sleeps. So such a call is found after at most a quarter of
    /// `stall_after` instead of [`CALLS_INTERVAL`], and is handled from then on as any other.
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
            // A watch that has just ended checks nothing.
            let _ = wake.send(());
        }
    }

    fn set(&self, wake: Option<mpsc::Sender<()>>) {
        *self.wake.lock().expect("no panic while held") = wake;
    }
}

/// The watch of one session, until it is dropped.
pub(in crate::virtio) struct Watch {
    rings: Arc<Rings>,
    stop: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watch {
    /// Starts a watch. It has a thread of its own, because the vhost-user thread may itself wait for a ring to stop.
    pub(in crate::virtio) fn start(rings: &Arc<Rings>) -> Watch {
        let (stop, woken) = mpsc::channel();
        rings.call_watch().set(Some(stop.clone()));
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
        Watch { rings: rings.clone(), stop: Some(stop), thread: thread.ok() }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The thread ends when both senders are gone.
        self.rings.call_watch().set(None);
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was logged. During an unwind another panic would hide the first.
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
            // A call that began just before this did not wake the watch. [`CallWatch::call_begins`] describes one that
            // this check does not see either.
            calls = rings.check_calls();
        }
        let timeout = if calls { CALLS_INTERVAL.min(interval) } else { interval };
        if woken.recv_timeout(timeout) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
        calls = rings.check_calls();
        if last.elapsed() >= interval {
            last = Instant::now();
            rings.check_stalls();
        }
    }
}
