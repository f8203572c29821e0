//! One disk: serves one front-end after the other, and hands a front-end over to another process.

pub(crate) mod hand_over;

use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use vhost::vhost_user::Error;

use super::blk::features;
use super::blk::request::ID_BYTES;
use super::options::{DeviceOptions, Tuning};
use super::rings::Rings;
use super::rings::stall_watch::Watch;
use super::vhost_user::activation;
use super::vhost_user::backend_channel::{self, Woken};
pub(crate) use super::vhost_user::first_bytes::FirstBytes;
use super::vhost_user::handler::{AdvertisedFeatures, DeviceLimits};
use super::vhost_user::session::{FrontEnd, Session};
use super::vhost_user::session_end::SessionEnd;
use crate::backend::Backend;
use crate::base::sync::EventNotifier;
use crate::disk::Events;
use hand_over::HandOverRequest;

/// A virtio-blk device on a back-end. `serve` runs in a thread of its own, the vhost-user thread.
pub struct Device {
    pub(super) rings: Arc<Rings>,
    advertised: AdvertisedFeatures,
    pub(super) limits: Arc<DeviceLimits>,
    connection: Mutex<Connection>,
    /// The front-end has sent a valid message.
    spoke: AtomicBool,
    /// Notified when `connection.front_end` becomes `None`.
    disconnected: Condvar,
}

/// The front-end that is served, and whether the device serves any.
#[derive(Default)]
pub(super) struct Connection {
    /// The front-end, from the start of `serve` to its end.
    pub(super) front_end: Option<FrontEnd>,
    /// Asks the vhost-user thread to hand the session over to another process.
    pub(super) hand_over: Option<HandOverRequest>,
    /// [`Device::shutdown`] was called: no further front-end is served.
    closed: bool,
}

impl Device {
    /// Creates a device without a front-end. `events` gets what happens.
    pub fn new(backend: Arc<dyn Backend>, options: &DeviceOptions, events: Arc<Events>) -> Arc<Self> {
        Self::with_tuning(backend, options, events, &Tuning::default())
    }

    /// Creates a device as [`Device::new`] does, with options that most users leave at their defaults.
    pub fn with_tuning(
        backend: Arc<dyn Backend>,
        options: &DeviceOptions,
        events: Arc<Events>,
        tuning: &Tuning,
    ) -> Arc<Self> {
        let mut geometry = backend.geometry();
        if let (Some(limits), Some(granularity)) = (&mut geometry.discard, tuning.discard_granularity) {
            limits.granularity = granularity;
        }
        let policy = options.mode.into();
        let mut serial = [0; ID_BYTES];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        Arc::new(Device {
            advertised: AdvertisedFeatures {
                features: features::offered(policy, &geometry),
                config: features::config_space(policy, &geometry, options.num_queues, options.queue_size),
                protocol_features: tuning.protocol_features,
            },
            limits: Arc::new(DeviceLimits {
                num_queues: options.num_queues,
                queue_size: options.queue_size,
                serial: Arc::new(serial),
            }),
            rings: Rings::new(backend, options.mode, events, tuning.clone()),
            connection: Mutex::default(),
            spoke: AtomicBool::new(false),
            disconnected: Condvar::new(),
        })
    }

    /// The disk, as the control socket sees it.
    pub fn disk(&self) -> Arc<Rings> {
        self.rings.clone()
    }

    /// Serves a front-end until it leaves, breaks the protocol, or [`Device::shutdown`] is called. On return every ring is
    /// stopped. Everything popped is completed (or retained, for the next server) and, in every mode but `unsafe`, synced.
    /// One call at a time. Blocks; called by the vhost-user thread.
    pub fn serve(&self, stream: UnixStream) -> std::io::Result<SessionEnd> {
        let session = match self.connect(&stream)? {
            Some(front_end) => {
                Session::new(self.rings.clone(), self.advertised.clone(), self.limits.clone(), front_end, stream)?
            }
            None => return Ok(SessionEnd::ShuttingDown),
        };
        Ok(self.run(session))
    }

