//! The thread that uses the target, and may hang with it. It creates the file, writes it, makes it durable and gives it
//! its final name.
//!
//! It has a descriptor table of its own, without a descriptor of the image or the guest. If the daemon is killed while the
//! target hangs, the kernel therefore closes the daemon's other descriptors at once: the front-end sees the disconnect and
//! the image's locks are free, although this thread lives until the target responds. For that, nothing that this thread
//! owns or drops may contain a descriptor of the daemon's table. It communicates only by [`TargetReport`]s and channels, and does
//! not log.

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

use super::scratch_thread::ScratchReply;
use super::target::{Target, partial_path};
use super::target_handle::LiveThread;
use super::{CopyStep, Tuning};
use crate::backend::IoBuf;
use crate::base::syscalls;
use crate::disk::CopyError;

/// Old data on its way to the target.
pub(super) struct OldData {
    pub(super) offset: u64,
    pub(super) buf: IoBuf,
    /// The number of clusters that become done when this data is written.
    pub(super) clusters: u64,
}

/// A report of the thread, or another event that the thread of `target_reports` acts on.
pub(super) enum TargetReport {
    /// Old data is written.
    Written {
        buf: IoBuf,
        /// Bytes written; blocks of zeroes are not.
        stored: u64,
        clusters: u64,
    },
    /// Everything is written and is being made durable.
    Syncing,
    /// Everything is durable, and the thread waits for the permission to give the file its final name. Holds the SHA-256 if
    /// one was asked for.
    Durable(Option<String>),
    /// The file has its final name, durably. Holds a text that says why the partial name is left behind, if it is.
    Published(Option<String>),
    /// The copy failed, and why, for the operator.
    Failed(String),
    /// A reply of the scratch's thread.
    Scratch(ScratchReply),
    /// The copy is over. Sent by the thread that ended it.
    Over,
}

/// What the thread has to create.
pub(super) struct TargetSpec {
    pub(super) path: PathBuf,
    pub(super) size: u64,
    /// The disk's image file, if it has one.
    pub(super) image: Option<PathBuf>,
    /// Compute the SHA-256 of the copy.
    pub(super) digest: bool,
    pub(super) tuning: Tuning,
    /// Set when the copy is over: the thread abandons unfinished work.
    pub(super) over: Arc<AtomicBool>,
}

/// The thread's ends of its channels.
pub(super) struct ThreadChannels {
    /// Sends whether the file was created. `Some`: the thread could not leave the daemon's descriptor table, and why.
    pub(super) created: SyncSender<Result<Option<io::Error>, CopyError>>,
    pub(super) old_data: Receiver<OldData>,
    pub(super) reports: Sender<TargetReport>,
    /// Receives the permission to give the file its final name.
    pub(super) publish: Receiver<()>,
    /// Receives one message if the partial file is to be removed.
    pub(super) remove: Receiver<()>,
    /// Sends why the partial file cannot be removed, if so. Dropped when no thread uses the partial name any more.
    pub(super) removed: Sender<String>,
    /// Dropped when this thread no longer uses the target.
    pub(super) alive: LiveThread,
}

/// The thread's main function: creates the target and writes it until it is complete or the copy is over.
pub(super) fn run(spec: &TargetSpec, channels: ThreadChannels) {
    let ThreadChannels { created, old_data, reports, publish, remove, removed, alive } = channels;
    let shared_table_cause = leave_descriptor_table().err();
    let (target, file) = match Target::create(&spec.path, spec.size, spec.image.as_deref(), &spec.tuning.directories) {
        Ok((target, file)) => (Arc::new(target), file),
        // A caller that no longer waits needs no error.
        Err(error) => return drop(created.send(Err(error))),
    };
    let remover = (Arc::clone(&target), alive.clone());
    let work = move || {
        let (target, alive) = remover;
        if remove.recv().is_ok()
            && let Err(why) = target.remove_partial()
        {
            // A caller that no longer waits has logged so.
            let _ = removed.send(why);
        }
        drop((target, removed, alive));
    };
    // A thread of its own, so that the file can be removed while a write of it hangs. It shares this thread's table.
    if let Err(error) = thread::Builder::new().name("copy-remove".into()).spawn(work) {
        let left = target.remove_partial().err().map_or(String::new(), |why| format!("; {why}"));
        let message = format!("no thread for the copy ({error}); raise the daemon's limits{left}");
        return drop(created.send(Err(CopyError { code: "resources", message })));
    }
    // If the caller no longer waits, the copy will not be used.
    if created.send(Ok(shared_table_cause)).is_err() {
        return drop(target.remove_partial());
    }
    let thread = TargetThread { spec, target: &target, file, reports };
    if let Err(why) = thread.write_all(old_data).and_then(|all| if all { thread.complete(&publish) } else { Ok(()) }) {
        thread.report(TargetReport::Failed(why));
    }
    drop(thread);
    drop((target, alive));
}

/// Moves the calling thread to a descriptor table of its own, in which only standard error is open, for panics. Descriptors
/// 0 to 2 are all standard error, so that the target's files get other numbers: a library may write to 0 to 2.
pub(super) fn leave_descriptor_table() -> io::Result<()> {
    syscalls::leave_descriptor_table()?;
    // Standard error stays open, because no value of ours owns it.
    dup2_stdin(stderr())?;
    Ok(dup2_stdout(stderr())?)
}

