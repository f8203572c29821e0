//! The one place that knows every part: makes the disk that a configuration describes.

use std::error::Error;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use serde_json::Value;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::hand_over::Requests;
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
use crate::control::{self, ImageNotices};
use crate::disk::{Copies, Disk, DiskStatus, Events, FailedRequest, ImageSnapshots, RingStatus};
use crate::upgrade::DiskFacts;
use crate::virtio::device::hand_over::{HandedOver, Steps};
use crate::virtio::vhost_user::save_restore::SavedSession;
use crate::virtio::{Device, DeviceOptions, SessionEnd, Tuning};

/// Called by the control socket's thread when it is told to end the daemon.
pub(super) type Quit = Arc<dyn Fn() + Send + Sync>;

/// Starts to answer the control socket, if there is one, and the image's store. Who wants to take over is told to the
/// last.
pub(super) type StartControl =
    Box<dyn FnOnce(Option<UnixListener>, Quit, Arc<Requests>) -> io::Result<Box<dyn Control>> + Send>;

/// An open image, checked, and how to control it.
pub(super) struct Opened {
    pub served: Arc<dyn Served>,
    pub start_control: StartControl,
}

/// Opens the image and makes the device. Nothing listens yet.
pub(super) fn open(
    config: &Config,
    copy_directories: Vec<CopyDirectory>,
) -> Result<Opened, Box<dyn Error + Send + Sync>> {
    let events = Events::new().map_err(|error| ServerError::System("cannot make an eventfd", error))?;
    let events = Arc::new(events);
    let depot = BouncePool::new(BouncePool::DEFAULT_BYTES);
    let image = open_backend(config, &depot)?;
    check_discard_granularity(config, &image.geometry())?;
    let queues = with_io_urings(config, affordable(config.num_queues))?;
    // Copies of an instant in front: see the head of backend::stable for the order.
    let stable = StableBackend::new(image, config.stable_writes, depot, events.clone());
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
    let info = control::Info { vhost_socket: config.listen.to_string(), command_line: hand_over::command_line() };
    let notices = ImageNotices::new().map_err(|error| ServerError::System("cannot make an eventfd", error))?;
    let (store_timeout, attended) = match &config.backend {
        BackendKind::Rbd(options) => (options.quiesce_timeout, options.quiesce == RbdQuiesce::Attended),
        // Never asked: these images have no store that speaks to us.
        _ => (Duration::from_secs(30), false),
    };
    let others = config.control.as_ref().map(|control| control.others).unwrap_or_default();
    let max_hold = config.max_hold;
    let resized = device.clone();
    let is_raw = config.is_raw;
    let served =
        Arc::new(ServedDisk { backend: backend.clone(), device, notices: notices.clone(), format: format.clone() });
    let start_control: StartControl = Box::new(move |listener, quit, requests| {
        let (under_way, leaving) = (requests.under_way.clone(), requests.leaving.clone());
        let upgrade = control::Upgrade {
            begin: Box::new(move |stream, misses_attendant| requests.put(stream, misses_attendant)),
            under_way,
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
        // When somebody answers, and before the first front-end.
        backend.start_notices(notices);
        if !is_raw {
            format.start(backend);
        }
        Ok(Box::new(server) as Box<dyn Control>)
    });
    Ok(Opened { served, start_control })
}

/// A unit smaller than a block could not be discarded (virtio 1.3, 5.2.6).
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
        log::warn!("--discard-granularity has no effect: this image takes no discards from its guest");
    }
    Ok(())
}

/// How long the end waits for a look at the image's format.
const FORMAT_CHECK_TIMEOUT: Duration = Duration::from_secs(1);

/// Descriptors that a ring needs: three of the front-end's, its wake-ups, the image, an io_uring. Somewhat rounded up.
const DESCRIPTORS_PER_RING: u64 = 14;
/// And everything else: sockets, memory regions, clients of the control socket.
const OTHER_DESCRIPTORS: u64 = 64;

/// As many queues as were allowed, and as there are descriptors for. Without one to spare the kernel drops those that
/// come with a message, the message layer loses its place, and the front-end would wait for an answer for ever.
fn affordable(wanted: u16) -> u16 {
    let Some(limit) = getrlimit(Resource::Nofile).current else { return wanted };
    let affordable = limit.saturating_sub(OTHER_DESCRIPTORS) / DESCRIPTORS_PER_RING;
    let offered = wanted.min(u16::try_from(affordable).unwrap_or(u16::MAX)).max(1);
    if offered < wanted {
        log::warn!(
            "{offered} queues are offered instead of {wanted}: only {limit} files may be open; {MORE_DESCRIPTORS}"
        );
    }
    offered
}

