//! One disk: what it offers, and serving one front-end after the other.

pub(crate) mod hand_over;

use crate::virtio::options::DeviceOptions;
use crate::virtio::options::Tuning;
pub(crate) use crate::virtio::vhost_user::first_bytes::FirstBytes;
use crate::virtio::vhost_user::handler::AdvertisedFeatures;
use crate::virtio::vhost_user::handler::DeviceLimits;
use crate::virtio::vhost_user::session::FrontEnd;
use crate::virtio::vhost_user::session::Session;
use crate::virtio::vhost_user::session_end::SessionEnd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use vhost::vhost_user::Error;

use super::blk::features;
use super::blk::request::ID_BYTES;
use super::rings::Rings;
use super::rings::stall_watch::Watch;
use super::vhost_user::activation;
use super::vhost_user::backend_channel;
use crate::backend::Backend;
use crate::base::sync::Bell;
use crate::disk::Events;
use hand_over::Ask;

/// A virtio-blk device on a back-end. Made by main; `serve` runs in the vhost-user thread.
pub struct Device {
    pub(super) rings: Arc<Rings>,
    advertised: AdvertisedFeatures,
    pub(super) limits: Arc<DeviceLimits>,
    connection: Mutex<Connection>,
    /// The front-end has sent a valid message.
    spoke: AtomicBool,
    /// `connection.front_end` became `None`.
    left: Condvar,
}

/// Whether somebody is served, and whether anybody may be.
#[derive(Default)]
pub(super) struct Connection {
    /// The front-end's, from the start of `serve` to its end.
    pub(super) front_end: Option<FrontEnd>,
    /// Another process is to take it over.
    pub(super) ask: Option<Ask>,
    /// `shutdown` was called.
    closed: bool,
}

impl Device {
    /// A device with no front-end yet. What happens is told to `events`.
    pub fn new(backend: Arc<dyn Backend>, options: &DeviceOptions, events: Arc<Events>) -> Arc<Self> {
        Self::with_tuning(backend, options, events, &Tuning::default())
    }

    /// The same, with what most leave as it is.
    pub fn with_tuning(
        backend: Arc<dyn Backend>,
        options: &DeviceOptions,
        events: Arc<Events>,
        tuning: &Tuning,
    ) -> Arc<Self> {
        let geometry = backend.geometry();
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
            left: Condvar::new(),
        })
    }

    /// The disk that the control socket speaks to.
    pub fn disk(&self) -> Arc<Rings> {
        self.rings.clone()
    }

    /// Serves a front-end until it leaves, breaks the protocol, or [`Device::shutdown`]. On return every ring is
    /// stopped, everything popped is answered (or kept, for the next server) and, in every mode but `unsafe`, synced.
    /// One call at a time; blocks; the vhost-user thread.
    pub fn serve(&self, stream: UnixStream) -> std::io::Result<SessionEnd> {
        let session = match self.begin(&stream)? {
            Some(front_end) => {
                Session::new(self.rings.clone(), self.advertised.clone(), self.limits.clone(), front_end, stream)?
            }
            None => return Ok(SessionEnd::ShuttingDown),
        };
        Ok(self.run(session))
    }

    /// Whether the front-end that is served has sent a valid message. One that has not gives way to another that has. Any
    /// thread.
    pub fn has_spoken(&self) -> bool {
        self.spoke.load(Relaxed)
    }

    /// Somebody is connected from now on. `None`: nobody may be.
    pub(super) fn begin(&self, stream: &UnixStream) -> std::io::Result<Option<FrontEnd>> {
        let front_end = FrontEnd { stream: stream.try_clone()?, bell: Arc::new(Bell::new()?) };
        let mut connection = self.lock();
        if connection.closed {
            return Ok(None);
        }
        connection.front_end = Some(FrontEnd { stream: stream.try_clone()?, bell: front_end.bell.clone() });
        Ok(Some(front_end))
    }

    /// Nobody is connected any more.
    pub(super) fn left(&self) {
        let mut connection = self.lock();
        connection.front_end = None;
        self.spoke.store(false, Relaxed);
        // Dropped, which is an answer, too.
        connection.ask = None;
        drop(connection);
        self.left.notify_all();
    }

    /// Message after message, to the end.
    pub(super) fn run(&self, mut session: Session) -> SessionEnd {
        let watch = Watch::start(&self.rings);
        let error = loop {
            let timeout = session.ours().waits_for_image().then_some(activation::RETRY_INTERVAL);
            match backend_channel::wait_for_message(&session.front_end.stream, &session.front_end.bell, timeout) {
                backend_channel::Woken::Message => {}
                backend_channel::Woken::Time => {
                    session.ours().retry();
                    continue;
                }
                backend_channel::Woken::Bell => {
                    if self.was_handed_over(&session) {
                        break None;
                    }
                    continue;
                }
            }
            if let Some(channel) = backend_channel::peek(&session.front_end.stream) {
                session.ours().offer_channel(channel);
            }
            // Before the answer: who has one keeps the place.
            if !self.has_spoken() && FirstBytes::of(&session.front_end.stream) == FirstBytes::Message {
                self.spoke.store(true, Relaxed);
            }
            match session.requests.handle_request() {
                Ok(()) => {}
                // Nothing was read yet. For want of memory or descriptors (ENOBUFS: the message's could not be taken)
                // half a message is lost, and reading on would take the other half for a message.
                Err(Error::SocketRetry(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => break Some(error),
            }
        };
        let end = match error {
            None => SessionEnd::HandedOver,
            Some(error) => {
                session.ours().end();
                session.end(error)
            }
        };
        drop(watch);
        self.rings.disconnected(&end.to_string());
        self.left();
        end
    }

    /// The image has `bytes` now, more or fewer: GET_CONFIG says so, requests beyond the end fail with
    /// VIRTIO_BLK_S_IOERR, and the front-end is told at once or, if none is connected, when it starts its rings. Requests
    /// taken before keep the size that they were checked against. Any thread; does not block.
    pub fn resized(&self, bytes: u64) {
        self.rings.resized(bytes);
    }

    /// Ends the connection, if there is one, and serves nobody any more; returns when everything popped is answered.
    /// Main, at the end.
    pub fn shutdown(&self) {
        let mut connection = self.lock();
        connection.closed = true;
        if let Some(FrontEnd { stream, .. }) = &connection.front_end {
            // For reading only: our thread hears of the end, and the front-end does not before everything is answered.
            // QEMU takes up the used index when it sees us gone, and would give what is answered after that to the next
            // server again. Already closed by the other side is fine.
            let _ = stream.shutdown(std::net::Shutdown::Read);
        }
        while connection.front_end.is_some() {
            connection = self.left.wait(connection).expect("no panic while held");
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().expect("no panic while held")
    }
}
