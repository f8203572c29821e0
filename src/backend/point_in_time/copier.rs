//! The thread that saves the image: what delayed ops wait for first, then the rest in order. It never touches the
//! target, which may hang: old data goes to the writer in memory.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Sender, SyncSender};
use std::time::{Duration, Instant};

use super::Mutant;
use super::copy::{CLUSTER, Copy, Phase};
use super::target_thread::Job;
use crate::backend::{Backend, Completion, IoBuf, IoQueue, Op, OpId, Source};

/// Reads in flight at most, and those of them that nobody waits for. What is in flight stands before a guest's request:
/// measured here (`benches/point_in_time.rs`), two reads of 256 KiB copy as fast as four of 512 KiB, and a guest's
/// write takes a fifth of the time.
const DEPTH: usize = 32;
const MOST_BACKGROUND: usize = 2;
/// Clusters in one read at most.
const LONGEST: u64 = 4;
/// Free buffers kept.
const KEPT: usize = 32;

/// What the thread owns.
struct Copier<'a> {
    copy: &'a Copy,
    image: &'a dyn Backend,
    queue: Box<dyn IoQueue>,
    writer: Sender<Job>,
    reads: HashMap<u64, Reading>,
    last_read: u64,
    urgent: VecDeque<Range<u64>>,
    /// Everything before it was dealt with in the background, or is.
    cursor: u64,
    /// The clusters that hold data where we looked last. Right for those not saved: nothing changes them.
    data: Range<u64>,
    /// Bytes of the buffers that are in use here and with the writer.
    lent: usize,
    free: Vec<IoBuf>,
    pace: Pace,
}

struct Reading {
    clusters: Range<u64>,
    urgent: bool,
}

/// Runs the copy's source side: tells `ready` whether it can, waits for the start, and reads until everything is saved
/// or the copy is over. `_open` is dropped when the image is let go.
pub(super) fn run(
    image: Arc<dyn Backend>,
    copy: Arc<Copy>,
    writer: Sender<Job>,
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
        reads: HashMap::new(),
        last_read: 0,
        urgent: VecDeque::new(),
        cursor: 0,
        data: 0..0,
        lent: 0,
        free: Vec::new(),
        pace: Pace::default(),
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
            let wait = self.start_reads()?;
            if self.reads.is_empty() && self.urgent.is_empty() && self.cursor == self.copy.saved.len() {
                self.copy.all_saved();
                return Ok(());
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
        while let Some(range) = self.urgent.pop_front() {
            if self.reads.len() == DEPTH || self.lent >= memory {
                self.urgent.push_front(range);
                return Ok(None);
            }
            if let Some(run) = self.next_run(range.clone(), LONGEST)? {
                self.urgent.push_front(run.end..range.end);
                self.read(run, true)?;
            }
        }
        let now = Instant::now();
        self.pace.limit(self.copy.bandwidth.load(Relaxed), now);
        loop {
            let background = self.reads.values().filter(|reading| !reading.urgent).count();
            if background == MOST_BACKGROUND || self.reads.len() == DEPTH || self.lent >= memory / 4 {
                return Ok(None);
            }
            if let Some(wait) = self.pace.must_wait(now) {
                return Ok(Some(wait));
            }
            let Some(run) = self.next_run(self.cursor..self.copy.saved.len(), self.pace.longest())? else {
                self.cursor = self.copy.saved.len();
                return Ok(None);
            };
            self.cursor = run.end;
            self.pace.spend((run.end - run.start) * CLUSTER);
            self.read(run, false)?;
        }
    }

    /// The first clusters of a range that are neither saved nor being read and may hold data, `most` at most. Clusters
    /// on the way that hold none are saved with that.
    fn next_run(&mut self, range: Range<u64>, most: u64) -> Result<Option<Range<u64>>, String> {
        let mut at = range.start;
        loop {
            let Some(first) = self.copy.saved.first_clear(at..range.end) else { return Ok(None) };
            at = first;
            if let Some(reading) = self.reads.values().find(|reading| reading.clusters.contains(&at)) {
                at = reading.clusters.end;
                continue;
            }
            if !self.data.contains(&at) {
                self.data = self.data_from(at)?;
                if at < self.data.start {
                    let holes = self.copy.mark_saved(at..self.data.start);
                    self.copy.done.fetch_add(holes, Relaxed);
                    continue;
                }
            }
            let most = range.end.min(self.data.end).min(at + most);
            let free = |cluster: &u64| {
                self.copy.saved.first_clear(*cluster..*cluster + 1).is_some()
                    && !self.reads.values().any(|reading| reading.clusters.contains(cluster))
            };
            let end = (at + 1..most).find(|cluster| !free(cluster)).unwrap_or(most);
            return Ok(Some(at..end));
        }
    }

    /// The next clusters from `at` on that may hold data; at the end of the image: an empty range there.
    fn data_from(&self, at: u64) -> Result<Range<u64>, String> {
        let all = self.copy.saved.len();
        let found = self.image.next_data(at * CLUSTER).map_err(|error| {
            format!("cannot tell the image's holes from byte {} on ({error}); check the image's medium", at * CLUSTER)
        })?;
        Ok(found.map_or(all..all, |(start, end)| (start / CLUSTER).max(at)..end.div_ceil(CLUSTER).min(all)))
    }

    fn read(&mut self, clusters: Range<u64>, urgent: bool) -> Result<(), String> {
        let offset = clusters.start * CLUSTER;
        let len = ((clusters.end * CLUSTER).min(self.copy.size) - offset) as usize;
        let kept = self.free.iter().position(|buf| buf.len() == len);
        let buf = kept.map_or_else(|| IoBuf::owned(len, 4096, 0), |index| self.free.swap_remove(index));
        self.lent += len;
        if self.copy.shared.tuning.mutant == Some(Mutant::ReleasesEarly) {
            self.copy.mark_saved(clusters.clone());
        }
        self.last_read += 1;
        self.reads.insert(self.last_read, Reading { clusters, urgent });
        let full = |_| "the image's queue took too few reads; please report this as a defect".to_owned();
        self.queue.push(Op::Read { offset, buf }, OpId(self.last_read)).map_err(full)
    }

    fn reap(&mut self) -> Result<(), String> {
        let mut out = Vec::new();
        self.queue.reap(&mut out);
        for Completion { id, result, buf } in out {
            let (Some(Reading { clusters, urgent }), Some(buf)) = (self.reads.remove(&id.0), buf) else {
                return Err("the image's queue answered what was not asked; please report this as a defect".into());
            };
            let offset = clusters.start * CLUSTER;
            if let Err(errno) = result {
                let error = io::Error::from_raw_os_error(errno.0);
                return Err(format!("the image cannot be read at byte {offset} ({error}); check the image's medium"));
            }
            self.copy.mark_saved(clusters);
            if urgent {
                self.copy.saved_before_write.fetch_add(buf.len() as u64, Relaxed);
            }
            if self.writer.send(Job { offset, buf }).is_err() {
                // The writer ends before us only with the copy.
                return Ok(());
            }
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

/// The bandwidth limit: no read before the last one's time is up.
#[derive(Default)]
struct Pace {
    /// Bytes a second; 0: none.
    limit: u64,
    next: Option<Instant>,
}

impl Pace {
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

    /// Clusters in one read: about an eighth of a second's.
    fn longest(&self) -> u64 {
        if self.limit == 0 { LONGEST } else { (self.limit / 8 / CLUSTER).clamp(1, LONGEST) }
    }
}
