//! Ceph RBD images, through librbd, which is loaded when one is opened.
//!
//! What is acknowledged when is decided by the engine, as for every back-end; librbd's cache is set so that the modes
//! mean the same as over a file (`options`). Contract clause 5: with librbd's cache on, a flush that failed is as final
//! as one of the page cache; without it nothing was lost, and only that flush fails. A client that was shut out of the
//! cluster (blocklisted) is done for good: every later op fails, and it never opens the image again by itself.

mod aio;
mod attempt;
mod callbacks;
mod data_map;
mod handle;
mod image_health;
mod lock;
mod luks;
mod name;
mod news;
mod open;
mod options;
mod queue;
mod quiesce;
mod recheck;
mod snapshots;
mod sys;
mod takeover;
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
use super::{Backend, BufferUse, Errno, Geometry, IoQueue, Notices};
use crate::disk::{ImageSnapshots, ImageStatus, RbdStatus};
use crate::engine::CacheMode;
use data_map::DataMap;
use handle::Image;
use image_health::ImageHealth;
use lock::Lock;
use news::KeeperEvent;
use queue::RbdQueue;
use quiesce::Quiesces;
use watch_thread::WatchThread;

/// Whether the image's lock is taken while a guest uses it (`--rbd-lock`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RbdLock {
    /// Where the image has the feature exclusive-lock, with a warning where not; and not where it is in a group, of
    /// which no snapshot could be taken then.
    #[default]
    Auto,
    /// Always: an image without the feature is refused.
    Exclusive,
    /// Never: clients that write take turns, and the user answers for it.
    None,
}

/// Whether the disk is held still for snapshots that others take (`--rbd-quiesce`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RbdQuiesce {
    /// It is; and an attendant is asked first if there is one.
    #[default]
    On,
    /// It is while somebody attends. Else the snapshot is refused: also before `virtioblkctl attend` has found a daemon that
    /// was started again.
    Attended,
    /// It is not: no watch.
    Off,
}

/// The format of an image that librbd encrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    /// Whichever of the two it is.
    Luks,
    /// LUKS1.
    Luks1,
    /// LUKS2.
    Luks2,
}

/// What to open and how. Everything but the name and the mode has a default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RbdOptions {
    /// Which image.
    pub name: RbdName,
    /// The cache mode.
    pub mode: CacheMode,
    /// The cluster's configuration file; `None`: where Ceph looks by itself.
    pub conf: Option<PathBuf>,
    /// The Ceph user, without "client.".
    pub user: String,
    /// Options for librbd and librados, in order.
    pub options: Vec<(String, String)>,
    /// An override of a pool's or an image's that breaks the mode is only warned of.
    pub allow_override: bool,
    /// Refuse writes. A snapshot is read-only anyway.
    pub read_only: bool,
    /// The sector size that the guest sees: 512 or 4096 bytes.
    pub logical_block_size: u32,
    /// Pass discards on, and let write-zeroes deallocate.
    pub discard_unmap: bool,
    /// The image's lock.
    pub lock: RbdLock,
    /// Who has the lock is kept in this file, so that a restart after a crash need not wait for the dead owner.
    pub state_file: Option<PathBuf>,
    /// Another process has the image and that file, and gives them up later: then [`Backend::take_over`] has them.
    pub lock_later: bool,
    /// Decrypt and encrypt, with the passphrase in this file.
    pub encryption: Option<(Encryption, PathBuf)>,
    /// Hold still for snapshots that others take.
    pub quiesce: RbdQuiesce,
    /// How long such a snapshot waits for us at most.
    pub quiesce_timeout: Duration,
    /// Where librados and librbd are; `None`: where the dynamic linker looks.
    pub library_path: Option<PathBuf>,
}

impl RbdOptions {
    /// The defaults.
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
    quiesce: Option<Arc<Quiesces>>,
    keeper: Mutex<WatchThread>,
    data_map: DataMap,
}

/// What queues, callbacks and the keeper have in common.
struct Shared {
    image: Image,
    name: String,
    /// The cluster's configuration file, if one was named.
    conf: Option<PathBuf>,
    /// librbd's version and its cache, for people.
    how: String,
    /// All but the size, which may change.
    geometry: Geometry,
    /// Bytes, whole blocks.
    size: AtomicU64,
    /// Write-zeroes may deallocate.
    zeroes_may_unmap: bool,
    /// librbd decrypts what is stored.
    encrypted: bool,
    /// librbd acknowledges writes that the cluster does not have.
    cached: bool,
    /// It does so only after the first flush (`rbd_cache_writethrough_until_flush`).
    cached_after_flush: bool,
    /// Something was written since the last sync of ours began.
    changed: AtomicBool,
    /// A flush was passed on.
    flushed: AtomicBool,
    /// One sync of ours at a time: the second must not end before the first.
    sync_turn: Mutex<()>,
    latch: StickyError,
    trouble: ImageHealth,
    lock: Lock,
    news: mpsc::Sender<KeeperEvent>,
}

