//! Threads that are reused. After [`keep_threads`] a thread that has done its work waits for more. The reason: an
//! io_uring that was prepared before the sandbox belongs for ever to the thread that used it first, and in the sandbox
//! no new one can be created.

use std::io;

#[cfg(all(test, feature = "model"))]
pub(crate) use model::{Task, spawn};
#[cfg(not(all(test, feature = "model")))]
pub(crate) use real::{Task, keep_threads, spawn};

#[cfg(not(all(test, feature = "model")))]
mod real {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::{self, Receiver, Sender};
    use std::thread;

    use super::io;

    /// Does the work and returns a function that reports its end.
    type Job = Box<dyn FnOnce() -> Box<dyn FnOnce()> + Send>;

    struct NamedJob {
        name: String,
        job: Job,
    }

    static KEEP: AtomicBool = AtomicBool::new(false);
    /// Threads that wait for work.
    static IDLE: Mutex<Vec<Sender<NamedJob>>> = Mutex::new(Vec::new());

    /// Makes threads wait for more work from now on. Called by main before the first one is started.
    pub(crate) fn keep_threads() {
        KEEP.store(true, Ordering::Relaxed);
    }

    /// Work that a thread was given.
    pub(crate) struct Task<T>(Receiver<T>);

    impl<T> Task<T> {
        /// Waits for the end of the work. Returns `None` when it panicked.
        pub(crate) fn join(self) -> Option<T> {
            self.0.recv().ok()
        }
    }

    /// Starts `work` in an idle thread, or in a new one. An error: no thread can be started.
    pub(crate) fn spawn<T: Send + 'static>(
        name: String,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Task<T>> {
        let (done, outcome) = mpsc::sync_channel(1);
        let job = move || {
            let result = work();
            // The thread that started the work may not wait for it.
            Box::new(move || drop(done.send(result))) as Box<dyn FnOnce()>
        };
        let mut named = NamedJob { name, job: Box::new(job) };
        while let Some(idle) = take_idle() {
            match idle.send(named) {
                Ok(()) => return Ok(Task(outcome)),
                Err(mpsc::SendError(back)) => named = back,
            }
        }
        let NamedJob { name, job } = named;
        thread::Builder::new().name(name).spawn(move || serve(job))?;
        Ok(Task(outcome))
    }

    fn take_idle() -> Option<Sender<NamedJob>> {
        IDLE.lock().expect("no panic while held").pop()
    }

    fn serve(first: Job) {
        let (sender, jobs) = mpsc::channel();
        let mut job = first;
        loop {
            let report_end = job();
            if !KEEP.load(Ordering::Relaxed) {
                return report_end();
            }
            // This comes before the report of the end: the caller may start the next work at once, and must find this
            // thread.
            IDLE.lock().expect("no panic while held").push(sender.clone());
            report_end();
            let Ok(named) = jobs.recv() else { return };
            let name = std::ffi::CString::new(named.name).unwrap_or_default();
            if let Err(errno) = rustix::thread::set_name(&name) {
                log::debug!("a thread keeps its old name: {errno}");
            }
            job = named.job;
        }
    }
}

#[cfg(all(test, feature = "model"))]
mod model {
    use super::io;
    use crate::base::sync::thread;

    /// Work that a thread was given.
    pub(crate) struct Task<T>(thread::JoinHandle<T>);

    impl<T> Task<T> {
        /// Waits for the end of the work. Returns `None` when it panicked.
        pub(crate) fn join(self) -> Option<T> {
            self.0.join().ok()
        }
    }

    /// Starts `work` in a thread of its own.
    pub(crate) fn spawn<T: Send + 'static>(
        name: String,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Task<T>> {
        thread::Builder::new().name(name).spawn(work).map(Task)
    }
}