/// Makes the io_urings of so many queues, where the sandbox will let none be made later. As many queues as have one.
fn with_io_urings(config: &Config, wanted: u16) -> io::Result<u16> {
    if !super::permissions::of(config).makes_io_urings_first() {
        return Ok(wanted);
    }
    let offered = prepare_io_urings(wanted)?;
    if offered < wanted {
        log::warn!(
            "{offered} queues are offered instead of {wanted}: there is memory for no more io_urings; raise RLIMIT_MEMLOCK \
             (LimitMEMLOCK= in the systemd unit), which all daemons of a user share, or ask for fewer (--num-queues)"
        );
    }
    Ok(offered)
}

fn open_backend(config: &Config, memory: &Arc<BouncePool>) -> Result<Arc<dyn Backend>, Box<dyn Error + Send + Sync>> {
    let block = config.logical_block_size.unwrap_or(512);
    Ok(match &config.backend {
        BackendKind::File(path) => Arc::new(open_file(config, path, memory)?),
        BackendKind::Rbd(options) => {
            let lock_later = config.take_over.is_some();
            Arc::new(RbdBackend::open(&RbdOptions { lock_later, ..(**options).clone() })?)
        }
        BackendKind::Slow { path, delay, .. } => {
            Arc::new(SlowBackend::new(Arc::new(open_file(config, path, memory)?), *delay))
        }
        BackendKind::Null(size) => Arc::new(NullBackend::new(*size, block)),
        BackendKind::Mem(size) => {
            Arc::new(MemBackend::new(MemOptions { logical_block: block, ..MemOptions::new(*size) }))
        }
    })
}

fn open_file(config: &Config, path: &Path, memory: &Arc<BouncePool>) -> Result<FileBackend, OpenError> {
    FileBackend::open(&FileOptions {
        read_only: config.read_only,
        logical_block_size: config.logical_block_size,
        discard_unmap: config.discard_unmap,
        is_raw: config.is_raw,
        memory: memory.clone(),
        locking: config.locking,
        lock_later: config.take_over.is_some(),
        ..FileOptions::new(path, config.cache.into())
    })
}

/// The choices that are not in [`DeviceOptions`], those of tests among them.
fn tuning(config: &Config) -> Tuning {
    let mut tuning = Tuning {
        on_error: config.on_error,
        poll_max: config.poll_max,
        discard_granularity: config.discard_granularity,
        ..Tuning::default()
    };
    if let BackendKind::Slow { forgets: true, .. } = config.backend {
        tuning.protocol_features.remove(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    }
    tuning
}

/// The device and its image, as the server drives them.
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

    fn has_spoken(&self) -> bool {
        self.device.has_spoken()
    }

    fn facts(&self) -> Option<DiskFacts> {
        self.device.facts()
    }

    fn sync_ahead(&self) -> io::Result<()> {
        self.device.sync_ahead()
    }

    fn hand_over(&self, timeout: Duration) -> Result<HandedOver, String> {
        self.device.hand_over(timeout).map_err(|error| error.to_string())
    }

    fn take_over(&self) -> io::Result<()> {
        self.backend.take_over()
    }

    fn go_on_counting(&self, before: &[RingStatus]) {
        self.device.resume_counts(before);
    }

    fn give_back(&self) {
        self.backend.hand_over();
    }

    fn restore_session(&self, moved: SavedSession, steps: &Steps) -> io::Result<SessionEnd> {
        self.device.restore_session(moved, steps)
    }

    fn shutdown(&self) {
        // First: nothing of the guest's waits for a copy that will not be finished.
        self.backend.close();
        self.device.shutdown();
        // Nothing changes the image any more, so a snapshot need not wait for us; what still does is answered, for a
        // back-end cannot stop before.
        self.notices.close();
        self.backend.stop_notices();
        // The image is let go by main, unless it hangs.
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

/// The rings, with the copies that stand behind them.
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
        DiskStatus { copies_ending: self.copies.ending(), detected_format: self.format.found(), ..self.disk.status() }
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

    fn copies(&self) -> Option<&dyn Copies> {
        Some(&*self.copies)
    }

    fn snapshots(&self) -> Option<Arc<dyn ImageSnapshots>> {
        self.copies.snapshots()
    }
}

impl Control for control::Server {
    fn take_over(&self, listener: Option<UnixListener>, figures: Value, misses_attendant: bool) -> io::Result<()> {
        control::Server::take_over(self, listener, figures, misses_attendant)
    }
}
