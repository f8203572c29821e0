//! The thread that uses the scratch file, and may hang with it. It creates the file, which has no name, stores old data in
//! it, reads the data back, and punches a hole where the data was. The file is never synced, because only its copy needs it.
//!
//! Like the target's thread, it has a descriptor table of its own, and owns nothing that holds a descriptor of the daemon's
//! table.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, fallocate, openat, unlinkat};
use rustix::io::Errno;

use super::target_handle::LiveThread;
use super::target_thread::{OldData, TargetReport, leave_descriptor_table};
use super::{CopyStep, Mutant, TARGET_TIMEOUT, Tuning};

/// A command of the copier.
pub(super) enum ScratchCommand {
    /// Store the data.
    Store(OldData),
    /// Read the data back into the buffer.
    Load(OldData),
}

impl ScratchCommand {
    pub(super) fn data(self) -> OldData {
        match self {
            ScratchCommand::Store(data) | ScratchCommand::Load(data) => data,
        }
    }
}

/// The reply to a command.
pub(super) enum ScratchReply {
    /// The data is in the file.
    Stored(OldData),
    /// The data is not in the file.
    NotStored {
        data: OldData,
        /// The filesystem or the file is full, so there may be space later.
        full: bool,
        /// For the operator.
        why: String,
    },
    /// The buffer is filled.
    Loaded {
        data: OldData,
        /// The space in the file was freed by a hole; `false`: the filesystem cannot punch one.
        freed: bool,
    },
    /// Old data cannot be read back, and why, for the operator.
    Lost(String),
}

/// Starts the thread and waits until it has created the file, two seconds at most. The thread sends its replies as reports
/// through `reports`. An error says, for the operator, why there is no scratch.
pub(super) fn start(
    directory: &Path,
    tuning: &Tuning,
    reports: Sender<TargetReport>,
    alive: LiveThread,
) -> Result<Sender<ScratchCommand>, String> {
    let (to_thread, commands) = mpsc::channel();
    let (created, is_created) = mpsc::sync_channel(1);
    let (place, tuning) = (directory.to_path_buf(), tuning.clone());
    let work = move || {
        // A failure is harmless: only a daemon that is killed while the scratch hangs then ends later.
        let _ = leave_descriptor_table();
        let file = create(&place);
        let result = file.as_ref().map(drop).map_err(|error| cannot(&place, "be used for a scratch file", error));
        // If the caller no longer waits, it will send no command.
        if created.send(result).is_ok()
            && let Ok(file) = file
        {
            ScratchFile { directory: &place, tuning: &tuning, file: &file }.run(&commands, &reports);
        }
        drop((commands, reports, alive));
    };
    let shown = directory.display();
    let thread = thread::Builder::new().name("copy-scratch".into()).spawn(work);
    thread.map_err(|error| format!("no thread for --scratch '{shown}' ({error}); raise the daemon's limits"))?;
    let hangs = |_| Err(format!("--scratch '{shown}' does not respond: its filesystem hangs; repair it"));
    is_created.recv_timeout(TARGET_TIMEOUT).unwrap_or_else(hangs)?;
    Ok(to_thread)
}

/// Creates a file without a name.
pub(super) fn create(directory: &Path) -> io::Result<File> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    match openat(CWD, directory, flags | OFlags::TMPFILE, mode) {
        // The filesystem does not support O_TMPFILE: create a file with a name and remove the name.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
        opened => return Ok(File::from(opened?)),
    }
    let number = COUNT.fetch_add(1, Relaxed);
    let path = directory.join(format!(".virtioblkd-scratch-{}-{number}", std::process::id()));
    let file = openat(CWD, &path, flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW, mode)?;
    unlinkat(CWD, &path, AtFlags::empty())?;
    Ok(File::from(file))
}

/// The file, as the thread that stores uses it.
pub(super) struct ScratchFile<'a> {
    pub(super) directory: &'a Path,
    pub(super) tuning: &'a Tuning,
    pub(super) file: &'a File,
}

impl ScratchFile<'_> {
    /// Carries the commands out until their sender is gone.
    pub(super) fn run(&self, commands: &Receiver<ScratchCommand>, reports: &Sender<TargetReport>) {
        let mut bytes = Vec::new();
        for command in commands {
            let reply = match command {
                ScratchCommand::Store(data) => self.store(data, &mut bytes),
                ScratchCommand::Load(data) => self.load(data, &mut bytes),
            };
            // The receiver ends only after the copy.
            let _ = reports.send(TargetReport::Scratch(reply));
        }
    }

    fn store(&self, data: OldData, bytes: &mut Vec<u8>) -> ScratchReply {
        bytes.resize(data.buf.len(), 0);
        data.buf.copy_to(0, bytes);
        let step = self.tuning.step(CopyStep::Store);
        match step.and_then(|()| self.file.write_all_at(bytes, data.offset)) {
            Ok(()) => ScratchReply::Stored(data),
            Err(error) => {
                // A part may have been stored. If it cannot be freed, there is less space.
                self.punch(&data);
                let full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
                ScratchReply::NotStored {
                    data,
                    full,
                    why: cannot(self.directory, "take more of a copy's old data", &error),
                }
            }
        }
    }

    fn load(&self, data: OldData, bytes: &mut Vec<u8>) -> ScratchReply {
        if self.tuning.mutant == Some(Mutant::PunchesFirst) {
            self.punch(&data);
        }
        bytes.resize(data.buf.len(), 0);
        let step = self.tuning.step(CopyStep::Load);
        if let Err(error) = step.and_then(|()| self.file.read_exact_at(bytes, data.offset)) {
            return ScratchReply::Lost(cannot(self.directory, "give a copy's old data back", &error));
        }
        data.buf.copy_from(0, bytes);
        let freed = self.punch(&data);
        ScratchReply::Loaded { data, freed }
    }

    /// Frees the data's range in the file. Returns `false` when the filesystem cannot.
    fn punch(&self, data: &OldData) -> bool {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(self.file, flags, data.offset, data.buf.len() as u64).is_ok()
    }
}

/// An error text for the operator: what failed, why and how to fix it.
pub(super) fn cannot(directory: &Path, what: &str, error: &io::Error) -> String {
    let fix = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "make room there, or lower --scratch-size",
        Some(libc::EFBIG) => "raise RLIMIT_FSIZE, or use a filesystem that supports larger files",
        Some(libc::EACCES | libc::EPERM) => "let the daemon's user write there, and restart virtioblkd",
        _ => "check its filesystem, or name another directory with --scratch",
    };
    format!("--scratch '{}' cannot {what} ({error}); {fix}", directory.display())
}
