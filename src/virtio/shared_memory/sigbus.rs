//! UNSAFE. Shared memory that its front-end takes away. A memory file may be truncated while it is mapped; whoever then
//! touches what lay behind its new end gets SIGBUS, which would end the daemon. Here it ends the connection alone. The
//! same happens where huge pages run out, and to the front-end's own bookkeeping (the in-flight region, the dirty log).
//!
//! The handler looks for the address among the regions that connections have mapped. Found, it maps zeroes over the
//! whole region, so that the access goes on with harmless bytes, notes the loss, and shuts the front-end's socket down:
//! its thread then stops every ring as for any front-end that leaves. An address of no region, or a SIGBUS that
//! somebody sent, is handed to whoever had the signal before. The kernel's own accesses (io_uring) need no handler:
//! they fail with EFAULT, as requests.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// The front-end's socket as the handler needs it, and what the handler found.
pub(in crate::virtio) struct SessionSocket {
    socket: OwnedFd,
    vanished: AtomicBool,
}

impl SessionSocket {
    /// Of a connection; `socket` is a duplicate of its descriptor. Installs the signal's handler, once a process.
    /// Errors: sigaction(2) failed. The vhost-user thread.
    pub(in crate::virtio) fn new(socket: OwnedFd) -> io::Result<Arc<Self>> {
        install()?;
        Ok(Arc::new(SessionSocket { socket, vanished: AtomicBool::new(false) }))
    }

    /// For tests, with its other end.
    #[cfg(test)]
    pub(in crate::virtio) fn pair() -> (Arc<Self>, std::os::unix::net::UnixStream) {
        let (here, there) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
        (SessionSocket::new(here.into()).expect("a handler"), there)
    }

    /// Whether memory of this connection vanished. The vhost-user thread, at the connection's end.
    pub(in crate::virtio) fn vanished(&self) -> bool {
        self.vanished.load(Ordering::Acquire)
    }
}

/// A mapped region that may vanish, until it is dropped. Dropped when no thread touches the region any more (by the
/// vhost-user thread while every ring is stopped, or by the last that shares both) and before the region is unmapped, so
/// that whoever faults in a region finds it here.
pub(in crate::virtio) struct GuardedMapping {
    slot: &'static Slot,
    _wire: Arc<SessionSocket>,
}

/// One place in the list of regions, reused and never freed, so that the handler may read it at any time.
struct Slot {
    /// First address; 0: nothing is watched here.
    start: AtomicUsize,
    len: AtomicUsize,
    /// Of the `GuardedMapping` that has this slot, which keeps it alive.
    wire: AtomicPtr<SessionSocket>,
    taken: AtomicBool,
    next: *const Slot,
}

// SAFETY: all that changes is atomic; `next` never changes and points to another slot, which is never freed.
unsafe impl Sync for Slot {}

/// The list's head. Slots are only added.
static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(null_mut());

/// All slots. No lock and no allocation: the handler walks them too.
fn slots() -> impl Iterator<Item = &'static Slot> {
    let mut at = SLOTS.load(Ordering::Acquire).cast_const();
    std::iter::from_fn(move || {
        // SAFETY: null, or a slot that was leaked and fully written before the head or its predecessor named it.
        let slot = unsafe { at.as_ref() }?;
        at = slot.next;
        Some(slot)
    })
}

impl GuardedMapping {
    /// Watches `len` bytes from `start`, which the caller has mapped. The vhost-user thread.
    pub(in crate::virtio) fn new(start: *mut u8, len: usize, wire: &Arc<SessionSocket>) -> Self {
        let free = slots().find(|slot| !slot.taken.swap(true, Ordering::AcqRel));
        let slot = free.unwrap_or_else(add_slot);
        slot.len.store(len, Ordering::Relaxed);
        slot.wire.store(Arc::as_ptr(wire).cast_mut(), Ordering::Relaxed);
        slot.start.store(start as usize, Ordering::Release);
        GuardedMapping { slot, _wire: wire.clone() }
    }
}

impl Drop for GuardedMapping {
    fn drop(&mut self) {
        self.slot.start.store(0, Ordering::Release);
        self.slot.taken.store(false, Ordering::Release);
    }
}

fn add_slot() -> &'static Slot {
    let slot = Box::leak(Box::new(Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        wire: AtomicPtr::new(null_mut()),
        taken: AtomicBool::new(true),
        next: null(),
    }));
    let mut head = SLOTS.load(Ordering::Acquire);
    loop {
        slot.next = head;
        match SLOTS.compare_exchange(head, slot, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return slot,
            Err(now) => head = now,
        }
    }
}

