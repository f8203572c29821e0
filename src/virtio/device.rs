//! One disk: what it offers, and serving one front-end after the other.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{BackendReqHandler, Error};

use super::activation;
use super::channel;
use super::channel::{GET_FEATURES, SET_FEATURES, SET_PROTOCOL_FEATURES};
use super::features;
use super::handler::Handler;
use super::moving::{Moved, Record};
use super::request::ID_BYTES;
use super::rings::Rings;
use super::vanished::Wire;
use crate::backend::Backend;
use crate::disk::Events;
use crate::engine::{CacheMode, OnError};
use crate::sync::Bell;
use crate::sys;
use crate::upgrade::{self, Descriptors, DiskFacts};

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
    rings: Arc<Rings>,
    offer: Offer,
    identity: Arc<Identity>,
    connection: Mutex<Connection>,
    /// `connection.front_end` became `None`.
    left: Condvar,
}

/// Whether somebody is served, and whether anybody may be.
#[derive(Default)]
struct Connection {
    /// The front-end's, from the start of `serve` to its end.
    front_end: Option<Line>,
    /// Another process is to take it over.
    ask: Option<Ask>,
    /// `shutdown` was called.
    closed: bool,
}

/// The front-end's socket, and the bell by which its thread is told of other things.
struct Line {
    stream: UnixStream,
    bell: Arc<Bell>,
}

/// To the vhost-user thread, between two messages: come to a stand, and hand the connection out.
struct Ask {
    patience: Duration,
    /// And when nothing was in flight any more.
    answer: mpsc::Sender<Result<(Moved, u64), String>>,
    /// Something: another process has it. An end: go on.
    verdict: mpsc::Receiver<()>,
}

/// A disk that stands still for another process. Dropped, it goes on here.
pub(crate) struct HandedOver {
    /// The front-end's connection.
    pub(crate) moved: Option<Moved>,
    /// When the disk began to come to a stand ([`upgrade::monotonic`]).
    pub(crate) since: u64,
    /// Nanoseconds until nothing was in flight.
    pub(crate) drained_in: u64,
    device: Arc<Device>,
    commit: Option<mpsc::Sender<()>>,
}

impl HandedOver {
    /// The other process has it: nothing here touches the image any more, and the vhost-user thread ends.
    pub(crate) fn commit(mut self) {
        if let Some(commit) = self.commit.take() {
            // Without a connection nobody waits for it.
            let _ = commit.send(());
        }
    }
}

