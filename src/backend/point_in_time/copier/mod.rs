//! The copier: the thread that saves the image. It reads the clusters that delayed ops wait for first, and the others in
//! order. It never uses the target, which may hang: it sends old data in memory to the target's thread, or to the scratch
//! first (`scratch`).

mod bandwidth_limiter;
mod plan;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Sender, SyncSender};
use std::time::{Duration, Instant};

use super::copy::{Copy, Phase};
use super::scratch::{AfterReply, Scratch};
use super::target_thread::OldData;
use crate::backend::{Backend, Completion, IoBuf, IoQueue, Op, OpId, Source};
pub(super) use bandwidth_limiter::BandwidthLimiter;
use plan::{DataExtent, Piece, Run};

/// The most reads in flight.
const DEPTH: usize = 32;

/// The most bytes of one read, and of the clusters of one run unless one cluster is larger.
const MAX_READ: u64 = 256 << 10;

/// The most free buffers to keep for reuse.
const MAX_FREE_BUFFERS: usize = 32;

/// The copier's state, which only its thread uses.
struct Copier<'a> {
    copy: &'a Copy,
    image: &'a dyn Backend,
    queue: Box<dyn IoQueue>,
    /// To the target's thread.
    to_target: Sender<OldData>,
    scratch: Option<Scratch>,
    /// By number: the runs whose data is being read.
    runs: HashMap<u64, Run>,
    /// By op id: the reads in flight.
    reads: HashMap<u64, Piece>,
    /// The last number given to a run or an op.
    last_number: u64,
    /// Clusters that delayed ops wait for and that are in no run.
    urgent: VecDeque<Range<u64>>,
    /// Pieces that delayed ops wait for and whose reads are not started.
    urgent_pieces: VecDeque<Piece>,
    /// Other pieces whose reads are not started.
    background_pieces: VecDeque<Piece>,
    /// Every cluster before this one is saved or in a run.
    cursor: u64,
    data: DataExtent,
    /// The bytes of the buffers in use, in this thread and in those of the target and the scratch.
    used_memory: usize,
    free_buffers: Vec<IoBuf>,
    bandwidth: BandwidthLimiter,
}

/// Opens a queue of the image for a thread that reads it, which `copy` wakes, and sends `ready` whether that succeeded.
/// `None`: it did not, or the caller no longer waits.
pub(super) fn open_queue(
    image: &dyn Backend,
    depth: usize,
    copy: &Copy,
    ready: SyncSender<io::Result<()>>,
) -> Option<Box<dyn IoQueue>> {
    let queue = image.open_queue(depth).and_then(|mut queue| {
        queue.watch(Source::Wake, copy.wake_fd())?;
        Ok(queue)
    });
    match queue {
        Ok(queue) => ready.send(Ok(())).is_ok().then_some(queue),
        Err(error) => {
            // A caller that no longer waits needs no error.
            let _ = ready.send(Err(error));
            None
        }
    }
}

/// The thread's main function. It sends `ready` whether it can read the image, waits for the copy's start, and reads until
/// everything is saved or the copy is over. It drops `open` when it has closed its queue of the image.
pub(super) fn run(
    image: Arc<dyn Backend>,
    copy: Arc<Copy>,
    to_target: Sender<OldData>,
    scratch: Option<Scratch>,
    ready: SyncSender<io::Result<()>>,
    open: Sender<()>,
) {
    let Some(queue) = open_queue(&*image, DEPTH, &copy, ready) else { return };
    let mut copier = Copier {
        copy: &copy,
        image: &*image,
        queue,
        to_target,
        scratch,
        runs: HashMap::new(),
        reads: HashMap::new(),
        last_number: 0,
        urgent: VecDeque::new(),
        urgent_pieces: VecDeque::new(),
        background_pieces: VecDeque::new(),
        cursor: 0,
        data: DataExtent::default(),
        used_memory: 0,
        free_buffers: Vec::new(),
        bandwidth: BandwidthLimiter::default(),
    };
    if let Err(why) = copier.run() {
        copy.fail(why);
    }
    // Closes the queue, which waits for its reads, and the channel of old data, which tells the target's thread that it has
    // all of them.
    drop(copier);
    drop((image, open));
    if copy.phase() == Phase::Failed {
        copy.clean_up();
    }
}

