//! One disk: what it offers, and serving one front-end after the other.

pub(crate) mod hand_over;

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::blk::features;
use super::blk::request::ID_BYTES;
use super::rings::Rings;
use super::rings::stall_watch::Watch;
use super::shared_memory::sigbus::Wire;
use super::vhost_user::activation;
use super::vhost_user::backend_channel;
use super::vhost_user::handler::Handler;
use crate::backend::Backend;
use crate::base::sync::Bell;
use crate::disk::Events;
use crate::engine::{CacheMode, OnError};
use hand_over::Ask;

/// What an operator chooses about the device.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// The cache mode.
    pub mode: CacheMode,
    /// The most rings that a front-end may use, 1 to 256.
    pub num_queues: u16,
    /// The largest ring that it may set up; a power of two.
    pub queue_size: u16,
    /// What GET_ID returns; cut to 20 bytes.
    pub serial: String,
}

/// What most leave as it is.
#[derive(Clone, Debug)]
pub struct Tuning {
    /// A request that is in flight for longer is told of.
    pub stall_after: Duration,
    /// Which failed requests are kept from the guest until somebody mended the cause.
    pub on_error: OnError,
    /// How long a ring's thread looks for work before it sleeps, at most; zero: it sleeps at once.
    pub poll_max: Duration,
    /// The protocol features that are offered at most: without INFLIGHT_SHMFD, tests show that they would notice.
    pub protocol_features: VhostUserProtocolFeatures,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            stall_after: Duration::from_secs(10),
            on_error: OnError::Report,
            poll_max: Duration::ZERO,
            protocol_features: VhostUserProtocolFeatures::all(),
        }
    }
}

/// What GET_FEATURES and GET_CONFIG answer.
#[derive(Clone)]
pub(super) struct Offer {
    pub features: u64,
    pub config: [u8; 60],
    pub protocol_features: VhostUserProtocolFeatures,
}

/// The constants of a device.
pub(super) struct Identity {
    pub num_queues: u16,
    pub queue_size: u16,
    pub serial: Arc<[u8; ID_BYTES]>,
}

/// A virtio-blk device on a back-end. Made by main; `serve` runs in the vhost-user thread.
pub struct Device {
    pub(super) rings: Arc<Rings>,
    offer: Offer,
    pub(super) identity: Arc<Identity>,
    connection: Mutex<Connection>,
    /// `connection.front_end` became `None`.
    left: Condvar,
}

/// Whether somebody is served, and whether anybody may be.
#[derive(Default)]
pub(super) struct Connection {
    /// The front-end's, from the start of `serve` to its end.
    pub(super) front_end: Option<Line>,
    /// Another process is to take it over.
    pub(super) ask: Option<Ask>,
    /// `shutdown` was called.
    closed: bool,
}

/// The front-end's socket, and the bell by which its thread is told of other things.
pub(super) struct Line {
    pub(super) stream: UnixStream,
    pub(super) bell: Arc<Bell>,
}

/// What the front-end is told after [`Device::shutdown`].
pub(super) const ENDING: &str = "the daemon is ending";

/// One conversation with a front-end.
pub(super) struct Talk {
    pub(super) line: Line,
    wire: Arc<Wire>,
    handler: Arc<Mutex<Handler>>,
    pub(super) requests: BackendReqHandler<Mutex<Handler>>,
}

impl Talk {
    pub(super) fn new(device: &Device, line: Line, stream: UnixStream) -> std::io::Result<Self> {
        let wire = Wire::new(line.stream.try_clone()?.into())?;
        device.rings.connected();
        let handler = Handler::new(device.rings.clone(), device.offer.clone(), device.identity.clone(), wire.clone());
        let handler = Arc::new(Mutex::new(handler));
        let requests = BackendReqHandler::from_stream(stream, handler.clone());
        Ok(Talk { line, wire, handler, requests })
    }

