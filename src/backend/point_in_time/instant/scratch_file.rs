//! The threads that use the scratch of an instant, and may hang with it: one stores old data, which a write of the guest waits
//! for, and one reads it for clients. The file has no name and is never synced; what it holds is at the same offset as in
//! the image.
//!
//! Both have one descriptor table of their own and own nothing that holds a descriptor of the daemon's table, as the thread
//! of a copy's target does.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread;

use rustix::fs::fstatvfs;

use crate::backend::point_in_time::scratch_thread::{ScratchCommand, ScratchFile, cannot, create};
use crate::backend::point_in_time::target_handle::{LiveThread, Liveness};
use crate::backend::point_in_time::target_thread::{TargetReport, leave_descriptor_table};
use crate::backend::point_in_time::{CopyStep, TARGET_TIMEOUT, Tuning};

/// Asks for bytes of the scratch.
pub(super) struct ScratchRead {
    pub(super) bytes: Range<u64>,
    /// Receives the bytes, or why they cannot be read, for the operator.
    pub(super) reply: SyncSender<Result<Vec<u8>, String>>,
}

/// The scratch, as its users see it. When the senders are gone, the threads end.
pub(super) struct ScratchLinks {
    pub(super) stores: Sender<ScratchCommand>,
    pub(super) reads: Sender<ScratchRead>,
    /// The most bytes that it may hold.
    pub(super) limit: u64,
}

/// The other ends of the links.
struct ThreadEnds {
    stores: Receiver<ScratchCommand>,
    reads: Receiver<ScratchRead>,
    reports: Sender<TargetReport>,
    created: SyncSender<Result<u64, String>>,
    alive: LiveThread,
}

/// Starts the threads and waits until the file is created, two seconds at most. What was stored is reported through
/// `reports`. `limit`: the most bytes to hold; `None`: half of what the filesystem has free. An error is for the operator.
pub(super) fn start(
    directory: &Path,
    limit: Option<u64>,
    tuning: &Tuning,
    reports: Sender<TargetReport>,
    liveness: &Liveness,
) -> Result<ScratchLinks, String> {
    let (to_stores, stores) = mpsc::channel();
    let (to_reads, reads) = mpsc::channel();
    let (created, is_created) = mpsc::sync_channel(1);
    let ends = ThreadEnds { stores, reads, reports, created, alive: liveness.thread() };
    let (place, tuning) = (directory.to_path_buf(), tuning.clone());
    let shown = directory.display();
    let thread = thread::Builder::new().name("export-scratch".into()).spawn(move || run(&place, &tuning, ends));
    thread.map_err(|error| format!("no thread for the scratch in '{shown}' ({error}); raise the daemon's limits"))?;
    let hangs = |_| Err(format!("the scratch in '{shown}' does not respond: its filesystem hangs; repair it"));
    let half_of_free = is_created.recv_timeout(TARGET_TIMEOUT).unwrap_or_else(hangs)?;
    Ok(ScratchLinks { stores: to_stores, reads: to_reads, limit: limit.unwrap_or(half_of_free) })
}

fn run(directory: &Path, tuning: &Tuning, ends: ThreadEnds) {
    let ThreadEnds { stores, reads, reports, created, alive } = ends;
    // A failure is harmless: only a daemon that is killed while the scratch hangs then ends later.
    let _ = leave_descriptor_table();
    let made = create(directory).and_then(|file| {
        let space = fstatvfs(&file)?;
        let half_of_free = space.f_bavail.saturating_mul(space.f_frsize) / 2;
        let file = Arc::new(file);
        let (reader, tuning, alive) = (Arc::clone(&file), tuning.clone(), alive.clone());
        // It shares this thread's table. Clients that read must not delay a store.
        let work = move || {
            read_for_clients(&reader, &tuning, &reads);
            drop(alive);
        };
        thread::Builder::new().name("export-reads".into()).spawn(work)?;
        Ok((file, half_of_free))
    });
    let (file, half_of_free) = match made {
        Ok(made) => made,
        // If the caller no longer waits, it sends no command.
        Err(error) => return drop(created.send(Err(cannot(directory, "be used for a scratch file", &error)))),
    };
    if created.send(Ok(half_of_free)).is_ok() {
        ScratchFile { directory, tuning, file: &file }.run(&stores, &reports);
    }
    drop((stores, reports, alive));
}

fn read_for_clients(file: &File, tuning: &Tuning, reads: &Receiver<ScratchRead>) {
    for ScratchRead { bytes, reply } in reads {
        let mut data = vec![0; (bytes.end - bytes.start) as usize];
        let read = tuning.step(CopyStep::Load).and_then(|()| file.read_exact_at(&mut data, bytes.start));
        // A reader that no longer waits needs no reply.
        let _ = reply.send(match read {
            Ok(()) => Ok(data),
            Err(error) => Err(format!("the scratch cannot be read ({error}); check its filesystem")),
        });
    }
}
