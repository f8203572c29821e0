//! A ring that no worker serves: plain values, owned by the handler, which may change any of them.

use std::fs::File;

use vm_memory::GuestMemoryMmap;

use crate::base::syscalls;
use crate::virtio::virtqueue::split_ring::RingAddresses;

/// A ring that nobody is serving.
pub(in crate::virtio) struct StoppedRing {
    /// Descriptors: a power of two.
    pub size: u16,
    /// Where its parts are, once SET_VRING_ADDR came since the last start from scratch.
    pub place: Option<RingAddresses>,
    /// Where the next head is taken. Where the next answer goes stands in the guest's memory, which firmware may still
    /// change until the ring starts: so it is read there then.
    pub next_available: u16,
    /// Where the guest's kicks arrive; the worker only watches it.
    pub kick: Option<File>,
    /// Where the guest is interrupted.
    pub call: Option<File>,
    /// Where a broken ring is told of (SET_VRING_ERR).
    pub err: Option<File>,
    /// SET_VRING_ENABLE, or set for all where the front-end negotiated no protocol features.
    pub enabled: bool,
    /// Heads that were taken and not answered because their transfers failed: the next start does them again.
    pub kept: Vec<u16>,
}

impl StoppedRing {
    pub(in crate::virtio) fn may_run(&self) -> bool {
        self.enabled && self.place.is_some() && self.kick.is_some()
    }

    /// SET_VRING_ADDR: the ring is there. Errors: why it cannot be there; then it is nowhere.
    pub(in crate::virtio) fn put(
        &mut self,
        place: RingAddresses,
        memory: &GuestMemoryMmap,
    ) -> Result<(), &'static str> {
        self.place = None;
        if !place.is_aligned() {
            return Err("it is not aligned as virtio asks");
        }
        place.used_index(memory).ok_or("its used ring lies outside the guest's memory")?;
        self.place = Some(place);
        Ok(())
    }

    /// Tells the front-end that the ring is broken (QEMU logs it). Called by the ring's worker.
    pub(in crate::virtio) fn signal_error(&self, index: u32) {
        signal(index, "error", self.err.as_ref());
    }

    /// Interrupts the guest. Called by the ring's worker.
    pub(in crate::virtio) fn interrupt(&self, index: u32) {
        signal(index, "call", self.call.as_ref());
    }

    /// Replaces the call descriptor and signals the new one. QEMU starts a ring before it sends the descriptor: answers in
    /// between went to nobody, and the guest would wait for ever for their interrupt. One too many is harmless.
    pub(in crate::virtio) fn set_call(&mut self, index: u32, call: Option<File>) {
        self.call = call;
        self.interrupt(index);
    }
}

fn signal(index: u32, what: &str, fd: Option<&File>) {
    if let Some(fd) = fd
        && let Err(error) = syscalls::signal(fd)
    {
        log::debug!("ring {index}: the {what} descriptor does not take a signal: {error}");
    }
}
