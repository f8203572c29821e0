//! The daemon's point-in-time copy: a back-end in front of another that can copy the image of one instant while the
//! guest goes on writing. A block about to be overwritten is saved first (copy before write).
//!
//! No copy: an op costs a slot's number, and one that changes the image a look at one atomic. During a copy an op that
//! changes clusters (64 KiB) not saved yet waits in its ring's `queue` until the `copier` has read them; nothing
//! else waits. Old data goes to the `writer` in memory, at most 32 MiB of it. The copy never harms the guest: if
//! anything of it fails, or makes a write wait too long, the copy fails and every delayed op goes on.
//!
//! Why the copy equals the image at the instant: `start` is called while the disk is held and quiet, and refuses if any
//! change is in flight; from then on a cluster whose bit is clear is changed by nobody; its bit is set only when its
//! old data is in memory; and what the copier reads has its bit clear. Another host's guest could change it without all
//! that, so a running copy keeps the image from others (`keep`).

mod bitmap;
mod copier;
mod copy;
mod keep;
mod queue;
mod target;
mod writer;

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::layer::Layer;
use super::{Backend, IoQueue};
use crate::disk::{Copies, CopyError, CopyOptions, CopyStatus, Events};
use copy::{Copy, Phase};
use keep::Keep;
use queue::DelayingQueue;
use target::Target;

/// Copies that ended and are remembered.
const MOST_ENDED: usize = 8;

/// Copies that ended and whose threads have not, because the image or a target hangs, at most.
const MOST_HANGING: usize = 4;

/// A filesystem that does not answer in this time hangs; callers do not wait for it any longer.
const HANGS: Duration = Duration::from_secs(2);

/// What the copier does wrong on purpose, so that tests show that they would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// No write is ever delayed.
    SavesNothing,
    /// Discards and write-zeroes are never delayed.
    ForgetsRanges,
    /// A write goes on when its clusters' read was started, not when it is over.
    ReleasesEarly,
}

/// What is about to be done to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Writing some clusters.
    Write,
    /// Syncing it.
    Sync,
    /// Giving it its name.
    Publish,
}

/// Called by the writer's thread before each step; it may sleep, and its error is the step's.
pub type TargetHook = Arc<dyn Fn(Step) -> io::Result<()> + Send + Sync>;

/// What tests change.
#[derive(Clone)]
pub struct Tuning {
    /// How long a write may be delayed before the copy is given up (longer by a second for each 32 MiB). A discard
    /// waits a fifth of this and is then left undone.
    pub patience: Duration,
    /// Bytes of old data in memory at most, give or take a read.
    pub memory: usize,
    /// A slow or failing target.
    pub hook: Option<TargetHook>,
    /// A defect.
    pub mutant: Option<Mutant>,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning { patience: Duration::from_secs(5), memory: 32 << 20, hook: None, mutant: None }
    }
}

impl Tuning {
    fn step(&self, step: Step) -> io::Result<()> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(step))
    }
}

/// A back-end of which copies can be made. Wraps any other; dropping it cancels a copy and removes its partial file.
pub struct PointInTime {
    image: Arc<dyn Backend>,
    shared: Arc<Shared>,
    keep: Arc<Keep>,
    /// Of copies whose copier has, or had, the image open: disconnected when it let go.
    copiers: Mutex<Vec<Receiver<()>>>,
    /// Of threads that create targets, in the same way.
    creators: Mutex<Vec<Receiver<()>>>,
}

/// What the rings' queues and the copies have in common.
struct Shared {
    /// The number of the copy that delays writes; 0: none.
    delaying: AtomicU64,
    events: Arc<Events>,
    tuning: Tuning,
    registry: Mutex<Registry>,
}

#[derive(Default)]
struct Registry {
    last: u64,
    current: Option<Arc<Copy>>,
    /// One is being made.
    preparing: bool,
    ended: VecDeque<CopyStatus>,
    /// Changes in flight, a counter a queue.
    changes: Vec<Weak<AtomicU64>>,
    /// The daemon ends.
    closed: bool,
}

impl PointInTime {
    /// Wraps `image`. The end of each copy is told to `events`.
    pub fn new(image: Arc<dyn Backend>, events: Arc<Events>) -> Self {
        Self::with_tuning(image, events, Tuning::default())
    }

    /// For tests.
    pub fn with_tuning(image: Arc<dyn Backend>, events: Arc<Events>, tuning: Tuning) -> Self {
        let shared = Shared { delaying: AtomicU64::new(0), events, tuning, registry: Mutex::default() };
        PointInTime {
            image,
            shared: Arc::new(shared),
            keep: Arc::default(),
            copiers: Mutex::default(),
            creators: Mutex::default(),
        }
    }

