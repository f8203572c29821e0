//! The thread that saves the image: what delayed ops wait for first, then the rest in order. It never touches the
//! target, which may hang: old data goes to the writer in memory, or to the scratch first (`scratch`).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Sender, SyncSender};
use std::time::{Duration, Instant};

use super::Mutant;
use super::copy::{Copy, Phase};
use super::scratch::{Heard, Scratch};
use super::target_thread::Job;
use crate::backend::{Backend, Completion, IoBuf, IoQueue, Op, OpId, Source};

/// Reads in flight at most.
const DEPTH: usize = 32;
/// Reads in flight that no op waits for, and their bytes, at most. What is in flight stands before a guest's request:
/// measured here (`benches/point_in_time.rs`), two reads of 256 KiB copy as fast as four of 512 KiB, and a guest's
/// write takes a fifth of the time.
const MAX_BACKGROUND: usize = 8;
const MAX_BACKGROUND_BYTES: u64 = 512 << 10;
/// Bytes in one read at most, and in the clusters that are taken up at once, unless one cluster is larger.
const MAX_READ: u64 = 256 << 10;
/// Reads begin and end at multiples of it, but for the image's end: the largest logical block.
const ALIGN: u64 = 4096;
/// A hole that is not larger is read with the data around it: that is faster than another read.
const MAX_GAP: u64 = 16 << 10;
/// Free buffers kept.
const KEPT: usize = 32;

/// What the thread owns.
struct Copier<'a> {
    copy: &'a Copy,
    image: &'a dyn Backend,
    queue: Box<dyn IoQueue>,
    writer: Sender<Job>,
    scratch: Option<Scratch>,
    /// By number: clusters that are being saved.
    runs: HashMap<u64, Run>,
    /// By the op's name: in flight.
    reads: HashMap<u64, BounceBuffer>,
    last_number: u64,
    urgent: VecDeque<Range<u64>>,
    /// To be read yet.
    urgent_pieces: VecDeque<BounceBuffer>,
    background_pieces: VecDeque<BounceBuffer>,
    /// Everything before it was dealt with in the background, or is.
    cursor: u64,
    data: Extent,
    /// Bytes of the buffers that are in use here and with the writer.
    lent: usize,
    free: Vec<IoBuf>,
    pace: BandwidthLimiter,
}

/// Clusters that are saved together, when all of their data has been read.
struct Run {
    clusters: Range<u64>,
    /// Pieces that are not read yet.
    left: usize,
    /// An op waits for it.
    urgent: bool,
}

/// Bytes of the image that one read reads.
struct BounceBuffer {
    run: u64,
    bytes: Range<u64>,
}

/// What was found where we looked for data last: none from `from` to `start`, then some up to `end`. Right for clusters
/// that are not saved: nothing changes them.
#[derive(Default)]
struct Extent {
    from: u64,
    start: u64,
    end: u64,
}

/// Runs the copy's source side: tells `ready` whether it can, waits for the start, and reads until everything is saved
/// or the copy is over. `_open` is dropped when the image is let go.
pub(super) fn run(
    image: Arc<dyn Backend>,
    copy: Arc<Copy>,
    writer: Sender<Job>,
    scratch: Option<Scratch>,
    ready: SyncSender<io::Result<()>>,
    open: Sender<()>,
) {
    let queue = image.open_queue(DEPTH).and_then(|mut queue| {
        queue.watch(Source::Wake, copy.wake_fd())?;
        Ok(queue)
    });
    let queue = match queue {
        Ok(queue) => queue,
        // Whoever waits for the answer may have gone; then nothing is to be done.
        Err(error) => return drop(ready.send(Err(error))),
    };
    if ready.send(Ok(())).is_err() {
        return;
    }
    let mut copier = Copier {
        copy: &copy,
        image: &*image,
        queue,
        writer,
        scratch,
        runs: HashMap::new(),
        reads: HashMap::new(),
        last_number: 0,
        urgent: VecDeque::new(),
        urgent_pieces: VecDeque::new(),
        background_pieces: VecDeque::new(),
        cursor: 0,
        data: Extent::default(),
        lent: 0,
        free: Vec::new(),
        pace: BandwidthLimiter::default(),
    };
    if let Err(why) = copier.run() {
        copy.fail(why);
    }
    // The queue waits for its reads; the writer learns that no more comes.
    drop(copier);
    drop((image, open));
    if copy.phase() == Phase::Failed {
        copy.clear_up();
    }
}

