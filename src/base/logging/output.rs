//! One output (standard error, standard output) whose reader may stop reading: a full pipe or socket, a terminal that
//! was stopped with Ctrl-S. No other thread waits for it. Lines wait in a bounded queue. Lines that do not fit are
//! dropped and counted, and the count is written when the output takes data again.
//!
//! Until [`Output::start_thread`] the thread that puts a line also writes what the output takes at once; to a regular
//! file it writes nothing ([`Output::hold_file_until_thread`]). From then on a thread of the output's own writes, and
//! it alone may wait. O_NONBLOCK is never set, because every process with the same open file description would share it
//! (a shell, the other programs of a service). Instead, data goes to a socket with MSG_DONTWAIT and to other files with
//! RWF_NOWAIT. Where the kernel supports neither, it is written after poll(2) has reported room.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{AtFlags, FileType, StatxFlags, statx};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::net::{SendFlags, send};

use crate::base::wait::poll_until;

/// The most bytes that wait: a few thousand lines, more than a reader that is merely slow leaves unread.
const MAX_BYTES: usize = 256 << 10;
/// How many bytes a pipe takes in one piece once poll(2) reports room (pipe(7)).
const PIPE_BUF: usize = 4096;
/// How long the thread waits for room before it uses the descriptor again, which [`super::continue_log`] may have
/// replaced.
const ROOM_INTERVAL: Duration = Duration::from_secs(1);
/// The pause after a refused write. It saves processor time with a descriptor that poll(2) reports as writable and that
/// takes nothing.
const RETRY_DELAY: Duration = Duration::from_millis(10);

/// An output and the lines that wait for it.
pub struct Output {
    descriptor: fn() -> BorrowedFd<'static>,
    /// The line that says how many lines were lost.
    loss: fn(u64) -> String,
    queue: Mutex<Queue>,
    /// Notified when a line is queued.
    work: Condvar,
    /// Notified when the queue is empty.
    idle: Condvar,
    /// The queue is not empty. A signal's handler reads this, because it may take no lock.
    pending: AtomicBool,
    /// Nothing is written until the output has a thread.
    holds: AtomicBool,
}

impl Output {
    /// `loss` formats the line that says how many lines were lost.
    pub const fn new(descriptor: fn() -> BorrowedFd<'static>, loss: fn(u64) -> String) -> Output {
        Output {
            descriptor,
            loss,
            queue: Mutex::new(Queue::new()),
            work: Condvar::new(),
            idle: Condvar::new(),
            pending: AtomicBool::new(false),
            holds: AtomicBool::new(false),
        }
    }

    /// Holds lines back until there is a thread, if the output is a regular file: its filesystem may hang (NFS, FUSE, a
    /// frozen one), and no flag keeps write(2) from waiting for that. Called once, before the first line.
    pub fn hold_file_until_thread(&self) {
        self.holds.store(is_regular((self.descriptor)()), Ordering::Relaxed);
    }

    /// Queues a text, its newline included. Returns whether there was room. Never blocks. Called by any thread.
    pub fn put(&self, text: &str) -> bool {
        let mut queue = self.lock();
        let has_room = queue.put(text);
        if queue.has_thread || self.holds.load(Ordering::Relaxed) {
            self.pending.store(true, Ordering::Release);
            self.work.notify_one();
        } else {
            self.drain(&mut queue);
        }
        has_room
    }

    /// Whether lines wait in the queue. Takes no lock.
    pub fn is_pending(&self) -> bool {
        self.pending.load(Ordering::Acquire)
    }

