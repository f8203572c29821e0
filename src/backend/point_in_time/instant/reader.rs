//! Reads the instant: of each cluster from the image, or from the scratch.
//!
//! Why what is read is the instant's: a cluster's bit is set before the first op that changes the cluster goes on. If the bit
//! is clear after the image was read, no op had gone on before, and the image held the old data. If it is set, the scratch
//! has the old data, and is read instead. An op goes on without a bit only after the instant is over, so a read that ends
//! while the instant lasts was right.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant as Time};

use super::image_thread::{ClientRead, Request};
use super::scratch_file::ScratchRead;
use super::sources::sources;
use super::{Instant, Links};
use crate::backend::point_in_time::Mutant;
use crate::backend::point_in_time::copy::Phase;
use crate::base::sync::EventNotifier;

/// Reads of the image start and end at multiples of this, except at its end. It is the largest logical block.
const ALIGN: u64 = 4096;

/// How long a read waits for the image or the scratch before it fails.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// More bytes than all clients together wait for at a time.
const MAX_QUEUED_BYTES: u64 = 64 << 20;

/// How often a read that waits checks whether the instant is over.
const OVER_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Why the instant was not read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadError {
    /// It can no longer be read, and why, for the operator.
    Over(String),
    /// This read failed, and why, for the operator. Another may succeed.
    Failed(String),
}

/// Some bytes of the instant that are a hole, or may hold data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StatusExtent {
    /// The length in bytes; not 0.
    pub len: u64,
    /// They read as zeroes and take no space.
    pub hole: bool,
}

/// The instant, for any number of threads.
#[derive(Clone)]
pub struct InstantReader(Arc<Instant>);

/// Receives the bytes that were read, or why they cannot be read, for the operator.
type ReadReply = Receiver<Result<Vec<u8>, String>>;

/// A read that has begun.
pub struct PendingRead {
    bytes: Range<u64>,
    /// The first byte that was asked of the image, and the reply. `None`: every cluster was saved.
    image: Option<(u64, ReadReply)>,
    /// For the planted fault that does not look again.
    saved_before: Option<Vec<bool>>,
}

impl Instant {
    /// Takes the requests of readers. Called by the image's thread.
    pub(super) fn take_requests(&self) -> Vec<Request> {
        let mut links = self.links.lock().expect("no panic while held");
        links.as_mut().map(|links| std::mem::take(&mut links.requests)).unwrap_or_default()
    }

    /// Refuses requests from now on. Called by the image's thread at its end.
    pub(super) fn close_links(&self) {
        *self.links.lock().expect("no panic while held") = None;
    }

    /// Adds a request, unless the instant is over.
    fn submit(&self, add: impl FnOnce(&mut Links)) {
        if let Some(links) = &mut *self.links.lock().expect("no panic while held") {
            add(links);
        }
        self.copy.wake_copier();
    }

    fn error(&self) -> ReadError {
        let status = self.copy.status();
        ReadError::Over(status.error.unwrap_or_else(|| match status.state.as_str() {
            "completed" => "the export has ended, because its clients had left".into(),
            _ => "the export was cancelled, or its daemon ends".into(),
        }))
    }

    fn check(&self) -> Result<(), ReadError> {
        // The same number that the guest's ops look at: while it stands, none of them has gone on without its bit.
        if self.copy.needs_image() { Ok(()) } else { Err(self.error()) }
    }

    /// How long a read may take: longer if a bandwidth limit delays it.
    fn read_timeout(&self) -> Duration {
        match self.copy.bandwidth.load(Relaxed) {
            0 => READ_TIMEOUT,
            limit => READ_TIMEOUT + Duration::from_secs(MAX_QUEUED_BYTES / limit),
        }
    }

    /// Waits for a reply.
    fn wait<T>(&self, reply: &Receiver<Result<T, String>>) -> Result<T, ReadError> {
        let end = Time::now() + self.read_timeout();
        loop {
            match reply.recv_timeout(OVER_CHECK_INTERVAL) {
                Ok(result) => return result.map_err(ReadError::Failed),
                Err(RecvTimeoutError::Disconnected) => return Err(self.error()),
                Err(RecvTimeoutError::Timeout) => self.check()?,
            }
            if Time::now() >= end {
                let why = "the storage of the image or the scratch has not replied in time; repair it".to_owned();
                return Err(ReadError::Failed(why));
            }
        }
    }

