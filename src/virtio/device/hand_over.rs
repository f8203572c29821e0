//! The device's part of an upgrade in place ([`crate::upgrade`]): it comes to a stand and gives its front-end away, or goes
//! on with one that another process served.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::Device;
use crate::disk::RingStatus;
use crate::upgrade::{self, Descriptors, DiskFacts};
use crate::virtio::vhost_user::save_restore::{HandOverError, SavedSession};
use crate::virtio::vhost_user::session::Session;
use crate::virtio::vhost_user::session_end::SessionEnd;

/// To the vhost-user thread, between two messages: come to a stand, and hand the connection out.
pub(in crate::virtio) struct Ask {
    timeout: Duration,
    /// And when nothing was in flight any more.
    answer: mpsc::Sender<Result<(SavedSession, u64), HandOverError>>,
    /// Something: another process has it. An end: go on.
    verdict: mpsc::Receiver<()>,
}

/// A disk that stands still for another process. Dropped, it goes on here.
pub(crate) struct HandedOver {
    /// The front-end's connection.
    pub(crate) moved: Option<SavedSession>,
    /// When the disk began to come to a stand ([`upgrade::monotonic`]).
    pub(crate) since: u64,
    /// Nanoseconds until nothing was in flight.
    pub(crate) drained_in: u64,
    device: Arc<Device>,
    commit: Option<mpsc::Sender<()>>,
}

impl HandedOver {
    /// What its rings have counted.
    pub(crate) fn counts(&self) -> Vec<RingStatus> {
        self.device.rings.counts()
    }

    /// The other process has it: nothing here touches the image any more, and the vhost-user thread ends.
    pub(crate) fn commit(mut self) {
        if let Some(commit) = self.commit.take() {
            // Without a connection nobody waits for it.
            let _ = commit.send(());
        }
    }

    /// The kernel may be about to close what the other process had open.
    fn take_back(&self) {
        let backend = self.device.rings.backend();
        let end = Instant::now() + RECLAIM_TIMEOUT;
        while let Err(error) = backend.take_over() {
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
            self.take_back();
            drop(commit);
        }
    }
}

/// The steps of [`Device::restore_session`], with whoever speaks to the other process.
pub(crate) struct Steps {
    /// The state is taken over and the image claimed; or why not.
    pub(crate) prepared: mpsc::Sender<Result<(), String>>,
    /// Something: the connection is ours. An end: it is not.
    pub(crate) go: mpsc::Receiver<()>,
    /// Every ring has looked at what is in it.
    pub(crate) running: mpsc::Sender<()>,
}

/// How long the image is tried to be had again before the guest's rings are left to wait for it.
const RECLAIM_TIMEOUT: Duration = Duration::from_secs(2);

impl Device {
    /// Goes on from what another process counted. Before [`Device::restore_session`].
    pub(crate) fn go_on_counting(&self, before: &[RingStatus]) {
        self.rings.go_on_counting(before);
    }

    /// Goes on with a connection that another process served ([`crate::upgrade`]), then as [`Device::serve`].
    pub(crate) fn restore_session(&self, moved: SavedSession, steps: &Steps) -> std::io::Result<SessionEnd> {
        let SavedSession { stream, record, mut descriptors } = moved;
        let Some(front_end) = self.begin(&stream)? else { return Ok(SessionEnd::ShuttingDown) };
        self.spoke.store(record.negotiated() != (None, 0), Relaxed);
        let ready =
            Session::replayed(self.rings.clone(), self.advertised.clone(), self.limits.clone(), front_end, &record)
                .and_then(|session| {
                    session.ours().take_over(record, &mut descriptors).map_err(std::io::Error::other)?;
                    log::debug!("hand-over: the connection's state is taken over");
                    if session.ours().claim() {
                        log::debug!("hand-over: the image is claimed");
                        return Ok(session);
                    }
                    // Told of by the claim.
                    Err(std::io::Error::other("the image is not given to us; see the log"))
                });
        let (session, told) = match ready {
            Ok(session) => (Some(session), Ok(())),
            Err(error) => (None, Err(format!("the front-end's connection cannot be taken over: {error}"))),
        };
        // Nobody listens: the hand-over is off.
        let told = steps.prepared.send(told).is_ok();
        match session {
            Some(session) if told && steps.go.recv() == Ok(()) => {
                session.ours().go_on();
                session.ours().have_looked();
                // Only for the measure.
                let _ = steps.running.send(());
                Ok(self.run(session))
            }
            session => {
                if let Some(session) = session {
                    session.ours().let_go();
                }
                self.rings.disconnected("it stays where it was");
                self.left();
                Ok(SessionEnd::NotTakenOver)
            }
        }
    }

