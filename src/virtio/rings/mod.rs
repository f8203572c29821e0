//! What outlives a ring and a session: the counters, the operator's hold over all rings, the errors, the status.

pub(super) mod capacity;
pub(super) mod command;
pub(super) mod error_log;
mod hold;
pub(super) mod image_users;
mod limiter;
pub(super) mod stall_watch;
mod synced;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

pub(super) use command::{Mailbox, RingThreads, StopMode, WorkerCommand};
use hold::Hold;
pub(super) use hold::RingHoldStats;
pub(super) use limiter::Limiter;

use super::blk::features;
use super::options::Tuning;
use crate::backend::{Backend, Errno};
use crate::base::rate_limit::{IMAGE_LOG, log_limited};
#[cfg(all(test, feature = "model"))]
use crate::base::sync::interleavings::{Mutant, planted};
use crate::base::sync::mpsc;
use crate::base::sync::{Mutex, MutexGuard, thread};
use crate::base::text::base64_unless_utf8;
use crate::disk::{
    Disk, DiskStatus, Event, Events, FailedRequest, ImageStatus, LatencyStatus, RingCounters, RingStatus,
    StoppedStatus, ThrottleStatus, UnsyncedStatus, duration, ticks,
};
use crate::engine::throttle::Limits;
use crate::engine::{CacheMode, CachePolicy};
use capacity::Capacity;

use error_log::ErrorLog;
use image_users::ImageUsers;
use stall_watch::CallWatch;
pub(super) use synced::SyncCover;

/// The failed requests that one ring retains.
pub(super) struct RetainedRequests {
    /// The request that stopped the ring: the first change, or the first request if none is a change.
    pub first: FailedRequest,
    /// How many requests are retained.
    pub requests: u64,
}

/// All rings of one disk. The handler, the workers and, as a [`Disk`], the control thread share it.
pub struct Rings {
    backend: Arc<dyn Backend>,
    events: Arc<Events>,
    mode: CacheMode,
    tuning: Tuning,
    capacity: Capacity,
    image_users: ImageUsers,
    /// A [`Disk::resize`] is running.
    resizing: AtomicBool,
    call_watch: CallWatch,
    /// What the workers' clocks count from.
    started: Instant,
    /// Grows when a ring runs for the first time.
    generation: AtomicU64,
    /// When the last sync that succeeded began, in ticks since `started`, plus one. 0: none did.
    synced_at: AtomicU64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: BTreeMap<u32, Mailbox>,
    counters: BTreeMap<u32, Arc<RingCounters>>,
    hold: Option<Hold>,
    /// The epoch of the hold that a thread syncs for, because no ring does. `None`: there is no such thread.
    syncing: Option<u64>,
    /// The retained requests of each ring that has some.
    retained: BTreeMap<u32, RetainedRequests>,
    connected: bool,
    acked_features: Option<u64>,
    /// Why the back-end refuses the image, while rings wait for it.
    refused: Option<String>,
    errors: ErrorLog,
    /// The latencies that earlier daemons of this disk recorded.
    latency_before: LatencyStatus,
    /// The limits of the disk's rates. `None`: it has none.
    limiter: Option<Arc<Limiter>>,
}

/// What a ring gets that starts.
pub(super) struct RingJoined {
    pub counters: Arc<RingCounters>,
    /// The epoch of a hold that is on: the worker starts with its gate closed.
    pub hold: Option<u64>,
    /// The disk's limits, if it has any.
    pub limiter: Option<Arc<Limiter>>,
}

/// How an operator shares a guest's memory with virtioblkd.
pub(super) const SHARE_MEMORY: &str = "QEMU: use -object memory-backend-memfd,id=mem,size=SIZE,share=on and -machine \
     memory-backend=mem; libvirt: <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>";

/// How long the control thread waits for the storage. Storage that takes longer hangs.
const STORAGE_TIMEOUT: Duration = Duration::from_secs(2);

