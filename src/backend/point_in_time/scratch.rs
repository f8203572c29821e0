//! The scratch: a local file (`--scratch`) that first takes the old data that the guest's writes waited for, while the
//! target is too slow. The data is read back when the target's thread has room.
//!
//! This file is the copier's side: [`Index`] records what the file holds, and [`Scratch`] decides what goes there. The
//! file itself belongs to a thread of its own (`scratch_thread`). The copier never waits for that thread: a scratch that
//! is full, slow, broken or hangs takes no more data, and the copier then waits for the target as without a scratch.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::sync::mpsc::Sender;

use super::ScratchOptions;
use super::copy::Copy;
use super::scratch_thread::{self, ScratchCommand, ScratchReply};
use super::target_handle::Liveness;
use super::target_thread::OldData;
use crate::backend::IoBuf;
use crate::base::rate_limit::{COPY_LOG, log_limited};

/// The most threads of scratch files, over all copies: if that many are still alive, their filesystem hangs.
const MAX_THREADS: usize = 2;

/// The unit in which space is counted, because a filesystem allocates no less.
const BLOCK: u64 = 4096;

/// Which bytes of the image, as it was at the instant, are in the scratch. They are at the same offset as in the image.
struct Index {
    /// The most bytes that the scratch may hold.
    limit: u64,
    /// The bytes that `extents` occupy, in whole blocks.
    bytes: u64,
    /// By offset.
    extents: BTreeMap<u64, Extent>,
    /// The offsets of the extents in the file that are not being read back, in the order in which they were stored.
    stored: VecDeque<u64>,
}

/// A range of bytes that is in the scratch, or on the way there or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    len: u64,
    /// The number of clusters that become done when these bytes are written to the target.
    clusters: u64,
    state: ExtentState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ExtentState {
    /// In memory, on the way to the file.
    Storing,
    /// In the file.
    Stored,
    /// In the file, and being read back. After that a hole is punched there.
    Loading,
}

impl Index {
    fn new(limit: u64) -> Self {
        Index { limit, bytes: 0, extents: BTreeMap::new(), stored: VecDeque::new() }
    }

    /// Reserves space for an extent that is to be stored. Returns `false` when there is no space for it.
    fn reserve(&mut self, offset: u64, len: u64, clusters: u64) -> bool {
        let space = len.next_multiple_of(BLOCK);
        if self.bytes + space > self.limit {
            return false;
        }
        let before = self.extents.insert(offset, Extent { len, clusters, state: ExtentState::Storing });
        debug_assert!(before.is_none(), "a cluster is saved once");
        self.bytes += space;
        true
    }

    /// Records that the extent at `offset` is in the file.
    fn set_stored(&mut self, offset: u64) {
        if let Some(extent) = self.extents.get_mut(&offset) {
            extent.state = ExtentState::Stored;
            self.stored.push_back(offset);
        }
    }

    /// Chooses the next extent to read back. Returns its offset and length.
    fn load_next(&mut self) -> Option<(u64, u64)> {
        let offset = self.stored.pop_front()?;
        let extent = self.extents.get_mut(&offset)?;
        extent.state = ExtentState::Loading;
        Some((offset, extent.len))
    }

    /// Removes the extent at `offset`, which is no longer in the file or was not stored. Returns its clusters.
    fn remove(&mut self, offset: u64) -> Option<u64> {
        let extent = self.extents.remove(&offset)?;
        self.bytes -= extent.len.next_multiple_of(BLOCK);
        Some(extent.clusters)
    }

    /// Lowers the limit to what is used now, because the filesystem is full.
    fn limit_to_used(&mut self) {
        self.limit = self.limit.min(self.bytes);
    }

    /// Lowers the limit by `len` bytes, because the filesystem could not free them.
    fn lose_space(&mut self, len: u64) {
        self.limit = self.limit.saturating_sub(len.next_multiple_of(BLOCK));
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }
}

/// The threads of all scratch files, including those of copies that are over.
#[derive(Default)]
pub(super) struct Scratches(Mutex<Vec<Liveness>>);

impl Scratches {
    /// Creates the copy's scratch file if `--scratch` is set. Logs a warning if the file cannot be created.
    pub(super) fn start(&self, copy: &Copy) -> Option<Scratch> {
        let tuning = &copy.shared.tuning;
        let ScratchOptions { directory, size } = tuning.scratch.as_ref()?;
        let mut threads = self.0.lock().expect("no panic while held");
        threads.retain(Liveness::is_alive);
        let started = if threads.len() < MAX_THREADS {
            let liveness = Liveness::default();
            let alive = liveness.thread();
            threads.push(liveness);
            scratch_thread::start(directory, tuning, copy.target.reports(), alive)
        } else {
            Err(format!("earlier copies still wait for --scratch '{}'; repair its filesystem", directory.display()))
        };
        let warn = |why| log_limited!(COPY_LOG, Warn, "{}: {why}. The copy runs without a scratch", copy.name);
        started.map(|commands| Scratch::new(*size, commands)).map_err(warn).ok()
    }
}

/// The copier's handle of the scratch. Dropping it ends the thread.
pub(super) struct Scratch {
    index: Index,
    commands: Sender<ScratchCommand>,
    /// The file still takes data.
    usable: bool,
    /// Bytes that were sent to the thread and are not stored yet.
    storing: usize,
    warned: bool,
}

