//! The daemon's point-in-time copy: a back-end in front of another that can copy the image of one instant while the
//! guest continues to write. The old data of a block is saved before a write overwrites it (copy before write).
//!
//! Without a copy, an op costs one shifted id, and an op that changes the image also one atomic load. During a copy, an
//! op that changes unsaved clusters waits in its virtqueue's queue (`queue`) until the thread of `copier` has read them;
//! no other op waits. A cluster is 64 KiB, more for images over 32 TiB. Old data goes in memory to the thread that writes
//! the target (`target_thread`), at most 32 MiB of it. With a `scratch`, old data that the guest's writes wait for goes to
//! a local file first while the target is slow. The copy never harms the guest: if any part of it fails, or it makes a
//! write wait too long, the copy fails and every delayed op continues.
//!
//! Why the copy equals the image at the instant: `start` is called while the disk is held and quiet, and refuses if any
//! change is in flight. From then on, no op here changes a cluster whose bit is clear. The bit is set only when the
//! cluster's old data is in memory, and the copier reads only clusters whose bit is clear. Another host's guest could
//! change the image past these checks, so a running copy keeps the image from other hosts (`image_lease`).

mod bitmap;
mod copier;
mod copy;
mod image_lease;
mod queue;
mod scratch;
mod scratch_thread;
mod target;
mod target_handle;
mod target_reports;
mod target_thread;
mod waiters;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::layer::Layer;
use super::{Backend, ImageClaim, IoQueue};
use crate::base::rate_limit::{COPY_LOG, log_limited};
use crate::base::sync::reused;
use crate::disk::{Copies, CopyError, CopyOptions, CopyStatus, Events};
use copy::{Copy, Phase};
use image_lease::ImageLease;
use queue::DelayingQueue;
use scratch::Scratches;
use target_handle::{Liveness, TargetHandle, TargetLinks};
use target_thread::TargetSpec;

/// The most ended copies that the status lists.
const MAX_ENDED: usize = 8;

/// The most ended copies whose threads still run, because the image or a target hangs.
const MAX_ENDING: usize = 4;

/// How long a caller waits for the file system of a target or scratch.
const TARGET_TIMEOUT: Duration = Duration::from_secs(2);

/// A deliberate defect, with which tests show that they detect it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutant {
    /// No write is ever delayed.
    SavesNothing,
    /// Discards and write-zeroes are never delayed.
    ForgetsRanges,
    /// A write continues when the read of its clusters has started, not when it is complete.
    ReleasesEarly,
    /// A hole is punched in the scratch before the data there is read back.
    PunchesFirst,
}

/// A step of the target's or the scratch's thread, for a [`TargetHook`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyStep {
    /// Writes some clusters to the target.
    Write,
    /// Syncs the target.
    Sync,
    /// Gives the target its final name.
    Publish,
    /// Stores old data in the scratch.
    Store,
    /// Reads old data back from the scratch.
    Load,
}

/// Called by the thread of the target or the scratch before each step. It may sleep; if it returns an error, the step fails
/// with that error.
pub type TargetHook = Arc<dyn Fn(CopyStep) -> io::Result<()> + Send + Sync>;

/// A directory that the sandbox lets copies go to, as it was when the daemon started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyDirectory {
    /// The path as the operator wrote it.
    pub path: PathBuf,
    /// The directory's device and inode, or a text that says why it could not be opened.
    pub at_start: Result<(u64, u64), String>,
}

/// The scratch: where old data may go first while the target is too slow to take it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScratchOptions {
    /// The directory in which each copy creates a file without a name.
    pub directory: PathBuf,
    /// The most bytes that one scratch file holds.
    pub size: u64,
}

/// Options that the daemon sets, and settings that only tests change.
#[derive(Clone)]
pub struct Tuning {
    /// How long a write may be delayed before the copy fails (longer by a second for each 32 MiB). A discard waits a
    /// fifth of this and is then skipped.
    pub timeout: Duration,
    /// The most bytes of old data in memory. May be exceeded by one read.
    pub memory: usize,
    /// For tests: makes the target or the scratch slow or failing.
    pub hook: Option<TargetHook>,
    /// For tests: the defect to have.
    pub mutant: Option<Mutant>,
    /// The directories that the sandbox lets copies go to. Only for error messages.
    pub directories: Arc<[CopyDirectory]>,
    /// The scratch for old data; `None`: no scratch.
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
    /// Calls the hook, if there is one, before `step`.
    fn step(&self, step: CopyStep) -> io::Result<()> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(step))
    }
}