    /// Cancels the copy there is and takes no more. At the daemon's orderly end.
    pub fn close(&self) {
        let current = {
            let mut registry = self.shared.lock();
            registry.closed = true;
            registry.current.clone()
        };
        if let Some(copy) = current
            && copy.end(Phase::Cancelled, None)
        {
            bury(&copy);
        }
    }

    /// Makes the copy's two threads, ready to start.
    fn start_threads(&self, copy: &Arc<Copy>, file: std::fs::File) -> io::Result<()> {
        let (to_writer, jobs) = mpsc::channel();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let (open, closed) = mpsc::channel();
        let (image, copier_copy, writer_copy) = (Arc::clone(&self.image), Arc::clone(copy), Arc::clone(copy));
        thread::Builder::new().name("copy-target".into()).spawn(move || writer::run(&writer_copy, file, jobs))?;
        thread::Builder::new()
            .name("copy-image".into())
            .spawn(move || copier::run(image, copier_copy, to_writer, ready, open))?;
        self.copiers.lock().expect("no panic while held").push(closed);
        is_ready.recv().unwrap_or_else(|_| Err(io::Error::other("its thread ended")))
    }

    /// The next copy's number, if there may be one.
    fn reserve(&self) -> Result<u64, CopyError> {
        let hanging = self.hanging();
        let mut registry = self.shared.lock();
        if registry.closed {
            return Err(busy("the daemon ends"));
        }
        if let Some(copy) = &registry.current {
            return Err(busy(format!(
                "{} to {} is {}, and there is one copy at a time; wait for its end or cancel it",
                copy.name,
                copy.target.path.display(),
                copy.status().state
            )));
        }
        if registry.preparing || hanging >= MOST_HANGING {
            return Err(busy("another copy is being prepared, or earlier ones wait for storage that hangs; try again"));
        }
        registry.preparing = true;
        registry.last += 1;
        Ok(registry.last)
    }

    fn make(&self, number: u64, options: &CopyOptions) -> Result<Arc<Copy>, CopyError> {
        let size = self.geometry().size;
        let lacking = |error: io::Error| CopyError {
            code: "resources",
            message: format!("no thread or descriptor for the copy ({error}); raise the daemon's limits"),
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| lacking(error.into()))?;
        let (creating, created) = mpsc::channel();
        self.creators.lock().expect("no panic while held").push(created);
        let (target, file) = create(&options.target, size, creating)?;
        let copy = Arc::new(Copy::new(number, size, options, target, wake, Arc::clone(&self.shared)));
        self.start_threads(&copy, file).map_err(|error| {
            copy.abandon();
            lacking(error)
        })?;
        Ok(copy)
    }

    /// How many threads of copies that ended or never began hang in the image or a target.
    fn hanging(&self) -> usize {
        let count = |threads: &Mutex<Vec<Receiver<()>>>| {
            let mut threads = threads.lock().expect("no panic while held");
            threads.retain(|ended| ended.try_recv() != Err(TryRecvError::Disconnected));
            threads.len()
        };
        count(&self.copiers) + count(&self.creators)
    }
}

