//! UNSAFE. Survives shared memory that its front-end takes away. A front-end may truncate a memory file that is mapped here.
//! A thread that then accesses memory behind the file's new end gets SIGBUS, which would end the daemon. With this handler it
//! ends only the session. The same happens when huge pages run out, and to the in-flight region and the dirty log.
//!
//! The signal's handler searches the regions that sessions have mapped for the address. If one contains it, the handler maps
//! zeroes over the whole region, so that the access continues with harmless bytes. It notes the loss, and shuts the
//! front-end's socket down: the vhost-user thread then stops every ring as for any front-end that leaves. An address outside
//! all regions, or a SIGBUS that a process sent, goes to the handler that was there before. The kernel's own accesses
//! (io_uring) need no handler: they fail with EFAULT, and so does the request.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// A session's socket, which the signal's handler shuts down when the session's memory vanishes.
pub(in crate::virtio) struct SessionSocket {
    socket: OwnedFd,
    vanished: AtomicBool,
}

impl SessionSocket {
    /// Wraps a duplicate of the descriptor of a session's socket. Installs the signal's handler, once in a process. An error:
    /// sigaction(2) failed. Called by the vhost-user thread.
    pub(in crate::virtio) fn new(socket: OwnedFd) -> io::Result<Arc<Self>> {
        install()?;
        Ok(Arc::new(SessionSocket { socket, vanished: AtomicBool::new(false) }))
    }

    /// A socket for tests, and its other end.
    #[cfg(test)]
    pub(in crate::virtio) fn pair() -> (Arc<Self>, std::os::unix::net::UnixStream) {
        let (here, there) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
        (SessionSocket::new(here.into()).expect("a handler"), there)
    }

    /// Whether memory of this session vanished. Called by the vhost-user thread, at the end of the session.
    pub(in crate::virtio) fn vanished(&self) -> bool {
        self.vanished.load(Ordering::Acquire)
    }
}

/// Guards a mapped region that may vanish, until this is dropped. It must be dropped when no thread accesses the region any
/// more (by the vhost-user thread while every ring is stopped, or by the last owner of both), and before the region is
/// unmapped. So a thread that faults in a region finds it in the list.
pub(in crate::virtio) struct GuardedMapping {
    entry: &'static RegionEntry,
    _socket: Arc<SessionSocket>,
}

/// One entry of the list of regions. Entries are reused and never freed, so the handler may read them at any time.
struct RegionEntry {
    /// The first address of the region; 0: the entry guards no region.
    start: AtomicUsize,
    len: AtomicUsize,
    /// The socket of the `GuardedMapping` that uses this entry and keeps the socket alive.
    socket: AtomicPtr<SessionSocket>,
    /// A `GuardedMapping` uses this entry.
    taken: AtomicBool,
    next: *const RegionEntry,
}

// SAFETY: all that changes is atomic; `next` never changes and points to another entry, which is never freed.
unsafe impl Sync for RegionEntry {}

/// The head of the list. Entries are only added.
static ENTRIES: AtomicPtr<RegionEntry> = AtomicPtr::new(null_mut());

/// All entries. This takes no lock and allocates nothing, because the signal's handler calls it too.
fn entries() -> impl Iterator<Item = &'static RegionEntry> {
    let mut at = ENTRIES.load(Ordering::Acquire).cast_const();
    std::iter::from_fn(move || {
        // SAFETY: null, or an entry that was leaked and fully written before the head or its predecessor pointed to it.
        let entry = unsafe { at.as_ref() }?;
        at = entry.next;
        Some(entry)
    })
}

impl GuardedMapping {
    /// Guards `len` bytes from `start`, which the caller has mapped. Called by the vhost-user thread.
    pub(in crate::virtio) fn new(start: *mut u8, len: usize, socket: &Arc<SessionSocket>) -> Self {
        let free = entries().find(|entry| !entry.taken.swap(true, Ordering::AcqRel));
        let entry = free.unwrap_or_else(add_entry);
        entry.len.store(len, Ordering::Relaxed);
        entry.socket.store(Arc::as_ptr(socket).cast_mut(), Ordering::Relaxed);
        entry.start.store(start as usize, Ordering::Release);
        GuardedMapping { entry, _socket: socket.clone() }
    }
}

