//! The scratch: old data that the guest's writes waited for and the target is too slow to take goes into a local file
//! (`--scratch`) first. It is taken from there when the target's thread has room.
//!
//! Here is the copier's side: the [`Index`], which says what the file holds, and [`Scratch`], which decides what goes
//! there. The file belongs to a thread of its own (`scratch_thread`). The copier never waits for that thread: a scratch
//! that is full, slow, broken or hanging takes nothing more, and the target is waited for as if there were none.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Mutex;
use std::sync::mpsc::Sender;

use super::ScratchOptions;
use super::copy::Copy;
use super::order::Liveness;
use super::scratch_thread::{self, Answer, Command};
use super::target_thread::Job;
use crate::backend::IoBuf;
use crate::base::rate_limit::{COPY_LOG, log_limited};

/// Threads of scratch files at most: if more would wait for their filesystem, it hangs.
const MAX_THREADS: usize = 2;

/// What a filesystem allocates at least: room is counted in such blocks.
const BLOCK: u64 = 4096;

/// Which bytes of the image, as it was at the instant, are in the scratch. They are there at their own offset.
struct Index {
    /// Bytes that may be held.
    limit: u64,
    bytes: u64,
    /// By the first byte.
    held: BTreeMap<u64, Held>,
    /// The first bytes of what is stored and nothing reads yet, in the order in which it was stored.
    stored: VecDeque<u64>,
}

/// Bytes that are in the scratch, or on the way there or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    len: u64,
    /// What the target's thread is to count.
    clusters: u64,
    place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Still in memory; the file gets it.
    Storing,
    /// In the file.
    File,
    /// In the file, and being read back. The hole is punched after that.
    Loading,
}

impl Index {
    fn new(limit: u64) -> Self {
        Index { limit, bytes: 0, held: BTreeMap::new(), stored: VecDeque::new() }
    }

    /// Takes room for bytes that are to be stored. False: there is none.
    fn reserve(&mut self, offset: u64, len: u64, clusters: u64) -> bool {
        let room = len.next_multiple_of(BLOCK);
        if self.bytes + room > self.limit {
            return false;
        }
        let before = self.held.insert(offset, Held { len, clusters, place: Place::Storing });
        debug_assert!(before.is_none(), "a cluster is saved once");
        self.bytes += room;
        true
    }

    /// The bytes from `offset` on are in the file.
    fn is_stored(&mut self, offset: u64) {
        if let Some(held) = self.held.get_mut(&offset) {
            held.place = Place::File;
            self.stored.push_back(offset);
        }
    }

    /// The next bytes to read back: where, and how many.
    fn load_next(&mut self) -> Option<(u64, u64)> {
        let offset = self.stored.pop_front()?;
        let held = self.held.get_mut(&offset)?;
        held.place = Place::Loading;
        Some((offset, held.len))
    }

    /// The bytes from `offset` on are not in the file any more, or never came there. Returns the clusters that go with
    /// them.
    fn remove(&mut self, offset: u64) -> Option<u64> {
        let held = self.held.remove(&offset)?;
        self.bytes -= held.len.next_multiple_of(BLOCK);
        Some(held.clusters)
    }

    /// The filesystem gives no more than what is used now.
    fn limit_to_used(&mut self) {
        self.limit = self.limit.min(self.bytes);
    }

    /// The filesystem did not take these bytes back.
    fn lose_room(&mut self, len: u64) {
        self.limit = self.limit.saturating_sub(len.next_multiple_of(BLOCK));
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn is_empty(&self) -> bool {
        self.held.is_empty()
    }
}

/// The threads of all scratch files, of copies that are over too.
#[derive(Default)]
pub(super) struct Scratches(Mutex<Vec<Liveness>>);

impl Scratches {
    /// Makes the copy's scratch file, if there is to be one. A file that cannot be made is warned about.
    pub(super) fn start(&self, copy: &Copy) -> Option<Scratch> {
        let tuning = &copy.shared.tuning;
        let ScratchOptions { directory, size } = tuning.scratch.as_ref()?;
        let mut threads = self.0.lock().expect("no panic while held");
        threads.retain(Liveness::is_alive);
        let started = if threads.len() < MAX_THREADS {
            let liveness = Liveness::default();
            let alive = liveness.thread();
            threads.push(liveness);
            scratch_thread::start(directory, tuning, copy.target.notes(), alive)
        } else {
            Err(format!("earlier copies still wait for --scratch '{}'; repair its filesystem", directory.display()))
        };
        let unused = |why| log_limited!(COPY_LOG, Warn, "{}: {why}. The copy makes do without it", copy.name);
        started.map(|commands| Scratch::new(*size, commands)).map_err(unused).ok()
    }
}

/// The copier's end of the scratch. Dropping it lets the thread end.
pub(super) struct Scratch {
    index: Index,
    commands: Sender<Command>,
    /// The file takes data.
    usable: bool,
    /// Bytes of memory that the thread has not stored yet.
    storing: usize,
    warned: bool,
}

/// What the copier does about an answer.
pub(super) enum Heard {
    /// The buffer is free.
    Free(IoBuf),
    /// The target's thread gets it now.
    Write(Job),
}

impl Scratch {
    /// `limit`: bytes that it may hold.
    fn new(limit: u64, commands: Sender<Command>) -> Self {
        Scratch { index: Index::new(limit), commands, usable: true, storing: 0, warned: false }
    }