impl Copier<'_> {
    /// Saves the image. An error says, for the operator, why the copy failed.
    fn run(&mut self) -> Result<(), String> {
        let cannot_wait = |error| format!("cannot wait for I/O of the image ({error}); see the daemon's log");
        while self.copy.phase() == Phase::Prepared {
            self.queue.wait(None).map_err(cannot_wait)?;
        }
        while let Some(urgent) = self.copy.take_urgent() {
            self.urgent.extend(urgent);
            self.handle_scratch_replies()?;
            let wait = self.start_reads()?;
            if self.runs.is_empty() && self.urgent.is_empty() && self.cursor == self.copy.saved.len() {
                self.copy.all_saved();
                if self.scratch.as_ref().is_none_or(Scratch::is_empty) {
                    return Ok(());
                }
            }
            self.queue.wait(wait).map_err(cannot_wait)?;
            self.reap()?;
        }
        Ok(())
    }

    /// Starts the reads that may start now. Returns how long the bandwidth limit delays the next one, if it does.
    fn start_reads(&mut self) -> Result<Option<Duration>, String> {
        for buf in self.copy.take_returned() {
            self.free_buffer(buf);
        }
        let memory = self.copy.shared.tuning.memory;
        if !self.start_urgent_reads(memory)? {
            return Ok(None);
        }
        self.load_scratch(memory / 4)?;
        let now = Instant::now();
        self.bandwidth.set_limit(self.copy.bandwidth.load(Relaxed), now);
        loop {
            if self.has_enough_background() || self.reads.len() == DEPTH || self.used_memory >= memory / 4 {
                return Ok(None);
            }
            if let Some(wait) = self.bandwidth.delay(now) {
                return Ok(Some(wait));
            }
            if let Some(piece) = self.background_pieces.pop_front() {
                self.bandwidth.charge(piece.bytes.end - piece.bytes.start);
                self.read(piece)?;
                continue;
            }
            let max_bytes = self.bandwidth.max_read();
            let Some(run) = self.next_run(self.cursor..self.copy.saved.len(), max_bytes)? else {
                self.cursor = self.copy.saved.len();
                return Ok(None);
            };
            self.cursor = run.end;
            self.plan(run, false)?;
        }
    }

    /// Starts the reads that delayed ops wait for. Returns `false` when some of them cannot start yet.
    fn start_urgent_reads(&mut self, memory: usize) -> Result<bool, String> {
        while self.urgent_pieces.len() < DEPTH
            && let Some(range) = self.urgent.pop_front()
        {
            self.promote(&range);
            if let Some(run) = self.next_run(range.clone(), MAX_READ)? {
                self.urgent.push_front(run.end..range.end);
                self.plan(run, true)?;
            }
        }
        while let Some(piece) = self.urgent_pieces.pop_front() {
            if self.reads.len() == DEPTH || self.used_memory >= memory {
                self.urgent_pieces.push_front(piece);
                return Ok(false);
            }
            self.read(piece)?;
        }
        Ok(true)
    }

    /// Starts the read of a piece.
    fn read(&mut self, piece: Piece) -> Result<(), String> {
        let Range { start: offset, end } = piece.bytes;
        let len = (end - offset) as usize;
        let buf = buffer(&mut self.free_buffers, len);
        self.used_memory += len;
        self.last_number += 1;
        self.reads.insert(self.last_number, piece);
        let full = |_| "the image's queue refused a read below its depth; please report this as a defect".to_owned();
        self.queue.push(Op::Read { offset, buf }, OpId(self.last_number)).map_err(full)
    }

    /// Passes on the data of the reads that have finished.
    fn reap(&mut self) -> Result<(), String> {
        let mut out = Vec::new();
        self.queue.reap(&mut out);
        for Completion { id, result, buf } in out {
            let (Some(piece), Some(buf)) = (self.reads.remove(&id.0), buf) else {
                return Err("the image's queue completed an unknown read; please report this as a defect".into());
            };
            let offset = piece.bytes.start;
            if let Err(errno) = result {
                let error = io::Error::from_raw_os_error(errno.0);
                return Err(format!("the image cannot be read at byte {offset} ({error}); check the image's medium"));
            }
            let urgent = self.runs.get(&piece.run).is_some_and(|run| run.urgent);
            let clusters = self.finish_piece(&piece, buf.len() as u64);
            self.send_old_data(OldData { offset, buf, clusters }, urgent);
        }
        Ok(())
    }

    /// Counts a piece as read. If it was the last of its run, marks the run's clusters as saved and returns their number;
    /// otherwise returns 0.
    fn finish_piece(&mut self, piece: &Piece, len: u64) -> u64 {
        let run = self.runs.get_mut(&piece.run).expect("a run with unread pieces is in the map");
        if run.urgent {
            self.copy.saved_before_write.fetch_add(len, Relaxed);
        }
        run.unread -= 1;
        if run.unread > 0 {
            return 0;
        }
        let Run { clusters, .. } = self.runs.remove(&piece.run).expect("found just now");
        self.copy.mark_saved(clusters.clone());
        clusters.end - clusters.start
    }

    /// Sends old data to the target's thread; or to the scratch, if an op waited for its data and half the memory is in use.
    fn send_old_data(&mut self, data: OldData, urgent: bool) {
        let memory = self.copy.shared.tuning.memory;
        let data = match &mut self.scratch {
            // A quarter of the memory at most: a scratch that hangs must leave most of it to the target.
            Some(scratch) if urgent && self.used_memory > memory / 2 => {
                let stored = scratch.store(data, memory / 4);
                self.copy.scratch.store(scratch.bytes(), Relaxed);
                let Err(data) = stored else { return };
                data
            }
            _ => data,
        };
        // If the target's thread has ended, so has the copy.
        let _ = self.to_target.send(data);
    }

    /// Handles the replies of the scratch's thread.
    fn handle_scratch_replies(&mut self) -> Result<(), String> {
        let Some(mut scratch) = self.scratch.take() else { return Ok(()) };
        for reply in self.copy.take_scratch_replies() {
            match scratch.handle(reply)? {
                AfterReply::Free(buf) => self.free_buffer(buf),
                // If the target's thread has ended, so has the copy.
                AfterReply::Write(data) => drop(self.to_target.send(data)),
            }
        }
        self.copy.scratch.store(scratch.bytes(), Relaxed);
        self.scratch = Some(scratch);
        Ok(())
    }

    /// Starts to read data back from the scratch while less than `memory` bytes are in use.
    fn load_scratch(&mut self, memory: usize) -> Result<(), String> {
        let Some(scratch) = &mut self.scratch else { return Ok(()) };
        while self.used_memory < memory {
            let mut used = 0;
            let take = |len| {
                used = len;
                buffer(&mut self.free_buffers, len)
            };
            if !scratch.load(take)? {
                break;
            }
            self.used_memory += used;
        }
        Ok(())
    }

    /// Takes back a buffer that is no longer in use.
    fn free_buffer(&mut self, buf: IoBuf) {
        self.used_memory -= buf.len();
        if self.free_buffers.len() < MAX_FREE_BUFFERS {
            self.free_buffers.push(buf);
        }
    }
}

/// Returns a buffer of `len` bytes: a free one if possible, otherwise a new one.
fn buffer(free: &mut Vec<IoBuf>, len: usize) -> IoBuf {
    let index = free.iter().position(|buf| buf.len() == len);
    index.map_or_else(|| IoBuf::owned(len, 4096, 0), |index| free.swap_remove(index))
}
