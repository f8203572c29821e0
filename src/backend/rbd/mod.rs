//! Ceph RBD images, through librbd, which is loaded when an image is opened.
//!
//! The engine decides when a request is acknowledged, as for every back-end; librbd's cache is set so that the cache modes
//! mean the same as for a file (`options`). Clause 5 of the contract: with librbd's cache, a failed flush is as final as a
//! failed sync of the page cache; without it nothing was lost, and only that flush fails. A client that was shut out of
//! the cluster (blocklisted) stays so: every later op fails, and the daemon does not open the image again by itself.
//!
//! | file | what |
//! |---|---|
//! | `name`, `options`, `open` | the image's name, librbd's options, and every check before a guest waits |
//! | `network`, `image_health` | whether a cluster can be reached; why an image cannot be used |
//! | `sys`, `handle`, `luks`, `aio`, `callbacks` | UNSAFE: librbd's functions, their calls, and the calls that it makes |
//! | `queue` | the queue of one virtqueue |
//! | `watch_thread`, `watch_event` | does what librbd's own threads must not |
//! | `lock`, `attempt`, `lock_check`, `state_file` | the image's lock: taken in a thread, checked, and named for the next daemon |
//! | `quiesce`, `snapshots` | snapshots that others take, and those that the daemon has taken |
//! | `data_map` | where the image may hold data |

mod aio;
mod attempt;
mod callbacks;
mod data_map;
mod handle;
mod image_health;
mod lock;
mod lock_check;
mod luks;
mod name;
mod network;
mod open;
mod options;
mod queue;
mod quiesce;
mod snapshots;
mod state_file;
mod sys;
mod watch_event;
mod watch_thread;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

pub use name::RbdName;
pub use open::OpenError;

use super::sticky_error::StickyError;
use super::{
    Backend, BufferUse, Completion, Errno, Geometry, ImageClaim, ImageEnds, ImageInfo, ImageStore, ImageUpgrade, IoBuf,
    IoQueue, Notices, Op, OpId, image_format,
};
use crate::disk::{ImageSnapshots, ImageStatus, RbdStatus};
use crate::engine::CacheMode;
use data_map::DataMap;
use handle::Image;
use image_health::ImageHealth;
use lock::Lock;
use queue::RbdQueue;
use quiesce::QuiesceWatch;
use watch_event::WatchEvent;
use watch_thread::WatchThread;

/// Whether to take the image's lock while a guest uses it (`--rbd-lock`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RbdLock {
    /// Take it if the image has the feature exclusive-lock, and warn if it does not. Do not take it if the image is in a
    /// group, because then no snapshot of the group could be taken.
    #[default]
    Auto,
    /// Always take it, and refuse an image without the feature.
    Exclusive,
    /// Never take it. The lock moves between the clients that write, and the user is responsible for that.
    None,
}

/// Whether to hold the disk for snapshots that other clients take (`--rbd-quiesce`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RbdQuiesce {
    /// Hold the disk; if there is an attendant, it prepares the guest first.
    #[default]
    On,
    /// Hold the disk if there is an attendant, otherwise refuse the snapshot. That includes the time until
    /// `virtioblkctl attend` has connected to a restarted daemon.
    Attended,
    /// Do not hold the disk, and watch for no quiesce requests.
    Off,
}

/// The format of an image that librbd encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// LUKS1 or LUKS2, as the image's header says.
    Luks,
    /// LUKS1.
    Luks1,
    /// LUKS2.
    Luks2,
}