    /// Stores the job, unless more than `memory` bytes would wait for that; then it is given back.
    pub(super) fn store(&mut self, job: Job, memory: usize) -> Result<(), Job> {
        let len = job.buf.len();
        if !self.usable
            || (self.storing > 0 && self.storing + len > memory)
            || !self.index.reserve(job.offset, len as u64, job.clusters)
        {
            return Err(job);
        }
        self.storing += len;
        let offset = job.offset;
        self.commands.send(Command::Store(job)).map_err(|unsent| {
            self.usable = false;
            self.storing -= len;
            self.index.remove(offset);
            unsent.0.job()
        })
    }

    /// Reads the next bytes back into the buffer that `buffer` makes for so many. False: there are none.
    pub(super) fn load(&mut self, buffer: impl FnOnce(usize) -> IoBuf) -> Result<bool, String> {
        let Some((offset, len)) = self.index.load_next() else { return Ok(false) };
        let job = Job { offset, buf: buffer(len as usize), clusters: 0 };
        let sent = self.commands.send(Command::Load(job));
        sent.map(|()| true).map_err(|_| "the thread of its scratch ended; please report this as a defect".into())
    }

    /// Errors: why the copy failed, in words for the operator.
    pub(super) fn hear(&mut self, answer: Answer) -> Result<Heard, String> {
        Ok(match answer {
            Answer::Stored(Job { offset, buf, .. }) => {
                self.storing -= buf.len();
                self.index.is_stored(offset);
                Heard::Free(buf)
            }
            Answer::NotStored { job, full, why } => {
                self.storing -= job.buf.len();
                self.index.remove(job.offset);
                // When the target has taken some there is room again.
                self.index.limit_to_used();
                self.usable &= full;
                self.warn(&why);
                Heard::Write(job)
            }
            Answer::Loaded { job, freed } => {
                let clusters = self.index.remove(job.offset).unwrap_or_default();
                if !freed {
                    self.index.lose_room(job.buf.len() as u64);
                }
                Heard::Write(Job { clusters, ..job })
            }
            Answer::Lost(why) => return Err(why),
        })
    }

    fn warn(&mut self, why: &str) {
        if !std::mem::replace(&mut self.warned, true) {
            log_limited!(COPY_LOG, Warn, "{why}: the copy goes on, and a slow target slows the guest's writes");
        }
    }

    /// Nothing is in it, or on the way.
    pub(super) fn is_empty(&self) -> bool {
        self.index.is_empty()
    }

    /// Bytes in it, or on the way.
    pub(super) fn bytes(&self) -> u64 {
        self.index.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_counted_in_blocks_and_comes_back() {
        let mut index = Index::new(3 * BLOCK);
        assert!(index.reserve(0, BLOCK, 1) && index.reserve(1 << 40, BLOCK + 512, 2));
        assert_eq!(index.bytes(), 3 * BLOCK);
        assert!(!index.reserve(BLOCK, 1, 1), "it is full");
        assert_eq!(index.load_next(), None, "nothing is in the file");
        index.is_stored(1 << 40);
        index.is_stored(0);
        assert_eq!(index.load_next(), Some((1 << 40, BLOCK + 512)), "the first that was stored");
        assert!(!index.reserve(BLOCK, 1, 1), "the hole is not punched yet");
        assert_eq!(index.remove(1 << 40), Some(2));
        assert_eq!(index.remove(1 << 40), None);
        assert!(index.reserve(BLOCK, 2 * BLOCK, 0));
        assert_eq!(index.load_next(), Some((0, BLOCK)));
        assert_eq!((index.remove(0), index.is_empty()), (Some(1), false));
        assert_eq!((index.remove(BLOCK), index.is_empty(), index.bytes()), (Some(0), true, 0));
    }

    #[test]
    fn a_full_filesystem_lowers_the_limit() {
        let mut index = Index::new(1 << 30);
        assert!(index.reserve(0, BLOCK, 1) && index.reserve(BLOCK, BLOCK, 1));
        index.remove(BLOCK);
        index.limit_to_used();
        assert!(!index.reserve(BLOCK, BLOCK, 1));
        index.remove(0);
        assert!(index.reserve(BLOCK, BLOCK, 1), "as much as was there before");
        index.remove(BLOCK);
        index.lose_room(1);
        assert!(!index.reserve(BLOCK, BLOCK, 1), "the filesystem has not taken the block back");
    }
}
