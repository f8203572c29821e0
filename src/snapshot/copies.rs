//! The method `copy`: the daemon fixes the instant and copies in the background. This module starts the copies, waits
//! for them and cancels them.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde_json::{Value, json};

use super::disks::{Disks, OnFailure, interrupted};
use super::plan::SnapshotPlan;
use super::wait::{CancelFd, WaitEnd, wait};
use crate::base::figures::bytes;
use crate::control::client::{Client, Failure, REPLY_TIMEOUT};

/// The most events of a daemon that are read before its copies are queried again.
const MAX_EVENTS_PER_QUERY: usize = 1000;

/// How often to query the progress of a copy when no event comes.
const STATUS_INTERVAL: Duration = Duration::from_millis(500);

/// How often to query whether a copy has ended that can no longer be cancelled.
const END_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// One disk's copy.
#[derive(Clone, Debug)]
pub struct DiskCopy {
    /// The disk's index in the list.
    pub disk: usize,
    /// The copy's name in the daemon.
    name: String,
    /// The path of the complete copy.
    target: PathBuf,
    /// The copy's last known status.
    pub status: Value,
}

impl DiskCopy {
    /// A copy that the daemon has prepared under this name.
    pub fn new(disk: usize, name: String, target: &Path) -> Self {
        DiskCopy { disk, name, target: target.to_owned(), status: Value::Null }
    }
}

/// Has the daemon prepare a copy. The daemon removes a prepared copy when our connection ends.
pub fn prepare(disks: &mut Disks, disk: usize, target: &Path, plan: &SnapshotPlan) -> Result<DiskCopy, Failure> {
    let Some(text) = target.to_str() else {
        let text =
            format!("'{}' is not UTF-8, which the daemon's protocol needs: choose another name", target.display());
        return Err(Failure::new("target", text));
    };
    let mut arguments = json!({"target": text});
    if plan.bandwidth != 0 {
        arguments["bandwidth"] = json!(plan.bandwidth);
    }
    if plan.digest {
        arguments["digest"] = json!(true);
    }
    if plan.background {
        arguments["detached"] = json!(true);
    }
    let disk_at = &mut disks.list[disk];
    let answer = disk_at.client()?.execute("copy-prepare", arguments, REPLY_TIMEOUT);
    let answer = answer.map_err(|failure| match failure.code.as_str() {
        "unknown-command" => Failure::new(
            "unknown-command",
            format!("the daemon behind '{}' is too old for copy: upgrade it", disk_at.control.display()),
        ),
        _ => disk_at.blame("cannot be copied", failure),
    })?;
    let name = answer["copy"].as_str().unwrap_or_default().to_owned();
    Ok(DiskCopy::new(disk, name, target))
}

/// Fixes the instant of all copies, while all disks are held.
pub fn start(disks: &mut Disks, copies: &[DiskCopy], cancel: CancelFd<'_>) -> Result<(), Failure> {
    let request = |copy: &DiskCopy| {
        let token = disks.list[copy.disk].token().unwrap_or_default();
        (copy.disk, "copy-start", json!({"copy": copy.name, "token": token}))
    };
    let requests = copies.iter().map(request).collect();
    let deadline = (Instant::now() + REPLY_TIMEOUT).min(disks.lease_ends());
    for answer in disks.execute(requests, deadline, cancel, OnFailure::StopWaiting) {
        answer.result.map_err(|why| disks.list[answer.disk].blame("could not be copied", why))?;
    }
    Ok(())
}

/// Queries the status of the copies. The error is that of the first copy that failed.
pub fn query(disks: &mut Disks, copies: &mut [DiskCopy]) -> Result<(), Failure> {
    let requests = copies.iter().map(|copy| (copy.disk, "query-copies", json!({}))).collect();
    let answers = disks.execute(requests, Instant::now() + REPLY_TIMEOUT, None, OnFailure::WaitForAll);
    for (copy, answer) in copies.iter_mut().zip(answers) {
        let blame = |why| disks.list[answer.disk].blame("is copied by a daemon that is lost", why);
        let list = answer.result.map_err(blame)?;
        let found = list.as_array().and_then(|list| list.iter().find(|status| status["copy"] == *copy.name));
        copy.status = found.cloned().unwrap_or_else(|| json!({"state": "failed", "error": "the daemon forgot it"}));
    }
    for copy in copies.iter() {
        if matches!(copy.state(), "failed" | "cancelled") {
            let why = copy.status["error"].as_str().unwrap_or(copy.state()).to_owned();
            if copy.status["export"].is_object() {
                return Err(Failure::new(
                    "export-failed",
                    format!("the export at '{}' failed: {why}", copy.target.display()),
                ));
            }
            return Err(Failure::new("copy-failed", format!("the copy to '{}' failed: {why}", copy.target.display())));
        }
    }
    Ok(())
}

/// Waits until all copies are complete. The error is that of the first copy that failed; `interrupted`: `cancel` became
/// readable. `progress`: show the progress on standard error.
pub fn wait_for(
    disks: &mut Disks,
    copies: &mut [DiskCopy],
    progress: bool,
    cancel: CancelFd<'_>,
) -> Result<(), Failure> {
    let mut shown = progress.then(|| Progress { show: crate::base::logging::show_progress, start: None, last: None });
    loop {
        query(disks, copies)?;
        if let Some(shown) = &mut shown {
            shown.update(copies);
        }
        if copies.iter().all(|copy| copy.state() == "completed") {
            return Ok(());
        }
        let fds: Vec<_> = copies.iter().filter_map(|copy| disks.list[copy.disk].fd()).collect();
        match wait(&fds, cancel, Instant::now() + STATUS_INTERVAL) {
            Ok(WaitEnd::Cancelled) => return Err(interrupted()),
            Ok(WaitEnd::Ready(_) | WaitEnd::TimedOut) => {}
            Err(error) => return Err(Failure::new("internal", format!("poll: {error}"))),
        }
        for copy in copies.iter() {
            // An event only means that it is time to query again. A daemon may send without end.
            for _ in 0..MAX_EVENTS_PER_QUERY {
                if disks.list[copy.disk].client()?.try_next()?.is_none() {
                    break;
                }
            }
        }
    }
}