impl HandedOver {
    /// The kernel may be about to close what the other process had open.
    fn take_back(&self) {
        let backend = self.device.rings.backend();
        let end = Instant::now() + TAKE_BACK;
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

/// The steps of [`Device::adopt`], with whoever speaks to the other process.
pub(crate) struct Steps {
    /// The state is taken over and the image claimed; or why not.
    pub(crate) prepared: mpsc::Sender<Result<(), String>>,
    /// Something: the connection is ours. An end: it is not.
    pub(crate) go: mpsc::Receiver<()>,
    /// Every ring has looked at what is in it.
    pub(crate) running: mpsc::Sender<()>,
}

/// How long the image is tried to be had again before the guest's rings are left to wait for it.
const TAKE_BACK: Duration = Duration::from_secs(2);

/// What the front-end is told after [`Device::shutdown`].
const ENDING: &str = "the daemon is ending";

/// One conversation with a front-end.
struct Talk {
    line: Line,
    wire: Arc<Wire>,
    handler: Arc<Mutex<Handler>>,
    requests: BackendReqHandler<Mutex<Handler>>,
}

impl Talk {
    fn new(device: &Device, line: Line, stream: UnixStream) -> std::io::Result<Self> {
        let wire = Wire::new(line.stream.try_clone()?.into())?;
        device.rings.connected();
        let handler = Handler::new(device.rings.clone(), device.offer.clone(), device.identity.clone(), wire.clone());
        let handler = Arc::new(Mutex::new(handler));
        let requests = BackendReqHandler::from_stream(stream, handler.clone());
        Ok(Talk { line, wire, handler, requests })
    }

    /// The same for a connection on which the features were settled already. The message layer learns them from messages
    /// alone: so it first has a connection to us, on which we say them again, and then the real one in its place.
    fn replayed(device: &Device, line: Line, record: &Record) -> std::io::Result<Self> {
        let (here, there) = UnixStream::pair()?;
        let mut talk = Talk::new(device, line, there)?;
        let (features, protocol_features) = record.negotiated();
        let mut messages = vec![(GET_FEATURES, None), (SET_PROTOCOL_FEATURES, Some(protocol_features))];
        messages.extend(features.map(|features| (SET_FEATURES, Some(features))));
        for (request, argument) in messages {
            (&here).write_all(&channel::message(request, argument))?;
            talk.requests.handle_request().map_err(std::io::Error::other)?;
        }
        sys::replace(&talk.requests, talk.line.stream.as_fd())?;
        Ok(talk)
    }

    fn ours(&self) -> MutexGuard<'_, Handler> {
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
    /// stopped, everything popped is answered (or kept, for the next server) and, in every mode but `unsafe`, synced. Returns why it ended, for the
    /// log. One call at a time; blocks; the vhost-user thread.
    pub fn serve(&self, stream: UnixStream) -> std::io::Result<String> {
        let talk = match self.begin(&stream)? {
            Some(line) => Talk::new(self, line, stream)?,
            None => return Ok(ENDING.into()),
        };
        Ok(self.converse(talk))
    }

    /// Goes on with a connection that another process served ([`crate::upgrade`]), then as [`Device::serve`].
    pub(crate) fn adopt(&self, moved: Moved, steps: &Steps) -> std::io::Result<String> {
        let Moved { stream, record, mut descriptors } = moved;
        let Some(line) = self.begin(&stream)? else { return Ok(ENDING.into()) };
        let ready = Talk::replayed(self, line, &record).and_then(|talk| {
            talk.ours().take_over(record, &mut descriptors).map_err(std::io::Error::other)?;
            if talk.ours().claim() {
                return Ok(talk);
            }
            // Told of by the claim.
            Err(std::io::Error::other("the image is not given to us; see the log"))
        });
        let (talk, told) = match ready {
            Ok(talk) => (Some(talk), Ok(())),
            Err(error) => (None, Err(format!("the front-end's connection cannot be taken over: {error}"))),
        };
        // Nobody listens: the hand-over is off.
        let told = steps.prepared.send(told).is_ok();
        match talk {
            Some(talk) if told && steps.go.recv() == Ok(()) => {
                talk.ours().go_on();
                talk.ours().have_looked();
                // Only for the measure.
                let _ = steps.running.send(());
                Ok(self.converse(talk))
            }
            talk => {
                if let Some(talk) = talk {
                    talk.ours().let_go();
                }
                self.rings.disconnected("it stays where it was");
                self.left();
                Ok("it stays with the daemon that had it".into())
            }
        }
    }

    /// Somebody is connected from now on. `None`: nobody may be.
    fn begin(&self, stream: &UnixStream) -> std::io::Result<Option<Line>> {
        let line = Line { stream: stream.try_clone()?, bell: Arc::new(Bell::new()?) };
        let mut connection = self.lock();
        if connection.closed {
            return Ok(None);
        }
        connection.front_end = Some(Line { stream: stream.try_clone()?, bell: line.bell.clone() });
        Ok(Some(line))
    }

    /// Nobody is connected any more.
    fn left(&self) {
        let mut connection = self.lock();
        connection.front_end = None;
        // Dropped, which is an answer, too.
        connection.ask = None;
        drop(connection);
        self.left.notify_all();
    }

    /// Message after message, to the end.
    fn converse(&self, mut talk: Talk) -> String {
        let watch = self.watch_for_stalls();
        let end = loop {
            let timeout = talk.ours().waits_for_image().then_some(activation::RETRY);
            match channel::wait_for_message(&talk.line.stream, &talk.line.bell, timeout) {
                channel::Woken::Message => {}
                channel::Woken::Time => {
                    talk.ours().retry();
                    continue;
                }
                channel::Woken::Bell => {
                    if self.was_handed_over(&talk) {
                        break None;
                    }
                    continue;
                }
            }
            if let Some(channel) = channel::peek(&talk.line.stream) {
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

    /// Whether another process has the connection now: [`Device::hand_over`] asked for it, and committed.
    fn was_handed_over(&self, talk: &Talk) -> bool {
        talk.line.bell.was_rung();
        let Some(Ask { patience, answer, verdict }) = self.lock().ask.take() else { return false };
        let moved = Self::bring_to_a_stand(talk, patience);
        let stands = moved.is_ok();
        // Whoever asked waits for the answer, and is gone only with the process.
        let heard = answer.send(moved).is_ok();
        if stands && heard && verdict.recv() == Ok(()) {
            return true;
        }
        talk.ours().go_on();
        false
    }

    /// The connection, and when nothing was in flight any more.
    fn bring_to_a_stand(talk: &Talk, patience: Duration) -> Result<(Moved, u64), String> {
        let (mut drained, mut handler, mut descriptors) = (0, talk.ours(), Descriptors::default());
        handler.stand_still(patience, || drained = upgrade::monotonic())?;
        let record = handler.record(&mut descriptors);
        let moved = record.and_then(|record| Ok(Moved { stream: talk.line.stream.try_clone()?, record, descriptors }));
        let moved = moved.map_err(|error| format!("no descriptor is left to hand the connection over: {error}"))?;
        Ok((moved, drained))
    }

    /// Brings the disk to a stand and hands out the front-end's connection, if there is one, for another process to go on
    /// with. Everything acknowledged is durable then, and nothing changes the image until the value returned is dropped,
    /// which makes the disk go on here; after [`HandedOver::commit`] it never does. Errors say the cause and the mend, and
    /// the disk goes on. `patience`: for requests in flight. A thread of its own; nobody may begin to be served meanwhile.
    pub(crate) fn hand_over(self: &Arc<Self>, patience: Duration) -> Result<HandedOver, String> {
        let since = upgrade::monotonic();
        let (answer, answered) = mpsc::channel();
        let (commit, verdict) = mpsc::channel();
        let bell = {
            let mut connection = self.lock();
            let bell = connection.front_end.as_ref().map(|line| line.bell.clone());
            connection.ask = bell.as_ref().map(|_| Ask { patience, answer, verdict });
            bell
        };
        let mut moved = None;
        if let Some(bell) = bell {
            bell.ring();
            let heard = answered.recv_timeout(patience);
            if matches!(heard, Err(RecvTimeoutError::Timeout)) && self.lock().ask.take().is_some() {
                return Err("the front-end is in the middle of a message: see whether its QEMU hangs".into());
            }
            // The connection may have ended at the same time: then nobody is connected.
            let heard = heard.or_else(|_| answered.recv());
            moved = heard.ok().transpose()?;
        }
        if moved.is_none() {
            let synced = self.rings.sync();
            synced.map_err(|error| format!("the image cannot be synced: {error}; mend the storage"))?;
        }
        let (moved, drained) = moved.unzip();
        self.rings.backend().hand_over();
        let drained_in = drained.map_or(0, |drained| drained - since);
        Ok(HandedOver { moved, since, drained_in, device: self.clone(), commit: Some(commit) })
    }

    /// Syncs while the rings run, so that little is left for [`Device::hand_over`]. The same thread.
    pub(crate) fn sync_ahead(&self) -> std::io::Result<()> {
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
            num_queues: self.identity.num_queues,
            queue_size: self.identity.queue_size,
        })
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

    /// Looks for stalled requests, in a thread of its own until the value returned is dropped: the vhost-user thread may
    /// itself wait for a ring to stop.
    fn watch_for_stalls(&self) -> mpsc::Sender<()> {
        let (until, ended) = mpsc::channel();
        let rings = self.rings.clone();
        let work = move || {
            while ended.recv_timeout(rings.tuning().stall_after / 4) == Err(RecvTimeoutError::Timeout) {
                rings.look_for_stalls();
            }
        };
        if let Err(error) = thread::Builder::new().name("stall-watch".into()).spawn(work) {
            log::warn!("no thread to watch for I/O that hangs: {error}; raise the limit on threads");
        }
        until
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().expect("no panic while held")
    }
}