/// A back-end that wraps another and can copy its image. Dropping it cancels a running copy and removes its partial file.
pub struct PointInTime {
    image: Arc<dyn Backend>,
    shared: Arc<Shared>,
    lease: Arc<ImageLease>,
    /// By copy number: a channel that its copier disconnects when it has closed its queue of the image.
    copiers: Mutex<Vec<(u64, Receiver<()>)>>,
    /// By copy number: whether threads still use its target. Includes targets that could not be created.
    targets: Mutex<Vec<(u64, Liveness)>>,
    scratches: Scratches,
}

/// The state that the virtqueues' queues and the copies share.
struct Shared {
    /// The number of the copy that delays ops; 0: none.
    delaying: AtomicU64,
    events: Arc<Events>,
    tuning: Tuning,
    registry: Mutex<Registry>,
}

#[derive(Default)]
struct Registry {
    last_number: u64,
    /// The one copy that is prepared or running.
    current: Option<Arc<Copy>>,
    /// Copies that can no longer be cancelled because they get their names, and copies that are over but not cleaned up.
    /// They do not keep another copy from being made.
    finishing: Vec<Arc<Copy>>,
    /// A copy is being prepared, without the lock.
    preparing: bool,
    /// The last copies that are over and cleaned up.
    ended: VecDeque<(CopyStatus, Liveness)>,
    /// One counter for each queue: its ops in flight that change the image.
    changes: Vec<Weak<AtomicU64>>,
    /// The daemon ends; no new copy is taken.
    closed: bool,
}

impl PointInTime {
    /// Wraps `image`. `events` receives an event at the end of each copy.
    pub fn new(image: Arc<dyn Backend>, events: Arc<Events>) -> Self {
        Self::with_tuning(image, events, Tuning::default())
    }

    /// Wraps `image` with settings other than the default ones.
    pub fn with_tuning(image: Arc<dyn Backend>, events: Arc<Events>, tuning: Tuning) -> Self {
        let shared = Shared { delaying: AtomicU64::new(0), events, tuning, registry: Mutex::default() };
        PointInTime {
            image,
            shared: Arc::new(shared),
            lease: Arc::default(),
            copiers: Mutex::default(),
            targets: Mutex::default(),
            scratches: Scratches::default(),
        }
    }

    /// Cancels the current copy and refuses new ones. Called at the daemon's orderly end.
    pub fn close(&self) {
        let current = {
            let mut registry = self.shared.lock();
            registry.closed = true;
            registry.current.clone()
        };
        if let Some(copy) = current
            && copy.end(Phase::Cancelled, None)
        {
            copy.clean_up();
        }
    }

    /// Starts the copy's thread for the image and the one for reports of the target. They wait for the copy's start.
    fn start_threads(&self, copy: &Arc<Copy>, links: TargetLinks) -> io::Result<()> {
        let TargetLinks { old_data, reports, publish } = links;
        let (ready, is_ready) = mpsc::sync_channel(1);
        let (open, closed) = mpsc::channel();
        let scratch = self.scratches.start(copy);
        let (image, copier_copy, reports_copy) = (Arc::clone(&self.image), Arc::clone(copy), Arc::clone(copy));
        thread::Builder::new()
            .name("copy-reports".into())
            .spawn(move || target_reports::run(&reports_copy, &reports, &publish))?;
        reused::spawn("copy-image".into(), move || copier::run(image, copier_copy, old_data, scratch, ready, open))?;
        self.copiers.lock().expect("no panic while held").push((copy.number, closed));
        is_ready.recv().unwrap_or_else(|_| Err(io::Error::other("its thread ended")))
    }

