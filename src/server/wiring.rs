//! Builds the disk that a configuration describes. This is the only module that knows every part.

use std::error::Error;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::hand_over::{HandOverRequest, HandOverRequests};
use super::{Control, Served, ServerError, hand_over};
use crate::backend::bounce_pool::BouncePool;
use crate::backend::file::{FileBackend, FileOptions, OpenError, prepare_io_urings};
use crate::backend::image_format::FormatCheck;
use crate::backend::mem::{MemBackend, MemOptions};
use crate::backend::null::NullBackend;
use crate::backend::point_in_time::{self, CopyDirectory, PointInTime};
use crate::backend::rbd::{RbdBackend, RbdOptions, RbdQuiesce};
use crate::backend::slow::SlowBackend;
use crate::backend::stable::StableBackend;
use crate::backend::{Backend, Geometry};
use crate::base::unix_listener::MORE_DESCRIPTORS;
use crate::config::{BackendKind, Config};
use crate::control::protocol::return_types::TookOver;
use crate::control::{self, ImageNotices};
use crate::disk::{
    Copies, CopyError, Disk, DiskStatus, Events, ExportOptions, FailedRequest, ImageSnapshots, LatencyStatus,
    RingStatus, UnsyncedStatus,
};
use crate::engine::throttle::Limits;
use crate::export;
use crate::upgrade::{DiskFacts, LimitsState};
use crate::virtio::device::hand_over::{HandedOver, Steps};
use crate::virtio::vhost_user::save_restore::{HandOverError, SavedSession};
use crate::virtio::{Device, DeviceOptions, SessionEnd, Tuning};

/// The control thread calls this when a client sends `quit`.
pub(super) type Quit = Arc<dyn Fn() + Send + Sync>;

/// Starts the control thread, which serves the control socket, if there is one, and the image's store. The thread puts the
/// requests of new daemons into the last argument.
pub(super) type StartControl =
    Box<dyn FnOnce(Option<UnixListener>, Quit, Arc<HandOverRequests>) -> io::Result<Box<dyn Control>> + Send>;

/// A disk whose image is open and checked, and the function that starts its control thread.
pub(super) struct OpenDisk {
    pub served: Arc<dyn Served>,
    pub image: OpenImage,
    pub start_control: StartControl,
}

/// The main thread's reference to the image. It is the last one at the end, so that the main thread closes the image.
pub(super) struct OpenImage(Arc<dyn Backend>);

