//! The size of the disk, and what the front-end knows of it.
//!
//! QEMU reads the configuration space when it creates the device, and again on VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
//! (hw/block/vhost-user-blk.c, vhost_user_blk_handle_config_change). It does not read it at a reconnect, and it ignores the
//! message before the rings run. So each front-end gets the message once when its first ring starts, unless it has read the
//! present size itself. In this way a size reaches the guest that changed while no front-end was connected, or while the
//! daemon did not run.

use crate::base::rate_limit::{FRONT_END_LOG, log_limited};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use rustix::net::SendFlags;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1 of the protocol, no reply requested, no body. (Before a reply, QEMU
/// would wait for GET_CONFIG on the other channel.)
const CONFIG_CHANGED: [[u8; 4]; 3] = [2u32.to_ne_bytes(), 1u32.to_ne_bytes(), 0u32.to_ne_bytes()];

/// The size of the disk, and what the front-end knows of it. Any thread may use it.
pub(in crate::virtio) struct Capacity {
    bytes: AtomicU64,
    front_end: Mutex<FrontEnd>,
}

#[derive(Default)]
struct FrontEnd {
    /// The channel for messages to the front-end (SET_BACKEND_REQ_FD).
    channel: Option<OwnedFd>,
    /// The size that the front-end read on this connection, or was asked to read.
    known_size: Option<u64>,
    /// A ring of the front-end was started, so it acts on messages.
    running: bool,
}

impl Capacity {
    /// The capacity of an image of so many bytes.
    pub(in crate::virtio) fn new(bytes: u64) -> Self {
        Capacity { bytes: AtomicU64::new(bytes), front_end: Mutex::default() }
    }

    /// The size in bytes.
    pub(in crate::virtio) fn get(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Sets the size. The caller informs running rings afterwards. Rings read the size here when they start.
    pub(in crate::virtio) fn set(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Release);
    }

    /// Sends the front-end a message if it does not know the size and a ring of it was started.
    pub(in crate::virtio) fn announce(&self) {
        self.lock().announce(self.get());
    }

    /// A front-end has connected. What it knows is unknown.
    pub(in crate::virtio) fn connected(&self) {
        *self.lock() = FrontEnd::default();
    }

    /// The front-end has left: it gets no further message.
    pub(in crate::virtio) fn disconnected(&self) {
        *self.lock() = FrontEnd::default();
    }

    /// Sets the channel for messages to the front-end.
    pub(in crate::virtio) fn set_channel(&self, channel: OwnedFd) {
        self.lock().channel = Some(channel);
    }

    /// What another process that takes the session over needs: a duplicate of the channel, and the size that the front-end
    /// knows.
    pub(in crate::virtio) fn record(&self) -> (io::Result<Option<OwnedFd>>, Option<u64>) {
        let front_end = self.lock();
        (front_end.channel.as_ref().map(OwnedFd::try_clone).transpose(), front_end.known_size)
    }

    /// Sets the size that the front-end knows from the process before this one.
    pub(in crate::virtio) fn set_known(&self, size: Option<u64>) {
        self.lock().known_size = size;
    }

    /// The size for a reply to GET_CONFIG. The front-end knows it from then on.
    pub(in crate::virtio) fn read(&self) -> u64 {
        let mut front_end = self.lock();
        let bytes = self.get();
        front_end.known_size = Some(bytes);
        bytes
    }

    /// A ring has started.
    pub(in crate::virtio) fn ring_started(&self) {
        let mut front_end = self.lock();
        if !std::mem::replace(&mut front_end.running, true) {
            front_end.announce(self.get());
        }
    }

    /// The last ring has stopped.
    pub(in crate::virtio) fn rings_stopped(&self) {
        self.lock().running = false;
    }

    fn lock(&self) -> MutexGuard<'_, FrontEnd> {
        self.front_end.lock().expect("no panic while held")
    }
}

impl FrontEnd {
    fn announce(&mut self, bytes: u64) {
        if !self.running || self.known_size == Some(bytes) {
            return;
        }
        let Some(channel) = &self.channel else {
            // When QEMU starts a disk for the first time, it has just read the size.
            log::debug!("the front-end takes no messages: it may not know that the disk has {bytes} bytes");
            return;
        };
        // Do not wait for a front-end that does not read: a full channel has unread messages of the same meaning.
        match rustix::net::send(channel, CONFIG_CHANGED.as_flattened(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => self.known_size = Some(bytes),
            Err(error) => log_limited!(
                FRONT_END_LOG,
                Warn,
                "the front-end cannot be informed that the disk has {bytes} bytes now: {error}"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_front_end_is_informed_of_a_size_that_it_does_not_know_while_its_rings_run() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut messages = move || {
            let mut bytes = [0; 1024];
            theirs.read(&mut bytes).map_or(0, |len| len / 12)
        };
        let capacity = Capacity::new(1000);
        capacity.connected();
        capacity.set_channel(ours.into());
        assert_eq!(capacity.read(), 1000);
        capacity.ring_started();
        assert_eq!(messages(), 0, "it has read the size");
        capacity.set(2000);
        capacity.announce();
        capacity.announce();
        assert_eq!(messages(), 1);
        capacity.rings_stopped();
        capacity.set(3000);
        capacity.announce();
        assert_eq!(messages(), 0, "QEMU would ignore it");
        capacity.ring_started();
        assert_eq!(messages(), 1);
        capacity.rings_stopped();
        capacity.ring_started();
        assert_eq!(messages(), 0, "it knows the size already");
    }

    #[test]
    fn a_reconnected_front_end_is_informed_unless_it_reads_the_size() {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let capacity = Capacity::new(1000);
        capacity.set_channel(ours.into());
        capacity.ring_started();
        let mut message = [0; 12];
        (&theirs).read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
}
