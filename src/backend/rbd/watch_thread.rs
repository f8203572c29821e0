//! The thread that does for an image what librbd's own threads must not: ask for the size and the features, see to the
//! lock, and watch the time.

use crate::backend::rbd::news::KeeperEvent;
use crate::base::rate_limit::{IMAGE_LOG, log_limited};
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::super::Notices;
use super::Shared;
use super::callbacks::Watch;
use super::quiesce::Quiesces;

/// The thread, and what it will hear.
pub(super) struct WatchThread {
    news: Option<mpsc::Receiver<KeeperEvent>>,
    running: Option<Running>,
}

struct Running {
    thread: JoinHandle<()>,
    updates: Option<Watch>,
}

impl WatchThread {
    pub(super) fn new(news: mpsc::Receiver<KeeperEvent>) -> Self {
        WatchThread { news: Some(news), running: None }
    }

    /// Begins to tell `notices`. Once.
    pub(super) fn start(&mut self, shared: &Arc<Shared>, quiesces: Option<&Arc<Quiesces>>, notices: Arc<dyn Notices>) {
        let Some(news) = self.news.take() else { return };
        if let Some(quiesces) = quiesces {
            quiesces.start(Arc::clone(&notices));
        }
        // A snapshot does not change, and an image that is open read-only hears nothing.
        let updates = (!shared.geometry.read_only).then(|| watch_updates(shared)).flatten();
        let (shared, quiesces) = (Arc::clone(shared), quiesces.cloned());
        let body = move || keep(&shared, quiesces.as_deref(), &*notices, &news);
        match thread::Builder::new().name("rbd-keeper".into()).spawn(body) {
            Ok(thread) => self.running = Some(Running { thread, updates }),
            Err(error) => {
                log_limited!(
                    IMAGE_LOG,
                    Error,
                    "no thread for the RBD image's news: {error}; resizes and a lost lock are not seen"
                )
            }
        }
    }

    /// Nothing is told any more, and no quiesce is unanswered.
    pub(super) fn stop(&mut self, shared: &Shared, quiesces: Option<&Arc<Quiesces>>) {
        if let Some(quiesces) = quiesces {
            quiesces.stop();
        }
        let Some(Running { thread, updates }) = self.running.take() else { return };
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
        // It hears this: it holds the receiver.
        let _ = shared.news.send(KeeperEvent::Stop);
        if thread.join().is_err() {
            log::error!("{}: the keeper's thread panicked", shared.name);
        }
    }
}

fn watch_updates(shared: &Arc<Shared>) -> Option<Watch> {
    let news = shared.news.clone();
    let changed = Box::new(move || {
        // Nobody listens at the end.
        let _ = news.send(KeeperEvent::Updated);
    });
    match Watch::updates(Arc::clone(shared), changed) {
        Ok(watch) => Some(watch),
        Err(errno) => {
            log_limited!(
                IMAGE_LOG,
                Warn,
                "{}: no update watch ({}): resizes and disabled features are not seen",
                shared.name,
                super::io_error(errno)
            );
            None
        }
    }
}

fn keep(shared: &Arc<Shared>, quiesces: Option<&Quiesces>, notices: &dyn Notices, news: &mpsc::Receiver<KeeperEvent>) {
    let mut check_lock: Option<Instant> = None;
    loop {
        let next = [quiesces.and_then(Quiesces::expire), check_lock].into_iter().flatten().min();
        let heard = match next {
            Some(deadline) => news.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            None => news.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
        };
        match heard {
            Ok(KeeperEvent::Updated) => {
                check_lock = shared.lock.check(shared);
                look_at_size(shared, notices);
            }
            Ok(KeeperEvent::StateChanged) => {
                notices.state_changed();
                if shared.trouble.is_locked_out() {
                    check_lock = shared.lock.check(shared);
                }
            }
            Ok(KeeperEvent::Quiesce) | Err(mpsc::RecvTimeoutError::Timeout) => {
                if check_lock.is_some_and(|due| due <= Instant::now()) {
                    check_lock = shared.lock.check(shared);
                }
            }
            Ok(KeeperEvent::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn look_at_size(shared: &Shared, notices: &dyn Notices) {
    let block = u64::from(shared.geometry.logical_block);
    match shared.image.size() {
        Ok(size) => {
            let size = size / block * block;
            if shared.size.swap(size, Ordering::AcqRel) != size {
                notices.resized(size);
            }
        }
        Err(errno) => {
            shared.heed(Err(errno));
            log_limited!(IMAGE_LOG, Warn, "{}: its size cannot be read: {}", shared.name, super::io_error(errno));
            // Not at once again: the next change of the header asks anew.
            thread::sleep(Duration::from_millis(10));
        }
    }
}