/// The image to open and its options. All but the name and the mode have a default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdOptions {
    /// The image.
    pub name: RbdName,
    /// The cache mode.
    pub mode: CacheMode,
    /// The cluster's configuration file; `None`: Ceph looks for it in its usual places.
    pub conf: Option<PathBuf>,
    /// The Ceph user, without "client.".
    pub user: String,
    /// Options for librbd and librados, in order.
    pub options: Vec<(String, String)>,
    /// An option of the pool or the image that breaks the mode is only a warning.
    pub allow_override: bool,
    /// Refuse writes. A snapshot is always read-only.
    pub read_only: bool,
    /// The logical block size that the guest sees: 512 or 4096 bytes.
    pub logical_block_size: u32,
    /// Pass discards on, and let write-zeroes deallocate.
    pub discard_unmap: bool,
    /// Whether to take the image's lock.
    pub lock: RbdLock,
    /// The file in which the lock's owner is recorded, so that a restart after a crash need not wait for the dead owner.
    pub state_file: Option<PathBuf>,
    /// Another process has the image and the state file, and hands them over later to [`ImageUpgrade::take_over`].
    pub lock_later: bool,
    /// The encryption format, and the file with the passphrase.
    pub encryption: Option<(Encryption, PathBuf)>,
    /// Whether to hold the disk for snapshots that other clients take.
    pub quiesce: RbdQuiesce,
    /// How long such a snapshot may wait for the disk to be held.
    pub quiesce_timeout: Duration,
    /// The directory of librados and librbd; `None`: where the dynamic linker looks.
    pub library_path: Option<PathBuf>,
}

impl RbdOptions {
    /// The default options for an image and a cache mode.
    pub fn new(name: RbdName, mode: CacheMode) -> Self {
        RbdOptions {
            name,
            mode,
            conf: None,
            user: "admin".to_string(),
            options: Vec::new(),
            allow_override: false,
            read_only: false,
            logical_block_size: 512,
            discard_unmap: true,
            lock: RbdLock::Auto,
            state_file: None,
            lock_later: false,
            encryption: None,
            quiesce: RbdQuiesce::On,
            quiesce_timeout: Duration::from_secs(30),
            library_path: None,
        }
    }
}

/// An open image.
pub struct RbdBackend {
    shared: Arc<Shared>,
    quiesce: Option<Arc<QuiesceWatch>>,
    watch_thread: Mutex<WatchThread>,
    data_map: DataMap,
}

/// The state that queues, callbacks and the watch thread share.
struct Shared {
    image: Image,
    name: String,
    /// The cluster's configuration file, if the options name one.
    conf: Option<PathBuf>,
    /// librbd's version and whether it caches, for people.
    librbd: String,
    /// The geometry; its size is that at the start.
    geometry: Geometry,
    /// The current size in bytes, in whole blocks.
    size: AtomicU64,
    /// Write-zeroes may deallocate.
    zeroes_may_unmap: bool,
    /// The image is encrypted by librbd.
    encrypted: bool,
    /// librbd's cache is on: it may acknowledge writes that the cluster does not have.
    cached: bool,
    /// The cache holds back writes only after the first flush (`rbd_cache_writethrough_until_flush`).
    cached_after_flush: bool,
    /// The image was written since the last [`Shared::sync`] began.
    changed: AtomicBool,
    /// librbd got a flush.
    flushed: AtomicBool,
    /// Makes calls of [`Shared::sync`] follow one another: the second must not end before the first.
    sync_turn: Mutex<()>,
    sticky_error: StickyError,
    health: ImageHealth,
    lock: Lock,
    events: mpsc::Sender<WatchEvent>,
}

