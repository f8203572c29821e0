//! The device's part in an upgrade in place ([`crate::upgrade`]): it stops and gives its front-end's session to another
//! process, or continues one that another process served.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::Device;
use crate::disk::{Disk, LatencyStatus, RingStatus, ThrottleStatus};
use crate::upgrade::session_state::SessionState;
use crate::upgrade::{self, Descriptors, DiskFacts, LimitsState};
use crate::virtio::vhost_user::save_restore::{HandOverError, SavedSession};
use crate::virtio::vhost_user::session::{FrontEnd, Session};
use crate::virtio::vhost_user::session_end::SessionEnd;

/// Asks the vhost-user thread, between two messages, to stop all rings and to give the session out.
pub(in crate::virtio) struct HandOverRequest {
    /// How long requests in flight may take to complete.
    timeout: Duration,
    /// Gets the session, and the time when nothing was in flight any more ([`upgrade::monotonic`]).
    reply: mpsc::Sender<Result<(SavedSession, u64), HandOverError>>,
    /// A message: another process has the session. The end of the channel: the session continues here.
    verdict: mpsc::Receiver<()>,
}

/// A disk that is stopped for another process. When this is dropped, the disk continues here.
pub(crate) struct HandedOver {
    /// The front-end's session, if a front-end is connected.
    pub(crate) session: Option<SavedSession>,
    /// When the disk began to stop ([`upgrade::monotonic`]).
    pub(crate) since: u64,
    /// Nanoseconds until nothing was in flight.
    pub(crate) drained_in: u64,
    device: Arc<Device>,
    commit: Option<mpsc::Sender<()>>,
}

impl HandedOver {
    /// What the disk's rings have counted.
    pub(crate) fn counts(&self) -> Vec<RingStatus> {
        self.device.rings.counts()
    }

    /// The latencies that the disk's rings have recorded.
    pub(crate) fn latencies(&self) -> LatencyStatus {
        self.device.rings.latencies()
    }

    /// The limits of the disk's rates.
    pub(crate) fn limits(&self) -> LimitsState {
        let rings = &self.device.rings;
        LimitsState {
            configured: ThrottleStatus::of(&rings.tuning().limits),
            current: ThrottleStatus::of(&rings.limits()),
        }
    }

    /// Leaves the disk to the other process. Nothing here touches the image any more, and the vhost-user thread ends.
    pub(crate) fn commit(mut self) {
        if let Some(commit) = self.commit.take() {
            // Without a front-end no thread waits for the message.
            let _ = commit.send(());
        }
    }