/// What SIGBUS did before: Rust's runtime has a handler for stacks that overflow.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: all zeroes is a valid sigaction (no flags, an empty mask, the default action).
        let (mut action, mut before): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: both live through the calls; the handler does nothing but what signal-safety(7) allows. The old
        // action is read before the new one can run, since the handler needs it.
        let done = unsafe {
            libc::sigaction(libc::SIGBUS, null(), &raw mut before) == 0
                && BEFORE.set(before).is_ok()
                && libc::sigaction(libc::SIGBUS, &raw const action, null_mut()) == 0
        };
        if done { Ok(()) } else { Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)) }
    });
    installed.map_err(io::Error::from_raw_os_error)
}

/// The signal's handler, in the thread that touched the memory. Only atomics and system calls.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo; for SIGBUS of a fault (si_code above 0) the address is
    // there. errno's place is the thread's own.
    let (code, address, errno) = unsafe { ((*info).si_code, (*info).si_addr() as usize, *libc::__errno_location()) };
    // A code of 0 or below is a signal that somebody sent: its address means nothing.
    let slot = if code > 0 { slots().find(|slot| slot.holds(address)) } else { None };
    if !slot.is_some_and(Slot::cover) {
        hand_back();
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

impl Slot {
    fn holds(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        start != 0 && address >= start && address - start < self.len.load(Ordering::Relaxed)
    }

    /// Maps zeroes over the region and ends its connection. In the signal's handler.
    fn cover(&self) -> bool {
        let (start, len) = (self.start.load(Ordering::Acquire), self.len.load(Ordering::Relaxed));
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the whole range is one mapping of shared memory, which only raw pointers and references to atomics
        // point into (`virtio::shared`): its bytes may change at any time anyhow. It stays mapped, since the thread
        // that faulted in it holds it. Its owner unmaps the range as it would have unmapped the file's.
        let covered =
            unsafe { libc::mmap(start as *mut libc::c_void, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if covered == libc::MAP_FAILED {
            return false;
        }
        // SAFETY: the `GuardedMapping` that has this slot holds the Wire, and it is dropped only when no thread touches its
        // region any more (see there): this one does.
        let wire = unsafe { &*self.wire.load(Ordering::Relaxed) };
        wire.vanished.store(true, Ordering::Release);
        // SAFETY: a system call on a descriptor that `wire` keeps open. That the front-end is gone already is fine.
        unsafe { libc::shutdown(wire.socket.as_raw_fd(), libc::SHUT_RDWR) };
        true
    }
}

/// The access happens again, with the action that was there before us.
fn hand_back() {
    if let Some(before) = BEFORE.get() {
        // SAFETY: an action that sigaction(2) itself returned.
        unsafe { libc::sigaction(libc::SIGBUS, before, null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;

    const LEN: usize = 1 << 20;

    /// A mapped file and the file.
    fn mapping() -> (*mut u8, OwnedFd) {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, LEN as u64).unwrap();
        // SAFETY: a new mapping of a file that nobody else knows.
        let start =
            unsafe { mmap(null_mut(), LEN, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0).unwrap() };
        (start.cast(), file)
    }

    #[test]
    fn memory_that_vanishes_reads_as_zeroes_and_ends_its_connection_only() {
        let (ours, mut our_peer) = SessionSocket::pair();
        let (other, _other_peer) = SessionSocket::pair();
        let (start, file) = mapping();
        let (other_start, other_file) = mapping();
        let watched = [GuardedMapping::new(start, LEN, &ours), GuardedMapping::new(other_start, LEN, &other)];
        // SAFETY: inside the mapping.
        unsafe { start.add(5000).write_volatile(7) };
        ftruncate(&file, 4096).unwrap();
        // SAFETY: inside the mapping; behind the file's end, which is what this is about.
        let (seen, written) = unsafe {
            let seen = start.add(5000).read_volatile();
            start.add(LEN - 1).write_volatile(9);
            (seen, start.add(LEN - 1).read_volatile())
        };
        assert_eq!((seen, written), (0, 9));
        assert!(ours.vanished());
        assert_eq!(std::io::Read::read(&mut our_peer, &mut [0]).unwrap(), 0, "the socket is shut down");
        assert!(!other.vanished());
        drop((watched, other_file));
        // SAFETY: the two mappings made above; nothing points into them any more.
        unsafe {
            munmap(start.cast(), LEN).unwrap();
            munmap(other_start.cast(), LEN).unwrap();
        }
    }

    #[test]
    fn slots_are_used_again() {
        let (ours, _peer) = SessionSocket::pair();
        let (start, _file) = mapping();
        for _ in 0..10_000 {
            drop(GuardedMapping::new(start, LEN, &ours));
        }
        // Other tests of this process may have taken some.
        assert!(slots().count() < 5_000);
        // SAFETY: as above.
        unsafe { munmap(start.cast(), LEN).unwrap() };
    }
}