impl Shared {
    /// Checks that a range is inside the image at its current size.
    fn check_range(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size.load(Ordering::Acquire));
        end.map(drop).ok_or(Errno(libc::EIO))
    }

    /// Fails if this client was shut out. The cluster forgets that after about an hour; the client must not.
    fn check_usable(&self) -> Result<(), Errno> {
        self.health.check(false)
    }

    /// Fails if an earlier sync failed for good (clause 5).
    fn check_sync(&self) -> Result<(), Errno> {
        self.sticky_error.get().map_or(Ok(()), Err)
    }

    /// Records that the image was written. Called before the caller sees the write's completion.
    fn mark_changed(&self) {
        self.changed.store(true, Ordering::Release);
    }

    /// Records that librbd gets a flush.
    fn mark_flushed(&self) {
        self.flushed.store(true, Ordering::Release);
    }

    /// Records the result of a sync and returns the result that its caller must see (clause 5).
    fn record_sync(&self, result: Result<(), Errno>) -> Result<(), Errno> {
        if result.is_ok() {
            self.health.writable_again(&self.events);
        }
        if self.cached { self.sticky_error.record(result, &self.name) } else { result }
    }

    /// Records that the image is fenced or locked out, if an op's result shows that.
    fn record_result(&self, result: Result<(), Errno>) {
        match result {
            Err(queue::FENCED) => self.health.fenced(&self.name, &self.events),
            Err(queue::LOCKED_OUT) if !self.geometry.read_only => self.health.locked_out(&self.name, &self.events),
            _ => {}
        }
    }

    /// Makes every write durable whose completion was reaped. librbd writes through until the first flush, for guests
    /// that never flush. A flush of the daemon would end that, so it sends none before the guest's first one: until
    /// then librbd acknowledges a write only when the cluster has it, and no flush is needed.
    fn sync(&self) -> Result<(), Errno> {
        let _turn = self.sync_turn.lock().expect("no panic while held");
        self.check_sync()?;
        self.check_usable()?;
        if self.cached && self.cached_after_flush && !self.flushed.load(Ordering::Acquire) {
            return Ok(());
        }
        // Another client may have the lock of an image that we did not write, so a flush could fail.
        if !self.changed.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.mark_flushed();
        let result = self.record_sync(self.image.flush());
        if result.is_err() {
            self.mark_changed();
        }
        self.record_result(result);
        result
    }
}

/// Converts an error number to an error with the system's text.
fn io_error(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno.0)
}

impl RbdBackend {
    /// Opens and checks an image. The error says what failed, why and how to fix it. Called by main before the socket is
    /// bound and after signals are blocked, because librados' threads inherit the signal mask.
    pub fn open(options: &RbdOptions) -> Result<RbdBackend, OpenError> {
        let (sender, receiver) = mpsc::channel();
        let shared = Arc::new(open::open(options, sender)?);
        let watched = options.quiesce != RbdQuiesce::Off && !shared.geometry.read_only;
        let quiesce = watched.then(|| Arc::new(QuiesceWatch::new(Arc::clone(&shared), options.quiesce_timeout)));
        Ok(RbdBackend {
            shared,
            quiesce,
            watch_thread: Mutex::new(WatchThread::new(receiver)),
            data_map: DataMap::default(),
        })
    }
}

impl Backend for RbdBackend {
    fn geometry(&self) -> Geometry {
        Geometry { size: self.shared.size.load(Ordering::Acquire), ..self.shared.geometry }
    }

    fn open_queue(&self, depth: usize) -> io::Result<Box<dyn IoQueue>> {
        Ok(Box::new(RbdQueue::open(Arc::clone(&self.shared), depth)?))
    }

    fn sync(&self) -> io::Result<()> {
        self.shared.sync().map_err(io_error)
    }

    /// For an encrypted image, and for one that is being migrated, everything counts as data: librbd lists stored ranges,
    /// which are at other offsets or in another image.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let size = self.geometry().size;
        if self.shared.encrypted {
            return Ok((offset < size).then_some((offset, size)));
        }
        let object = u64::from(self.shared.geometry.opt_io).max(data_map::MIN_OBJECT);
        Ok(self.data_map.next(&self.shared, offset, size, object))
    }

    fn describe(&self) -> String {
        let access = if self.shared.geometry.read_only { ", read-only" } else { "" };
        format!("Ceph RBD image {} over {}{access}", self.shared.name, self.shared.librbd)
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.shared.sticky_error.get()
    }

    fn info(&self) -> &dyn ImageInfo {
        self
    }

    fn store(&self) -> &dyn ImageStore {
        self
    }

    fn for_upgrade(&self) -> &dyn ImageUpgrade {
        self
    }

    fn claim(&self) -> &dyn ImageClaim {
        self
    }
}