    /// Returns the number for a new copy, unless another is under way or too many hang.
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
        registry.last_number += 1;
        Ok(registry.last_number)
    }

    fn make(&self, number: u64, options: &CopyOptions) -> Result<Arc<Copy>, CopyError> {
        let size = self.geometry().size;
        let no_resources = |error: io::Error| CopyError {
            code: "resources",
            message: format!("no thread or descriptor for the copy ({error}); raise the daemon's limits"),
        };
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|error| no_resources(error.into()))?;
        let saved = Copy::bitmap(size).map_err(|error| CopyError {
            code: "resources",
            message: format!("no memory to copy an image of {size} bytes ({error}); give the daemon more"),
        })?;
        let started = |liveness| self.targets.lock().expect("no panic while held").push((number, liveness));
        let spec = TargetSpec {
            path: options.target.clone(),
            size,
            image: self.image.info().path().map(Path::to_owned),
            digest: options.digest,
            tuning: self.shared.tuning.clone(),
            over: Arc::default(),
        };
        let (target, links) = TargetHandle::create(spec, started)?;
        let copy = Arc::new(Copy::new(number, size, options, target, wake, Arc::clone(&self.shared), saved));
        self.start_threads(&copy, links).map_err(|error| {
            copy.abandon();
            no_resources(error)
        })?;
        Ok(copy)
    }

    /// How many copies are over, or never started, and still have a thread that waits for the image or a target.
    fn count_ending(&self, registry: &Registry) -> usize {
        let mut copiers = self.copiers.lock().expect("no panic while held");
        copiers.retain(|(_, ended)| ended.try_recv() != Err(TryRecvError::Disconnected));
        let mut targets = self.targets.lock().expect("no panic while held");
        targets.retain(|(_, liveness)| liveness.is_alive());
        let alive = copiers.iter().map(|(number, _)| *number).chain(targets.iter().map(|(number, _)| *number));
        let known = || registry.current.iter().chain(&registry.finishing);
        let is_running = |number| known().any(|copy| copy.number == number && !copy.phase().is_over());
        alive.collect::<BTreeSet<_>>().into_iter().filter(|&number| !is_running(number)).count()
    }
}

impl Drop for PointInTime {
    /// Returns when every copier has closed its queue of the image.
    fn drop(&mut self) {
        self.close();
        for (_, closed) in self.copiers.get_mut().expect("no panic while held").drain(..) {
            // The copier sends nothing: this waits until it drops its end.
            let _ = closed.recv();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().expect("no panic while held")
    }

    /// Adds a new queue's counter of ops in flight that change the image.
    fn add_change_counter(&self, changes: &Arc<AtomicU64>) {
        let mut registry = self.lock();
        registry.changes.retain(|counter| counter.strong_count() > 0);
        registry.changes.push(Arc::downgrade(changes));
    }

    /// The current copy, if it has this number.
    fn running(&self, number: u64) -> Option<Arc<Copy>> {
        self.lock().current.clone().filter(|copy| copy.number == number)
    }

    /// Moves a copy that is cleaned up to the list of ended ones.
    fn record_end(&self, copy: &Copy, status: CopyStatus) {
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
                    format!("{name} has already ended ({}); 'virtioblkctl copies' shows how", ended.state)
                }
                None => "there is no copy of this name; 'virtioblkctl copies' lists them".into(),
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
        // Without the lock: a virtqueue that starts meanwhile must not wait for the target's file system.
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
            return Err(busy(format!("{} has already been started; wait for its end or cancel it", copy.name)));
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
            return Err(busy("a write is in flight, so the disk is not quiesced; quiesce it first"));
        }
        log_limited!(COPY_LOG, Info, "{} to {} started", copy.name, copy.target.path.display());
        Ok(())
    }

    fn cancel(&self, copy: &str) -> Result<(), CopyError> {
        let copy = Arc::clone(self.shared.lock().find(copy)?);
        if !copy.end(Phase::Cancelled, None) {
            return Err(busy(format!("{} is complete or just ending; query-copies shows how it ended", copy.name)));
        }
        copy.clean_up();
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

    fn layer_claim(&self) -> &dyn ImageClaim {
        self
    }
}

impl ImageClaim for PointInTime {
    fn activate(&self) -> io::Result<()> {
        self.lease.activate(&*self.image)
    }

    fn activate_for_hold(&self) -> io::Result<bool> {
        self.lease.activate_for_hold(&*self.image)
    }

    fn gives_way(&self) -> bool {
        self.image.claim().gives_way()
    }

    fn deactivate(&self) {
        self.lease.deactivate(&self.image, &self.shared);
    }
}
