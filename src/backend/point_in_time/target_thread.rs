//! The thread that touches the target, and may hang with it: it creates the file, writes it, makes it durable and names it.
//!
//! It has a descriptor table of its own, without a descriptor of the image or the guest. So when the daemon is killed
//! while the target hangs, the kernel closes the others at once: the front-end learns of it and the image's locks are
//! free, though this thread lives until the target answers. For that to hold, nothing that this thread owns or drops may
//! contain a descriptor of the shared table: it talks to the rest by [`Note`]s and channels, and logs nothing.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, SyncSender};
use std::thread;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::stdio::{dup2_stdin, dup2_stdout, stderr};
use sha2::{Digest, Sha256};

use super::order::Alive;
use super::scratch_thread::Answer;
use super::target::{Target, partial_path};
use super::{Step, Tuning};
use crate::backend::IoBuf;
use crate::base::syscalls;
use crate::disk::CopyError;

/// Old data on its way to the target.
pub(super) struct Job {
    pub(super) offset: u64,
    pub(super) buf: IoBuf,
    /// Clusters of which this was the last data.
    pub(super) clusters: u64,
}

/// What the thread reports.
pub(super) enum Note {
    /// The job's data is written; `stored` bytes of it were not zero.
    Written { buf: IoBuf, stored: u64, clusters: u64 },
    /// Everything is written and is being made durable.
    Syncing,
    /// Everything is durable. The thread waits for the permission to give the file its name.
    Durable(Option<String>),
    /// The file has its name, durably. If the partial file's name is left behind: why.
    Published(Option<String>),
    /// The copy failed; why.
    Failed(String),
    /// From the scratch's thread.
    Scratch(Answer),
    /// Not from the thread: the copy ended.
    Over,
}

/// What the thread makes.
pub(super) struct Order {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    pub(super) digest: bool,
    pub(super) tuning: Tuning,
    /// The copy is over: whatever is unfinished is not wanted any more.
    pub(super) over: Arc<AtomicBool>,
}

/// The thread's ends of its channels.
pub(super) struct Ends {
    /// The file exists, or why not. With it: why the thread shares the descriptor table, if it does.
    pub(super) created: SyncSender<Result<Option<io::Error>, CopyError>>,
    pub(super) jobs: Receiver<Job>,
    pub(super) notes: Sender<Note>,
    /// The permission to give the file its name.
    pub(super) publish: Receiver<()>,
    /// One message: the partial file is to be removed.
    pub(super) remove: Receiver<()>,
    /// Dropped when nothing touches the partial file's name any more; before that: why it cannot be removed.
    pub(super) removed: Sender<String>,
    /// Dropped when nothing touches the target any more.
    pub(super) alive: Alive,
}

/// Creates the target and writes it, until it is complete or the copy is over.
pub(super) fn run(order: &Order, ends: Ends) {
    let Ends { created, jobs, notes, publish, remove, removed, alive } = ends;
    let shares = leave_descriptor_table().err();
    let (target, file) = match Target::create(&order.path, order.size, &order.tuning.directories) {
        Ok((target, file)) => (Arc::new(target), file),
        // If the caller has gone, there is nothing to report.
        Err(error) => return drop(created.send(Err(error))),
    };
    let remover = (Arc::clone(&target), alive.clone());
    let work = move || {
        let (target, alive) = remover;
        if remove.recv().is_ok()
            && let Err(why) = target.remove_partial()
        {
            // If the caller does not wait any more, it has logged that.
            let _ = removed.send(why);
        }
        drop((target, removed, alive));
    };
    // It shares this thread's table. A thread of its own: the file can be removed while a write of it hangs.
    if let Err(error) = thread::Builder::new().name("copy-remove".into()).spawn(work) {
        let left = target.remove_partial().err().map_or(String::new(), |why| format!("; {why}"));
        let message = format!("no thread for the copy ({error}); raise the daemon's limits{left}");
        return drop(created.send(Err(CopyError { code: "resources", message })));
    }
    // If the caller does not wait any more, the copy will never be used.
    if created.send(Ok(shares)).is_err() {
        return drop(target.remove_partial());
    }
    let thread = TargetThread { order, target: &target, file, notes };
    if let Err(why) = thread.write_all(jobs).and_then(|all| if all { thread.complete(&publish) } else { Ok(()) }) {
        thread.note(Note::Failed(why));
    }
    drop(thread);
    drop((target, alive));
}

/// Leaves the process's descriptor table for one in which only standard error is open, for panics. The kernel gives the
/// target's files other numbers than 0 to 2, to which a library may write.
pub(super) fn leave_descriptor_table() -> io::Result<()> {
    syscalls::leave_descriptor_table()?;
    // SAFE: standard error stays open, and belongs to no value of ours.
    dup2_stdin(stderr())?;
    Ok(dup2_stdout(stderr())?)
}

struct TargetThread<'a> {
    order: &'a Order,
    target: &'a Target,
    file: File,
    notes: Sender<Note>,
}

/// Bytes written between two syncs: what lies in the host's cache would make a guest's flush wait.
const UNSYNCED: u64 = 32 << 20;

/// Bytes of a block: one that holds zeroes alone is not written. Most filesystems' own.
const BLOCK: usize = 4096;

/// Bytes hashed between two looks whether the copy is over.
const HASHED: usize = 64 << 10;

