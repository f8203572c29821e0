//! What remains of a virtqueue while no worker serves it: plain values, which the connection's handler owns and may change.

use std::fs::File;

use vm_memory::GuestMemoryMmap;

use crate::base::syscalls;
use crate::virtio::virtqueue::split_ring::RingAddresses;

/// A virtqueue that no worker serves.
pub(in crate::virtio) struct StoppedRing {
    /// The number of descriptors, a power of two.
    pub size: u16,
    /// Where the parts of the virtqueue lie. `None` until SET_VRING_ADDR, and after one that was refused.
    pub place: Option<RingAddresses>,
    /// The position in the available ring of the next head to take. The position in the used ring is in the guest's
    /// memory. Firmware may change it until the virtqueue starts, so it is read there at the start.
    pub next_available: u16,
    /// The eventfd of the guest's kicks. The worker only watches it.
    pub kick: Option<File>,
    /// The eventfd that interrupts the guest.
    pub call: Option<File>,
    /// The eventfd that signals the front-end that the virtqueue is broken (SET_VRING_ERR).
    pub err: Option<File>,
    /// The front-end enabled the virtqueue (SET_VRING_ENABLE), or negotiated no protocol features.
    pub enabled: bool,
    /// Heads that were taken and not completed, because their transfers failed or a hold blocked them. The next worker
    /// resubmits them.
    pub resubmit: Vec<u16>,
}

impl StoppedRing {
    /// Whether a worker may serve the virtqueue.
    pub(in crate::virtio) fn may_run(&self) -> bool {
        self.enabled && self.place.is_some() && self.kick.is_some()
    }

    /// Sets the addresses of the virtqueue (SET_VRING_ADDR). Errors say why it cannot lie there; then it has no addresses.
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

    /// Signals the front-end that the virtqueue is broken, which QEMU logs. Called by the worker.
    pub(in crate::virtio) fn signal_error(&self, index: u32) {
        signal(index, "error", self.err.as_ref());
    }

    /// Interrupts the guest. Called by the worker.
    pub(in crate::virtio) fn interrupt(&self, index: u32) {
        signal(index, "call", self.call.as_ref());
    }

    /// Replaces the call descriptor and signals the new one. QEMU starts a virtqueue before it sends the descriptor, so
    /// completions in between interrupted nothing, and the guest would wait for ever. One interrupt too many is harmless.
    pub(in crate::virtio) fn set_call(&mut self, index: u32, call: Option<File>) {
        self.call = call;
        self.interrupt(index);
    }
}

fn signal(index: u32, what: &str, fd: Option<&File>) {
    if let Some(fd) = fd
        && let Err(error) = syscalls::signal(fd)
    {
        log::debug!("ring {index}: the {what} descriptor cannot be signalled: {error}");
    }
}