impl Drop for PointInTime {
    /// Returns when no copier has the image open any more.
    fn drop(&mut self) {
        self.close();
        for closed in self.copiers.get_mut().expect("no panic while held").drain(..) {
            // Nothing is ever sent: this waits for the other end to go.
            let _ = closed.recv();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().expect("no panic while held")
    }

    /// A new queue's counter of changes in flight.
    fn count(&self, changes: &Arc<AtomicU64>) {
        let mut registry = self.lock();
        registry.changes.retain(|counter| counter.strong_count() > 0);
        registry.changes.push(Arc::downgrade(changes));
    }

    fn running(&self, number: u64) -> Option<Arc<Copy>> {
        self.lock().current.clone().filter(|copy| copy.number == number)
    }

    /// A copy is cleared up.
    fn ended(&self, number: u64, status: CopyStatus) {
        let mut registry = self.lock();
        if registry.current.as_ref().is_some_and(|copy| copy.number == number) {
            registry.current = None;
        }
        if registry.ended.len() == MOST_ENDED {
            registry.ended.pop_front();
        }
        registry.ended.push_back(status);
    }
}

impl Registry {
    fn find(&self, name: &str) -> Result<&Arc<Copy>, CopyError> {
        let current = self.current.as_ref().filter(|copy| copy.name == name && !copy.phase().is_over());
        current.ok_or_else(|| {
            let message = match self.ended.iter().find(|ended| ended.copy == name) {
                Some(ended) => format!("{name} has ended already ({}); query-copies tells how", ended.state),
                None => "there is no copy of this name; query-copies names them".into(),
            };
            CopyError { code: "no-such-copy", message }
        })
    }
}

/// Creates the target in a thread of its own: its filesystem may hang, and the caller must not.
fn create(path: &Path, size: u64, creating: mpsc::Sender<()>) -> Result<(Target, std::fs::File), CopyError> {
    let (sender, created) = mpsc::sync_channel(0);
    let wanted = path.to_path_buf();
    let work = move || {
        // Nobody waits any more: nobody will use it.
        if let Err(mpsc::SendError(Ok((target, _)))) = sender.send(Target::create(&wanted, size)) {
            target.remove_partial();
        }
        drop(creating);
    };
    if let Err(error) = thread::Builder::new().name("copy-create".into()).spawn(work) {
        let message = format!("no thread for the copy ({error}); raise the daemon's limits");
        return Err(CopyError { code: "resources", message });
    }
    created.recv_timeout(HANGS).unwrap_or_else(|_| {
        let message = format!("{}: its filesystem does not answer; mend it, or choose another target", path.display());
        Err(CopyError { code: "target", message })
    })
}

/// Clears up in a thread of its own, for the same reason. When the filesystem answers, the file is gone on return.
fn bury(copy: &Arc<Copy>) {
    let (sender, buried) = mpsc::channel::<()>();
    let theirs = Arc::clone(copy);
    let work = move || {
        theirs.bury();
        drop(sender);
    };
    match thread::Builder::new().name("copy-end".into()).spawn(work) {
        Ok(_) => {
            if buried.recv_timeout(HANGS) == Err(mpsc::RecvTimeoutError::Timeout) {
                log::warn!("{}: its filesystem does not answer; it is removed when it does", copy.name);
            }
        }
        // A hang is only possible, a file left behind would be certain.
        Err(_) => copy.bury(),
    }
}

fn busy(message: impl Into<String>) -> CopyError {
    CopyError { code: "busy", message: message.into() }
}

impl Copies for PointInTime {
    fn prepare(&self, options: &CopyOptions) -> Result<String, CopyError> {
        let number = self.reserve()?;
        // Without the lock: a ring that starts meanwhile must not wait for the target's filesystem.
        let made = self.make(number, options);
        let mut registry = self.shared.lock();
        registry.preparing = false;
        let copy = made?;
        let name = copy.name.clone();
        if registry.closed {
            drop(registry);
            copy.abandon();
            return Err(busy("the daemon ends"));
        }
        registry.current = Some(copy);
        Ok(name)
    }

    fn start(&self, copy: &str) -> Result<(), CopyError> {
        let registry = self.shared.lock();
        let copy = registry.find(copy)?;
        if copy.phase() != Phase::Prepared {
            return Err(busy(format!("{} was started already", copy.name)));
        }
        let size = self.geometry().size;
        if size != copy.size {
            let prepared = copy.size;
            return Err(busy(format!(
                "the image was resized since {} was prepared, from {prepared} to {size} bytes; cancel it and prepare \
                 another",
                copy.name
            )));
        }
        let in_flight =
            || registry.changes.iter().filter_map(Weak::upgrade).map(|count| count.load(Ordering::SeqCst)).sum();
        if !copy.begin(in_flight) {
            return Err(busy("a write is in flight: the disk is not held still. Quiesce it first"));
        }
        log::info!("{} to {} started", copy.name, copy.target.path.display());
        Ok(())
    }

    fn cancel(&self, copy: &str) -> Result<(), CopyError> {
        let copy = Arc::clone(self.shared.lock().find(copy)?);
        if !copy.end(Phase::Cancelled, None) {
            return Err(busy(format!("{} is complete, or ends just now; query-copies tells how", copy.name)));
        }
        bury(&copy);
        Ok(())
    }

    fn set_bandwidth(&self, copy: &str, bandwidth: u64) -> Result<(), CopyError> {
        let registry = self.shared.lock();
        let copy = registry.find(copy)?;
        copy.bandwidth.store(bandwidth, Ordering::Relaxed);
        copy.wake_copier();
        Ok(())
    }

    fn status(&self) -> Vec<CopyStatus> {
        let registry = self.shared.lock();
        registry.ended.iter().cloned().chain(registry.current.as_ref().map(|copy| copy.status())).collect()
    }
}

impl Layer for PointInTime {
    fn image(&self) -> &dyn Backend {
        &*self.image
    }

    fn open_layer(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        let inner = self.image.open_queue(depth)?;
        Ok(Box::new(DelayingQueue::new(inner, depth, Arc::clone(&self.shared))?))
    }

    fn activate_layer(&self) -> io::Result<()> {
        self.keep.activate(&*self.image)
    }

    fn activate_layer_for_hold(&self) -> io::Result<bool> {
        self.keep.activate_for_hold(&*self.image)
    }

    fn deactivate_layer(&self) {
        self.keep.deactivate(&self.image, &self.shared);
    }
}
