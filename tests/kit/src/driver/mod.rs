//! virtio-driver (libblkio's, a front-end that nobody here wrote) with shared memory for its buffers. For tests and
//! benchmarks.
#![allow(unsafe_code)]

pub mod load;
pub mod pairs;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};
use vm_memory::{FileOffset, MmapRegion};

/// VIRTIO_BLK_F_FLUSH and its like, for `connect`'s mask.
pub const F_FLUSH: u64 = 1 << 9;
/// Everything that is offered, packed rings apart.
pub const ALL: u64 = !(1 << 34);

/// How long a connection or a completion may take before a test fails.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// A connected driver. `buffer` is a byte range of its shared memory.
pub struct Driver {
    pub transport: Box<VirtioBlkTransport>,
    queues: Vec<VirtioBlkQueue<'static, u64>>,
    memory: Arc<MmapRegion>,
}

impl Driver {
    /// Connects with the features in `mask` that are offered, and starts `queues` rings of `size` descriptors.
    /// `memory`: bytes of shared buffer memory.
    pub fn connect(path: &Path, queues: usize, size: u16, memory: usize, mask: u64) -> std::io::Result<Driver> {
        let features = mask | VirtioFeatureFlags::VERSION_1.bits();
        let transport = VhostUser::new(path.to_str().expect("a UTF-8 path"), features)?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, queues, size)?;
        // Off by default, and `wait` sleeps on them.
        queues.iter_mut().for_each(|queue| queue.set_used_notif_enabled(true));
        let file: File = rustix::fs::memfd_create("buffers", rustix::fs::MemfdFlags::CLOEXEC)?.into();
        file.set_len(memory as u64)?;
        let fd = file.as_raw_fd();
        let memory =
            MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), memory).map_err(std::io::Error::other)?;
        transport.map_mem_region(memory.as_ptr() as usize, memory.size(), fd, 0)?;
        Ok(Driver { transport, queues, memory: Arc::new(memory) })
    }

    /// Like `connect`, but waits for a server that is still starting.
    pub fn connect_soon(path: &Path, queues: usize, size: u16, memory: usize, mask: u64) -> Driver {
        let end = Instant::now() + WAIT_TIMEOUT;
        loop {
            match Self::connect(path, queues, size, memory, mask) {
                Ok(driver) => return driver,
                Err(error) if Instant::now() > end => panic!("{}: {error}", path.display()),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// The shared memory, for a thread that changes it while requests are under way.
    pub fn memory(&self) -> Arc<MmapRegion> {
        self.memory.clone()
    }

    /// Copies into the shared memory.
    pub fn fill(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.memory.size());
        // SAFETY: inside the mapping, which lives as long as `self`; no reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.as_ptr().add(at), bytes.len()) }
    }

    /// Copies out of the shared memory.
    pub fn fetch(&self, at: usize, len: usize) -> Vec<u8> {
        assert!(at + len <= self.memory.size());
        let mut bytes = vec![0; len];
        // SAFETY: as in `fill`.
        unsafe { std::ptr::copy_nonoverlapping(self.memory.as_ptr().add(at), bytes.as_mut_ptr(), len) }
        bytes
    }

    /// Queues a read of `len` bytes at `offset` into the shared memory at `at`.
    pub fn read(&mut self, queue: usize, offset: u64, at: usize, len: usize, id: u64) {
        assert!(at + len <= self.memory.size());
        // SAFETY: inside the mapping, which lives as long as the queues.
        unsafe { self.queues[queue].read_raw(offset, self.memory.as_ptr().add(at), len, id) }
            .expect("room in the ring");
    }

    /// Queues a write of `len` bytes at `offset` from the shared memory at `at`.
    pub fn write(&mut self, queue: usize, offset: u64, at: usize, len: usize, id: u64) {
        assert!(at + len <= self.memory.size());
        // SAFETY: inside the mapping, which lives as long as the queues.
        unsafe { self.queues[queue].write_raw(offset, self.memory.as_ptr().add(at), len, id) }
            .expect("room in the ring");
    }

    /// Queues a vectored read or write; parts are (position, length) in the shared memory.
    pub fn vectored(&mut self, queue: usize, write: bool, offset: u64, parts: &[(usize, usize)], id: u64) {
        let iovecs: Vec<virtio_driver::iovec> = parts
            .iter()
            .map(|&(at, len)| {
                assert!(at + len <= self.memory.size());
                // SAFETY: inside the mapping.
                let base = unsafe { self.memory.as_ptr().add(at) };
                virtio_driver::iovec { iov_base: base.cast(), iov_len: len }
            })
            .collect();
        let queue = &mut self.queues[queue];
        // SAFETY: the iovecs are inside the mapping, which lives as long as the queues.
        let result = unsafe {
            if write {
                queue.writev(offset, iovecs.as_ptr(), iovecs.len(), id)
            } else {
                queue.readv(offset, iovecs.as_ptr(), iovecs.len(), id)
            }
        };
        result.expect("room in the ring");
    }

    /// Queues a flush.
    pub fn flush(&mut self, queue: usize, id: u64) {
        self.queues[queue].flush(id).expect("room in the ring");
    }

    /// Queues a discard.
    pub fn discard(&mut self, queue: usize, offset: u64, len: u64, id: u64) {
        self.queues[queue].discard(offset, len, id).expect("room in the ring");
    }

    /// Queues a write-zeroes.
    pub fn write_zeroes(&mut self, queue: usize, offset: u64, len: u64, unmap: bool, id: u64) {
        self.queues[queue].write_zeroes(offset, len, unmap, id).expect("room in the ring");
    }

    /// Kicks, if the device wants it.
    pub fn kick(&mut self, queue: usize) {
        if self.queues[queue].avail_notif_needed() {
            self.transport.get_submission_notifier(queue).notify().expect("a kick");
        }
    }

    /// Takes what has completed: (id, 0 or a negative errno).
    pub fn completed(&mut self, queue: usize) -> Vec<(u64, i32)> {
        self.queues[queue].completions().map(|done| (done.context, done.ret)).collect()
    }

    /// Sleeps on the call eventfd until something has completed.
    pub fn wait(&mut self, queue: usize) -> Vec<(u64, i32)> {
        loop {
            let done = self.completed(queue);
            if !done.is_empty() {
                return done;
            }
            use rustix::event::{PollFd, PollFlags, Timespec, poll};
            let fd = self.transport.get_completion_fd(queue);
            let timeout = Timespec { tv_sec: WAIT_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
            let ready = poll(&mut [PollFd::new(&*fd, PollFlags::IN)], Some(&timeout)).expect("poll");
            assert!(ready > 0, "no completion within {WAIT_TIMEOUT:?}");
            fd.read().expect("the call eventfd");
        }
    }

    /// Sleeps until one of the first `queues` rings interrupts. Something may have completed already: look first.
    pub fn wait_any(&mut self, queues: usize) {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let fds: Vec<_> = (0..queues).map(|queue| self.transport.get_completion_fd(queue)).collect();
        let mut wanted: Vec<PollFd> = fds.iter().map(|fd| PollFd::new(&**fd, PollFlags::IN)).collect();
        let timeout = Timespec { tv_sec: WAIT_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
        let ready = poll(&mut wanted, Some(&timeout)).expect("poll");
        assert!(ready > 0, "no completion within {WAIT_TIMEOUT:?}");
        let readable: Vec<bool> = wanted.iter().map(|fd| !fd.revents().is_empty()).collect();
        for (fd, _) in fds.iter().zip(readable).filter(|(_, readable)| *readable) {
            fd.read().expect("the call eventfd");
        }
    }

    /// The same, while others are in flight, whose answers may come first and are lost.
    pub fn one_beside(&mut self, queue: usize, ask: impl FnOnce(&mut Self, u64)) -> i32 {
        ask(self, u64::MAX);
        self.kick(queue);
        loop {
            if let Some((_, result)) = self.wait(queue).into_iter().find(|(id, _)| *id == u64::MAX) {
                return result;
            }
        }
    }

    /// One request, start to end: 0 or a negative errno.
    pub fn one(&mut self, queue: usize, ask: impl FnOnce(&mut Self, u64)) -> i32 {
        ask(self, u64::MAX);
        self.kick(queue);
        let done = self.wait(queue);
        assert_eq!((done.len(), done[0].0), (1, u64::MAX));
        done[0].1
    }
}