impl OpenImage {
    /// Waits until no other thread uses the image, for `limit` at most, and closes it. A thread may still release the image
    /// after a hold, or look at its format. Called by main at the end, when the disk and the control thread are dropped.
    ///
    /// An RBD image that is not closed keeps its watch, and for others its exclusive lock, until the cluster notices that the
    /// client is gone.
    pub(super) fn close(self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while Arc::strong_count(&self.0) > 1 {
            if Instant::now() >= deadline {
                log::warn!(
                    "{}: a thread still uses the image after {} s: the daemon ends without closing it. Everything is synced",
                    self.0.describe(),
                    limit.as_secs()
                );
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Opens the image and creates the device. No socket is bound yet.
pub(super) fn open(
    config: &Config,
    copy_directories: Vec<CopyDirectory>,
) -> Result<OpenDisk, Box<dyn Error + Send + Sync>> {
    let events = Events::new().map_err(|error| ServerError::System("cannot create an eventfd", error))?;
    let events = Arc::new(events);
    let bounce_pool = BouncePool::new(BouncePool::DEFAULT_BYTES);
    let image = open_backend(config, &bounce_pool, config.take_over.is_some())?;
    check_discard_granularity(config, &image.geometry())?;
    let queues = limit_to_io_urings(config, limit_to_descriptors(config.num_queues))?;
    let open_image = OpenImage(Arc::clone(&image));
    // The layer of copies is above the layer of stable writes; backend::stable says why.
    let stable = StableBackend::new(image, config.stable_writes, bounce_pool, events.clone());
    let copies = point_in_time::Tuning {
        directories: copy_directories.into(),
        scratch: config.scratch.clone(),
        ..point_in_time::Tuning::default()
    };
    let backend = Arc::new(PointInTime::with_tuning(Arc::new(stable), events.clone(), copies));
    let options = DeviceOptions {
        mode: config.cache,
        num_queues: queues,
        queue_size: config.queue_size,
        serial: config.serial.clone(),
    };
    let format = Arc::new(FormatCheck::default());
    let device = Device::with_tuning(backend.clone(), &options, events.clone(), &tuning(config));
    let disk: Arc<dyn Disk> =
        Arc::new(CopiedDisk { disk: Box::new(device.disk()), copies: backend.clone(), format: format.clone() });
    let info = control::DaemonInfo { vhost_socket: config.listen.to_string(), command_line: hand_over::command_line() };
    let notices = ImageNotices::new().map_err(|error| ServerError::System("cannot create an eventfd", error))?;
    let (store_timeout, attended) = match &config.backend {
        BackendKind::Rbd(options) => (options.quiesce_timeout, options.quiesce == RbdQuiesce::Attended),
        // These are unused: only an RBD image has a store that asks for a quiesce.
        _ => (Duration::from_secs(30), false),
    };
    let others = config.control.as_ref().map(|control| control.others).unwrap_or_default();
    let max_hold = config.max_hold;
    let resized = device.clone();
    let is_raw = config.is_raw;
    let served =
        Arc::new(ServedDisk { backend: backend.clone(), device, notices: notices.clone(), format: format.clone() });
    let start_control: StartControl = Box::new(move |listener, quit, requests| {
        let (is_running, leaving) = (requests.is_running.clone(), requests.leaving.clone());
        let upgrade = control::Upgrade {
            begin: Box::new(move |stream, requires_attendant| {
                requests.put(HandOverRequest { stream, requires_attendant });
            }),
            is_running,
            leaving,
        };
        let setup = control::Setup {
            disk,
            events,
            notices: notices.clone(),
            store_timeout,
            attended,
            max_hold,
            resized: Box::new(move |size| resized.resized(size)),
            quit,
            others,
            info,
            upgrade: Some(upgrade),
        };
        let server = control::Server::start(listener, setup)?;
        // The control thread replies to notices, so it runs by now. No front-end is served yet.
        backend.store().start_notices(notices);
        if !is_raw {
            format.start(backend);
        }
        Ok(Box::new(server) as Box<dyn Control>)
    });
    Ok(OpenDisk { served, image: open_image, start_control })
}

/// Opens the image without claiming it, and checks it.
pub(super) fn open_image(config: &Config) -> Result<Arc<dyn Backend>, Box<dyn Error + Send + Sync>> {
    let image = open_backend(config, &BouncePool::new(BouncePool::DEFAULT_BYTES), true)?;
    check_discard_granularity(config, &image.geometry())?;
    Ok(image)
}

/// Checks `--discard-granularity`: the guest could not discard a unit that is smaller than a block (virtio 1.3, 5.2.6).
fn check_discard_granularity(config: &Config, geometry: &Geometry) -> Result<(), String> {
    let Some(granularity) = config.discard_granularity else { return Ok(()) };
    if granularity < geometry.logical_block {
        return Err(format!(
            "--discard-granularity {granularity} is smaller than the image's logical blocks of {} bytes: use that or a \
             multiple by a power of two",
            geometry.logical_block
        ));
    }
    if geometry.discard.is_none() {
        log::warn!("--discard-granularity has no effect: this image does not support discards");
    }
    Ok(())
}

/// How long [`Served::shutdown`] waits for the check of the image's format.
const FORMAT_CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// The descriptors that a virtqueue needs: three of the front-end's, its eventfds, the image, an io_uring; rounded up.
const DESCRIPTORS_PER_QUEUE: u64 = 14;
/// The descriptors that the rest of the process needs: sockets, memory regions, clients of the control socket.
const OTHER_DESCRIPTORS: u64 = 64;

/// Limits the number of queues to what RLIMIT_NOFILE allows. Beyond that limit the kernel drops the descriptors of a
/// message, the message layer loses its position in the stream, and the front-end would wait for a reply for ever.
fn limit_to_descriptors(wanted: u16) -> u16 {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return wanted };
    let possible = limit.saturating_sub(OTHER_DESCRIPTORS) / DESCRIPTORS_PER_QUEUE;
    let offered = wanted.min(u16::try_from(possible).unwrap_or(u16::MAX)).max(1);
    if offered < wanted {
        log::warn!(
            "{offered} queues are offered instead of {wanted}: only {limit} files may be open; {MORE_DESCRIPTORS}"
        );
    }
    offered
}

/// Creates the io_urings of `wanted` queues, if the sandbox forbids to create them later. Returns the number of queues for
/// which there is an io_uring.
fn limit_to_io_urings(config: &Config, wanted: u16) -> io::Result<u16> {
    if !super::permissions::of(config).makes_io_urings_first() {
        return Ok(wanted);
    }
    let offered = prepare_io_urings(wanted)?;
    if offered < wanted {
        log::warn!(
            "{offered} queues are offered instead of {wanted}: there is no memory for more io_urings; raise \
             RLIMIT_MEMLOCK (LimitMEMLOCK= in the systemd unit), which all daemons of a user share, or give fewer \
             queues (--num-queues)"
        );
    }
    Ok(offered)
}

/// `lock_later`: the image is opened and not claimed.
fn open_backend(
    config: &Config,
    memory: &Arc<BouncePool>,
    lock_later: bool,
) -> Result<Arc<dyn Backend>, Box<dyn Error + Send + Sync>> {
    let block = config.logical_block_size.unwrap_or(512);
    Ok(match &config.backend {
        BackendKind::File(path) => Arc::new(open_file(config, path, memory, lock_later)?),
        BackendKind::Rbd(options) => Arc::new(RbdBackend::open(&RbdOptions { lock_later, ..(**options).clone() })?),
        BackendKind::Slow { path, delay, .. } => {
            Arc::new(SlowBackend::new(Arc::new(open_file(config, path, memory, lock_later)?), *delay))
        }
        BackendKind::Null(size) => Arc::new(NullBackend::new(*size, block)),
        BackendKind::Mem(size) => {
            Arc::new(MemBackend::new(MemOptions { logical_block: block, ..MemOptions::new(*size) }))
        }
    })
}

fn open_file(
    config: &Config,
    path: &Path,
    memory: &Arc<BouncePool>,
    lock_later: bool,
) -> Result<FileBackend, OpenError> {
    FileBackend::open(&FileOptions {
        read_only: config.read_only,
        logical_block_size: config.logical_block_size,
        discard_unmap: config.discard_unmap,
        is_raw: config.is_raw,
        memory: memory.clone(),
        locking: config.locking,
        lock_later,
        ..FileOptions::new(path, config.cache.into())
    })
}

/// The device's choices that are not in [`DeviceOptions`], among them those for tests.
fn tuning(config: &Config) -> Tuning {
    let mut tuning = Tuning {
        on_error: config.on_error,
        poll_max: config.poll_max,
        discard_granularity: config.discard_granularity,
        limits: config.limits,
        ..Tuning::default()
    };
    if let BackendKind::Slow { forgets: true, .. } = config.backend {
        tuning.protocol_features.remove(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    }
    tuning
}

/// The device and its image, as the server uses them.
struct ServedDisk {
    backend: Arc<PointInTime>,
    device: Arc<Device>,
    notices: Arc<ImageNotices>,
    format: Arc<FormatCheck>,
}

impl Served for ServedDisk {
    fn serve(&self, stream: UnixStream) -> io::Result<SessionEnd> {
        self.device.serve(stream)
    }

    fn has_received_message(&self) -> bool {
        self.device.has_received_message()
    }

    fn facts(&self) -> Option<DiskFacts> {
        self.device.facts()
    }

    fn sync_ahead(&self) -> io::Result<()> {
        self.device.sync_ahead()
    }

    fn hand_over(&self, timeout: Duration) -> Result<HandedOver, HandOverError> {
        // The new daemon is ready. A guest's write may wait for an export, which this daemon cannot pass on.
        self.backend.end_exports("an upgrade has begun, and the next daemon does not know the instant; take it again");
        self.device.hand_over(timeout)
    }

    fn take_over(&self) -> io::Result<()> {
        self.backend.for_upgrade().take_over()
    }

    fn resume_counts(&self, before: &[RingStatus], latency: &LatencyStatus) {
        self.device.resume_counts(before, latency);
    }

    fn resume_limits(&self, before: &LimitsState) {
        self.device.resume_limits(before);
    }

    fn release_image(&self) {
        self.backend.for_upgrade().hand_over();
    }

    fn restore_session(&self, saved: SavedSession, steps: &Steps) -> io::Result<SessionEnd> {
        self.device.restore_session(saved, steps)
    }

    fn shutdown(&self) {
        // Closing the copies comes first: a guest's write may wait for a copy, which will not be finished any more.
        self.backend.close();
        self.device.shutdown();
        // Nothing changes the image any more, so a snapshot of the store need not wait for this daemon. Closing replies to
        // the pending notices; the back-end could not stop before that.
        self.notices.close();
        self.backend.store().stop_notices();
        // The check uses the image. If its thread ends in time, the main thread releases the image.
        self.format.wait(FORMAT_CHECK_TIMEOUT);
    }

    fn sync(&self) -> io::Result<()> {
        self.backend.sync()
    }

    fn describe(&self) -> String {
        self.backend.describe()
    }

    fn in_flight(&self) -> u64 {
        self.device.disk().status().total.in_flight
    }
}

/// The disk of the device, with the copies and the detected format of the layers below it.
struct CopiedDisk {
    disk: Box<dyn Disk>,
    copies: Arc<PointInTime>,
    format: Arc<FormatCheck>,
}

impl Disk for CopiedDisk {
    fn close_gate(&self, epoch: u64) {
        self.disk.close_gate(epoch);
    }

    fn open_gate(&self) {
        self.disk.open_gate();
    }

    fn status(&self) -> DiskStatus {
        DiskStatus {
            copies_ending: self.copies.ending(),
            detected_format: self.format.found().map(str::to_owned),
            ..self.disk.status()
        }
    }

    fn latency(&self) -> LatencyStatus {
        self.disk.latency()
    }

    fn unsynced(&self) -> UnsyncedStatus {
        self.disk.unsynced()
    }

    fn continue_io(&self) -> u64 {
        self.disk.continue_io()
    }

    fn stopped_change(&self) -> Option<FailedRequest> {
        self.disk.stopped_change()
    }

    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> Result<u64, String> {
        self.disk.resize(grow_to, shrink)
    }

    fn limits(&self) -> Limits {
        self.disk.limits()
    }

    fn set_limits(&self, limits: Limits) {
        self.disk.set_limits(limits);
    }

    fn copies(&self) -> Option<&dyn Copies> {
        Some(&*self.copies)
    }

    fn prepare_export(&self, listener: UnixListener, options: &ExportOptions) -> Result<String, CopyError> {
        let (copy, reader) = self.copies.prepare_instant(options)?;
        let timeouts = export::ClientTimeouts::default();
        let served = export::ServerOptions { name: options.name.clone(), idle: options.idle, timeouts };
        export::start(listener, reader, served).map_err(|error| {
            let message = format!("no thread or descriptor for the export ({error}); raise the daemon's limits");
            // It has no client yet, so its own end is no news.
            let _ = self.copies.cancel(&copy);
            CopyError { code: "resources", message }
        })?;
        Ok(copy)
    }

    fn snapshots(&self) -> Option<Arc<dyn ImageSnapshots>> {
        self.copies.store().snapshots()
    }
}

impl Control for control::Server {
    fn take_over(&self, listener: Option<UnixListener>, figures: TookOver, attendant_missing: bool) -> io::Result<()> {
        control::Server::take_over(self, listener, figures, attendant_missing)
    }
}
