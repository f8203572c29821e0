//! The thread that reads the image for an instant. It saves the clusters that the guest's ops wait for first, and reads for
//! clients besides. It alone sets the bits of saved clusters.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Sender, SyncSender};
use std::time::{Duration, Instant as Time};

use super::{Instant, StatusExtent, status};
use crate::backend::point_in_time::Mutant;
use crate::backend::point_in_time::copier::{BandwidthLimiter, open_queue};
use crate::backend::point_in_time::copy::Phase;
use crate::backend::point_in_time::holes::next_data;
use crate::backend::point_in_time::scratch_thread::{ScratchCommand, ScratchReply};
use crate::backend::point_in_time::target_thread::OldData;
use crate::backend::{Backend, Completion, IoBuf, IoQueue, Op, OpId};

/// The most reads in flight.
const DEPTH: usize = 32;

/// The most reads in flight for clients. A guest's request queues behind them, see `copier::plan::MAX_BACKGROUND`.
const MAX_CLIENT_READS: usize = 8;

/// The most bytes of one read, and of the clusters that are saved together unless one cluster is larger.
const MAX_READ: u64 = 256 << 10;

/// Extents start and end at multiples of this, except at the image's end.
const ALIGN: u64 = 4096;

/// Asks for something of the image.
pub(super) enum Request {
    /// The bytes of a range, which starts and ends at blocks.
    Read(ClientRead),
    /// What a range held at the instant.
    Status { bytes: Range<u64>, reply: StatusReply },
}

/// Receives holes and data in order, or why they are not known, for the operator.
type StatusReply = SyncSender<Result<Vec<StatusExtent>, String>>;

/// A read of a client.
pub(super) struct ClientRead {
    pub(super) bytes: Range<u64>,
    /// Receives the bytes, or why they cannot be read, for the operator.
    pub(super) reply: SyncSender<Result<Vec<u8>, String>>,
}

/// Clusters that become saved together.
struct Run {
    clusters: Range<u64>,
    /// The number of pieces that are not stored yet.
    unstored: usize,
}

/// The part of a run that one read covers.
struct Piece {
    run: u64,
    bytes: Range<u64>,
}

/// What a read in flight is for.
enum Read {
    Save(Piece),
    Client(ClientRead),
}

struct ImageThread<'a> {
    instant: &'a Instant,
    image: &'a dyn Backend,
    queue: Box<dyn IoQueue>,
    stores: Sender<ScratchCommand>,
    /// The most bytes that the scratch may hold.
    limit: u64,
    /// By number.
    runs: HashMap<u64, Run>,
    /// By op id.
    reads: HashMap<u64, Read>,
    client_reads_in_flight: usize,
    /// By offset: the run of a piece that is being stored.
    storing: HashMap<u64, u64>,
    /// The last number given to a run or an op.
    last_number: u64,
    /// Clusters that delayed ops wait for and that are in no run.
    urgent: VecDeque<Range<u64>>,
    pieces: VecDeque<Piece>,
    client_reads: VecDeque<ClientRead>,
    statuses: VecDeque<(Range<u64>, StatusReply)>,
    /// The last result of `next_data`: no data is between the first two numbers, and there may be data up to the third.
    data: (u64, u64, u64),
    /// The bytes of old data in memory.
    used_memory: usize,
    bandwidth: BandwidthLimiter,
}

/// The thread's main function. It sends `ready` whether it can read the image, waits for the instant, and serves until the
/// export is over. It drops `open` when it has closed its queue of the image.
pub(super) fn run(
    image: Arc<dyn Backend>,
    instant: Arc<Instant>,
    stores: Sender<ScratchCommand>,
    limit: u64,
    ready: SyncSender<io::Result<()>>,
    open: Sender<()>,
) {
    let Some(queue) = open_queue(&*image, DEPTH, &instant.copy, ready) else { return };
    let mut thread = ImageThread {
        instant: &instant,
        image: &*image,
        queue,
        stores,
        limit,
        runs: HashMap::new(),
        reads: HashMap::new(),
        client_reads_in_flight: 0,
        storing: HashMap::new(),
        last_number: 0,
        urgent: VecDeque::new(),
        pieces: VecDeque::new(),
        client_reads: VecDeque::new(),
        statuses: VecDeque::new(),
        data: (0, 0, 0),
        used_memory: 0,
        bandwidth: BandwidthLimiter::default(),
    };
    if let Err(why) = thread.run() {
        instant.copy.fail(why);
    }
    // Readers that wait for a reply see that it does not come.
    instant.close_links();
    thread.reads.clear();
    thread.client_reads.clear();
    thread.statuses.clear();
    // Waits for the reads in flight.
    drop(thread);
    drop((image, open));
}

