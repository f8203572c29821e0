//! The daemon's point-in-time copy: a back-end in front of another that can copy the image of one instant while the
//! guest goes on writing. A block about to be overwritten is saved first (copy before write).
//!
//! No copy: an op costs a slot's number, and one that changes the image a look at one atomic. During a copy an op that
//! changes clusters (64 KiB, more for images over 32 TiB) not saved yet waits in its ring's `queue` until the `copier` has read them; nothing
//! else waits. Old data goes to the `writer` in memory, at most 32 MiB of it; with a `scratch`, what the guest's
//! writes wait for goes to a local file first while the writer is slow. The copy never harms the guest: if
//! anything of it fails, or makes a write wait too long, the copy fails and every delayed op goes on.
//!
//! Why the copy equals the image at the instant: `start` is called while the disk is held and quiet, and refuses if any
//! change is in flight; from then on a cluster whose bit is clear is changed by nobody; its bit is set only when its
//! old data is in memory; and what the copier reads has its bit clear. Another host's guest could change it without all
//! that, so a running copy keeps the image from others (`keep`).

mod bitmap;
mod copier;
mod copy;
mod image_lease;
mod notes;
mod order;
mod queue;
mod scratch;
mod scratch_thread;
mod target;
mod target_thread;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::layer::Layer;
use super::{Backend, IoQueue};
use crate::base::rate_limit::{COPY_LOG, log_limited};
use crate::base::sync::reused;
use crate::disk::{Copies, CopyError, CopyOptions, CopyStatus, Events};
use copy::{Copy, Phase};
use image_lease::ImageLease;
use order::{Liveness, TargetLinks, TargetOrder};
use queue::DelayingQueue;
use scratch::Scratches;

/// Copies that ended and are remembered.
const MAX_ENDED: usize = 8;

/// Copies that ended and whose threads have not, because the image or a target hangs, at most.
const MAX_ENDING: usize = 4;

/// How long callers wait for a target's filesystem.
const TARGET_TIMEOUT: Duration = Duration::from_secs(2);

/// What the copier does wrong on purpose, so that tests show that they would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// No write is ever delayed.
    SavesNothing,
    /// Discards and write-zeroes are never delayed.
    ForgetsRanges,
    /// A write goes on when its clusters' read was started, not when it is over.
    ReleasesEarly,
    /// A hole is punched in the scratch before the data there is read back.
    PunchesFirst,
}

/// What is about to be done to the target or the scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Writing some clusters.
    Write,
    /// Syncing it.
    Sync,
    /// Giving it its name.
    Publish,
    /// Storing old data in the scratch.
    Store,
    /// Reading it back.
    Load,
}

/// Called by the thread of the target or the scratch before each step; it may sleep, and its error is the step's.
pub type TargetHook = Arc<dyn Fn(Step) -> io::Result<()> + Send + Sync>;

/// A directory that copies may go to in the sandbox, as it was when the daemon started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyDirectory {
    /// As the operator named it.
    pub path: PathBuf,
    /// Its device and inode; or, in words, why it could not be opened.
    pub at_start: Result<(u64, u64), String>,
}

/// Where old data may go first, while the target is too slow to take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScratchOptions {
    /// A file without a name is made here for each copy.
    pub directory: PathBuf,
    /// Bytes that one file holds at most.
    pub size: u64,
}