/// What the copier does after a reply of the scratch's thread.
pub(super) enum AfterReply {
    /// Reuse the buffer.
    Free(IoBuf),
    /// Send the data to the target's thread.
    Write(OldData),
}

impl Scratch {
    /// `limit`: the most bytes that the file may hold.
    fn new(limit: u64, commands: Sender<ScratchCommand>) -> Self {
        Scratch { index: Index::new(limit), commands, usable: true, storing: 0, warned: false }
    }

    /// Sends old data to be stored. Returns it instead when the file has no space, or more than `memory` bytes would be
    /// waiting to be stored.
    pub(super) fn store(&mut self, data: OldData, memory: usize) -> Result<(), OldData> {
        let len = data.buf.len();
        if !self.usable
            || (self.storing > 0 && self.storing + len > memory)
            || !self.index.reserve(data.offset, len as u64, data.clusters)
        {
            return Err(data);
        }
        self.storing += len;
        let offset = data.offset;
        self.commands.send(ScratchCommand::Store(data)).map_err(|unsent| {
            self.usable = false;
            self.storing -= len;
            self.index.remove(offset);
            unsent.0.data()
        })
    }

    /// Starts to read the next extent back, into a buffer of its length from `buffer`. Returns `false` when no extent is
    /// left to read.
    pub(super) fn load(&mut self, buffer: impl FnOnce(usize) -> IoBuf) -> Result<bool, String> {
        let Some((offset, len)) = self.index.load_next() else { return Ok(false) };
        let data = OldData { offset, buf: buffer(len as usize), clusters: 0 };
        let sent = self.commands.send(ScratchCommand::Load(data));
        sent.map(|()| true)
            .map_err(|_| "the thread that writes its scratch ended; please report this as a defect".into())
    }

    /// Handles a reply of the scratch's thread. An error says, for the operator, why the copy failed.
    pub(super) fn handle(&mut self, reply: ScratchReply) -> Result<AfterReply, String> {
        Ok(match reply {
            ScratchReply::Stored(OldData { offset, buf, .. }) => {
                self.storing -= buf.len();
                self.index.set_stored(offset);
                AfterReply::Free(buf)
            }
            ScratchReply::NotStored { data, full, why } => {
                self.storing -= data.buf.len();
                self.index.remove(data.offset);
                // There is space again as soon as extents are read back.
                self.index.limit_to_used();
                self.usable &= full;
                self.warn(&why);
                AfterReply::Write(data)
            }
            ScratchReply::Loaded { data, freed } => {
                let clusters = self.index.remove(data.offset).unwrap_or_default();
                if !freed {
                    self.index.lose_space(data.buf.len() as u64);
                }
                AfterReply::Write(OldData { clusters, ..data })
            }
            ScratchReply::Lost(why) => return Err(why),
        })
    }

    fn warn(&mut self, why: &str) {
        if !std::mem::replace(&mut self.warned, true) {
            log_limited!(
                COPY_LOG,
                Warn,
                "{why}. The copy continues; from now on a slow target delays the guest's writes"
            );
        }
    }

    /// Whether no data is in the scratch or on the way there or back.
    pub(super) fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// The bytes in the scratch or on the way there or back.
    pub(super) fn bytes(&self) -> u64 {
        self.index.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_counted_in_blocks_and_freed_by_removal() {
        let mut index = Index::new(3 * BLOCK);
        assert!(index.reserve(0, BLOCK, 1) && index.reserve(1 << 40, BLOCK + 512, 2));
        assert_eq!(index.bytes(), 3 * BLOCK);
        assert!(!index.reserve(BLOCK, 1, 1), "it is full");
        assert_eq!(index.load_next(), None, "nothing is in the file");
        index.set_stored(1 << 40);
        index.set_stored(0);
        assert_eq!(index.load_next(), Some((1 << 40, BLOCK + 512)), "the extent that was stored first");
        assert!(!index.reserve(BLOCK, 1, 1), "the hole is not punched yet");
        assert_eq!(index.remove(1 << 40), Some(2));
        assert_eq!(index.remove(1 << 40), None);
        assert!(index.reserve(BLOCK, 2 * BLOCK, 0));
        assert_eq!(index.load_next(), Some((0, BLOCK)));
        assert_eq!((index.remove(0), index.is_empty()), (Some(1), false));
        assert_eq!((index.remove(BLOCK), index.is_empty(), index.bytes()), (Some(0), true, 0));
    }

    #[test]
    fn a_full_file_system_lowers_the_limit() {
        let mut index = Index::new(1 << 30);
        assert!(index.reserve(0, BLOCK, 1) && index.reserve(BLOCK, BLOCK, 1));
        index.remove(BLOCK);
        index.limit_to_used();
        assert!(!index.reserve(BLOCK, BLOCK, 1));
        index.remove(0);
        assert!(index.reserve(BLOCK, BLOCK, 1), "as much as was there before");
        index.remove(BLOCK);
        index.lose_space(1);
        assert!(!index.reserve(BLOCK, BLOCK, 1), "the filesystem has not freed the block");
    }
}