impl Rings {
    /// The rings of a disk on `backend` in this mode. `events` gets what happens.
    pub fn new(backend: Arc<dyn Backend>, mode: CacheMode, events: Arc<Events>, tuning: Tuning) -> Arc<Self> {
        let capacity = Capacity::new(backend.geometry().size);
        let state = State { limiter: limiter_of(tuning.limits), ..State::default() };
        Arc::new(Rings {
            backend,
            events,
            mode,
            tuning,
            capacity,
            image_users: ImageUsers::default(),
            resizing: AtomicBool::new(false),
            call_watch: CallWatch::default(),
            started: Instant::now(),
            generation: AtomicU64::new(0),
            synced_at: AtomicU64::new(0),
            state: Mutex::new(state),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    /// The figures of every ring that ever ran.
    pub(super) fn counts(&self) -> Vec<RingStatus> {
        self.lock().counters.iter().map(|(index, counters)| counters.status(*index)).collect()
    }

    /// The latencies of every ring that ever ran, in this process and before it.
    pub(super) fn latencies(&self) -> LatencyStatus {
        let state = self.lock();
        let mut total = state.latency_before.clone();
        state.counters.values().for_each(|counters| total.accumulate(&counters.latency.read()));
        total
    }

    /// Continues what another process counted. Called before any ring runs.
    pub(super) fn resume_counts(&self, before: &[RingStatus], latency: &LatencyStatus) {
        let mut state = self.lock();
        for ring in before {
            state.counters.entry(ring.index).or_default().resume_counts(ring);
        }
        state.latency_before = latency.clone();
        self.generation.fetch_add(1, Release);
    }

    /// What the workers' clocks count from.
    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// The cache policy of the disk.
    pub(super) fn policy(&self) -> CachePolicy {
        self.mode.into()
    }

    /// The back-end of the image.
    pub(super) fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }

    /// The options that most users leave at their defaults.
    pub(super) fn tuning(&self) -> &Tuning {
        &self.tuning
    }

    /// Sets what a ring retains; `None`: nothing. Called by its worker. The counter and the list change together, so a
    /// client that reads in the status that requests are retained can have them retried.
    pub(super) fn set_retained(&self, index: u32, retained: Option<RetainedRequests>) {
        let mut state = self.lock();
        if let Some(counters) = state.counters.get(&index) {
            counters.kept.store(retained.as_ref().map_or(0, |retained| retained.requests), Relaxed);
        }
        match retained {
            Some(retained) => state.retained.insert(index, retained),
            None => state.retained.remove(&index),
        };
    }

    /// Has each worker that has requests in flight check them for stalls: it sleeps until one completes, and would not check
    /// by itself. Each worker that had stalled requests checks too, though it may have nothing in flight by now, and so does
    /// each worker that was kicked and found no request. Called now and then by the session's watch.
    pub(super) fn check_stalls(&self) {
        let state = self.lock();
        for (index, mailbox) in &state.running {
            if state.counters.get(index).is_some_and(|counters| {
                counters.in_flight.load(Relaxed) > 0
                    || counters.stalled.load(Relaxed) > 0
                    || counters.kicked_empty.load(Relaxed)
            }) {
                mailbox.send(WorkerCommand::CheckStalls);
            }
        }
    }

    /// Has another thread continue each ring whose thread is in the same call as at the last check. Returns whether any ring
    /// made calls since then. Called by the session's watch.
    pub(super) fn check_calls(&self) -> bool {
        let threads: Vec<_> = self.lock().running.values().map(Mailbox::threads).collect();
        threads.into_iter().filter(|threads| threads.clone().check_call()).count() > 0
    }

    /// What wakes the session's watch when a ring begins a call.
    pub(super) fn call_watch(&self) -> &CallWatch {
        &self.call_watch
    }

    /// Notes that a ring's thread begins a call that may block.
    #[inline]
    pub(super) fn call_begins(&self) {
        self.call_watch.call_begins();
    }

    /// The disk's size, and what the front-end knows of it.
    pub(super) fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    /// Sets the size of the image. Requests are checked against it from each ring's next batch on, and the front-end is
    /// informed. Any thread.
    pub(super) fn resized(&self, bytes: u64) {
        let before = self.capacity.get();
        let bytes = bytes - bytes % u64::from(self.backend.geometry().logical_block);
        if bytes == before {
            return;
        }
        log_limited!(IMAGE_LOG, Info, "{}: {before} bytes before, {bytes} now", self.backend.describe());
        self.capacity.set(bytes);
        for mailbox in self.lock().running.values() {
            mailbox.send(WorkerCommand::Resize(bytes));
        }
        self.capacity.announce();
    }

    /// Carries out [`Disk::resize`] in a thread of its own, one at a time: the control thread must not wait for storage that
    /// hangs.
    fn resize_in_thread(self: &Arc<Self>, grow_to: Option<u64>, shrink: bool) -> Result<u64, String> {
        if self.resizing.swap(true, Acquire) {
            return Err("an earlier resize has not ended: the image's storage does not answer; fix it".into());
        }
        let (sender, result) = mpsc::sync_channel(1);
        let rings = self.clone();
        let work = move || {
            let result = rings.backend.resize(grow_to, shrink).map_err(|error| error.to_string());
            if let Ok(bytes) = result {
                rings.resized(bytes);
            }
            rings.resizing.store(false, Release);
            // The control thread no longer waits if the storage hung.
            let _ = sender.send(result);
        };
        if let Err(error) = thread::Builder::new().name("resize".into()).spawn(work) {
            self.resizing.store(false, Release);
            return Err(format!("no thread to resize in: {error}; raise the limit on threads"));
        }
        result.recv_timeout(STORAGE_TIMEOUT).unwrap_or_else(|_| {
            Err("the image's storage does not answer; once it does, the guest is informed of the new size".into())
        })
    }

    /// Reports why rings wait for the image, or that they no longer do. Called by the vhost-user thread.
    pub(super) fn image_refused(&self, why: Option<String>) {
        self.lock().refused = why;
        self.events.send(Event::ImageState(self.image_status()));
    }

    /// The status of the image: the back-end's, unless rings wait for the image.
    fn image_status(&self) -> ImageStatus {
        let refused = self.lock().refused.clone();
        let mut status = self.backend.info().image_status();
        if let Some(why) = refused {
            (status.trouble, status.trouble_detail) = (Some("not-ours".into()), Some(why));
        }
        status
    }

    /// Adds a ring that starts.
    pub(super) fn ring_joined(&self, index: u32, mailbox: Mailbox) -> RingJoined {
        let mut state = self.lock();
        state.running.insert(index, mailbox);
        self.capacity.ring_started();
        if !state.counters.contains_key(&index) {
            self.generation.fetch_add(1, Release);
        }
        let counters = state.counters.entry(index).or_default().clone();
        counters.running.store(true, Relaxed);
        let limiter = state.limiter.clone();
        #[cfg(all(test, feature = "model"))]
        if planted(Mutant::StartsUnblocked) {
            return RingJoined { counters, hold: None, limiter };
        }
        RingJoined { counters, hold: state.hold.as_ref().map(|hold| hold.epoch), limiter }
    }

    /// Removes a ring that has stopped.
    pub(super) fn ring_left(self: &Arc<Self>, index: u32) {
        let mut state = self.lock();
        state.running.remove(&index);
        if state.running.is_empty() {
            self.capacity.rings_stopped();
        }
        if let Some(counters) = state.counters.get(&index) {
            counters.running.store(false, Relaxed);
            counters.held.store(false, Relaxed);
            counters.limited.store(false, Relaxed);
            counters.untracked.store(false, Relaxed);
            counters.kicked_empty.store(false, Relaxed);
        }
        #[cfg(all(test, feature = "model"))]
        if planted(Mutant::HoldAwaitsStoppedRing) {
            return;
        }
        if let Some(hold) = &mut state.hold
            && hold.waiting.remove(&index)
        {
            hold.needs_sync = true;
            self.settle_if_complete(&mut state);
        }
    }

    /// Claims the image for rings that are about to run. An error: the image is another's. Called by the vhost-user thread.
    pub(super) fn claim_for_rings(&self) -> std::io::Result<()> {
        self.image_users.claim_for_rings(&*self.backend)
    }

    /// Releases the image, unless a hold needs it. No ring is to run, and what rings acknowledged is synced. Called by the
    /// vhost-user thread.
    pub(super) fn release_for_rings(&self) {
        #[cfg(all(test, feature = "model"))]
        if planted(Mutant::ReleasesHeldImage) {
            return self.image_users.release_rings(&*self.backend, || false);
        }
        self.image_users.release_rings(&*self.backend, || self.lock().hold.is_some());
    }

    /// Makes acknowledged writes durable when a ring is handed back or the front-end leaves (GET_VRING_BASE, disconnect),
    /// except in `unsafe`. QEMU sends a vhost-user disk no flush of its own at `stop` or migration. Called by the vhost-user
    /// thread.
    pub(super) fn sync_unless_ignored(&self) {
        if !self.policy().ignores_flush() {
            // `sync` reports the error.
            let _ = self.sync();
        }
    }

    /// Makes acknowledged writes durable, in every mode, and reports an error. Called by a thread that may block.
    pub(super) fn sync(&self) -> std::io::Result<()> {
        let mut cover = SyncCover::default();
        cover.begin(self, ticks(self.started.elapsed()));
        let result = self.backend.sync();
        match &result {
            Ok(()) => cover.succeeded(self),
            Err(error) => self.report(Event::SyncError(errno_of(error))),
        }
        result
    }

    /// A front-end has connected.
    pub(super) fn connected(&self) {
        self.capacity.connected();
        self.lock().connected = true;
        self.events.send(Event::Connected);
    }

    /// The front-end has left.
    pub(super) fn disconnected(&self, why: &str) {
        self.capacity.disconnected();
        {
            let mut state = self.lock();
            state.connected = false;
            state.acked_features = None;
        }
        self.events.send(Event::Disconnected(why.to_owned()));
    }

    /// Sets the features that the driver acknowledged; `None` after a reset.
    pub(super) fn negotiated(&self, acked: Option<u64>) {
        self.lock().acked_features = acked;
    }

    /// Reports an event to the control thread and, if it is an error, to the status and the log. Errors are logged at a
    /// limited rate, because a guest can cause them.
    pub(super) fn report(&self, event: Event) {
        let Some(text) = error_log::text(&event) else { return self.events.send(event) };
        let by_guest = matches!(event, Event::ProtocolError(_));
        let line = self.lock().errors.add(by_guest, text.clone());
        // Log without the lock: a log that is not read must not stop the control socket.
        line.log(&text);
        self.events.send(event);
    }
}

fn limiter_of(limits: Limits) -> Option<Arc<Limiter>> {
    limits.is_limited().then(|| Arc::new(Limiter::new(limits)))
}

/// The error number of an I/O error; EIO if it has none.
pub(super) fn errno_of(error: &std::io::Error) -> Errno {
    Errno(error.raw_os_error().unwrap_or(libc::EIO))
}

/// `Arc<Rings>` is the disk that the control socket sees.
impl Disk for Arc<Rings> {
    fn close_gate(&self, epoch: u64) {
        self.begin_hold(epoch);
    }

    fn open_gate(&self) {
        self.end_hold();
    }

    fn resize(&self, grow_to: Option<u64>, shrink: bool) -> Result<u64, String> {
        self.resize_in_thread(grow_to, shrink)
    }

    fn latency(&self) -> LatencyStatus {
        self.latencies()
    }

    fn unsynced(&self) -> UnsyncedStatus {
        let not_durable = |counters: &RingCounters| {
            // In this order: the first is never more than the second was then.
            let durable = counters.durable.load(Acquire);
            counters.acknowledged.load(Acquire).saturating_sub(durable)
        };
        let unsynced_bytes = self.lock().counters.values().map(|counters| not_durable(counters)).sum();
        let since = |at: u64| self.started.elapsed().saturating_sub(duration(at));
        let began = self.synced_at.load(Relaxed).checked_sub(1);
        UnsyncedStatus { unsynced_bytes, last_sync_ms: began.map(|at| since(at).as_millis() as u64) }
    }

    fn continue_io(&self) -> u64 {
        let state = self.lock();
        for index in state.retained.keys() {
            if let Some(mailbox) = state.running.get(index) {
                mailbox.send(WorkerCommand::Retry);
            }
        }
        state.retained.values().map(|retained| retained.requests).sum()
    }

    fn stopped_change(&self) -> Option<FailedRequest> {
        self.lock().retained.values().map(|retained| &retained.first).find(|failed| failed.is_change()).cloned()
    }

    fn limits(&self) -> Limits {
        self.lock().limiter.as_ref().map(|limiter| limiter.limits()).unwrap_or_default()
    }

    fn set_limits(&self, limits: Limits) {
        let mut state = self.lock();
        state.limiter = limiter_of(limits);
        for mailbox in state.running.values() {
            mailbox.send(WorkerCommand::Limit(state.limiter.clone()));
        }
    }

    fn status(&self) -> DiskStatus {
        let geometry = self.backend.geometry();
        let policy = self.policy();
        let image_status = self.image_status();
        let state = self.lock();
        let acked = state.acked_features;
        let mut total = RingStatus::default();
        let mut rings = Vec::new();
        for (&index, counters) in &state.counters {
            let ring = counters.status(index);
            total.accumulate(&ring);
            if counters.running.load(Relaxed) {
                rings.push(ring);
            }
        }
        let durable = policy.syncs_each_write(acked.is_none_or(features::driver_can_flush));
        DiskStatus {
            copies_ending: 0,
            detected_format: None,
            image: self.backend.describe(),
            image_path: self.backend.info().path().map(|path| path.display().to_string()),
            image_path_b64: self.backend.info().path().and_then(|path| base64_unless_utf8(path.as_os_str())),
            size: self.capacity.get(),
            logical_block_size: geometry.logical_block,
            read_only: geometry.read_only,
            cache_mode: self.mode.to_string(),
            write_acknowledged: match (durable, policy.opens_direct(), &image_status.rbd) {
                (true, ..) => "when durable",
                (false, true, None) => "when the host's device has it",
                (false, false, None) => "when the host's cache has it",
                (false, true, Some(_)) => "when the Ceph cluster has it",
                (false, false, Some(_)) => "when librbd's cache has it",
            }
            .into(),
            guest_flush: if policy.ignores_flush() { "ignored" } else { "synced" }.into(),
            guest_sees: if policy.guest_sees_write_cache() { "write back" } else { "write through" }.into(),
            connected: state.connected,
            driver_ready: acked.is_some(),
            acked_features: acked.unwrap_or(0),
            rings,
            stopped: state.retained.values().next().map(|retained| StoppedStatus::new(&retained.first, total.kept)),
            on_error: self.tuning.on_error.to_string(),
            throttle: state.limiter.as_ref().map(|limiter| ThrottleStatus::of(&limiter.limits())),
            total,
            last_errors: state.errors.last(),
            sync_failed: self.backend.sync_failed().is_some(),
            image_status,
        }
    }
}