/// What tests change, and what is known of the surroundings.
#[derive(Clone)]
pub struct Tuning {
    /// How long a write may be delayed before the copy is given up (longer by a second for each 32 MiB). A discard
    /// waits a fifth of this and is then left undone.
    pub timeout: Duration,
    /// Bytes of old data in memory at most, give or take a read.
    pub memory: usize,
    /// A slow or failing target.
    pub hook: Option<TargetHook>,
    /// A defect.
    pub mutant: Option<Mutant>,
    /// Where copies may go, as the sandbox has it; for messages only.
    pub directories: Arc<[CopyDirectory]>,
    /// A local place for old data.
    pub scratch: Option<ScratchOptions>,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            timeout: Duration::from_secs(5),
            memory: 32 << 20,
            hook: None,
            mutant: None,
            directories: Arc::default(),
            scratch: None,
        }
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
    keep: Arc<ImageLease>,
    /// By a copy's number: its copier has, or had, the image open; disconnected when it let go.
    copiers: Mutex<Vec<(u64, Receiver<()>)>>,
    /// By a copy's number: its target, also one that could not be created.
    targets: Mutex<Vec<(u64, Liveness)>>,
    scratches: Scratches,
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
    /// Copies that nothing stops any more, since they get their names, or are over and not cleared up. They hinder no other.
    finishing: Vec<Arc<Copy>>,
    /// One is being made.
    preparing: bool,
    ended: VecDeque<(CopyStatus, Liveness)>,
    /// Changes in flight, a counter a queue.
    changes: Vec<Weak<AtomicU64>>,
    /// The daemon ends.
    closed: bool,
}

impl PointInTime {
    /// Wraps `image`. The end of each copy is reported to `events`.
    pub fn new(image: Arc<dyn Backend>, events: Arc<Events>) -> Self {
        Self::with_tuning(image, events, Tuning::default())
    }

    /// The same, with other choices.
    pub fn with_tuning(image: Arc<dyn Backend>, events: Arc<Events>, tuning: Tuning) -> Self {
        let shared = Shared { delaying: AtomicU64::new(0), events, tuning, registry: Mutex::default() };
        PointInTime {
            image,
            shared: Arc::new(shared),
            keep: Arc::default(),
            copiers: Mutex::default(),
            targets: Mutex::default(),
            scratches: Scratches::default(),
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
            copy.clear_up();
        }
    }

    /// Makes the copy's other threads, ready to start.
    fn start_threads(&self, copy: &Arc<Copy>, links: TargetLinks) -> io::Result<()> {
        let TargetLinks { jobs, notes, publish } = links;
        let (ready, is_ready) = mpsc::sync_channel(1);
        let (open, closed) = mpsc::channel();
        let scratch = self.scratches.start(copy);
        let (image, copier_copy, notes_copy) = (Arc::clone(&self.image), Arc::clone(copy), Arc::clone(copy));
        thread::Builder::new().name("copy-notes".into()).spawn(move || notes::run(&notes_copy, &notes, &publish))?;
        reused::spawn("copy-image".into(), move || copier::run(image, copier_copy, jobs, scratch, ready, open))?;
        self.copiers.lock().expect("no panic while held").push((copy.number, closed));
        is_ready.recv().unwrap_or_else(|_| Err(io::Error::other("its thread ended")))
    }