/// Cancels the copies that run and removes those that are complete, so that nothing is left behind. Returns what could
/// not be removed.
pub fn undo(disks: &mut Disks, copies: &[DiskCopy]) -> Vec<String> {
    copies.iter().filter_map(|copy| undo_one(disks, copy).err()).collect()
}

fn undo_one(disks: &mut Disks, copy: &DiskCopy) -> Result<(), String> {
    let disk = &mut disks.list[copy.disk];
    let shown = copy.target.display();
    // The connection may have been closed before; a detached copy outlives it.
    let mut fresh;
    let client = match disk.client() {
        Ok(client) => client,
        Err(_) => {
            fresh =
                Client::connect(&disk.control).map_err(|why| format!("is the copy to '{shown}' cancelled? {why}"))?;
            &mut fresh
        }
    };
    let end = Instant::now() + REPLY_TIMEOUT;
    loop {
        match client.execute("copy-cancel", json!({"copy": copy.name}), REPLY_TIMEOUT) {
            Ok(_) => return Ok(()),
            // The copy has ended, or it is just getting its name, which cannot be stopped.
            Err(failure) if matches!(failure.code.as_str(), "no-such-copy" | "busy") => {}
            Err(why) => return Err(format!("the copy to '{shown}' could not be cancelled: {why}")),
        }
        let list = client
            .execute("query-copies", json!({}), REPLY_TIMEOUT)
            .map_err(|why| format!("is '{shown}' there? {why}"))?;
        let list = list.as_array().map(Vec::as_slice).unwrap_or_default();
        let found = list.iter().find(|status| status["copy"] == *copy.name);
        match found.and_then(|status| status["state"].as_str()) {
            Some("completed") => break,
            Some("syncing") if Instant::now() < end => std::thread::sleep(END_POLL_INTERVAL),
            Some("syncing") => return Err(format!("the copy to '{shown}' does not end: remove it once it is there")),
            // The daemon has removed the copy. A file of the target's name is then not ours.
            _ => return Ok(()),
        }
    }
    match rustix::fs::unlink(&copy.target) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(format!("'{shown}', which is no snapshot, cannot be removed: {errno}")),
    }
}

impl DiskCopy {
    fn state(&self) -> &str {
        self.status["state"].as_str().unwrap_or("prepared")
    }
}

/// Returns the average rate in bytes a second. `None`: less than a second has passed, or nothing was copied.
fn rate(done: u64, elapsed: Duration) -> Option<u64> {
    (elapsed >= Duration::from_secs(1)).then(|| (done as f64 / elapsed.as_secs_f64()) as u64).filter(|rate| *rate > 0)
}

fn progress_text(done: u64, total: u64, rate: Option<u64>) -> String {
    let text = format!("copied {} % of {}", done * 100 / total, bytes(total));
    match rate {
        Some(rate) => format!("{text}, {}/s, {} s left", bytes(rate), total.saturating_sub(done).div_ceil(rate)),
        None => text,
    }
}

/// Shows the progress of the copies on one line that is rewritten. Later output begins on a new line, whatever ended
/// the progress. `show` is called with the text, and whether it is the last one.
struct Progress<F: FnMut(&str, bool)> {
    show: F,
    /// When the progress was first shown, and the bytes that were done then.
    start: Option<(Instant, u64)>,
    last: Option<String>,
}

impl<F: FnMut(&str, bool)> Progress<F> {
    fn update(&mut self, copies: &[DiskCopy]) {
        let sum = |name: &str| copies.iter().filter_map(|copy| copy.status[name].as_u64()).sum::<u64>();
        let (done, total) = (sum("done-bytes"), sum("total-bytes").max(1));
        let (start, done_before) = *self.start.get_or_insert((Instant::now(), done));
        let text = progress_text(done, total, rate(done.saturating_sub(done_before), start.elapsed()));
        (self.show)(&text, false);
        self.last = Some(text);
    }
}

impl<F: FnMut(&str, bool)> Drop for Progress<F> {
    fn drop(&mut self) {
        if let Some(text) = self.last.take() {
            (self.show)(&text, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_after_the_progress_begins_on_a_new_line() {
        let status = json!({"done-bytes": 1 << 20, "total-bytes": 4 << 20});
        let copy = DiskCopy { disk: 0, name: String::new(), target: PathBuf::new(), status };
        let mut shown = Vec::new();
        let mut progress =
            Progress { show: |text: &str, last| shown.push((text.to_owned(), last)), start: None, last: None };
        progress.update(std::slice::from_ref(&copy));
        drop(progress);
        let text = "copied 25 % of 4.0 MiB".to_owned();
        assert_eq!(shown, [(text.clone(), false), (text, true)]);
    }

    #[test]
    fn the_progress_has_a_rate_and_the_time_that_is_left() {
        assert_eq!(rate(10 << 20, Duration::from_millis(900)), None);
        assert_eq!(rate(0, Duration::from_secs(2)), None);
        let rate = rate(400 << 20, Duration::from_secs(4));
        assert_eq!(progress_text(400 << 20, 4 << 30, rate), "copied 9 % of 4.0 GiB, 100 MiB/s, 37 s left");
    }
}
