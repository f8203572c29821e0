//! What remains of a virtqueue while no worker serves it: plain values, which the connection's handler owns and may change.

use std::fmt;
use std::fs::File;

use vm_memory::GuestMemoryMmap;

use crate::base::syscalls;
use crate::virtio::virtqueue::split_ring::RingAddresses;

/// A virtqueue that no worker serves.
pub(in crate::virtio) struct StoppedRing {
    /// The number of descriptors, a power of two.
    pub size: u16,
    /// Where the parts of the virtqueue lie. `None` until SET_VRING_ADDR, and after one that was refused.
    pub addresses: Option<RingAddresses>,
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

/// Why a virtqueue cannot lie at the addresses that the front-end names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::virtio) enum AddressFault {
    Misaligned,
    UsedRingOutside,
}

impl fmt::Display for AddressFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            AddressFault::Misaligned => "it is not aligned as virtio asks",
            AddressFault::UsedRingOutside => "its used ring lies outside the guest's memory",
        })
    }
}

impl std::error::Error for AddressFault {}

impl StoppedRing {
    /// Whether a worker may serve the virtqueue.
    pub(in crate::virtio) fn may_run(&self) -> bool {
        self.enabled && self.addresses.is_some() && self.kick.is_some()
    }

    /// Sets the addresses of the virtqueue (SET_VRING_ADDR). When it cannot lie there, it has no addresses afterwards.
    pub(in crate::virtio) fn set_addresses(
        &mut self,
        addresses: RingAddresses,
        memory: &GuestMemoryMmap,
    ) -> Result<(), AddressFault> {
        self.addresses = None;
        if !addresses.is_aligned() {
            return Err(AddressFault::Misaligned);
        }
        addresses.used_index(memory).ok_or(AddressFault::UsedRingOutside)?;
        self.addresses = Some(addresses);
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
        log::debug!("queue {index}: the {what} descriptor cannot be signalled: {error}");
    }
}
