//! One disk: what it offers, and serving one front-end after the other.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::{BackendReqHandler, Error};

use super::features;
use super::handler::Handler;
use super::request::ID_BYTES;
use super::rings::Rings;
use crate::backend::Backend;
use crate::disk::Events;
use crate::engine::CacheMode;

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

/// What GET_FEATURES and GET_CONFIG answer.
#[derive(Clone)]
pub(super) struct Offer {
    pub features: u64,
    pub config: [u8; 60],
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
    /// The front-end's socket, for `disconnect`.
    connection: Mutex<Option<UnixStream>>,
}

impl Device {
    /// A device with no front-end yet. What happens is told to `events`.
    pub fn new(backend: Arc<dyn Backend>, options: &DeviceOptions, events: Arc<Events>) -> Arc<Self> {
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
            },
            identity: Arc::new(Identity {
                num_queues: options.num_queues,
                queue_size: options.queue_size,
                serial: Arc::new(serial),
            }),
            rings: Rings::new(backend, options.mode, events),
            connection: Mutex::new(None),
        })
    }

    /// The disk that the control socket speaks to.
    pub fn disk(&self) -> Arc<Rings> {
        self.rings.clone()
    }

    /// Serves a front-end until it leaves, or [`Device::disconnect`]. On return every ring is stopped, everything
    /// popped is answered, and (in every mode but `unsafe`) synced. Returns why it ended, for the log. One call at a
    /// time; blocks; the vhost-user thread.
    pub fn serve(&self, stream: UnixStream) -> std::io::Result<String> {
        *self.connection.lock().expect("no panic while held") = Some(stream.try_clone()?);
        self.rings.connected();
        let handler = Handler::new(self.rings.clone(), self.offer.clone(), self.identity.clone());
        let handler = Arc::new(Mutex::new(handler));
        let mut requests = BackendReqHandler::from_stream(stream, handler.clone());
        let end = loop {
            match requests.handle_request() {
                Ok(()) | Err(Error::SocketRetry(_)) => {}
                Err(error) => break error,
            }
        };
        handler.lock().expect("no panic while held").stop_all();
        self.rings.sync_unless_ignored();
        let why = match end {
            Error::Disconnected | Error::PartialMessage | Error::SocketBroken(_) => "the front-end left".to_owned(),
            error => format!("the front-end broke the protocol: {error}"),
        };
        self.connection.lock().expect("no panic while held").take();
        self.rings.disconnected(&why);
        Ok(why)
    }

    /// Ends the connection, if there is one: `serve` drains and returns. Main, at shutdown.
    pub fn disconnect(&self) {
        if let Some(stream) = &*self.connection.lock().expect("no panic while held") {
            // Already closed by the other side is fine.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}