    /// The next copy's number, if there may be one.
    fn reserve(&self) -> Result<u64, CopyError> {
        let mut registry = self.shared.lock();
        if registry.closed {
            return Err(busy("the daemon ends"));
        }
        if let Some(copy) = registry.current.take() {
            match copy.phase() {
                phase if phase.is_over() || phase == Phase::Publishing => registry.finishing.push(copy),
                _ => {
                    let state = copy.status().state;
                    let message = format!(
                        "{} to {} is {state}, and there is one copy at a time; wait for its end or cancel it",
                        copy.name,
                        copy.target.path.display(),
                    );
                    registry.current = Some(copy);
                    return Err(busy(message));
                }
            }
        }
        if registry.preparing {
            return Err(busy("another copy is being prepared; try again"));
        }
        let ending = self.count_ending(&registry);
        if ending >= MAX_ENDING {
            return Err(busy(format!(
                "{ending} earlier copies still wait for storage that does not answer (virtioblkctl copies); repair it, or \
                 restart virtioblkd"
            )));
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
        let saved = Copy::bitmap(size).map_err(|error| CopyError {
            code: "resources",
            message: format!("no memory to copy an image of {size} bytes ({error}); give the daemon more"),
        })?;
        let started = |liveness| self.targets.lock().expect("no panic while held").push((number, liveness));
        let (target, links) = TargetOrder::create(options, size, &self.shared.tuning, started)?;
        let copy = Arc::new(Copy::new(number, size, options, target, wake, Arc::clone(&self.shared), saved));
        self.start_threads(&copy, links).map_err(|error| {
            copy.abandon();
            lacking(error)
        })?;
        Ok(copy)
    }

    /// How many copies have ended, or never began, and still wait for the image or a target.
    fn count_ending(&self, registry: &Registry) -> usize {
        let mut copiers = self.copiers.lock().expect("no panic while held");
        copiers.retain(|(_, ended)| ended.try_recv() != Err(TryRecvError::Disconnected));
        let mut targets = self.targets.lock().expect("no panic while held");
        targets.retain(|(_, liveness)| liveness.is_alive());
        let alive = copiers.iter().map(|(number, _)| *number).chain(targets.iter().map(|(number, _)| *number));
        let known = || registry.current.iter().chain(&registry.finishing);
        let runs = |number| known().any(|copy| copy.number == number && !copy.phase().is_over());
        alive.collect::<BTreeSet<_>>().into_iter().filter(|&number| !runs(number)).count()
    }
}

impl Drop for PointInTime {
    /// Returns when no copier has the image open any more.
    fn drop(&mut self) {
        self.close();
        for (_, closed) in self.copiers.get_mut().expect("no panic while held").drain(..) {
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
    fn ended(&self, copy: &Copy, status: CopyStatus) {
        let mut registry = self.lock();
        if registry.current.as_ref().is_some_and(|current| current.number == copy.number) {
            registry.current = None;
        }
        registry.finishing.retain(|finishing| finishing.number != copy.number);
        if registry.ended.len() == MAX_ENDED {
            registry.ended.pop_front();
        }
        registry.ended.push_back((status, copy.target.liveness()));
    }
}

impl Registry {
    fn find(&self, name: &str) -> Result<&Arc<Copy>, CopyError> {
        let mut known = self.current.iter().chain(&self.finishing);
        known.find(|copy| copy.name == name && !copy.phase().is_over()).ok_or_else(|| {
            let message = match self.ended.iter().find(|(ended, _)| ended.copy == name) {
                Some((ended, _)) => {
                    format!("{name} has ended already ({}); 'virtioblkctl copies' tells how", ended.state)
                }
                None => "there is no copy of this name; 'virtioblkctl copies' names them".into(),
            };
            CopyError { code: "no-such-copy", message }
        })
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
        log_limited!(COPY_LOG, Info, "{} to {} started", copy.name, copy.target.path.display());
        Ok(())
    }

    fn cancel(&self, copy: &str) -> Result<(), CopyError> {
        let copy = Arc::clone(self.shared.lock().find(copy)?);
        if !copy.end(Phase::Cancelled, None) {
            return Err(busy(format!("{} is complete, or ends just now; query-copies tells how", copy.name)));
        }
        copy.clear_up();
        Ok(())
    }

    fn set_bandwidth(&self, copy: &str, bandwidth: u64) -> Result<(), CopyError> {
        let registry = self.shared.lock();
        let copy = registry.find(copy)?;
        copy.bandwidth.store(bandwidth, Ordering::Relaxed);
        copy.wake_copier();
        Ok(())
    }

    fn ending(&self) -> u64 {
        self.count_ending(&self.shared.lock()) as u64
    }

    fn status(&self) -> Vec<CopyStatus> {
        let registry = self.shared.lock();
        let ended = registry
            .ended
            .iter()
            .map(|(status, liveness)| CopyStatus { ending: liveness.is_alive(), ..status.clone() });
        let known = registry.finishing.iter().chain(&registry.current).map(|copy| copy.status());
        ended.chain(known).collect()
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
