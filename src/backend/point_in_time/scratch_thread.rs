//! The thread that touches the scratch file, and may hang with it: it creates the file, which has no name, stores old
//! data in it and reads it back, and punches a hole where that was. The file is never synced: only its copy needs it.
//!
//! As the target's thread it has a descriptor table of its own, and owns nothing that holds a descriptor of the shared one.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, fallocate, openat, unlinkat};
use rustix::io::Errno;

use super::order::Alive;
use super::target_thread::{Job, Note, leave_descriptor_table};
use super::{Mutant, Step, TARGET_TIMEOUT, Tuning};

/// What the copier asks for.
pub(super) enum Command {
    /// To store the job's data.
    Store(Job),
    /// To fill the job's buffer.
    Load(Job),
}

impl Command {
    pub(super) fn job(self) -> Job {
        match self {
            Command::Store(job) | Command::Load(job) => job,
        }
    }
}

/// What comes of it.
pub(super) enum Answer {
    Stored(Job),
    /// The job's data is not in the file. `full`: room may come.
    NotStored {
        job: Job,
        full: bool,
        why: String,
    },
    /// The job's buffer is filled, and its place in the file is a hole. Not `freed`: the filesystem punches none.
    Loaded {
        job: Job,
        freed: bool,
    },
    /// Old data cannot be read back; why.
    Lost(String),
}

/// Starts the thread and waits until it has created the file, for two seconds at most. The receiver of `notes` gets its
/// answers. Errors: why there is no scratch, in words for the operator.
pub(super) fn start(
    directory: &Path,
    tuning: &Tuning,
    notes: Sender<Note>,
    alive: Alive,
) -> Result<Sender<Command>, String> {
    let (to_thread, commands) = mpsc::channel();
    let (created, is_created) = mpsc::sync_channel(1);
    let (place, tuning) = (directory.to_path_buf(), tuning.clone());
    let work = move || {
        // Advice here: with the shared table a daemon that is killed while the scratch hangs ends later.
        let _ = leave_descriptor_table();
        let made = create(&place);
        let answer = made.as_ref().map(drop).map_err(|error| cannot(&place, "be used for a scratch file", error));
        // If the caller does not wait any more, there will be no command.
        if created.send(answer).is_ok()
            && let Ok(file) = made
        {
            ScratchFile { directory: &place, tuning: &tuning, file }.run(&commands, &notes);
        }
        drop((commands, notes, alive));
    };
    let shown = directory.display();
    let thread = thread::Builder::new().name("copy-scratch".into()).spawn(work);
    thread.map_err(|error| format!("no thread for --scratch '{shown}' ({error}); raise the daemon's limits"))?;
    let hangs = |_| Err(format!("--scratch '{shown}' does not answer: its filesystem hangs; repair it"));
    is_created.recv_timeout(TARGET_TIMEOUT).unwrap_or_else(hangs)?;
    Ok(to_thread)
}

/// A new file without a name.
fn create(directory: &Path) -> io::Result<File> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    match openat(CWD, directory, flags | OFlags::TMPFILE, mode) {
        // The filesystem has no files without a name.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
        opened => return Ok(File::from(opened?)),
    }
    let number = COUNT.fetch_add(1, Relaxed);
    let path = directory.join(format!(".virtioblkd-scratch-{}-{number}", std::process::id()));
    let file = openat(CWD, &path, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode)?;
    unlinkat(CWD, &path, AtFlags::empty())?;
    Ok(File::from(file))
}

struct ScratchFile<'a> {
    directory: &'a Path,
    tuning: &'a Tuning,
    file: File,
}

impl ScratchFile<'_> {
    fn run(&self, commands: &Receiver<Command>, notes: &Sender<Note>) {
        let mut bytes = Vec::new();
        for command in commands {
            let answer = match command {
                Command::Store(job) => self.store(job, &mut bytes),
                Command::Load(job) => self.load(job, &mut bytes),
            };
            // Whoever listened has gone only after the copy's end.
            let _ = notes.send(Note::Scratch(answer));
        }
    }

    fn store(&self, job: Job, bytes: &mut Vec<u8>) -> Answer {
        bytes.resize(job.buf.len(), 0);
        job.buf.copy_to(0, bytes);
        let step = self.tuning.step(Step::Store);
        match step.and_then(|()| self.file.write_all_at(bytes, job.offset)) {
            Ok(()) => Answer::Stored(job),
            Err(error) => {
                // What was stored of it. If that cannot be freed, there is less room.
                self.punch(&job);
                let full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
                Answer::NotStored { job, full, why: cannot(self.directory, "take more of a copy's old data", &error) }
            }
        }
    }

    fn load(&self, job: Job, bytes: &mut Vec<u8>) -> Answer {
        if self.tuning.mutant == Some(Mutant::PunchesFirst) {
            self.punch(&job);
        }
        bytes.resize(job.buf.len(), 0);
        let step = self.tuning.step(Step::Load);
        if let Err(error) = step.and_then(|()| self.file.read_exact_at(bytes, job.offset)) {
            return Answer::Lost(cannot(self.directory, "give a copy's old data back", &error));
        }
        job.buf.copy_from(0, bytes);
        let freed = self.punch(&job);
        Answer::Loaded { job, freed }
    }

    /// Frees the job's place. False: the filesystem cannot.
    fn punch(&self, job: &Job) -> bool {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, job.offset, job.buf.len() as u64).is_ok()
    }
}

/// For the operator: what failed, why and how to fix it.
fn cannot(directory: &Path, what: &str, error: &io::Error) -> String {
    let fix = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "make room there, or lower --scratch-size",
        Some(libc::EFBIG) => "raise RLIMIT_FSIZE, or use a filesystem for larger files",
        Some(libc::EACCES | libc::EPERM) => "let the daemon's user write there, and start virtioblkd anew",
        _ => "check its filesystem, or name another directory with --scratch",
    };
    format!("--scratch '{}' cannot {what} ({error}); {fix}", directory.display())
}
