//! The daemon's handle of the target's thread: it starts the thread, has the partial file removed and waits for the
//! thread's end.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use super::TARGET_TIMEOUT;
use super::target_thread::{self, OldData, TargetReport, TargetSpec, ThreadChannels};
use crate::base::rate_limit::{COPY_LOG, log_limited};
use crate::disk::CopyError;

/// Counts the threads that use a target or a scratch. It holds no descriptor, so those threads may own a clone of it.
#[derive(Clone, Default)]
pub(super) struct Liveness(Arc<(Mutex<usize>, Condvar)>);

/// Counts as one thread in a [`Liveness`] until it is dropped.
pub(super) struct LiveThread(Liveness);

impl Liveness {
    /// Counts one more thread.
    pub(super) fn thread(&self) -> LiveThread {
        *self.lock() += 1;
        LiveThread(self.clone())
    }

    /// Whether at least one of the threads has not ended.
    pub(super) fn is_alive(&self) -> bool {
        *self.lock() > 0
    }

    /// Waits until all threads have ended, no longer than `timeout`.
    fn wait(&self, timeout: Duration) {
        let waited = self.0.1.wait_timeout_while(self.lock(), timeout, |threads| *threads > 0);
        drop(waited.expect("no panic while held"));
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.0.0.lock().expect("no panic while held")
    }
}

impl Clone for LiveThread {
    fn clone(&self) -> Self {
        self.0.thread()
    }
}

impl Drop for LiveThread {
    fn drop(&mut self) {
        *self.0.lock() -= 1;
        self.0.0.1.notify_all();
    }
}

/// The handle of a target and its thread.
pub(super) struct TargetHandle {
    pub(super) path: PathBuf,
    over: Arc<AtomicBool>,
    reports: Sender<TargetReport>,
    /// The request to remove the partial file, and the receiver of its result. Taken by the first caller that decides
    /// whether the file is removed or stays.
    remove: Mutex<Option<(Sender<()>, Receiver<String>)>>,
    liveness: Liveness,
}

/// The ends of the target thread's channels that the copy's other threads use.
pub(super) struct TargetLinks {
    /// For the copier: old data to write.
    pub(super) old_data: Sender<OldData>,
    pub(super) reports: Receiver<TargetReport>,
    /// Permits the thread to give the file its final name.
    pub(super) publish: Sender<()>,
}

impl TargetHandle {
    /// Starts the thread and waits until it has created the file, two seconds at most. Before that wait it calls `started`
    /// with the thread's liveness.
    pub(super) fn create(
        spec: TargetSpec,
        started: impl FnOnce(Liveness),
    ) -> Result<(TargetHandle, TargetLinks), CopyError> {
        let (path, over) = (spec.path.clone(), Arc::clone(&spec.over));
        let (to_target, old_data) = mpsc::channel();
        let (reports, from_target) = mpsc::channel();
        let (publish, may_publish) = mpsc::channel();
        let (remove, is_asked) = mpsc::channel();
        let (removed, is_removed) = mpsc::channel();
        let liveness = Liveness::default();
        let (created, is_created) = mpsc::sync_channel(0);
        let channels = ThreadChannels {
            created,
            old_data,
            reports: reports.clone(),
            publish: may_publish,
            remove: is_asked,
            removed,
            alive: liveness.thread(),
        };
        let thread = thread::Builder::new().name("copy-target".into());
        thread.spawn(move || target_thread::run(&spec, channels)).map_err(|error| {
            let message = format!("no thread for the copy ({error}); raise the daemon's limits");
            CopyError { code: "resources", message }
        })?;
        started(liveness.clone());
        let created = is_created.recv_timeout(TARGET_TIMEOUT).unwrap_or_else(|_| {
            let message =
                format!("{}: its filesystem does not respond; repair it, or choose another target", path.display());
            Err(CopyError { code: "target", message })
        });
        if let Some(error) = created? {
            warn_shared_table(&error);
        }
        let remove = Mutex::new(Some((remove, is_removed)));
        let handle = TargetHandle { path, over, reports, remove, liveness };
        Ok((handle, TargetLinks { old_data: to_target, reports: from_target, publish }))
    }

    /// The handle of an instant that others read: no file is made under a name. `path`: the socket, for messages.
    /// `reports`: where the copy's end is reported. `liveness`: of the scratch's threads.
    pub(super) fn of_export(path: PathBuf, reports: Sender<TargetReport>, liveness: Liveness) -> Self {
        TargetHandle { path, over: Arc::default(), reports, remove: Mutex::default(), liveness }
    }

    /// The copy is over: the thread abandons unfinished work. Does not block.
    pub(super) fn copy_is_over(&self) {
        self.over.store(true, Relaxed);
        // The receiver may have ended already.
        let _ = self.reports.send(TargetReport::Over);
    }

    /// Has the partial file removed. Waits two seconds at most; after that, the file is removed when its filesystem
    /// responds.
    pub(super) fn remove(&self) {
        let Some((remove, removed)) = self.take_remove() else { return };
        // If the thread that removes the file has ended, the receive below shows it.
        let _ = remove.send(());
        let partial = super::target::partial_path(&self.path);
        match removed.recv_timeout(TARGET_TIMEOUT) {
            Ok(why) => log_limited!(COPY_LOG, Warn, "{why}"),
            Err(RecvTimeoutError::Disconnected) => {}
            Err(RecvTimeoutError::Timeout) => {
                log_limited!(
                    COPY_LOG,
                    Warn,
                    "{}: its filesystem does not respond; the file is removed as soon as it does",
                    partial.display()
                );
            }
        }
    }

    /// The file has its final name: waits for the thread's end, two seconds at most.
    pub(super) fn finish(&self) {
        drop(self.take_remove());
        self.liveness.wait(TARGET_TIMEOUT);
    }

    fn take_remove(&self) -> Option<(Sender<()>, Receiver<String>)> {
        self.remove.lock().expect("no panic while held").take()
    }

    /// A sender of reports, for the scratch's thread.
    pub(super) fn reports(&self) -> Sender<TargetReport> {
        self.reports.clone()
    }

    /// Whether threads still use the target.
    pub(super) fn liveness(&self) -> Liveness {
        self.liveness.clone()
    }
}

fn warn_shared_table(error: &io::Error) {
    log_limited!(
        COPY_LOG,
        Warn,
        "the thread that writes the copy shares the daemon's descriptors, because close_range failed ({error}): if the \
         daemon is killed while the target hangs, its front-end connection and image locks stay open until the target \
         responds; use Linux 5.9 or later"
    );
}