impl Copier<'_> {
    /// Errors: why the copy failed, in words for the operator.
    fn run(&mut self) -> Result<(), String> {
        let broken = |error| format!("cannot wait for I/O of the image ({error}); see the daemon's log");
        while self.copy.phase() == Phase::Prepared {
            self.queue.wait(None).map_err(broken)?;
        }
        while let Some(urgent) = self.copy.take_urgent() {
            self.urgent.extend(urgent);
            self.hear_scratch()?;
            let wait = self.start_reads()?;
            if self.runs.is_empty() && self.urgent.is_empty() && self.cursor == self.copy.saved.len() {
                self.copy.all_saved();
                if self.scratch.as_ref().is_none_or(Scratch::is_empty) {
                    return Ok(());
                }
            }
            self.queue.wait(wait).map_err(broken)?;
            self.reap()?;
        }
        Ok(())
    }

    /// Starts what may be read now; returns how long the bandwidth limit makes us wait.
    fn start_reads(&mut self) -> Result<Option<Duration>, String> {
        for buf in self.copy.take_returned() {
            self.give_back(buf);
        }
        let memory = self.copy.shared.tuning.memory;
        if !self.start_urgent_reads(memory)? {
            return Ok(None);
        }
        self.load_scratch(memory / 4)?;
        let now = Instant::now();
        self.pace.limit(self.copy.bandwidth.load(Relaxed), now);
        loop {
            if self.has_enough_background() || self.reads.len() == DEPTH || self.lent >= memory / 4 {
                return Ok(None);
            }
            if let Some(wait) = self.pace.must_wait(now) {
                return Ok(Some(wait));
            }
            if let Some(piece) = self.background_pieces.pop_front() {
                self.pace.spend(piece.bytes.end - piece.bytes.start);
                self.read(piece)?;
                continue;
            }
            let most = self.pace.longest();
            let Some(run) = self.next_run(self.cursor..self.copy.saved.len(), most)? else {
                self.cursor = self.copy.saved.len();
                return Ok(None);
            };
            self.cursor = run.end;
            self.plan(run, false)?;
        }
    }

    /// Starts what delayed ops wait for. False: some of it must wait.
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
            if self.reads.len() == DEPTH || self.lent >= memory {
                self.urgent_pieces.push_front(piece);
                return Ok(false);
            }
            self.read(piece)?;
        }
        Ok(true)
    }

    /// An op waits for these clusters: what is being saved of them in the background is urgent now.
    fn promote(&mut self, clusters: &Range<u64>) {
        let background = self.runs.iter_mut().filter(|(_, run)| !run.urgent);
        let wanted =
            background.filter(|(_, run)| run.clusters.start < clusters.end && clusters.start < run.clusters.end);
        for (number, run) in wanted {
            run.urgent = true;
            let (urgent, rest) = self.background_pieces.drain(..).partition(|piece| piece.run == *number);
            self.background_pieces = rest;
            let urgent: VecDeque<BounceBuffer> = urgent;
            self.urgent_pieces.extend(urgent);
        }
    }

    fn has_enough_background(&self) -> bool {
        let background = self.reads.values().filter(|piece| !self.runs[&piece.run].urgent);
        let (count, bytes) =
            background.fold((0, 0), |(count, bytes), piece| (count + 1, bytes + piece.bytes.end - piece.bytes.start));
        count >= MAX_BACKGROUND || bytes >= MAX_BACKGROUND_BYTES
    }

    /// The first clusters of a range that are neither saved nor being read and may hold data, of `most` bytes at most.
    /// Clusters on the way that hold none are saved with that.
    fn next_run(&mut self, range: Range<u64>, most: u64) -> Result<Option<Range<u64>>, String> {
        let cluster = self.copy.cluster;
        let mut at = range.start;
        loop {
            let Some(first) = self.copy.saved.first_clear(at..range.end) else { return Ok(None) };
            at = first;
            if let Some(run) = self.runs.values().find(|run| run.clusters.contains(&at)) {
                at = run.clusters.end;
                continue;
            }
            let data = self.data_from(at * cluster)? / cluster;
            if data > at {
                let empty = at..data.min(self.copy.saved.len());
                let fresh = self.copy.mark_saved(empty);
                self.copy.done.fetch_add(fresh, Relaxed);
                continue;
            }
            let most = range.end.min(at + (most / cluster).max(1));
            let free = |cluster: &u64| {
                self.copy.saved.first_clear(*cluster..*cluster + 1).is_some()
                    && !self.runs.values().any(|run| run.clusters.contains(cluster))
            };
            let end = (at + 1..most).find(|cluster| !free(cluster)).unwrap_or(most);
            return Ok(Some(at..end));
        }
    }

    /// The first byte from `at` on that may hold data; the image's end, rounded up to clusters, if there is none.
    fn data_from(&mut self, at: u64) -> Result<u64, String> {
        if !(self.data.from..self.data.end).contains(&at) {
            let found = self.image.next_data(at).map_err(|error| {
                format!("cannot tell the image's holes from byte {at} on ({error}); check the image's medium")
            })?;
            let none = (self.copy.size.next_multiple_of(self.copy.cluster), u64::MAX);
            let (start, end) = found.unwrap_or(none);
            self.data = Extent { from: at, start, end };
        }
        Ok(self.data.start.max(at))
    }

    /// Finds out which bytes of some clusters are to be read, and queues them.
    fn plan(&mut self, clusters: Range<u64>, urgent: bool) -> Result<(), String> {
        let cluster = self.copy.cluster;
        let (mut at, end) = (clusters.start * cluster, (clusters.end * cluster).min(self.copy.size));
        let mut found: Vec<Range<u64>> = Vec::new();
        while at < end {
            let start = self.data_from(at)? / ALIGN * ALIGN;
            if start >= end {
                break;
            }
            let stop = self.data.end.checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX).min(end);
            match found.last_mut() {
                Some(last) if start.saturating_sub(last.end) <= MAX_GAP => last.end = stop,
                _ => found.push(start..stop),
            }
            at = stop;
        }
        self.last_number += 1;
        let run = self.last_number;
        let parts = |found: Range<u64>| {
            let starts = found.clone().step_by(MAX_READ as usize);
            starts.map(move |start| BounceBuffer { run, bytes: start..found.end.min(start + MAX_READ) })
        };
        let pieces: Vec<BounceBuffer> = found.into_iter().flat_map(parts).collect();
        if pieces.is_empty() {
            let fresh = self.copy.mark_saved(clusters);
            self.copy.done.fetch_add(fresh, Relaxed);
            return Ok(());
        }
        if self.copy.shared.tuning.mutant == Some(Mutant::ReleasesEarly) {
            self.copy.mark_saved(clusters.clone());
        }
        self.runs.insert(run, Run { clusters, left: pieces.len(), urgent });
        if urgent {
            self.urgent_pieces.extend(pieces)
        } else {
            self.background_pieces.extend(pieces)
        }
        Ok(())
    }

    fn read(&mut self, piece: BounceBuffer) -> Result<(), String> {
        let Range { start: offset, end } = piece.bytes;
        let len = (end - offset) as usize;
        let buf = buffer(&mut self.free, len);
        self.lent += len;
        self.last_number += 1;
        self.reads.insert(self.last_number, piece);
        let full = |_| "the image's queue took too few reads; please report this as a defect".to_owned();
        self.queue.push(Op::Read { offset, buf }, OpId(self.last_number)).map_err(full)
    }

    fn reap(&mut self) -> Result<(), String> {
        let mut out = Vec::new();
        self.queue.reap(&mut out);
        for Completion { id, result, buf } in out {
            let (Some(piece), Some(buf)) = (self.reads.remove(&id.0), buf) else {
                return Err("the image's queue answered what was not asked; please report this as a defect".into());
            };
            let offset = piece.bytes.start;
            if let Err(errno) = result {
                let error = io::Error::from_raw_os_error(errno.0);
                return Err(format!("the image cannot be read at byte {offset} ({error}); check the image's medium"));
            }
            let urgent = self.runs.get(&piece.run).is_some_and(|run| run.urgent);
            let clusters = self.piece_is_read(&piece, buf.len() as u64);
            self.pass_on(Job { offset, buf, clusters }, urgent);
        }
        Ok(())
    }

    /// Saves the clusters of the piece's run if it was the last of it. Returns how many those are.
    fn piece_is_read(&mut self, piece: &BounceBuffer, len: u64) -> u64 {
        let run = self.runs.get_mut(&piece.run).expect("it has pieces left");
        if run.urgent {
            self.copy.saved_before_write.fetch_add(len, Relaxed);
        }
        run.left -= 1;
        if run.left > 0 {
            return 0;
        }
        let Run { clusters, .. } = self.runs.remove(&piece.run).expect("looked at just now");
        self.copy.mark_saved(clusters.clone());
        clusters.end - clusters.start
    }

    /// The target's thread gets a job, or the scratch does, if an op waited for it and half the memory is in use.
    fn pass_on(&mut self, job: Job, urgent: bool) {
        let memory = self.copy.shared.tuning.memory;
        let job = match &mut self.scratch {
            // Never all of the memory: a scratch that hangs must leave most of it to the target.
            Some(scratch) if urgent && self.lent > memory / 2 => {
                let stored = scratch.store(job, memory / 4);
                self.copy.scratch.store(scratch.bytes(), Relaxed);
                let Err(job) = stored else { return };
                job
            }
            _ => job,
        };
        // The writer ends before us only with the copy.
        let _ = self.writer.send(job);
    }

    fn hear_scratch(&mut self) -> Result<(), String> {
        let Some(mut scratch) = self.scratch.take() else { return Ok(()) };
        for answer in self.copy.take_scratch_answers() {
            match scratch.hear(answer)? {
                Heard::Free(buf) => self.give_back(buf),
                // The writer ends before us only with the copy.
                Heard::Write(job) => drop(self.writer.send(job)),
            }
        }
        self.copy.scratch.store(scratch.bytes(), Relaxed);
        self.scratch = Some(scratch);
        Ok(())
    }

    /// Takes data back from the scratch while less than `memory` is in use.
    fn load_scratch(&mut self, memory: usize) -> Result<(), String> {
        let Some(scratch) = &mut self.scratch else { return Ok(()) };
        while self.lent < memory {
            let mut taken = 0;
            let take = |len| {
                taken = len;
                buffer(&mut self.free, len)
            };
            if !scratch.load(take)? {
                break;
            }
            self.lent += taken;
        }
        Ok(())
    }

    fn give_back(&mut self, buf: IoBuf) {
        self.lent -= buf.len();
        if self.free.len() < KEPT {
            self.free.push(buf);
        }
    }
}

