//! The daemon's point-in-time copy: a back-end in front of another that can copy the image of one instant while the
//! guest continues to write. The old data of a block is saved before a write overwrites it (copy before write).
//!
//! Without a copy, an op costs one shifted id, and an op that changes the image also one atomic load. During a copy, an
//! op that changes unsaved clusters waits in its virtqueue's queue (`delaying_queue`) until the thread of `copier` has read them;
//! no other op waits. A cluster is 64 KiB, more for images over 32 TiB. Old data goes in memory to the thread that writes
//! the target (`target_thread`), at most 32 MiB of it. With a `scratch`, old data that the guest's writes wait for goes to
//! a local file first while the target is slow. The copy never harms the guest: if any part of it fails, or it makes a
//! write wait too long, the copy fails and every delayed op continues.
//!
//! Why the copy equals the image at the instant: `start` is called while the disk is held and quiet, and refuses if any
//! change is in flight. From then on, no op here changes a cluster whose bit is clear. The bit is set only when the
//! cluster's old data is in memory, and the copier reads only clusters whose bit is clear. Another host's guest could
//! change the image past these checks, so a running copy keeps the image from other hosts (`image_lease`).
//!
//! | file | what |
//! |---|---|
//! | `delaying_queue`, `waiters` | the queue in front of the image's; the ops that wait for a copy |
//! | `registry`, `copy`, `bitmap` | all copies of the image; one copy; which of its clusters are saved |
//! | `copier` | the thread that reads the image for a copy |
//! | `instant` | the instant as others read it (`crate::export`), from the image and a scratch file |
//! | `holes` | where the image holds data; an image that was shrunk |
//! | `target`, `target_thread` | the file that a copy is written to; the thread that writes it and may hang |
//! | `target_handle`, `target_reports` | the daemon's side of that thread: its start and end; its reports |
//! | `scratch`, `scratch_thread` | old data in a local file while the target is slow; the thread that uses the file |
//! | `image_lease` | keeps other hosts from the image while a copy reads it |
//! | `tuning` | what the daemon sets, and what only tests change |

mod bitmap;
mod copier;
mod copy;
mod delaying_queue;
mod holes;
mod image_lease;
mod instant;
mod registry;
mod scratch;
mod scratch_thread;
mod target;
mod target_handle;
mod target_reports;
mod target_thread;
mod tuning;
mod waiters;

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use super::layer::Layer;
use super::{Backend, ImageClaim, IoQueue};
use crate::base::rate_limit::{COPY_LOG, log_limited};
use crate::base::sync::reused;
use crate::disk::{Copies, CopyError, CopyOptions, CopyStatus, Events};
use copy::{Copy, Phase};
use delaying_queue::DelayingQueue;
use image_lease::ImageLease;
pub use instant::{InstantReader, PendingRead, ReadError, StatusExtent};
use registry::{Registry, Shared};
use scratch::Scratches;
use target_handle::{Liveness, TargetHandle, TargetLinks};
use target_thread::TargetSpec;

pub use tuning::{CopyDirectory, CopyStep, Mutant, ScratchOptions, TargetHook, Tuning};

/// The most ended copies whose threads still run, because the image or a target hangs.
const MAX_ENDING: usize = 4;

/// How long a caller waits for the filesystem of a target or scratch.
const TARGET_TIMEOUT: Duration = Duration::from_secs(2);

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
    fn reserve_number(&self) -> Result<u64, CopyError> {
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
                "{ending} earlier copies still wait for storage that does not respond (virtioblkctl copies); repair it, or \
                 restart virtioblkd"
            )));
        }
        registry.preparing = true;
        registry.last_number += 1;
        Ok(registry.last_number)
    }

    fn create_copy(&self, number: u64, options: &CopyOptions) -> Result<Arc<Copy>, CopyError> {
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

fn busy(message: impl Into<String>) -> CopyError {
    CopyError { code: "busy", message: message.into() }
}

impl PointInTime {
    /// Makes a copy, or an instant for readers, with `make`, and records it as the current one. Returns its name, and what
    /// else was made.
    fn prepare_with<T>(
        &self,
        make: impl FnOnce(u64) -> Result<(Arc<Copy>, T), CopyError>,
    ) -> Result<(String, T), CopyError> {
        let number = self.reserve_number()?;
        // Without the lock: a virtqueue that starts meanwhile must not wait for the target's filesystem.
        let made = make(number);
        let mut registry = self.shared.lock();
        registry.preparing = false;
        let (copy, rest) = made?;
        let name = copy.name.clone();
        if registry.closed {
            drop(registry);
            copy.abandon();
            return Err(busy("the daemon ends"));
        }
        registry.current = Some(copy);
        Ok((name, rest))
    }
}

impl Copies for PointInTime {
    fn prepare(&self, options: &CopyOptions) -> Result<String, CopyError> {
        let (name, ()) = self.prepare_with(|number| Ok((self.create_copy(number, options)?, ())))?;
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

    fn end_exports(&self, why: &str) {
        let exports: Vec<_> = {
            let registry = self.shared.lock();
            registry.current.iter().filter(|copy| copy.export.is_some()).map(Arc::clone).collect()
        };
        exports.iter().for_each(|copy| copy.fail(why.to_owned()));
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
