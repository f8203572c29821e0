//! The watch thread of an image. It does what a callback in librbd's own threads must not: read the size and the features,
//! check the lock, and watch deadlines.

use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::super::Notices;
use super::Shared;
use super::callbacks::Watch;
use super::quiesce::QuiesceWatch;
use super::watch_event::WatchEvent;
use crate::base::rate_limit::{IMAGE_LOG, log_limited};

/// The watch thread, or the receiver for its events before it is started.
pub(super) struct WatchThread {
    events: Option<mpsc::Receiver<WatchEvent>>,
    running: Option<RunningThread>,
}

/// The running thread, and the watch for updates that sends it events.
struct RunningThread {
    thread: JoinHandle<()>,
    updates: Option<Watch>,
}

impl WatchThread {
    pub(super) fn new(events: mpsc::Receiver<WatchEvent>) -> Self {
        WatchThread { events: Some(events), running: None }
    }

    /// Starts the thread, which calls `notices`. Only the first call does so.
    pub(super) fn start(
        &mut self,
        shared: &Arc<Shared>,
        quiesces: Option<&Arc<QuiesceWatch>>,
        notices: Arc<dyn Notices>,
    ) {
        let Some(events) = self.events.take() else { return };
        if let Some(quiesces) = quiesces {
            quiesces.start(Arc::clone(&notices));
        }
        // A snapshot does not change, and librbd reports no updates of an image that is open read-only.
        let updates = (!shared.geometry.read_only).then(|| watch_updates(shared)).flatten();
        let (shared, quiesces) = (Arc::clone(shared), quiesces.cloned());
        let body = move || run(&shared, quiesces.as_deref(), &*notices, &events);
        match thread::Builder::new().name("rbd-watch".into()).spawn(body) {
            Ok(thread) => self.running = Some(RunningThread { thread, updates }),
            Err(error) => {
                log_limited!(
                    IMAGE_LOG,
                    Error,
                    "no thread for the RBD image's events ({error}): resizes and a lost lock are not detected; raise the \
                     limit of threads"
                )
            }
        }
    }

    /// Stops the thread: no notice follows, and every quiesce request has a reply.
    pub(super) fn stop(&mut self, shared: &Shared, quiesces: Option<&Arc<QuiesceWatch>>) {
        if let Some(quiesces) = quiesces {
            quiesces.stop();
        }
        let Some(RunningThread { thread, updates }) = self.running.take() else { return };
        if let Some(watch) = updates
            && let Err(errno) = watch.stop()
        {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: the update watch cannot be removed: {}",
                shared.name,
                super::io_error(errno)
            );
        }
        // This cannot fail while the thread runs, because it owns the receiver.
        let _ = shared.events.send(WatchEvent::Stop);
        if thread.join().is_err() {
            log::error!("{}: the image's watch thread panicked", shared.name);
        }
    }
}

/// Starts the watch for changes of the image's header.
fn watch_updates(shared: &Arc<Shared>) -> Option<Watch> {
    let events = shared.events.clone();
    let changed = Box::new(move || {
        // The thread may have ended.
        let _ = events.send(WatchEvent::Updated);
    });
    match Watch::updates(Arc::clone(shared), changed) {
        Ok(watch) => Some(watch),
        Err(errno) => {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: no update watch ({}): resizes and disabled features are not detected",
                shared.name,
                super::io_error(errno)
            );
            None
        }
    }
}

/// The thread's main function.
fn run(
    shared: &Arc<Shared>,
    quiesces: Option<&QuiesceWatch>,
    notices: &dyn Notices,
    events: &mpsc::Receiver<WatchEvent>,
) {
    let mut check_lock: Option<Instant> = None;
    loop {
        let next = [quiesces.and_then(QuiesceWatch::expire), check_lock].into_iter().flatten().min();
        let received = match next {
            Some(deadline) => events.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            None => events.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
        };
        match received {
            Ok(WatchEvent::Updated) => {
                check_lock = shared.lock.check(shared);
                update_size(shared, notices);
            }
            Ok(WatchEvent::StateChanged) => {
                notices.state_changed();
                if shared.health.is_locked_out() {
                    check_lock = shared.lock.check(shared);
                }
            }
            Ok(WatchEvent::Quiesce) | Err(mpsc::RecvTimeoutError::Timeout) => {
                if check_lock.is_some_and(|due| due <= Instant::now()) {
                    check_lock = shared.lock.check(shared);
                }
            }
            Ok(WatchEvent::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Reads the image's size and reports a change.
fn update_size(shared: &Shared, notices: &dyn Notices) {
    let block = u64::from(shared.geometry.logical_block);
    match shared.image.size() {
        Ok(size) => {
            let size = size / block * block;
            if shared.size.swap(size, Ordering::AcqRel) != size {
                notices.resized(size);
            }
        }
        Err(errno) => {
            shared.record_result(Err(errno));
            log_limited!(IMAGE_LOG, Warn, "{}: its size cannot be read: {}", shared.name, super::io_error(errno));
            // A pause, in case such events follow quickly. The next change of the header reads the size again.
            thread::sleep(Duration::from_millis(10));
        }
    }
}