    /// Whether the front-end that is served has sent a valid message. One that has not gives way to another that has. Any
    /// thread.
    pub fn has_received_message(&self) -> bool {
        self.spoke.load(Relaxed)
    }

    /// Records a front-end as connected. Returns `None` after [`Device::shutdown`].
    pub(super) fn connect(&self, stream: &UnixStream) -> std::io::Result<Option<FrontEnd>> {
        let front_end = FrontEnd { stream: stream.try_clone()?, notifier: Arc::new(EventNotifier::new()?) };
        let mut connection = self.lock();
        if connection.closed {
            return Ok(None);
        }
        connection.front_end = Some(FrontEnd { stream: stream.try_clone()?, notifier: front_end.notifier.clone() });
        Ok(Some(front_end))
    }

    /// Records that no front-end is connected any more.
    pub(super) fn disconnect(&self) {
        let mut connection = self.lock();
        connection.front_end = None;
        self.spoke.store(false, Relaxed);
        // The thread that asked sees that its request was dropped.
        connection.hand_over = None;
        drop(connection);
        self.disconnected.notify_all();
    }

    /// Handles message after message until the session ends.
    pub(super) fn run(&self, mut session: Session) -> SessionEnd {
        let watch = Watch::start(&self.rings);
        let error = loop {
            let timeout = session.handler().waits_for_image().then_some(activation::RETRY_INTERVAL);
            match backend_channel::wait_for_message(&session.front_end.stream, &session.front_end.notifier, timeout) {
                Woken::Message => {}
                Woken::Timeout => {
                    session.handler().start_all();
                    continue;
                }
                Woken::Notified => {
                    if self.was_handed_over(&session) {
                        break None;
                    }
                    continue;
                }
            }
            if let Some(channel) = backend_channel::peek(&session.front_end.stream) {
                session.handler().offer_channel(channel);
            }
            // Before the reply: a front-end that has got a reply is not replaced by another.
            if !self.has_received_message() && FirstBytes::of(&session.front_end.stream) == FirstBytes::Message {
                self.spoke.store(true, Relaxed);
            }
            match session.requests.handle_request() {
                Ok(()) => {}
                // Nothing was read yet. Other errors that the message layer would retry mean a lack of memory or of
                // descriptors (ENOBUFS: those of the message could not be taken). Half a message is then lost, and the
                // other half would be taken for a message.
                Err(Error::SocketRetry(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => break Some(error),
            }
        };
        let end = match error {
            None => SessionEnd::HandedOver,
            Some(error) => {
                session.handler().end();
                session.end(error)
            }
        };
        drop(watch);
        self.rings.disconnected(&end.to_string());
        self.disconnect();
        end
    }

    /// Sets the size of the image to `bytes`, more or fewer than before. GET_CONFIG returns it, and requests beyond the end
    /// fail with VIRTIO_BLK_S_IOERR. The front-end is informed at once or, if none is connected, when the next one starts
    /// its rings. Requests that were taken before are not checked again. Any thread; does not block.
    pub fn resized(&self, bytes: u64) {
        self.rings.resized(bytes);
    }

    /// Ends the session, if there is one, and serves no further front-end. Returns when everything popped is completed.
    /// Called by main at the end.
    pub fn shutdown(&self) {
        let mut connection = self.lock();
        connection.closed = true;
        if let Some(FrontEnd { stream, .. }) = &connection.front_end {
            // Shut down for reading only. The vhost-user thread then sees the end, and the front-end does not until
            // everything is completed. QEMU reads the used index when it sees the connection end, and would give what is
            // completed after that to the next server again. The front-end may have closed the connection already.
            let _ = stream.shutdown(std::net::Shutdown::Read);
        }
        while connection.front_end.is_some() {
            connection = self.disconnected.wait(connection).expect("no panic while held");
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().expect("no panic while held")
    }
}