    /// Whether another process has the connection now: [`Device::hand_over`] asked for it, and committed.
    pub(in crate::virtio) fn was_handed_over(&self, session: &Session) -> bool {
        session.front_end.bell.was_rung();
        let Some(Ask { timeout, answer, verdict }) = self.lock().ask.take() else { return false };
        let moved = Self::pause_and_save(session, timeout);
        let stands = moved.is_ok();
        // Whoever asked waits for the answer, and is gone only with the process.
        let heard = answer.send(moved).is_ok();
        if stands && heard && verdict.recv() == Ok(()) {
            return true;
        }
        session.ours().go_on();
        false
    }

    /// The connection, and when nothing was in flight any more.
    fn pause_and_save(session: &Session, timeout: Duration) -> Result<(SavedSession, u64), HandOverError> {
        let (mut drained, mut handler, mut descriptors) = (0, session.ours(), Descriptors::default());
        handler.pause_all(timeout, || drained = upgrade::monotonic())?;
        let record = handler.record(&mut descriptors);
        let moved = record
            .and_then(|record| Ok(SavedSession { stream: session.front_end.stream.try_clone()?, record, descriptors }));
        Ok((moved.map_err(HandOverError::OutOfDescriptors)?, drained))
    }

    /// Brings the disk to a stand and hands out the front-end's connection, if there is one, for another process to go on
    /// with. Everything acknowledged is durable then, and nothing changes the image until the value returned is dropped,
    /// which makes the disk go on here; after [`HandedOver::commit`] it never does. Errors say the cause and the mend, and
    /// the disk goes on. `timeout`: for requests in flight. A thread of its own; nobody may begin to be served meanwhile.
    pub(crate) fn hand_over(self: &Arc<Self>, timeout: Duration) -> Result<HandedOver, HandOverError> {
        let since = upgrade::monotonic();
        let (answer, answered) = mpsc::channel();
        let (commit, verdict) = mpsc::channel();
        let bell = {
            let mut connection = self.lock();
            let bell = connection.front_end.as_ref().map(|front_end| front_end.bell.clone());
            connection.ask = bell.as_ref().map(|_| Ask { timeout, answer, verdict });
            bell
        };
        let mut moved = None;
        if let Some(bell) = bell {
            bell.ring();
            let heard = answered.recv_timeout(timeout);
            if matches!(heard, Err(RecvTimeoutError::Timeout)) && self.lock().ask.take().is_some() {
                return Err(HandOverError::FrontEndBusy);
            }
            // The connection may have ended at the same time: then nobody is connected.
            let heard = heard.or_else(|_| answered.recv());
            moved = heard.ok().transpose()?;
        }
        if moved.is_none() {
            self.rings.sync().map_err(HandOverError::SyncFailed)?;
        }
        let (moved, drained) = moved.unzip();
        self.rings.backend().hand_over();
        let drained_in = drained.map_or(0, |drained| drained - since);
        Ok(HandedOver { moved, since, drained_in, device: self.clone(), commit: Some(commit) })
    }

    /// Syncs while the rings run, so that little is left for [`Device::hand_over`]. The same thread.
    pub(crate) fn sync_ahead(&self) -> std::io::Result<()> {
        self.rings.backend().settle();
        self.rings.sync()
    }

    /// The image, and what the guest was told of it. `None`: no other process can have it.
    pub(crate) fn facts(&self) -> Option<DiskFacts> {
        let geometry = self.rings.backend().geometry();
        Some(DiskFacts {
            image: self.rings.backend().identity()?,
            size: self.rings.capacity().get(),
            logical_block: geometry.logical_block,
            read_only: geometry.read_only,
            num_queues: self.limits.num_queues,
            queue_size: self.limits.queue_size,
        })
    }
}