    /// Replaces the bytes of saved clusters by those of the scratch.
    fn fill_saved(&self, bytes: Range<u64>, data: &mut [u8]) -> Result<(), ReadError> {
        let cluster = self.copy.cluster;
        let start = bytes.start;
        for saved in sources(bytes, cluster, &self.copy.saved).into_iter().filter(|source| source.saved) {
            // Cut again where zeroes and stored data meet.
            for part in sources(saved.bytes, cluster, &self.zero) {
                let range = (part.bytes.start - start) as usize..(part.bytes.end - start) as usize;
                if part.saved {
                    data[range].fill(0);
                    continue;
                }
                let (reply, is_read) = mpsc::sync_channel(1);
                let read = ScratchRead { bytes: part.bytes, reply };
                // If the thread has ended, so has its reply.
                self.submit(|links| drop(links.scratch.send(read)));
                data[range].copy_from_slice(&self.wait(&is_read)?);
            }
        }
        Ok(())
    }
}

impl InstantReader {
    pub(super) fn new(instant: Arc<Instant>) -> Self {
        InstantReader(instant)
    }

    /// The size of the image at the instant.
    pub fn size(&self) -> u64 {
        self.0.copy.size
    }

    /// A name for messages.
    pub fn name(&self) -> &str {
        &self.0.copy.name
    }

    /// Notified when the instant begins and when it is over.
    pub(crate) fn changed(&self) -> &EventNotifier {
        &self.0.changed
    }

    /// Whether the instant is still to come.
    pub fn is_prepared(&self) -> bool {
        self.0.copy.phase() == Phase::Prepared
    }

    /// Whether the instant can no longer be read.
    pub fn is_over(&self) -> bool {
        self.0.copy.phase().is_over()
    }

    /// Ends the export, because its clients have left.
    pub fn complete(&self) {
        self.0.copy.end(Phase::Completed, None);
    }

    /// Ends the export with an error, for the operator.
    pub fn fail(&self, why: &str) {
        self.0.copy.fail(why.to_owned());
    }

    /// Counts a client that came (`1`) or left (`-1`).
    pub fn count_client(&self, change: i64) {
        if let Some(counters) = &self.0.copy.export {
            let _ = counters.clients.fetch_update(Relaxed, Relaxed, |clients| clients.checked_add_signed(change));
        }
    }

    /// Begins to read a range, which is not empty and inside the image.
    pub fn begin(&self, bytes: Range<u64>) -> PendingRead {
        let Instant { copy, .. } = &*self.0;
        let parts = sources(bytes.clone(), copy.cluster, &copy.saved);
        let saved_before = (copy.shared.tuning.mutant == Some(Mutant::LooksOnce))
            .then(|| parts.iter().flat_map(|part| part.bytes.clone().map(|_| part.saved)).collect());
        let image = parts.iter().any(|part| !part.saved).then(|| {
            let start = bytes.start / ALIGN * ALIGN;
            let end = bytes.end.next_multiple_of(ALIGN).min(copy.size);
            let (reply, is_read) = mpsc::sync_channel(1);
            self.0.submit(|links| links.requests.push(Request::Read(ClientRead { bytes: start..end, reply })));
            (start, is_read)
        });
        PendingRead { bytes, image, saved_before }
    }

    /// Waits for the bytes of a read.
    pub fn finish(&self, read: PendingRead) -> Result<Vec<u8>, ReadError> {
        let PendingRead { bytes, image, saved_before } = read;
        let len = (bytes.end - bytes.start) as usize;
        let mut data = match image {
            Some((start, reply)) => {
                let mut data = self.0.wait(&reply)?;
                data.drain(..(bytes.start - start) as usize);
                data.truncate(len);
                data
            }
            None => vec![0; len],
        };
        let from_image = saved_before.is_some().then(|| data.clone());
        // After the image was read, not before.
        self.0.fill_saved(bytes, &mut data)?;
        if let (Some(before), Some(from_image)) = (saved_before, from_image) {
            let unsaved = before.iter().enumerate().filter(|(_, saved)| !**saved);
            unsaved.for_each(|(at, _)| data[at] = from_image[at]);
        }
        self.0.check()?;
        if let Some(counters) = &self.0.copy.export {
            counters.read_bytes.fetch_add(len as u64, Relaxed);
        }
        Ok(data)
    }

    /// Which parts of a range were holes at the instant, in order and without gaps. May end before the range does, but not
    /// at its start.
    pub fn status(&self, bytes: Range<u64>) -> Result<Vec<StatusExtent>, ReadError> {
        let (reply, is_known) = mpsc::sync_channel(1);
        self.0.submit(|links| links.requests.push(Request::Status { bytes, reply }));
        let extents = self.0.wait(&is_known)?;
        self.0.check()?;
        Ok(extents)
    }
}