impl ImageThread<'_> {
    /// Serves until the export is over. An error says, for the operator, why the instant can no longer be read.
    fn run(&mut self) -> Result<(), String> {
        let copy = &self.instant.copy;
        let cannot_wait = |error| format!("cannot wait for I/O of the image ({error}); see the daemon's log");
        while copy.phase() == Phase::Prepared {
            self.queue.wait(None).map_err(cannot_wait)?;
        }
        self.instant.changed.notify();
        while let Some(urgent) = copy.take_urgent() {
            self.urgent.extend(urgent);
            self.handle_stored()?;
            self.start_saves()?;
            for request in self.instant.take_requests() {
                match request {
                    Request::Read(read) => self.client_reads.push_back(read),
                    Request::Status { bytes, reply } => self.statuses.push_back((bytes, reply)),
                }
            }
            self.reply_status()?;
            let wait = self.start_client_reads()?;
            let wait = if self.statuses.is_empty() { wait } else { Some(Duration::ZERO) };
            self.queue.wait(wait).map_err(cannot_wait)?;
            self.reap()?;
        }
        Ok(())
    }

    /// Sets the bits of the clusters whose data is in the scratch, which releases the guest's ops.
    fn handle_stored(&mut self) -> Result<(), String> {
        for reply in self.instant.copy.take_scratch_replies() {
            match reply {
                ScratchReply::Stored(OldData { offset, buf, .. }) => {
                    self.used_memory -= buf.len();
                    let Some(run) = self.storing.remove(&offset) else { continue };
                    self.finish_piece(run);
                }
                ScratchReply::NotStored { why, .. } | ScratchReply::Lost(why) => return Err(why),
                ScratchReply::Loaded { .. } => {}
            }
        }
        Ok(())
    }

    fn finish_piece(&mut self, number: u64) {
        let Some(run) = self.runs.get_mut(&number) else { return };
        run.unstored -= 1;
        if run.unstored == 0 {
            let clusters = run.clusters.clone();
            self.runs.remove(&number);
            self.instant.copy.mark_saved(clusters);
        }
    }

    /// Starts the reads of clusters that the guest's ops wait for, while there is memory for their data.
    fn start_saves(&mut self) -> Result<(), String> {
        let memory = self.instant.copy.shared.tuning.memory;
        loop {
            while self.pieces.len() < DEPTH
                && let Some(range) = self.urgent.pop_front()
            {
                if let Some(run) = self.next_run(range.clone())? {
                    self.urgent.push_front(run.end..range.end);
                    self.plan(run)?;
                }
            }
            let Some(piece) = self.pieces.pop_front() else { return Ok(()) };
            // The clients' reads leave room in the queue.
            if self.reads.len() == DEPTH || self.used_memory >= memory {
                self.pieces.push_front(piece);
                return Ok(());
            }
            self.used_memory += (piece.bytes.end - piece.bytes.start) as usize;
            self.read(piece.bytes.clone(), Read::Save(piece))?;
        }
    }

    /// Finds the first clusters of a range that are not saved and in no run, and that may hold data. Marks those before them
    /// that held only zeroes.
    fn next_run(&mut self, range: Range<u64>) -> Result<Option<Range<u64>>, String> {
        let copy = &self.instant.copy;
        let mut at = range.start;
        loop {
            let Some(first) = copy.saved.first_clear(at..range.end) else { return Ok(None) };
            at = first;
            if let Some(run) = self.runs.values().find(|run| run.clusters.contains(&at)) {
                at = run.clusters.end;
                continue;
            }
            let data = self.data_from(at * copy.cluster)? / copy.cluster;
            if data > at {
                // Not more than what waits: marking it is a promise to know it.
                let empty = at..data.min(range.end);
                self.instant.zero.set(empty.clone());
                copy.mark_saved(empty);
                continue;
            }
            let data_end = self.data.2.div_ceil(copy.cluster);
            let max_end = range.end.min(at + (MAX_READ / copy.cluster).max(1)).min(data_end.max(at + 1));
            let is_free = |cluster: &u64| {
                copy.saved.first_clear(*cluster..*cluster + 1).is_some()
                    && !self.runs.values().any(|run| run.clusters.contains(cluster))
            };
            let end = (at + 1..max_end).find(|cluster| !is_free(cluster)).unwrap_or(max_end);
            return Ok(Some(at..end));
        }
    }

    /// Returns the first byte from `at` on, which is in no saved cluster, that may hold data, or the image's end rounded up
    /// to clusters.
    fn data_from(&mut self, at: u64) -> Result<u64, String> {
        let (from, _, end) = self.data;
        if !(from..end).contains(&at) {
            let copy = &self.instant.copy;
            let found = next_data(self.image, copy.size, at)?;
            let (start, end) = found.unwrap_or((copy.size.next_multiple_of(copy.cluster), u64::MAX));
            self.data = (at, start, end);
        }
        Ok(self.data.1.max(at))
    }

    /// Makes a run of some clusters and queues its pieces. Fails when the scratch may not hold so much more.
    fn plan(&mut self, clusters: Range<u64>) -> Result<(), String> {
        let copy = &self.instant.copy;
        let (start, end) = (clusters.start * copy.cluster, (clusters.end * copy.cluster).min(copy.size));
        let held = copy.scratch.fetch_add(end - start, Relaxed) + end - start;
        copy.saved_before_write.fetch_add(end - start, Relaxed);
        if held > self.limit {
            return Err(format!(
                "the guest has overwritten more than the scratch may hold, {} MiB; read the export faster, or allow more \
                 (--scratch-size)",
                self.limit >> 20
            ));
        }
        self.last_number += 1;
        let run = self.last_number;
        let starts = (start..end).step_by(MAX_READ as usize);
        let pieces: Vec<Piece> = starts.map(|start| Piece { run, bytes: start..end.min(start + MAX_READ) }).collect();
        self.runs.insert(run, Run { clusters: clusters.clone(), unstored: pieces.len() });
        self.pieces.extend(pieces);
        if copy.shared.tuning.mutant == Some(Mutant::ReleasesEarly) {
            copy.mark_saved(clusters);
        }
        Ok(())
    }

    /// Starts reads for clients. Returns how long the bandwidth limit delays the next one, if it does.
    fn start_client_reads(&mut self) -> Result<Option<Duration>, String> {
        let now = Time::now();
        self.bandwidth.set_limit(self.instant.copy.bandwidth.load(Relaxed), now);
        while self.client_reads_in_flight < MAX_CLIENT_READS && self.reads.len() < DEPTH {
            if self.client_reads.is_empty() {
                return Ok(None);
            }
            if let Some(wait) = self.bandwidth.delay(now) {
                return Ok(Some(wait));
            }
            let Some(read) = self.client_reads.pop_front() else { return Ok(None) };
            self.bandwidth.charge(read.bytes.end - read.bytes.start);
            self.client_reads_in_flight += 1;
            self.read(read.bytes.clone(), Read::Client(read))?;
        }
        Ok(None)
    }

    fn read(&mut self, bytes: Range<u64>, read: Read) -> Result<(), String> {
        let buf = IoBuf::owned((bytes.end - bytes.start) as usize, 4096, 0);
        self.last_number += 1;
        self.reads.insert(self.last_number, read);
        let full = |_| "the image's queue refused a read below its depth; please report this as a defect".to_owned();
        self.queue.push(Op::Read { offset: bytes.start, buf }, OpId(self.last_number)).map_err(full)
    }

    /// Passes on the data of the reads that have finished.
    fn reap(&mut self) -> Result<(), String> {
        let mut out = Vec::new();
        self.queue.reap(&mut out);
        for Completion { id, result, buf } in out {
            let (Some(read), Some(buf)) = (self.reads.remove(&id.0), buf) else {
                return Err("the image's queue completed an unknown read; please report this as a defect".into());
            };
            let cannot = |offset: u64, errno: crate::backend::Errno| {
                let error = io::Error::from_raw_os_error(errno.0);
                format!("the image cannot be read at byte {offset} ({error}); check the image's medium")
            };
            match read {
                Read::Save(piece) => {
                    result.map_err(|errno| cannot(piece.bytes.start, errno))?;
                    self.storing.insert(piece.bytes.start, piece.run);
                    let data = OldData { offset: piece.bytes.start, buf, clusters: 0 };
                    let ended =
                        |_| "the thread that writes the scratch ended; please report this as a defect".to_owned();
                    self.stores.send(ScratchCommand::Store(data)).map_err(ended)?;
                }
                Read::Client(read) => {
                    self.client_reads_in_flight -= 1;
                    let data = result.map_err(|errno| cannot(read.bytes.start, errno)).map(|()| {
                        let mut data = vec![0; buf.len()];
                        buf.copy_to(0, &mut data);
                        data
                    });
                    let failure = data.as_ref().err().cloned();
                    // A reader that no longer waits needs no reply.
                    let _ = read.reply.send(data);
                    failure.map_or(Ok(()), Err)?;
                }
            }
        }
        Ok(())
    }

    /// Replies to one reader that asked for holes. The others wait for the thread's next turn, so that saving comes first.
    fn reply_status(&mut self) -> Result<(), String> {
        let Some((bytes, reply)) = self.statuses.pop_front() else { return Ok(()) };
        let instant = self.instant;
        let (cluster, saved) = (instant.copy.cluster, &instant.copy.saved);
        let found = status::list(bytes, cluster, saved, &instant.zero, |at| self.image_status(at));
        let failure = found.as_ref().err().cloned();
        // A reader that no longer waits needs no reply.
        drop(reply.send(found));
        // What could not be known once may be read wrongly later: the image may be cut off and grow again.
        failure.map_or(Ok(()), Err)
    }

    /// Whether the image has a hole at a byte of no saved cluster, and where it, or the data, ends.
    fn image_status(&mut self, at: u64) -> Result<(u64, bool), String> {
        let data = self.data_from(at)? / ALIGN * ALIGN;
        if data > at {
            return Ok((data, true));
        }
        let end = self.data.2;
        Ok((end.checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX).max(at + 1), false))
    }
}
