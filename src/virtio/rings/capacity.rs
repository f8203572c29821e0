//! The disk's size as the guest is to see it, and telling the front-end that it changed.
//!
//! QEMU reads the configuration space when the device is made and again when VHOST_USER_BACKEND_CONFIG_CHANGE_MSG tells
//! it to (hw/block/vhost-user-blk.c, vhost_user_blk_handle_config_change), but not at a reconnect, and it takes no
//! notice of the message before the rings run. So each connection is told once when its first ring starts, unless it
//! has read the present size itself; a size that changed while nobody was connected, or between two lives of the daemon,
//! reaches the guest in this way.

use crate::base::rate_limit::{FRONT_END_LOG, log_limited};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use rustix::net::SendFlags;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1 of the protocol, no answer wanted, no body. (With an answer QEMU
/// would wait for GET_CONFIG on the other channel first.)
const CONFIG_CHANGED: [[u8; 4]; 3] = [2u32.to_ne_bytes(), 1u32.to_ne_bytes(), 0u32.to_ne_bytes()];

/// The size, and what the front-end knows of it. Any thread.
pub(in crate::virtio) struct Capacity {
    bytes: AtomicU64,
    front_end: Mutex<FrontEnd>,
}

#[derive(Default)]
struct FrontEnd {
    /// Where our own requests go (SET_BACKEND_REQ_FD).
    channel: Option<OwnedFd>,
    /// The size that it read last, or was told to read, on this connection.
    knows: Option<u64>,
    /// Its first ring was started: it listens.
    running: bool,
}

impl Capacity {
    /// Of an image of so many bytes.
    pub(in crate::virtio) fn new(bytes: u64) -> Self {
        Capacity { bytes: AtomicU64::new(bytes), front_end: Mutex::default() }
    }

    /// Bytes.
    pub(in crate::virtio) fn get(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// The size changed. Rings must be told after this, and take it from here when they start.
    pub(in crate::virtio) fn set(&self, bytes: u64) {
        self.bytes.store(bytes, Ordering::Release);
    }

    /// Tells the front-end of a size that it does not know, if it listens.
    pub(in crate::virtio) fn announce(&self) {
        self.lock().announce(self.get());
    }

    /// A front-end came; nothing is known of it.
    pub(in crate::virtio) fn connected(&self) {
        *self.lock() = FrontEnd::default();
    }

    /// The front-end left: no message goes to it.
    pub(in crate::virtio) fn disconnected(&self) {
        *self.lock() = FrontEnd::default();
    }

    /// The front-end handed over its channel.
    pub(in crate::virtio) fn set_channel(&self, channel: OwnedFd) {
        self.lock().channel = Some(channel);
    }

    /// For another process that takes the connection over: a duplicate of the channel, and the size that the front-end
    /// knows.
    pub(in crate::virtio) fn record(&self) -> (io::Result<Option<OwnedFd>>, Option<u64>) {
        let front_end = self.lock();
        (front_end.channel.as_ref().map(OwnedFd::try_clone).transpose(), front_end.knows)
    }

    /// What the front-end was told by the process before this one.
    pub(in crate::virtio) fn set_known(&self, knows: Option<u64>) {
        self.lock().knows = knows;
    }

    /// GET_CONFIG: the size to answer.
    pub(in crate::virtio) fn read(&self) -> u64 {
        let mut front_end = self.lock();
        let bytes = self.get();
        front_end.knows = Some(bytes);
        bytes
    }

    /// A ring runs.
    pub(in crate::virtio) fn ring_started(&self) {
        let mut front_end = self.lock();
        if !std::mem::replace(&mut front_end.running, true) {
            front_end.announce(self.get());
        }
    }

    /// No ring runs any more.
    pub(in crate::virtio) fn rings_stopped(&self) {
        self.lock().running = false;
    }

    fn lock(&self) -> MutexGuard<'_, FrontEnd> {
        self.front_end.lock().expect("no panic while held")
    }
}

impl FrontEnd {
    fn announce(&mut self, bytes: u64) {
        if !self.running || self.knows == Some(bytes) {
            return;
        }
        let Some(channel) = &self.channel else {
            // At a first start QEMU has just read it.
            log::debug!("the front-end takes no messages: it may not know that the disk has {bytes} bytes");
            return;
        };
        // Not waiting for a front-end that does not read: a full channel has unread messages of the same meaning.
        match rustix::net::send(channel, CONFIG_CHANGED.as_flattened(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) => self.knows = Some(bytes),
            Err(error) => log_limited!(
                FRONT_END_LOG,
                Warn,
                "the front-end cannot be told that the disk has {bytes} bytes now: {error}"
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
    fn a_front_end_is_told_what_it_does_not_know_and_only_while_it_listens() {
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
        assert_eq!(messages(), 0, "it has read it");
        capacity.set(2000);
        capacity.announce();
        capacity.announce();
        assert_eq!(messages(), 1);
        capacity.rings_stopped();
        capacity.set(3000);
        capacity.announce();
        assert_eq!(messages(), 0, "QEMU would take no notice");
        capacity.ring_started();
        assert_eq!(messages(), 1);
        capacity.rings_stopped();
        capacity.ring_started();
        assert_eq!(messages(), 0, "once is enough");
    }

    #[test]
    fn a_reconnected_front_end_is_told_unless_it_reads() {
        let (theirs, ours) = UnixStream::pair().unwrap();
        let capacity = Capacity::new(1000);
        capacity.set_channel(ours.into());
        capacity.ring_started();
        let mut message = [0; 12];
        (&theirs).read_exact(&mut message).unwrap();
        assert_eq!(message, [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }
}
