//! The side of the target's thread that belongs to the rest of the daemon: starting the thread, and what is asked of it.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use super::target_thread::{self, Ends, Job, Note, Order};
use super::{TARGET_TIMEOUT, Tuning};
use crate::base::rate_limit::{COPY_LOG, log_limited};
use crate::disk::{CopyError, CopyOptions};

/// Counts the threads that touch a target. It holds no descriptor, so they may own a part of it.
#[derive(Clone, Default)]
pub(super) struct Liveness(Arc<(Mutex<usize>, Condvar)>);

/// One such thread; dropped at its end.
pub(super) struct Alive(Liveness);

impl Liveness {
    pub(super) fn thread(&self) -> Alive {
        *self.lock() += 1;
        Alive(self.clone())
    }

    /// Whether one of the threads has not ended.
    pub(super) fn is_alive(&self) -> bool {
        *self.lock() > 0
    }

    /// Waits for the end of all, no longer than `timeout`.
    fn wait(&self, timeout: Duration) {
        let waited = self.0.1.wait_timeout_while(self.lock(), timeout, |threads| *threads > 0);
        drop(waited.expect("no panic while held"));
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.0.0.lock().expect("no panic while held")
    }
}

impl Clone for Alive {
    fn clone(&self) -> Self {
        self.0.thread()
    }
}

impl Drop for Alive {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.0.1.notify_all();
    }
}

/// A target that is being written by its thread.
pub(super) struct TargetOrder {
    pub(super) path: PathBuf,
    over: Arc<AtomicBool>,
    notes: Sender<Note>,
    /// Taken by whoever has the partial file removed or kept.
    remove: Mutex<Option<(Sender<()>, Receiver<String>)>>,
    alive: Liveness,
}

/// What the copy's other threads need of it.
pub(super) struct TargetLinks {
    /// For the copier.
    pub(super) jobs: Sender<Job>,
    pub(super) notes: Receiver<Note>,
    /// The permission to give the file its name.
    pub(super) publish: Sender<()>,
}

impl TargetOrder {
    /// Starts the thread and waits until it has created the file, for two seconds at most. `started` is called with the
    /// thread's liveness before that.
    pub(super) fn create(
        options: &CopyOptions,
        size: u64,
        tuning: &Tuning,
        started: impl FnOnce(Liveness),
    ) -> Result<(TargetOrder, TargetLinks), CopyError> {
        let path = options.target.clone();
        let (to_target, jobs) = mpsc::channel();
        let (notes, from_target) = mpsc::channel();
        let (publish, may_publish) = mpsc::channel();
        let (remove, is_asked) = mpsc::channel();
        let (removed, is_removed) = mpsc::channel();
        let alive = Liveness::default();
        let (created, is_created) = mpsc::sync_channel(0);
        let over = Arc::new(AtomicBool::new(false));
        let order =
            Order { path: path.clone(), size, digest: options.digest, tuning: tuning.clone(), over: Arc::clone(&over) };
        let ends = Ends {
            created,
            jobs,
            notes: notes.clone(),
            publish: may_publish,
            remove: is_asked,
            removed,
            alive: alive.thread(),
        };
        let thread = thread::Builder::new().name("copy-target".into());
        thread.spawn(move || target_thread::run(&order, ends)).map_err(|error| {
            let message = format!("no thread for the copy ({error}); raise the daemon's limits");
            CopyError { code: "resources", message }
        })?;
        started(alive.clone());
        let created = is_created.recv_timeout(TARGET_TIMEOUT).unwrap_or_else(|_| {
            let message =
                format!("{}: its filesystem does not answer; repair it, or choose another target", path.display());
            Err(CopyError { code: "target", message })
        });
        if let Some(error) = created? {
            warn_shared_table(&error);
        }
        let remove = Mutex::new(Some((remove, is_removed)));
        let order = TargetOrder { path, over, notes, remove, alive };
        Ok((order, TargetLinks { jobs: to_target, notes: from_target, publish }))
    }

    /// The copy ended: what is unfinished is not wanted any more. Does not block.
    pub(super) fn copy_is_over(&self) {
        self.over.store(true, Relaxed);
        // Its reader may have gone.
        let _ = self.notes.send(Note::Over);
    }

    /// Has the partial file removed. Waits two seconds at most; then it is removed when the filesystem answers.
    pub(super) fn remove(&self) {
        let Some((remove, removed)) = self.take_remove() else { return };
        // Its reader is the thread that waits for this.
        let _ = remove.send(());
        let partial = super::target::partial_path(&self.path);
        match removed.recv_timeout(TARGET_TIMEOUT) {
            Ok(why) => log_limited!(COPY_LOG, Warn, "{why}"),
            Err(RecvTimeoutError::Disconnected) => {}
            Err(RecvTimeoutError::Timeout) => {
                log_limited!(
                    COPY_LOG,
                    Warn,
                    "{}: its filesystem does not answer; it is removed when it does",
                    partial.display()
                );
            }
        }
    }

    /// The file has its name. Waits for the thread's end, two seconds at most.
    pub(super) fn finish(&self) {
        drop(self.take_remove());
        self.alive.wait(TARGET_TIMEOUT);
    }

    fn take_remove(&self) -> Option<(Sender<()>, Receiver<String>)> {
        self.remove.lock().expect("no panic while held").take()
    }

    /// For the scratch's thread.
    pub(super) fn notes(&self) -> Sender<Note> {
        self.notes.clone()
    }

    pub(super) fn liveness(&self) -> Liveness {
        self.alive.clone()
    }
}

fn warn_shared_table(error: &io::Error) {
    log_limited!(
        COPY_LOG,
        Warn,
        "the thread that writes the copy shares the daemon's descriptors (close_range: {error}): if the daemon is killed \
         while the target hangs, the front-end and the image's locks wait for the target"
    );
}