impl Drop for GuardedMapping {
    fn drop(&mut self) {
        self.entry.start.store(0, Ordering::Release);
        self.entry.taken.store(false, Ordering::Release);
    }
}

fn add_entry() -> &'static RegionEntry {
    let entry = Box::leak(Box::new(RegionEntry {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        socket: AtomicPtr::new(null_mut()),
        taken: AtomicBool::new(true),
        next: null(),
    }));
    let mut head = ENTRIES.load(Ordering::Acquire);
    loop {
        entry.next = head;
        match ENTRIES.compare_exchange(head, entry, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return entry,
            Err(now) => head = now,
        }
    }
}

/// The action of SIGBUS before: Rust's runtime has a handler for stacks that overflow.
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

/// The signal's handler. It runs in the thread that accessed the memory, and uses only atomics and system calls.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo; for SIGBUS of a fault (si_code above 0) the address is
    // there. errno's place is the thread's own.
    let (code, address, errno) = unsafe { ((*info).si_code, (*info).si_addr() as usize, *libc::__errno_location()) };
    // A code of 0 or below is a signal that a process sent: its address means nothing.
    let entry = if code > 0 { entries().find(|entry| entry.contains(address)) } else { None };
    if !entry.is_some_and(RegionEntry::cover) {
        restore_action();
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

impl RegionEntry {
    fn contains(&self, address: usize) -> bool {
        let start = self.start.load(Ordering::Acquire);
        start != 0 && address >= start && address - start < self.len.load(Ordering::Relaxed)
    }

    /// Maps zeroes over the region and ends its session. Called in the signal's handler.
    fn cover(&self) -> bool {
        let (start, len) = (self.start.load(Ordering::Acquire), self.len.load(Ordering::Relaxed));
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the whole range is one mapping of shared memory, which only raw pointers and references to atomics
        // point into: its bytes may change at any time anyhow. It stays mapped, since the thread
        // that faulted in it holds it. Its owner unmaps the range as it would have unmapped the file's.
        let covered =
            unsafe { libc::mmap(start as *mut libc::c_void, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if covered == libc::MAP_FAILED {
            return false;
        }
        // SAFETY: the `GuardedMapping` that uses this entry owns the `SessionSocket`, and is dropped only when no thread
        // accesses its region any more (see there); this thread does.
        let session = unsafe { &*self.socket.load(Ordering::Relaxed) };
        session.vanished.store(true, Ordering::Release);
        // SAFETY: a system call on a descriptor that `session` keeps open. The front-end may be gone already.
        unsafe { libc::shutdown(session.socket.as_raw_fd(), libc::SHUT_RDWR) };
        true
    }
}

/// Restores the action that was there before. The access then happens again, and gets that action.
fn restore_action() {
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

    /// The address of a mapped file, and the file.
    fn mapping() -> (*mut u8, OwnedFd) {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, LEN as u64).unwrap();
        // SAFETY: a new mapping of a file that only this test has.
        let start =
            unsafe { mmap(null_mut(), LEN, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0).unwrap() };
        (start.cast(), file)
    }

    #[test]
    fn memory_that_vanishes_reads_as_zeroes_and_ends_only_its_own_session() {
        let (ours, mut our_peer) = SessionSocket::pair();
        let (other, _other_peer) = SessionSocket::pair();
        let (start, file) = mapping();
        let (other_start, other_file) = mapping();
        let guarded = [GuardedMapping::new(start, LEN, &ours), GuardedMapping::new(other_start, LEN, &other)];
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
        drop((guarded, other_file));
        // SAFETY: the two mappings made above; nothing points into them any more.
        unsafe {
            munmap(start.cast(), LEN).unwrap();
            munmap(other_start.cast(), LEN).unwrap();
        }
    }

    #[test]
    fn list_entries_are_reused() {
        let (ours, _peer) = SessionSocket::pair();
        let (start, _file) = mapping();
        for _ in 0..10_000 {
            drop(GuardedMapping::new(start, LEN, &ours));
        }
        // Other tests of this process may use some.
        assert!(entries().count() < 5_000);
        // SAFETY: as above.
        unsafe { munmap(start.cast(), LEN).unwrap() };
    }
}