static ZEROES: [u8; HASHED] = [0; HASHED];

impl TargetThread<'_> {
    fn note(&self, note: Note) {
        // Whoever listened has gone only after the copy's end.
        let _ = self.notes.send(note);
    }

    fn is_over(&self) -> bool {
        self.order.over.load(Relaxed)
    }

    /// Writes what the copier sends. False: the copy ended before everything was there.
    fn write_all(&self, jobs: Receiver<Job>) -> Result<bool, String> {
        let mut bytes = Vec::new();
        let mut unsynced = 0;
        for Job { offset, buf, clusters } in jobs {
            if self.is_over() {
                return Ok(false);
            }
            bytes.resize(buf.len(), 0);
            buf.copy_to(0, &mut bytes);
            let stored = self.write(offset, &bytes).map_err(|error| self.cannot("written", &error))?;
            self.note(Note::Written { buf, stored, clusters });
            unsynced += stored;
            if unsynced >= UNSYNCED {
                unsynced = 0;
                self.sync()?;
            }
        }
        Ok(!self.is_over())
    }

    /// Writes the blocks that are not zero and returns how many bytes that was.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        self.order.tuning.step(Step::Write)?;
        let mut stored = 0;
        let mut blocks = bytes.chunks(BLOCK).zip((0..bytes.len()).step_by(BLOCK)).peekable();
        while let Some((block, start)) = blocks.next() {
            if *block == ZEROES[..block.len()] {
                continue;
            }
            let mut end = start + block.len();
            while let Some((more, _)) = blocks.next_if(|(next, _)| **next != ZEROES[..next.len()]) {
                end += more.len();
            }
            self.file.write_all_at(&bytes[start..end], offset + start as u64)?;
            stored += (end - start) as u64;
        }
        Ok(stored)
    }

    fn sync(&self) -> Result<(), String> {
        let step = self.order.tuning.step(Step::Sync);
        step.and_then(|()| self.file.sync_data()).map_err(|error| self.cannot("synced", &error))?;
        if !self.order.digest {
            // Our pages would only push the guest's out. Advice: how it went does not matter.
            let _ = fadvise(&self.file, 0, None, Advice::DontNeed);
        }
        Ok(())
    }

    /// Everything is written: makes it durable and, when that is permitted, gives it its name.
    fn complete(&self, publish: &Receiver<()>) -> Result<(), String> {
        self.note(Note::Syncing);
        let step = self.order.tuning.step(Step::Sync);
        step.and_then(|()| self.file.sync_all()).map_err(|error| self.cannot("synced", &error))?;
        let sha256 = if self.order.digest {
            match self.digest()? {
                None => return Ok(()),
                sha256 => sha256,
            }
        } else {
            None
        };
        self.note(Note::Durable(sha256));
        if publish.recv().is_err() {
            return Ok(());
        }
        let published = self.order.tuning.step(Step::Publish).and_then(|()| self.target.publish(&self.file));
        let left = published.map_err(|error| self.cannot_publish(&error))?;
        if let Err(error) = self.target.sync_directory() {
            let removed = self.target.unpublish().err();
            let removed = removed.map_or(String::new(), |why| format!("; {why}"));
            return Err(self.cannot("given a durable name", &error) + &removed);
        }
        self.note(Note::Published(left));
        Ok(())
    }

    /// SHA-256 of the whole copy, read back from the target, holes as zeroes. None: the copy is over.
    fn digest(&self) -> Result<Option<String>, String> {
        let (file, size) = (&self.file, self.order.size);
        let mut sha = Sha256::new();
        let mut bytes = vec![0; HASHED];
        let mut at = 0;
        // Up to here there is a hole.
        let mut hole = 0;
        while at < size {
            if self.is_over() {
                return Ok(None);
            }
            if at >= hole {
                hole = match seek(file, SeekFrom::Data(at)) {
                    Ok(data) => data.min(size),
                    Err(rustix::io::Errno::NXIO) => size,
                    // A filesystem that does not know.
                    Err(_) => at,
                };
            }
            let len = if at < hole { hole - at } else { size - at }.min(HASHED as u64) as usize;
            if at < hole {
                sha.update(&ZEROES[..len]);
            } else {
                let read = file.read_exact_at(&mut bytes[..len], at);
                read.map_err(|error| self.cannot("read back", &error))?;
                sha.update(&bytes[..len]);
            }
            at += len as u64;
        }
        Ok(Some(sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// For the operator: what failed, why and how to fix it.
    fn cannot(&self, what: &str, error: &io::Error) -> String {
        let fix = match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => "make room, or choose a target elsewhere",
            Some(libc::EFBIG) => "raise RLIMIT_FSIZE, or use a filesystem for larger files",
            _ => "check the target's medium and the host's kernel log",
        };
        format!("{} cannot be {what} ({error}); {fix}", self.partial().display())
    }

    fn cannot_publish(&self, error: &io::Error) -> String {
        let fix = match error.raw_os_error() {
            Some(libc::EEXIST) => "something of that name has appeared meanwhile, and a copy replaces nothing",
            Some(libc::ENOENT) => "another process took the file away",
            _ => "check the target's filesystem",
        };
        let (partial, path) = (self.partial(), self.order.path.display());
        format!("{} cannot be named {path} ({error}); {fix}", partial.display())
    }

    fn partial(&self) -> PathBuf {
        partial_path(&self.order.path)
    }
}
