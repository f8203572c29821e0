//! Makes the same requests to the kernel directly, without a server: with one system call each, and with a plain io_uring.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};

use super::case::{Blocks, Case, Pattern};
use super::client::Figures;
use super::histogram::Histogram;

#[derive(Clone, Copy)]
pub enum Way {
    Call,
    Uring,
}

/// Aligned memory for every slot. It is leaked, because requests may be in flight at the end, and the process ends soon.
struct Buffers {
    start: *mut u8,
    block: usize,
}

impl Buffers {
    fn new(case: &Case) -> Buffers {
        let layout = std::alloc::Layout::from_size_align(case.depth * case.block, 4096).expect("a layout");
        // SAFETY: the size is not zero.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!start.is_null());
        Buffers { start, block: case.block }
    }

    fn of(&self, slot: usize) -> *mut u8 {
        // SAFETY: slots are below the depth for which the memory was allocated.
        unsafe { self.start.add(slot * self.block) }
    }
}

pub fn measure(way: Way, image: &Path, case: &Case, size: u64, seconds: f64) -> Figures {
    let mut open = OpenOptions::new();
    open.read(true).write(true);
    if case.direct {
        open.custom_flags(libc::O_DIRECT);
    }
    let file = open.open(image).expect("the image");
    let blocks = Blocks::new(case, size);
    let buffers = Buffers::new(case);
    let length = Duration::from_secs_f64(seconds);
    let (start, before) = (Instant::now(), cpu_seconds());
    let (done, times) = match way {
        Way::Call => by_calls(&file, case, blocks, &buffers, length),
        Way::Uring => by_uring(&file, case, blocks, &buffers, length),
    };
    let (took, cpu) = (start.elapsed().as_secs_f64(), cpu_seconds() - before);
    Figures::new(took, cpu, done, &times)
}

fn writes(case: &Case) -> bool {
    matches!(case.pattern, Pattern::RandomWrite | Pattern::WriteFlush)
}

fn by_calls(file: &File, case: &Case, mut blocks: Blocks, buffers: &Buffers, length: Duration) -> (u64, Histogram) {
    let start = Instant::now();
    let (mut done, mut times, mut now) = (0, Histogram::default(), start);
    while now - start < length {
        let offset = (blocks.next() * case.block as u64) as libc::off_t;
        let at = buffers.of(0);
        // SAFETY: the memory has this length and is never freed.
        let moved = unsafe {
            if writes(case) {
                libc::pwrite(file.as_raw_fd(), at.cast(), case.block, offset)
            } else {
                libc::pread(file.as_raw_fd(), at.cast(), case.block, offset)
            }
        };
        assert_eq!(moved, case.block as isize, "a short transfer");
        if case.pattern == Pattern::WriteFlush {
            file.sync_data().expect("a sync");
        }
        done += 1;
        let asked = std::mem::replace(&mut now, Instant::now());
        times.record(now - asked);
    }
    (done, times)
}

fn by_uring(file: &File, case: &Case, mut blocks: Blocks, buffers: &Buffers, length: Duration) -> (u64, Histogram) {
    let mut builder = IoUring::builder();
    builder.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun();
    let mut ring: IoUring = builder.build((case.depth as u32).next_power_of_two().max(8)).expect("an io_uring");
    let fd = types::Fd(file.as_raw_fd());
    let mut flushing = vec![false; case.depth];
    let mut ask = |ring: &mut IoUring, slot: usize, flush: bool| {
        let (at, len) = (buffers.of(slot), case.block as u32);
        let entry = if flush {
            opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
        } else {
            let offset = blocks.next() * case.block as u64;
            if writes(case) {
                opcode::Write::new(fd, at, len).offset(offset).build()
            } else {
                opcode::Read::new(fd, at, len).offset(offset).build()
            }
        };
        // SAFETY: the buffers are leaked, and the file outlives the ring.
        unsafe { ring.submission().push(&entry.user_data(slot as u64)) }.expect("sized for the depth");
    };
    for slot in 0..case.depth {
        ask(&mut ring, slot, false);
    }
    let start = Instant::now();
    let (mut done, mut times) = (0, Histogram::default());
    let (mut asked, mut now) = (vec![start; case.depth], start);
    while now - start < length {
        ring.submit_and_wait(1).expect("completions");
        let completed: Vec<_> = ring.completion().map(|entry| (entry.user_data() as usize, entry.result())).collect();
        now = Instant::now();
        for (slot, result) in completed {
            let flush = case.pattern == Pattern::WriteFlush && !flushing[slot];
            assert_eq!(result, if flushing[slot] { 0 } else { case.block as i32 }, "a failed transfer");
            flushing[slot] = flush;
            if !flush {
                done += 1;
                times.record(now - std::mem::replace(&mut asked[slot], now));
            }
            ask(&mut ring, slot, flush);
        }
    }
    // The requests in flight end before the file is closed.
    ring.submit_and_wait(case.depth).expect("completions");
    (done, times)
}

/// The processor time of this process, including the kernel's workers of its io_urings.
fn cpu_seconds() -> f64 {
    let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).expect("our own usage");
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}