struct TargetThread<'a> {
    spec: &'a TargetSpec,
    target: &'a Target,
    file: File,
    reports: Sender<TargetReport>,
}

/// The most bytes written between two syncs: dirty pages in the host's cache would make a guest's flush wait.
const MAX_UNSYNCED: u64 = 32 << 20;

/// The unit in which zeroes are found: a block that holds only zeroes is not written. Most filesystems use this size.
const BLOCK: usize = 4096;

/// How many bytes are hashed between two checks whether the copy is over.
const HASH_CHUNK: usize = 64 << 10;

static ZEROES: [u8; HASH_CHUNK] = [0; HASH_CHUNK];

impl TargetThread<'_> {
    fn report(&self, report: TargetReport) {
        // The receiver ends only after the copy.
        let _ = self.reports.send(report);
    }

    fn is_over(&self) -> bool {
        self.spec.over.load(Relaxed)
    }

    /// Writes the old data that the copier sends. Returns `false` when the copy ended before all were written.
    fn write_all(&self, old_data: Receiver<OldData>) -> Result<bool, String> {
        let mut bytes = Vec::new();
        let mut unsynced = 0;
        for OldData { offset, buf, clusters } in old_data {
            if self.is_over() {
                return Ok(false);
            }
            bytes.resize(buf.len(), 0);
            buf.copy_to(0, &mut bytes);
            let stored = self.write(offset, &bytes).map_err(|error| self.cannot("written", &error))?;
            self.report(TargetReport::Written { buf, stored, clusters });
            unsynced += stored;
            if unsynced >= MAX_UNSYNCED {
                unsynced = 0;
                self.sync()?;
            }
        }
        Ok(!self.is_over())
    }

    /// Writes the blocks that are not zero. Returns how many bytes that was.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        self.spec.tuning.step(CopyStep::Write)?;
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
        let step = self.spec.tuning.step(CopyStep::Sync);
        step.and_then(|()| self.file.sync_data()).map_err(|error| self.cannot("synced", &error))?;
        if !self.spec.digest {
            // The copy's pages would only evict the guest's from the host's cache. A failure of this advice is harmless.
            let _ = fadvise(&self.file, 0, None, Advice::DontNeed);
        }
        Ok(())
    }

    /// Everything is written: makes the file durable and, when permitted, gives it its final name.
    fn complete(&self, publish: &Receiver<()>) -> Result<(), String> {
        self.report(TargetReport::Syncing);
        let step = self.spec.tuning.step(CopyStep::Sync);
        step.and_then(|()| self.file.sync_all()).map_err(|error| self.cannot("synced", &error))?;
        let sha256 = if self.spec.digest {
            match self.digest()? {
                None => return Ok(()),
                sha256 => sha256,
            }
        } else {
            None
        };
        self.report(TargetReport::Durable(sha256));
        if publish.recv().is_err() {
            return Ok(());
        }
        let published = self.spec.tuning.step(CopyStep::Publish).and_then(|()| self.target.publish(&self.file));
        let left = published.map_err(|error| self.cannot_publish(&error))?;
        if let Err(error) = self.target.sync_directory() {
            let removed = self.target.unpublish().err();
            let removed = removed.map_or(String::new(), |why| format!("; {why}"));
            return Err(self.cannot("given a durable name", &error) + &removed);
        }
        self.report(TargetReport::Published(left));
        Ok(())
    }

    /// Computes the SHA-256 of the whole copy, read back from the target, with holes as zeroes. Returns `None` when the
    /// copy is over.
    fn digest(&self) -> Result<Option<String>, String> {
        let (file, size) = (&self.file, self.spec.size);
        let mut sha = Sha256::new();
        let mut bytes = vec![0; HASH_CHUNK];
        let mut at = 0;
        // The end of the hole at `at`, if there is one.
        let mut hole_end = 0;
        while at < size {
            if self.is_over() {
                return Ok(None);
            }
            if at >= hole_end {
                hole_end = match seek(file, SeekFrom::Data(at)) {
                    Ok(data) => data.min(size),
                    Err(rustix::io::Errno::NXIO) => size,
                    // The filesystem does not support SEEK_DATA: read everything.
                    Err(_) => at,
                };
            }
            let len = if at < hole_end { hole_end - at } else { size - at }.min(HASH_CHUNK as u64) as usize;
            if at < hole_end {
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

    /// An error text for the operator: what failed, why and how to fix it.
    fn cannot(&self, what: &str, error: &io::Error) -> String {
        let fix = match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => "make room, or choose a target elsewhere",
            Some(libc::EFBIG) => "raise RLIMIT_FSIZE, or use a filesystem that supports larger files",
            _ => "check the target's medium and the host's kernel log",
        };
        format!("{} cannot be {what} ({error}); {fix}", self.partial().display())
    }

    fn cannot_publish(&self, error: &io::Error) -> String {
        let fix = match error.raw_os_error() {
            Some(libc::EEXIST) => "a file of that name was created meanwhile, and a copy replaces nothing",
            Some(libc::ENOENT) => "another process removed or renamed the file",
            _ => "check the target's filesystem",
        };
        let (partial, path) = (self.partial(), self.spec.path.display());
        format!("{} cannot be named {path} ({error}); {fix}", partial.display())
    }

    fn partial(&self) -> PathBuf {
        partial_path(&self.spec.path)
    }
}