impl Shared {
    /// Whether a range lies in the image, as large as it is now.
    fn check_range(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size.load(Ordering::Acquire));
        end.map(drop).ok_or(Errno(libc::EIO))
    }

    /// Whether anything can be asked of the image. A cluster forgets after an hour or so that it shut a client out; the
    /// client must not.
    fn check_usable(&self) -> Result<(), Errno> {
        self.trouble.check(false)
    }

    fn check_sync(&self) -> Result<(), Errno> {
        self.latch.get().map_or(Ok(()), Err)
    }

    /// Something that was written is about to be reported.
    fn changed(&self) {
        self.changed.store(true, Ordering::Release);
    }

    /// A flush is about to be passed on.
    fn flushes(&self) {
        self.flushed.store(true, Ordering::Release);
    }

    /// The outcome of a sync, as its caller must see it.
    fn judge_sync(&self, result: Result<(), Errno>) -> Result<(), Errno> {
        if result.is_ok() {
            self.trouble.is_writable_again(&self.news);
        }
        if self.cached { self.latch.judge(result, &self.name) } else { result }
    }

    /// What an op's outcome means for the whole image.
    fn heed(&self, result: Result<(), Errno>) {
        match result {
            Err(queue::FENCED) => self.trouble.fenced(&self.name, &self.news),
            Err(queue::LOCKED_OUT) if !self.geometry.read_only => self.trouble.locked_out(&self.name, &self.news),
            _ => {}
        }
    }

    /// Makes everything durable that was reaped. A flush of ours would end the caution that librbd has for guests that
    /// never flush, so none is sent before the guest's first: until then a write is acknowledged when the cluster has
    /// it, and nothing is left to be done.
    fn sync(&self) -> Result<(), Errno> {
        let _turn = self.sync_turn.lock().expect("no panic while held");
        self.check_sync()?;
        self.check_usable()?;
        if self.cached && self.cached_after_flush && !self.flushed.load(Ordering::Acquire) {
            return Ok(());
        }
        // An image that we did not write may be another client's, which keeps us from flushing.
        if !self.changed.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.flushes();
        let result = self.judge_sync(self.image.flush());
        if result.is_err() {
            self.changed();
        }
        self.heed(result);
        result
    }
}

/// An error number with words.
fn io_error(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno.0)
}

impl RbdBackend {
    /// Opens and checks an image. Errors name the thing, the cause and the mend. Called by main before the socket is
    /// bound, after signals were blocked: librados' threads inherit that.
    pub fn open(options: &RbdOptions) -> Result<RbdBackend, OpenError> {
        let (sender, receiver) = mpsc::channel();
        let shared = Arc::new(open::open(options, sender)?);
        let watched = options.quiesce != RbdQuiesce::Off && !shared.geometry.read_only;
        let quiesce = watched.then(|| Arc::new(Quiesces::new(Arc::clone(&shared), options.quiesce_timeout)));
        Ok(RbdBackend { shared, quiesce, keeper: Mutex::new(WatchThread::new(receiver)), data_map: DataMap::default() })
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

    /// Of an encrypted image, and of one that is being moved, everything may hold data: librbd lists what is stored, which
    /// is elsewhere.
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
        format!("Ceph RBD image {} over {}{access}", self.shared.name, self.shared.how)
    }

    /// Checked when the image is opened: `rbd_disable_zero_copy_writes` is true.
    fn buffer_use(&self) -> BufferUse {
        BufferUse::Copies("librbd copies each write before it is sent".into())
    }

    fn sync_failed(&self) -> Option<Errno> {
        self.shared.latch.get()
    }

    fn start_notices(&self, notices: Arc<dyn Notices>) {
        let mut keeper = self.keeper.lock().expect("no panic while held");
        keeper.start(&self.shared, self.quiesce.as_ref(), notices);
    }

    fn stop_notices(&self) {
        self.keeper.lock().expect("no panic while held").stop(&self.shared, self.quiesce.as_ref());
    }

    /// By its name, which is one image's in a cluster; and the cluster by its configuration file.
    fn identity(&self) -> Option<String> {
        let conf = self.shared.conf.as_ref().map(|conf| format!(" by {}", conf.display())).unwrap_or_default();
        Some(format!("rbd {}{conf}", self.shared.name))
    }

    fn settle(&self) {
        self.shared.lock.settle();
    }

    fn hand_over(&self) {
        self.shared.lock.hand_over();
    }

    fn take_over(&self) -> io::Result<()> {
        self.shared.lock.take_over()
    }

    fn activate(&self) -> io::Result<()> {
        self.shared.lock.activate(&self.shared)
    }

    fn gives_way(&self) -> bool {
        self.shared.lock.is_used()
    }

    fn deactivate(&self) {
        self.shared.lock.deactivate(&self.shared);
    }

    fn image_status(&self) -> ImageStatus {
        let (trouble, trouble_detail) = self.shared.trouble.status().unzip();
        let rbd = RbdStatus {
            image: self.shared.name.clone(),
            lock: self.shared.lock.status().to_string(),
            quiesce: self.quiesce.as_ref().map(|quiesce| quiesce.status()),
        };
        ImageStatus { trouble, trouble_detail, rbd: Some(rbd), ..ImageStatus::default() }
    }

    fn snapshots(&self) -> Option<Arc<dyn ImageSnapshots>> {
        if self.shared.geometry.read_only {
            return None;
        }
        Some(Arc::new(snapshots::Snapshots(Arc::clone(&self.shared))))
    }
}

impl Drop for RbdBackend {
    fn drop(&mut self) {
        self.stop_notices();
        // A callback may be on its way out. Were it the last to hold the image, librbd's own thread would close it, and
        // wait for itself.
        let start = Instant::now();
        while self.quiesce.as_ref().is_some_and(|quiesces| Arc::strong_count(quiesces) > 1) {
            if start.elapsed() > Duration::from_secs(5) {
                log::error!("{}: a callback of librbd's does not end", self.shared.name);
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }
}
