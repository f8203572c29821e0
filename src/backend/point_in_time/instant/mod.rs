//! The instant, read by others while the guest goes on: nothing is copied. As for a copy, no op changes a cluster whose bit is
//! clear. The old data of a cluster that the guest is about to overwrite goes to a local file without a name, the scratch,
//! and then the bit is set. So the instant's data of a cluster is in the image while the bit is clear, and in the scratch
//! once it is set ([`InstantReader`]).
//!
//! The image stays the truth, and the scratch can be thrown away at any time. If the scratch is full, fails or is slow, the
//! instant can no longer be read, and the guest goes on.

mod image_thread;
mod reader;
mod scratch_file;
mod sources;
mod status;

use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::event::{EventfdFlags, eventfd};

use super::copy::Copy;
use super::target_handle::{Liveness, TargetHandle};
use super::{PointInTime, Tuning, target_reports};
use crate::backend::Backend;
use crate::base::sync::{EventNotifier, reused};
use crate::disk::{CopyError, CopyOptions, ExportOptions, ExportStatus};
use image_thread::Request;
pub use reader::{InstantReader, PendingRead, ReadError, StatusExtent};
use scratch_file::ScratchRead;

use super::bitmap::Bitmap;

/// What the threads of one instant share besides its [`Copy`](struct@Copy).
pub(super) struct Instant {
    pub(super) copy: Arc<Copy>,
    /// The saved clusters that held only zeroes at the instant. They are not in the scratch.
    pub(super) zero: Bitmap,
    /// `None`: the thread that reads the image has ended.
    links: Mutex<Option<Links>>,
    /// Notified when the instant begins, and when it is over.
    pub(super) changed: EventNotifier,
}

/// Where readers send what they want.
struct Links {
    /// For the thread that reads the image. It is woken by [`Copy::wake_copier`].
    requests: Vec<Request>,
    /// For the thread that reads the scratch.
    scratch: Sender<ScratchRead>,
}

/// What an export adds to the status of a copy.
pub(super) struct ExportCounters {
    pub(super) name: String,
    pub(super) clients: AtomicU64,
    pub(super) read_bytes: AtomicU64,
}

impl ExportCounters {
    pub(super) fn status(&self) -> ExportStatus {
        use std::sync::atomic::Ordering::Relaxed;
        ExportStatus {
            name: self.name.clone(),
            clients: self.clients.load(Relaxed),
            read_bytes: self.read_bytes.load(Relaxed),
        }
    }
}

impl PointInTime {
    /// Prepares an instant for readers; [`crate::disk::Copies::start`] fixes it. Returns its name among the copies. Fails as
    /// [`crate::disk::Copies::prepare`] does. Called by the control thread.
    pub fn prepare_instant(&self, options: &ExportOptions) -> Result<(String, InstantReader), CopyError> {
        self.prepare_with(|number| self.make_instant(number, options))
    }

    fn make_instant(&self, number: u64, options: &ExportOptions) -> Result<(Arc<Copy>, InstantReader), CopyError> {
        let no_resources = |error: std::io::Error| CopyError {
            code: "resources",
            message: format!("no thread or descriptor for the export ({error}); raise the daemon's limits"),
        };
        let size = self.geometry().size;
        let no_memory = |error| CopyError {
            code: "resources",
            message: format!("no memory to export an image of {size} bytes ({error}); give the daemon more"),
        };
        let wake =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|errno| no_resources(errno.into()))?;
        let saved = Copy::bitmap(size).map_err(no_memory)?;
        let zero = Copy::bitmap(size).map_err(no_memory)?;
        let (reports, from_threads) = mpsc::channel();
        let liveness = Liveness::default();
        self.targets.lock().expect("no panic while held").push((number, liveness.clone()));
        let (directory, limit) = scratch_place(&self.shared.tuning, options.scratch_size)?;
        let scratch = scratch_file::start(&directory, limit, &self.shared.tuning, reports.clone(), &liveness)
            .map_err(|message| CopyError { code: "scratch", message })?;
        let target = TargetHandle::of_export(options.target.clone(), reports, liveness);
        let copied = CopyOptions { target: options.target.clone(), bandwidth: options.bandwidth, digest: false };
        let mut copy = Copy::new(number, size, &copied, target, wake, Arc::clone(&self.shared), saved);
        let counters =
            ExportCounters { name: options.name.clone(), clients: AtomicU64::new(0), read_bytes: AtomicU64::new(0) };
        copy.export = Some(Arc::new(counters));
        let copy = Arc::new(copy);
        let links = Mutex::new(Some(Links { requests: Vec::new(), scratch: scratch.reads }));
        let changed = EventNotifier::new().map_err(no_resources)?;
        let instant = Arc::new(Instant { copy: Arc::clone(&copy), zero, links, changed });
        let started = self.start_instant_threads(&instant, scratch.stores, scratch.limit, from_threads);
        started.map_err(|error| {
            copy.abandon();
            no_resources(error)
        })?;
        Ok((copy, InstantReader::new(instant)))
    }

    fn start_instant_threads(
        &self,
        instant: &Arc<Instant>,
        stores: Sender<super::scratch_thread::ScratchCommand>,
        limit: u64,
        from_threads: mpsc::Receiver<super::target_thread::TargetReport>,
    ) -> std::io::Result<()> {
        let reports_instant = Arc::clone(instant);
        thread::Builder::new().name("export-reports".into()).spawn(move || {
            let (publish, _) = mpsc::channel();
            target_reports::run(&reports_instant.copy, &from_threads, &publish);
            reports_instant.changed.notify();
        })?;
        let (ready, is_ready) = mpsc::sync_channel(1);
        let (open, closed) = mpsc::channel();
        let (image, image_instant): (Arc<dyn Backend>, _) = (Arc::clone(&self.image), Arc::clone(instant));
        reused::spawn("export-image".into(), move || {
            image_thread::run(image, image_instant, stores, limit, ready, open);
        })?;
        self.copiers.lock().expect("no panic while held").push((instant.copy.number, closed));
        is_ready.recv().unwrap_or_else(|_| Err(std::io::Error::other("its thread ended")))
    }
}

/// Where the scratch goes, and the most bytes that it may hold; `None`: half of what its filesystem has free. That is
/// `--scratch`, else the first directory of `--copy-dir`.
fn scratch_place(tuning: &Tuning, wanted: Option<u64>) -> Result<(PathBuf, Option<u64>), CopyError> {
    if let Some(scratch) = &tuning.scratch {
        return Ok((scratch.directory.clone(), Some(wanted.unwrap_or(scratch.size))));
    }
    let directory = tuning.directories.iter().find(|directory| directory.at_start.is_ok());
    let none = || CopyError {
        code: "scratch",
        message:
            "the old data of blocks that the guest overwrites has no place: start virtioblkd with --scratch DIR, or \
                  with --copy-dir DIR"
                .into(),
    };
    Ok((directory.ok_or_else(none)?.path.clone(), wanted))
}