    /// Starts the thread that writes from now on. It blocks the signals that ask for an end, which another thread
    /// reads. Called once a process, after the sandbox was entered, because a thread inherits the sandbox's rules when
    /// it is started. Without the thread, queued lines are written with the next one.
    pub fn start_thread(&'static self) -> std::io::Result<()> {
        let ends: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT].into_iter().collect();
        let before = ends.thread_swap_mask(SigmaskHow::SIG_BLOCK)?;
        let mut queue = self.lock();
        let started = if queue.has_thread {
            Ok(())
        } else {
            thread::Builder::new().name("log".into()).spawn(|| self.serve()).map(|_| queue.has_thread = true)
        };
        drop(queue);
        before.thread_set_mask()?;
        started
    }

    /// Waits until everything is written, for at most `limit`. Called at the end of the process, when a thread may be
    /// started.
    pub fn flush(&'static self, limit: Duration) {
        let deadline = Instant::now() + limit;
        if self.holds.load(Ordering::Relaxed) && self.is_pending() && self.start_thread().is_err() {
            self.holds.store(false, Ordering::Relaxed);
        }
        let mut queue = self.lock();
        loop {
            if !queue.has_thread {
                self.drain(&mut queue);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if queue.is_idle() || left.is_zero() {
                return;
            }
            if queue.has_thread {
                queue = self.idle.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
            } else {
                wait_for_room((self.descriptor)(), left);
                thread::sleep(RETRY_DELAY.min(left));
            }
        }
    }

    /// Takes the lock, also after a panic: the queue is consistent at every moment.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes as much as the output takes at once.
    fn drain(&self, queue: &mut Queue) {
        while let Some((line, from)) = queue.first(self.loss) {
            match write_now((self.descriptor)(), &line[from..]) {
                Ok(count) => queue.wrote(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => queue.failed(),
            }
        }
        self.pending.store(!queue.is_idle(), Ordering::Release);
    }

    /// Runs the thread that writes.
    fn serve(&self) {
        loop {
            let (line, from) = self.next();
            match write_now((self.descriptor)(), &line[from..]) {
                Ok(count) => self.lock().wrote(count),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    wait_for_room((self.descriptor)(), ROOM_INTERVAL);
                    thread::sleep(RETRY_DELAY);
                }
                Err(_) => self.lock().failed(),
            }
        }
    }

    /// Waits for a line. Returns it, and how many of its bytes are written.
    fn next(&self) -> (Arc<[u8]>, usize) {
        let mut queue = self.lock();
        loop {
            if let Some(first) = queue.first(self.loss) {
                return first;
            }
            self.pending.store(false, Ordering::Release);
            self.idle.notify_all();
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The queued lines. This type does no I/O.
struct Queue {
    lines: VecDeque<Line>,
    bytes: usize,
    /// How many bytes of the first line are written.
    written: usize,
    /// Lines that were dropped and not yet reported.
    lost: u64,
    /// No line is accepted until all queued ones are written, so that the count appears where the lines are missing.
    is_full: bool,
    /// The last write failed, and not because the output is full: its reader is gone, or a filesystem has no space.
    is_broken: bool,
    has_thread: bool,
}

struct Line {
    text: Arc<[u8]>,
    /// How many lines are lost if this one cannot be written: one, or as many as it reports.
    stands_for: u64,
}

impl Queue {
    const fn new() -> Queue {
        Queue {
            lines: VecDeque::new(),
            bytes: 0,
            written: 0,
            lost: 0,
            is_full: false,
            is_broken: false,
            has_thread: false,
        }
    }

    fn put(&mut self, text: &str) -> bool {
        if self.is_full || self.bytes + text.len() > MAX_BYTES {
            self.is_full = true;
            self.lost += 1;
            return false;
        }
        self.bytes += text.len();
        self.lines.push_back(Line { text: text.as_bytes().into(), stands_for: 1 });
        true
    }

    /// The line to write, and how many of its bytes are written. Adds a line that reports lost lines when that is due:
    /// the queue is empty, or a line was queued after a failure.
    fn first(&mut self, loss: fn(u64) -> String) -> Option<(Arc<[u8]>, usize)> {
        let is_due = if self.lines.is_empty() { !self.is_broken } else { self.is_broken };
        if is_due {
            self.is_broken = false;
            if self.lost > 0 {
                let line = Line { text: loss(self.lost).into_bytes().into(), stands_for: self.lost };
                self.bytes += line.text.len();
                self.lines.push_front(line);
                self.lost = 0;
            }
            self.is_full = false;
        }
        self.lines.front().map(|line| (line.text.clone(), self.written))
    }

    /// Counts `count` bytes of the first line as written.
    fn wrote(&mut self, count: usize) {
        self.written += count;
        if self.lines.front().is_some_and(|line| line.text.len() <= self.written) {
            self.written = 0;
            self.bytes -= self.lines.pop_front().map_or(0, |line| line.text.len());
        }
    }

    /// Drops all queued lines, because they cannot be written. The next line is a new attempt.
    fn failed(&mut self) {
        self.lost += self.lines.drain(..).map(|line| line.stands_for).sum::<u64>();
        (self.bytes, self.written, self.is_full, self.is_broken) = (0, 0, false, true);
    }

    fn is_idle(&self) -> bool {
        self.lines.is_empty() && (self.lost == 0 || self.is_broken)
    }
}

/// Writes as much as the descriptor takes at once. The error is `AGAIN` when it takes nothing. Allocates nothing and
/// takes no lock, so a signal's handler may call it.
///
/// This may wait in two cases. Regular files, and pipes of kernels before 6.4, do not support RWF_NOWAIT and get a
/// plain write; another process may then have filled the pipe since poll(2). And a terminal with room for a part of the
/// line waits for the rest.
pub(super) fn write_now(descriptor: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
    match send(descriptor, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Err(Errno::NOTSOCK) => {}
        sent => return sent,
    }
    if !wait_for_room(descriptor, Duration::ZERO) {
        return Err(Errno::AGAIN);
    }
    let piece = &bytes[..bytes.len().min(PIPE_BUF)];
    // The offset -1 stands for the file's position (pwritev2(2)).
    match rustix::io::pwritev2(descriptor, &[IoSlice::new(piece)], u64::MAX, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::SPIPE) => rustix::io::write(descriptor, piece),
        Err(Errno::AGAIN) if is_regular(descriptor) => rustix::io::write(descriptor, piece),
        written => written,
    }
}

/// Whether the descriptor is a regular file. Does not ask the file's server, which may hang (AT_STATX_DONT_SYNC).
fn is_regular(descriptor: BorrowedFd<'_>) -> bool {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    statx(descriptor, "", flags, StatxFlags::TYPE)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile)
}

/// Waits until the descriptor takes data or reports an error, for at most `limit`. Returns whether it does.
pub(super) fn wait_for_room(descriptor: BorrowedFd<'_>, limit: Duration) -> bool {
    let sources = &mut [PollFd::from_borrowed_fd(descriptor, PollFlags::OUT)];
    poll_until(sources, Some(Instant::now() + limit)).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{BufRead, BufReader};
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::OnceLock;

    use super::*;

    fn loss(count: u64) -> String {
        format!("{count} lost")
    }

    /// Everything that is written until the queue has nothing more.
    fn drain(queue: &mut Queue) -> Vec<String> {
        let mut all = Vec::new();
        while let Some((line, from)) = queue.first(loss) {
            assert_eq!(from, 0);
            all.push(String::from_utf8(line.to_vec()).unwrap());
            queue.wrote(line.len());
        }
        all
    }

    #[test]
    fn lines_that_do_not_fit_are_counted_where_they_are_missing() {
        let mut queue = Queue::new();
        let line = "x".repeat(MAX_BYTES / 2);
        for _ in 0..5 {
            queue.put(&line);
        }
        assert!(!queue.is_idle());
        // Room for a small one, but it would stand before the lost ones.
        assert!(!queue.put("small"));
        assert_eq!(drain(&mut queue), [line.clone(), line, "4 lost".into()]);
        queue.put("after");
        assert_eq!(drain(&mut queue), ["after"]);
        assert!(queue.is_idle() && queue.bytes == 0);
    }

    #[test]
    fn a_line_goes_on_where_it_was_cut() {
        let mut queue = Queue::new();
        queue.put("abcdef");
        queue.first(loss).unwrap();
        queue.wrote(2);
        assert_eq!(queue.first(loss).unwrap().1, 2);
        queue.wrote(4);
        assert!(queue.first(loss).is_none());
    }

    #[test]
    fn lines_that_failed_are_counted_and_tried_again_with_the_next() {
        let mut queue = Queue::new();
        queue.put("a");
        queue.put("b");
        queue.first(loss).unwrap();
        queue.failed();
        assert!(queue.is_idle() && queue.first(loss).is_none(), "nothing is tried without a new line");
        queue.put("c");
        assert_eq!(&*queue.first(loss).unwrap().0, b"2 lost");
        queue.failed();
        queue.put("d");
        assert_eq!(drain(&mut queue), ["3 lost", "d"]);
    }

    #[test]
    fn a_pipe_that_is_not_read_loses_lines_but_never_blocks() {
        static WRITER: OnceLock<OwnedFd> = OnceLock::new();
        static OUTPUT: Output =
            Output::new(|| WRITER.get().expect("set below").as_fd(), |lost| format!("{lost} lost\n"));
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        WRITER.set(writer).unwrap();
        // The first lines are put without the thread.
        for number in 0..100 {
            assert!(OUTPUT.put(&format!("{number}\n")));
        }
        OUTPUT.start_thread().unwrap();
        let text = "x".repeat(1000);
        let sent = 1000;
        let kept = (0..sent).filter(|number| OUTPUT.put(&format!("{number} {text}\n"))).count();
        assert!(kept < sent, "everything fits");
        let started = Instant::now();
        OUTPUT.flush(Duration::from_millis(50));
        assert!(started.elapsed() < Duration::from_secs(60) && OUTPUT.is_pending());
        // The pipe is read again.
        let mut lines = BufReader::new(File::from(reader)).lines().map(Result::unwrap);
        let mut read = 0;
        let report = loop {
            let line = lines.next().expect("the writer is open");
            if line.ends_with(" lost") {
                break line;
            }
            read += 1;
        };
        assert_eq!((read, report), (100 + kept, format!("{} lost", sent - kept)));
        assert!(OUTPUT.put("after\n"));
        assert_eq!(lines.next().unwrap(), "after");
        OUTPUT.flush(Duration::from_secs(30));
        assert!(!OUTPUT.is_pending());
    }
}