    pub(super) fn ours(&self) -> MutexGuard<'_, Handler> {
        self.handler.lock().expect("no panic while held")
    }

    /// Why it ended, for the log.
    fn why(&self, end: Error) -> String {
        match end {
            _ if self.wire.vanished() => {
                "the front-end took away memory that it had shared (it truncated the memory's file, or huge pages ran \
                 out): its connection was ended"
                    .to_owned()
            }
            Error::SocketRetry(error) => format!(
                "a message's descriptors could not be taken: {error}; raise the limit of open files (RLIMIT_NOFILE; \
                 ulimit -n, or LimitNOFILE= in the systemd unit), or allow fewer queues (--num-queues)"
            ),
            Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_) => "the front-end left".to_owned(),
            error => format!("the front-end broke the protocol: {error}"),
        }
    }
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
            offer: Offer {
                features: features::offered(policy, &geometry),
                config: features::config_space(policy, &geometry, options.num_queues, options.queue_size),
                protocol_features: tuning.protocol_features,
            },
            identity: Arc::new(Identity {
                num_queues: options.num_queues,
                queue_size: options.queue_size,
                serial: Arc::new(serial),
            }),
            rings: Rings::new(backend, options.mode, events, tuning.clone()),
            connection: Mutex::default(),
            left: Condvar::new(),
        })
    }

    /// The disk that the control socket speaks to.
    pub fn disk(&self) -> Arc<Rings> {
        self.rings.clone()
    }

    /// Serves a front-end until it leaves, breaks the protocol, or [`Device::shutdown`]. On return every ring is
    /// stopped, everything popped is answered (or kept, for the next server) and, in every mode but `unsafe`, synced.
    /// Returns why it ended, for the log. One call at a time; blocks; the vhost-user thread.
    pub fn serve(&self, stream: UnixStream) -> std::io::Result<String> {
        let talk = match self.begin(&stream)? {
            Some(line) => Talk::new(self, line, stream)?,
            None => return Ok(ENDING.into()),
        };
        Ok(self.converse(talk))
    }

    /// Somebody is connected from now on. `None`: nobody may be.
    pub(super) fn begin(&self, stream: &UnixStream) -> std::io::Result<Option<Line>> {
        let line = Line { stream: stream.try_clone()?, bell: Arc::new(Bell::new()?) };
        let mut connection = self.lock();
        if connection.closed {
            return Ok(None);
        }
        connection.front_end = Some(Line { stream: stream.try_clone()?, bell: line.bell.clone() });
        Ok(Some(line))
    }

    /// Nobody is connected any more.
    pub(super) fn left(&self) {
        let mut connection = self.lock();
        connection.front_end = None;
        // Dropped, which is an answer, too.
        connection.ask = None;
        drop(connection);
        self.left.notify_all();
    }

    /// Message after message, to the end.
    pub(super) fn converse(&self, mut talk: Talk) -> String {
        let watch = Watch::start(&self.rings);
        let end = loop {
            let timeout = talk.ours().waits_for_image().then_some(activation::RETRY);
            match backend_channel::wait_for_message(&talk.line.stream, &talk.line.bell, timeout) {
                backend_channel::Woken::Message => {}
                backend_channel::Woken::Time => {
                    talk.ours().retry();
                    continue;
                }
                backend_channel::Woken::Bell => {
                    if self.was_handed_over(&talk) {
                        break None;
                    }
                    continue;
                }
            }
            if let Some(channel) = backend_channel::peek(&talk.line.stream) {
                talk.ours().offer_channel(channel);
            }
            match talk.requests.handle_request() {
                Ok(()) => {}
                // Nothing was read yet. For want of memory or descriptors (ENOBUFS: the message's could not be taken)
                // half a message is lost, and reading on would take the other half for a message.
                Err(Error::SocketRetry(error)) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => break Some(error),
            }
        };
        let why = match end {
            None => "another process goes on with it".to_owned(),
            Some(error) => {
                talk.ours().end();
                talk.why(error)
            }
        };
        drop(watch);
        self.rings.disconnected(&why);
        self.left();
        why
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
        if let Some(Line { stream, .. }) = &connection.front_end {
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
