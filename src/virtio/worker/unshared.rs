//! Guest memory that is not shared with us (QEMU's `share=off`): QEMU hands over the memory's file, but what the guest writes
//! goes to private copies of its pages. The guest then kicks the ring, which stays empty for us, and waits for ever.
//!
//! A kick alone proves nothing: a driver may kick at its start, or before it makes a request available. But no guest sets up
//! a ring without having written to its memory before. So the file must hold nothing but zeroes, too.
//!
//! A private file that held data before (a `mem-path` that names an existing file) is not recognized. No other sign is
//! certain: which mapping a front-end has is in /proc/PID/maps, which the sandbox and another user's process hide; and
//! memory that does not change may be that of a guest which sleeps, whose driver kicks at its start and asks for nothing.
//! A false alarm would have an operator stop a guest that is well.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::Worker;
use crate::disk::Event;
use crate::virtio::rings::SHARE_MEMORY;

/// How long a ring may stay empty after its first kick before its memory is examined.
const EMPTY_DELAY: Duration = Duration::from_secs(3);
/// Bytes at the start of a region that are examined whole: firmware and kernels begin there.
const WHOLE_BYTES: u64 = 1 << 20;
/// Of the rest one block in each of these strides is examined, up to [`MAX_EXAMINED`] bytes into the region.
const STRIDE: u64 = 64 << 10;
const MAX_EXAMINED: u64 = 64 << 20;
const BLOCK: usize = 4096;

/// What a ring has shown of its driver's requests since its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FirstRequest {
    /// It has shown neither a kick nor a request.
    Awaited,
    /// The driver kicked at this time, and the ring has shown no request.
    Kicked(Instant),
    /// It has shown a request, now or before it was started here; or the missing request was reported.
    Settled,
}

impl FirstRequest {
    /// For a ring that starts at this position.
    pub(super) fn at_start(next_available: u16) -> Self {
        if next_available == 0 { FirstRequest::Awaited } else { FirstRequest::Settled }
    }
}

impl Worker {
    /// Notes a kick of a ring that has shown no request yet.
    #[cold]
    pub(super) fn note_first_kick(&mut self, kick: bool) {
        if self.ring.next_available() != 0 || self.ring.has_more() {
            self.first_request = FirstRequest::Settled;
        } else if kick && self.first_request == FirstRequest::Awaited {
            self.first_request = FirstRequest::Kicked(Instant::now());
            // Has the connection's watch send `WorkerCommand::CheckStalls`.
            self.counters.kicked_empty.store(true, Relaxed);
        }
    }

    /// Reports that the guest's memory is not shared, when the ring was kicked and nothing appears in it. Carries out a part
    /// of [`super::WorkerCommand::CheckStalls`].
    pub(super) fn check_first_request(&mut self) {
        let FirstRequest::Kicked(since) = self.first_request else { return };
        let is_used = self.ring.next_available() != 0 || self.ring.has_more();
        if !is_used && since.elapsed() < EMPTY_DELAY {
            return;
        }
        self.first_request = FirstRequest::Settled;
        self.counters.kicked_empty.store(false, Relaxed);
        if !is_used && is_blank(self.setup.memory.table()) {
            // One text for all rings of the disk, so that it is logged once.
            self.setup.rings.report(Event::ProtocolError(format!(
                "the guest kicked a queue and nothing appears in it, and its memory holds only zeroes: the memory is not \
                 shared with virtioblkd (share=off), and the guest waits for its disk for ever. Share the memory. \
                 {SHARE_MEMORY}"
            )));
        }
    }
}

/// Whether the files of the guest's memory hold only zeroes where they are examined. `false` also when one cannot be read.
fn is_blank(memory: &GuestMemoryMmap) -> bool {
    memory.iter().all(is_region_blank)
}

/// Reads the region's file and not its mapping, because a read through the mapping would allocate pages, and SIGBUS would
/// follow where no huge page is left.
fn is_region_blank(region: &GuestRegionMmap) -> bool {
    let Some(file) = region.file_offset() else { return false };
    let whole = (0..WHOLE_BYTES.min(region.len())).step_by(BLOCK);
    let rest = (WHOLE_BYTES..MAX_EXAMINED.min(region.len())).step_by(STRIDE as usize);
    let mut block = [0; BLOCK];
    whole.chain(rest).all(|at| {
        let len = BLOCK.min((region.len() - at) as usize);
        let read = rustix::io::pread(file.file().as_fd(), &mut block[..len], file.start() + at);
        read.is_ok_and(|read| read == len) && block[..len].iter().all(|&byte| byte == 0)
    })
}