    /// Takes the image back. The kernel may still have to close what the other process had open, so this retries for
    /// [`RECLAIM_TIMEOUT`].
    fn reclaim_image(&self) {
        let backend = self.device.rings.backend();
        let end = Instant::now() + RECLAIM_TIMEOUT;
        while let Err(error) = backend.for_upgrade().take_over() {
            if Instant::now() > end {
                log::error!("the image was given up for another process and cannot be taken back yet: {error}");
                return;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for HandedOver {
    fn drop(&mut self) {
        if let Some(commit) = self.commit.take() {
            self.reclaim_image();
            drop(commit);
        }
    }
}

/// How the thread of [`Device::restore_session`] and the one that talks to the other process agree on each step.
pub(crate) struct Steps {
    /// Gets a message when the session is restored and the image claimed, or the reason why not.
    pub(crate) prepared: mpsc::Sender<std::io::Result<()>>,
    /// A message: the session is this process's. The end of the channel: it stays with the other process.
    pub(crate) go: mpsc::Receiver<()>,
    /// Gets a message when every ring has popped what was in it.
    pub(crate) running: mpsc::Sender<()>,
}

/// How long to retry reclaiming the image before the guest's rings are left waiting for it.
const RECLAIM_TIMEOUT: Duration = Duration::from_secs(2);

impl Device {
    /// Continues what another process counted. Called before [`Device::restore_session`].
    pub(crate) fn resume_counts(&self, before: &[RingStatus], latency: &LatencyStatus) {
        self.rings.resume_counts(before, latency);
    }

    /// Keeps the limits that were changed while the old daemon ran. If this one is started with other limits than that was,
    /// the operator wants those instead.
    pub(crate) fn resume_limits(&self, before: &LimitsState) {
        match before.changed(&self.rings.tuning().limits) {
            Some(Ok(limits)) => {
                log::info!("the limits that were changed at run time are kept");
                self.rings.set_limits(limits);
            }
            Some(Err(why)) => log::warn!(
                "the limits that were changed at run time are not kept, because the old virtioblkd gave invalid ones \
                 ({why}): set them again with 'virtioblkctl throttle'"
            ),
            None => {}
        }
    }

    /// Continues a session that another process served ([`crate::upgrade`]), then serves as [`Device::serve`] does.
    pub(crate) fn restore_session(&self, saved: SavedSession, steps: &Steps) -> std::io::Result<SessionEnd> {
        let SavedSession { stream, record, mut descriptors } = saved;
        let Some(front_end) = self.connect(&stream)? else { return Ok(SessionEnd::ShuttingDown) };
        self.spoke.store(record.negotiated() != (None, 0), Relaxed);
        let (session, restored) = match self.restore(front_end, record, &mut descriptors) {
            Ok(session) => (Some(session), Ok(())),
            Err(error) => (None, Err(error)),
        };
        // When no thread receives this, the hand-over has been abandoned.
        let heard = steps.prepared.send(restored).is_ok();
        match session {
            Some(session) if heard && steps.go.recv() == Ok(()) => {
                session.handler().start_all();
                session.handler().wait_until_polled();
                // Only the measurement of the pause needs this.
                let _ = steps.running.send(());
                Ok(self.run(session))
            }
            session => {
                if let Some(session) = session {
                    session.handler().abandon_take_over();
                }
                self.rings.disconnected("it stays where it was");
                self.disconnect();
                Ok(SessionEnd::NotTakenOver)
            }
        }
    }

    /// Restores the state of a session and claims the image. No ring runs yet.
    fn restore(
        &self,
        front_end: FrontEnd,
        record: SessionState,
        descriptors: &mut Descriptors,
    ) -> std::io::Result<Session> {
        let (advertised, limits) = (self.advertised.clone(), self.limits.clone());
        let session = Session::replayed(self.rings.clone(), advertised, limits, front_end, &record)?;
        session.handler().restore(record, descriptors).map_err(std::io::Error::other)?;
        log::debug!("hand-over: the connection's state is taken over");
        if !session.handler().claim() {
            // The claim logged the reason.
            return Err(std::io::Error::other("the image is not given to us; see the log"));
        }
        log::debug!("hand-over: the image is claimed");
        Ok(session)
    }

    /// Carries out a [`HandOverRequest`], if there is one. Returns whether another process has the session now.
    pub(in crate::virtio) fn was_handed_over(&self, session: &Session) -> bool {
        session.front_end.notifier.test_and_clear();
        let Some(HandOverRequest { timeout, reply, verdict }) = self.lock().hand_over.take() else { return false };
        let saved = Self::pause_and_save(session, timeout);
        let is_saved = saved.is_ok();
        // The thread that asked waits for the reply, for as long as this process runs.
        let heard = reply.send(saved).is_ok();
        if is_saved && heard && verdict.recv() == Ok(()) {
            return true;
        }
        session.handler().start_all();
        false
    }

    /// Pauses all rings. Returns the session, and the time when nothing was in flight any more.
    fn pause_and_save(session: &Session, timeout: Duration) -> Result<(SavedSession, u64), HandOverError> {
        let (mut drained, mut handler, mut descriptors) = (0, session.handler(), Descriptors::default());
        handler.pause_all(timeout, || drained = upgrade::monotonic())?;
        let record = handler.record(&mut descriptors);
        let saved = record
            .and_then(|record| Ok(SavedSession { stream: session.front_end.stream.try_clone()?, record, descriptors }));
        Ok((saved.map_err(HandOverError::OutOfDescriptors)?, drained))
    }

    /// Stops the disk and gives out its front-end's session, if there is one, for another process to continue. Everything
    /// acknowledged is durable then, and nothing changes the image until the value returned is dropped. The disk then
    /// continues here, unless [`HandedOver::commit`] was called. After an error it continues here at once. `timeout`: how
    /// long requests in flight may take. Called by a thread of its own; no front-end may be accepted meanwhile.
    pub(crate) fn hand_over(self: &Arc<Self>, timeout: Duration) -> Result<HandedOver, HandOverError> {
        let since = upgrade::monotonic();
        let (reply, replied) = mpsc::channel();
        let (commit, verdict) = mpsc::channel();
        let notifier = {
            let mut connection = self.lock();
            let notifier = connection.front_end.as_ref().map(|front_end| front_end.notifier.clone());
            connection.hand_over = notifier.as_ref().map(|_| HandOverRequest { timeout, reply, verdict });
            notifier
        };
        let mut saved = None;
        if let Some(notifier) = notifier {
            notifier.notify();
            let received = replied.recv_timeout(timeout);
            let is_late = matches!(received, Err(RecvTimeoutError::Timeout));
            if is_late && self.lock().hand_over.take().is_some() {
                return Err(HandOverError::FrontEndBusy);
            }
            // The session may have ended at the same time: then no front-end is connected.
            let received = received.or_else(|_| replied.recv());
            saved = received.ok().transpose()?;
        }
        if saved.is_none() {
            self.rings.sync().map_err(HandOverError::SyncFailed)?;
        }
        let (session, drained) = saved.unzip();
        self.rings.backend().for_upgrade().hand_over();
        let drained_in = drained.map_or(0, |drained| drained - since);
        Ok(HandedOver { session, since, drained_in, device: self.clone(), commit: Some(commit) })
    }

    /// Syncs while the rings run, so that little is left for [`Device::hand_over`]. Called by the same thread.
    pub(crate) fn sync_ahead(&self) -> std::io::Result<()> {
        self.rings.backend().for_upgrade().wait_until_releasable();
        self.rings.sync()
    }

    /// What identifies the image, and what the guest knows of it. `None`: no other process can open the image.
    pub(crate) fn facts(&self) -> Option<DiskFacts> {
        let geometry = self.rings.backend().geometry();
        Some(DiskFacts {
            image: self.rings.backend().for_upgrade().identity()?,
            size: self.rings.capacity().get(),
            logical_block: geometry.logical_block,
            read_only: geometry.read_only,
            num_queues: self.limits.num_queues,
            queue_size: self.limits.queue_size,
        })
    }
}