impl ImageInfo for RbdBackend {
    fn ends(&self) -> io::Result<ImageEnds> {
        let size = self.geometry().size;
        let mut queue = RbdQueue::open(Arc::clone(&self.shared), 1)?;
        let mut piece = |offset: u64, len: u64| -> io::Result<Vec<u8>> {
            let len = usize::try_from(len).expect("a few KiB");
            let pushed = queue.push(Op::Read { offset, buf: IoBuf::owned(len, 4096, 0) }, OpId(offset));
            pushed.map_err(|_| io::Error::other("the queue is full"))?;
            let mut done = Vec::new();
            while done.is_empty() {
                queue.wait(None)?;
                queue.reap(&mut done);
            }
            let Completion { result, buf, .. } = done.remove(0);
            result.map_err(io_error)?;
            let mut bytes = vec![0; len];
            buf.expect("a read hands its buffer back").copy_to(0, &mut bytes);
            Ok(bytes)
        };
        let tail = size.min(image_format::TAIL as u64);
        Ok(ImageEnds { head: piece(0, size.min(image_format::HEAD as u64))?, tail: piece(size - tail, tail)? })
    }

    /// librbd copies writes: opening the image checks that `rbd_disable_zero_copy_writes` is true.
    fn buffer_use(&self) -> BufferUse {
        BufferUse::Copies("librbd copies each write before it is sent".into())
    }

    fn image_status(&self) -> ImageStatus {
        let (trouble, trouble_detail) = self.shared.health.status().unzip();
        let rbd = RbdStatus {
            image: self.shared.name.clone(),
            lock: self.shared.lock.status().to_string(),
            quiesce: self.quiesce.as_ref().map(|quiesce| quiesce.status()),
        };
        ImageStatus { trouble, trouble_detail, rbd: Some(rbd), ..ImageStatus::default() }
    }
}

impl ImageStore for RbdBackend {
    fn start_notices(&self, notices: Arc<dyn Notices>) {
        let mut watch_thread = self.watch_thread.lock().expect("no panic while held");
        watch_thread.start(&self.shared, self.quiesce.as_ref(), notices);
    }

    fn stop_notices(&self) {
        self.watch_thread.lock().expect("no panic while held").stop(&self.shared, self.quiesce.as_ref());
    }

    fn snapshots(&self) -> Option<Arc<dyn ImageSnapshots>> {
        if self.shared.geometry.read_only {
            return None;
        }
        Some(Arc::new(snapshots::Snapshots(Arc::clone(&self.shared))))
    }
}

impl ImageUpgrade for RbdBackend {
    /// The image's name, which is unique in a cluster, and the configuration file, which names the cluster.
    fn identity(&self) -> Option<String> {
        let conf = self.shared.conf.as_ref().map(|conf| format!(" by {}", conf.display())).unwrap_or_default();
        Some(format!("rbd {}{conf}", self.shared.name))
    }

    fn wait_until_releasable(&self) {
        self.shared.lock.wait_until_releasable();
    }

    fn hand_over(&self) {
        self.shared.lock.hand_over();
    }

    fn take_over(&self) -> io::Result<()> {
        self.shared.lock.take_over()
    }
}

impl ImageClaim for RbdBackend {
    fn activate(&self) -> io::Result<()> {
        self.shared.lock.activate(&self.shared)
    }

    fn gives_way(&self) -> bool {
        self.shared.lock.is_used()
    }

    fn deactivate(&self) {
        self.shared.lock.deactivate(&self.shared);
    }
}

impl Drop for RbdBackend {
    fn drop(&mut self) {
        self.stop_notices();
        // A callback may be about to return. If it owned the last reference to the image, librbd's own thread would close
        // the image and wait for itself.
        let returned = wait_for(|| self.quiesce.as_ref().is_none_or(|quiesces| Arc::strong_count(quiesces) == 1));
        if !returned {
            log::error!("{}: a callback of librbd does not return", self.shared.name);
        }
        self.quiesce = None;
        // A thread that takes the lock, lists holes or takes a snapshot may be in a call. The process may end after this, and
        // the image would not be closed.
        if !wait_for(|| Arc::strong_count(&self.shared) == 1) {
            log::warn!("{}: a call of librbd does not return: the image stays open", self.shared.name);
        }
    }
}

/// Waits until the condition is true, for 5 s at most. Returns whether it is.
fn wait_for(condition: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > Duration::from_secs(5) {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    true
}