/// A buffer of so many bytes, one of the free ones if possible.
fn buffer(free: &mut Vec<IoBuf>, len: usize) -> IoBuf {
    let kept = free.iter().position(|buf| buf.len() == len);
    kept.map_or_else(|| IoBuf::owned(len, 4096, 0), |index| free.swap_remove(index))
}

/// The bandwidth limit: no read before the last one's time is up.
#[derive(Default)]
struct BandwidthLimiter {
    /// Bytes a second; 0: none.
    limit: u64,
    next: Option<Instant>,
}

impl BandwidthLimiter {
    fn limit(&mut self, limit: u64, now: Instant) {
        if limit != self.limit {
            (self.limit, self.next) = (limit, None);
        }
        // Time not used is lost: no burst after a pause.
        self.next = Some(self.next.map_or(now, |next| next.max(now)));
    }

    fn must_wait(&self, now: Instant) -> Option<Duration> {
        let wait = self.next?.saturating_duration_since(now);
        (self.limit > 0 && wait > Duration::ZERO).then_some(wait)
    }

    fn spend(&mut self, bytes: u64) {
        if self.limit > 0 {
            let time = Duration::from_secs_f64((bytes as f64 / self.limit as f64).min(3600.0));
            self.next = self.next.map(|next| next + time);
        }
    }

    /// Bytes that are taken up at once: about an eighth of a second's.
    fn longest(&self) -> u64 {
        if self.limit == 0 { MAX_READ } else { (self.limit / 8).min(MAX_READ) }
    }
}
