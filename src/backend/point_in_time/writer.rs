//! The thread that writes the target, and may hang with it: nobody else waits for it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Receiver;

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use sha2::{Digest, Sha256};

use super::Step;
use super::copy::{CLUSTER, Copy, Phase};
use crate::backend::IoBuf;

/// Old data on its way to the target.
pub(super) struct Job {
    pub(super) offset: u64,
    pub(super) buf: IoBuf,
}

/// Bytes written between two syncs: what lies in the host's cache would make a guest's flush wait.
const UNSYNCED: u64 = 32 << 20;

static ZEROES: [u8; CLUSTER as usize] = [0; CLUSTER as usize];

/// Runs the copy's target side, until it is complete or over.
pub(super) fn run(copy: &Arc<Copy>, file: File, jobs: Receiver<Job>) {
    if let Err(why) = write_all(copy, &file, jobs).and_then(|()| complete(copy, &file)) {
        copy.fail(why);
    }
    drop(file);
    // The canceller clears up by itself; a failure is cleared up by whoever can first.
    if matches!(copy.phase(), Phase::Completed | Phase::Failed) {
        copy.bury();
    }
}

fn write_all(copy: &Copy, file: &File, jobs: Receiver<Job>) -> Result<(), String> {
    let mut bytes = Vec::new();
    let mut unsynced = 0;
    for Job { offset, buf } in jobs {
        if copy.phase().is_over() {
            return Ok(());
        }
        bytes.resize(buf.len(), 0);
        buf.copy_to(0, &mut bytes);
        copy.give_back(buf);
        let stored = write(copy, file, offset, &bytes).map_err(|error| cannot("written", copy, &error))?;
        copy.stored.fetch_add(stored, Relaxed);
        copy.done.fetch_add((bytes.len() as u64).div_ceil(CLUSTER), Relaxed);
        unsynced += stored;
        if unsynced >= UNSYNCED {
            unsynced = 0;
            sync(copy, file)?;
        }
    }
    Ok(())
}

/// Writes what is not zero and returns how many bytes that was.
fn write(copy: &Copy, file: &File, offset: u64, bytes: &[u8]) -> io::Result<u64> {
    copy.shared.tuning.step(Step::Write)?;
    let mut stored = 0;
    let mut clusters = bytes.chunks(CLUSTER as usize).zip((0..bytes.len()).step_by(CLUSTER as usize)).peekable();
    while let Some((cluster, start)) = clusters.next() {
        if *cluster == ZEROES[..cluster.len()] {
            continue;
        }
        let mut end = start + cluster.len();
        while let Some((more, _)) = clusters.next_if(|(next, _)| **next != ZEROES[..next.len()]) {
            end += more.len();
        }
        file.write_all_at(&bytes[start..end], offset + start as u64)?;
        stored += (end - start) as u64;
    }
    Ok(stored)
}

fn sync(copy: &Copy, file: &File) -> Result<(), String> {
    copy.shared
        .tuning
        .step(Step::Sync)
        .and_then(|()| file.sync_data())
        .map_err(|error| cannot("synced", copy, &error))?;
    if !copy.digest {
        // Our pages would only push the guest's out. Advice: how it went does not matter.
        let _ = fadvise(file, 0, None, Advice::DontNeed);
    }
    Ok(())
}

/// Everything is written, unless the copy is over: makes it durable and gives it its name.
fn complete(copy: &Copy, file: &File) -> Result<(), String> {
    if !copy.begin_sync() {
        return Ok(());
    }
    copy.shared
        .tuning
        .step(Step::Sync)
        .and_then(|()| file.sync_all())
        .map_err(|error| cannot("synced", copy, &error))?;
    let sha256 = if copy.digest { digest(copy, file)? } else { None };
    if !copy.begin_publish(sha256) {
        return Ok(());
    }
    let published = copy.shared.tuning.step(Step::Publish).and_then(|()| copy.target.publish(file));
    published.map_err(|error| cannot_publish(copy, &error))?;
    if let Err(error) = copy.target.sync_directory() {
        copy.target.unpublish();
        return Err(cannot("given a durable name", copy, &error));
    }
    copy.end(Phase::Completed, None);
    Ok(())
}

/// SHA-256 of the whole copy, read back from the target, holes as zeroes. None: the copy is over.
fn digest(copy: &Copy, file: &File) -> Result<Option<String>, String> {
    let fail = |error: io::Error| cannot("read back", copy, &error);
    let mut sha = Sha256::new();
    let mut bytes = vec![0; 1 << 20];
    let mut at = 0;
    while at < copy.size {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(copy.size),
            Err(rustix::io::Errno::NXIO) => copy.size,
            // A filesystem that does not know.
            Err(_) => at,
        };
        while at < data {
            let len = (data - at).min(CLUSTER);
            sha.update(&ZEROES[..len as usize]);
            at += len;
        }
        let len = (copy.size - at).min(bytes.len() as u64) as usize;
        file.read_exact_at(&mut bytes[..len], at).map_err(fail)?;
        sha.update(&bytes[..len]);
        at += len as u64;
        if copy.phase().is_over() {
            return Ok(None);
        }
    }
    Ok(Some(sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
}

/// Words for the operator: the thing, the cause and the mend.
fn cannot(what: &str, copy: &Copy, error: &io::Error) -> String {
    let mend = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "make room, or choose a target elsewhere",
        Some(libc::EFBIG) => "raise RLIMIT_FSIZE, or use a filesystem for larger files",
        _ => "check the target's medium and the host's kernel log",
    };
    format!("{} cannot be {what} ({error}); {mend}", copy.target.partial_path().display())
}

fn cannot_publish(copy: &Copy, error: &io::Error) -> String {
    let mend = match error.raw_os_error() {
        Some(libc::EEXIST) => "something of that name has appeared meanwhile, and a copy replaces nothing",
        Some(libc::ENOENT) => "somebody took the file away",
        _ => "check the target's filesystem",
    };
    format!("{} cannot be named {} ({error}); {mend}", copy.target.partial_path().display(), copy.target.path.display())
}
