//! One front-end's session: its socket, the handler of its messages, and the message layer between them.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard};

use vhost::vhost_user::{BackendReqHandler, Error};

use super::backend_channel::{self, GET_FEATURES, SET_FEATURES, SET_PROTOCOL_FEATURES};
use super::handler::{AdvertisedFeatures, DeviceLimits, Handler};
use super::session_end::SessionEnd;
use crate::base::sync::EventNotifier;
use crate::base::syscalls;
use crate::upgrade::session_state::SessionState;
use crate::virtio::rings::Rings;
use crate::virtio::shared_memory::sigbus::SessionSocket;

/// The front-end's socket, and the notifier that wakes its thread for anything but a message.
pub(in crate::virtio) struct FrontEnd {
    pub(in crate::virtio) stream: UnixStream,
    pub(in crate::virtio) notifier: Arc<EventNotifier>,
}

/// One front-end's session, from its connection to its end. The vhost-user thread owns it.
pub(in crate::virtio) struct Session {
    pub(in crate::virtio) front_end: FrontEnd,
    socket: Arc<SessionSocket>,
    handler: Arc<Mutex<Handler>>,
    pub(in crate::virtio) requests: BackendReqHandler<Mutex<Handler>>,
}

impl Session {
    /// The session of a front-end that has just connected on `stream`.
    pub(in crate::virtio) fn new(
        rings: Arc<Rings>,
        advertised: AdvertisedFeatures,
        limits: Arc<DeviceLimits>,
        front_end: FrontEnd,
        stream: UnixStream,
    ) -> std::io::Result<Self> {
        let socket = SessionSocket::new(front_end.stream.try_clone()?.into())?;
        rings.connected();
        let handler = Handler::new(rings, advertised, limits, socket.clone());
        let handler = Arc::new(Mutex::new(handler));
        let requests = BackendReqHandler::from_stream(stream, handler.clone());
        Ok(Session { front_end, socket, handler, requests })
    }

    /// The handler of the front-end's messages.
    pub(in crate::virtio) fn handler(&self) -> MutexGuard<'_, Handler> {
        self.handler.lock().expect("no panic while held")
    }

    /// Why the session ends with this error of the message layer.
    pub(in crate::virtio) fn end(&self, error: Error) -> SessionEnd {
        match error {
            _ if self.socket.vanished() => SessionEnd::MemoryTakenAway,
            Error::SocketRetry(error) => SessionEnd::OutOfDescriptors(error),
            Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_) => SessionEnd::Left,
            error => SessionEnd::ProtocolViolation(error),
        }
    }

    /// The session of a front-end that negotiated its features with another process. The message layer learns features from
    /// messages alone. So it first gets a socket pair, on which this function repeats those messages, and then the
    /// front-end's socket takes the place of the pair's.
    pub(in crate::virtio) fn replayed(
        rings: Arc<Rings>,
        advertised: AdvertisedFeatures,
        limits: Arc<DeviceLimits>,
        front_end: FrontEnd,
        record: &SessionState,
    ) -> std::io::Result<Self> {
        let (here, there) = UnixStream::pair()?;
        let mut session = Session::new(rings, advertised, limits, front_end, there)?;
        let (features, protocol_features) = record.negotiated();
        let mut messages = vec![(GET_FEATURES, None), (SET_PROTOCOL_FEATURES, Some(protocol_features))];
        messages.extend(features.map(|features| (SET_FEATURES, Some(features))));
        for (request, argument) in messages {
            (&here).write_all(&backend_channel::message(request, argument))?;
            session.requests.handle_request().map_err(std::io::Error::other)?;
        }
        syscalls::replace(&session.requests, session.front_end.stream.as_fd())?;
        Ok(session)
    }
}
