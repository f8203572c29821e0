//! The disks of a snapshot, each a connection to its daemon: held all together or not at all.
//!
//! A hold is bound to its connection: whatever ends this process ends the hold. If the daemon still accepts our token
//! when we resume, the disk was held all the time.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::wait::{Stop, Wake, wait};
use crate::control::client::{Client, Failure, REPLY_TIMEOUT};
use crate::control::is_trusted;
use crate::disk::DiskStatus;

/// How much later than the daemon's deadline ours is, so that the user sees the daemon's message and not ours.
const REPLY_MARGIN: Duration = Duration::from_secs(1);

/// One disk.
pub struct Disk {
    /// `None` once its daemon is lost, or owes a reply that we no longer wait for.
    client: Option<Client>,
    /// The disk's control socket.
    pub control: PathBuf,
    /// The `image` of the daemon's status, for people.
    pub image: String,
    /// The file or device.
    pub image_path: Option<PathBuf>,
    /// The image's store makes snapshots.
    pub image_snapshots: bool,
    /// Who says what is above, by the kernel's word.
    pub daemon: Daemon,
    /// The token of the hold.
    token: Option<String>,
    /// When its gate was asked to close.
    asked: Option<Instant>,
    /// The figures of the quiesce.
    pub figures: Value,
    /// From asking the gate to close until it was open again: the guest's writes waited at most this long.
    pub held: Duration,
}

/// The process that serves a disk.
#[derive(Clone, Copy, Debug)]
pub struct Daemon {
    /// Its id in our process namespace, if it has one there.
    pub pid: Option<u32>,
    /// It is root's or ours. Another user's may have been broken into, and lie.
    pub is_trusted: bool,
}

/// All disks of a snapshot.
pub struct Disks {
    /// In the user's order.
    pub list: Vec<Disk>,
    lease: Duration,
    lease_ends: Option<Instant>,
}

impl Disks {
    /// Connects to every daemon and queries what it serves. No disk is held yet.
    pub fn connect(controls: &[PathBuf], lease: Duration) -> Result<Self, Failure> {
        let list = controls.iter().map(|control| Disk::connect(control)).collect::<Result<_, _>>()?;
        Ok(Disks { list, lease, lease_ends: None })
    }

    /// Closes every gate at once and waits until all disks are still. Returns the instant: from now until
    /// [`Disks::resume`] nothing changes on any of them. On an error the caller must [`Disks::resume`], too.
    pub fn hold(&mut self, timeout: Duration, who: &str, stop: Stop<'_>) -> Result<SystemTime, Failure> {
        let lease = self.lease.as_millis() as u64;
        let arguments = json!({"timeout-ms": timeout.as_millis() as u64, "lease-ms": lease, "who": who});
        let now = Instant::now();
        // Every lease begins with its grant, which cannot come before now.
        self.lease_ends = Some(now + self.lease);
        for disk in &mut self.list {
            disk.asked = Some(now);
        }
        let requests = (0..self.list.len()).map(|disk| (disk, "quiesce", arguments.clone())).collect();
        let mut failure = None;
        for answer in self.ask(requests, now + timeout + REPLY_MARGIN, stop, OnFailure::StopWaiting) {
            let disk = &mut self.list[answer.disk];
            match answer.result {
                Ok(figures) => {
                    disk.token = figures["token"].as_str().map(str::to_owned);
                    disk.figures = figures;
                }
                Err(why) => keep_first(&mut failure, disk.blame("could not be held", why)),
            }
        }
        failure.map_or(Ok(SystemTime::now()), Err)
    }

    /// When the first lease may end: whatever needs the disks to be held must be done by then.
    pub fn lease_ends(&self) -> Instant {
        self.lease_ends.unwrap_or_else(Instant::now)
    }

    /// Resumes every disk, all at once, even if some fail. Errors: a disk was not held until now, so that the snapshot
    /// is worthless; or a daemon does not reply, whose hold then ends with the connection.
    pub fn resume(&mut self) -> Result<(), Failure> {
        let mut held = Vec::new();
        for (at, disk) in self.list.iter_mut().enumerate() {
            match disk.token.take() {
                Some(token) => held.push((at, "resume", json!({"token": token}))),
                // Its quiesce may still be waiting; it ends with the connection.
                None if disk.asked.is_some() => disk.client = None,
                None => {}
            }
        }
        let mut failure = None;
        for answer in self.ask(held, Instant::now() + REPLY_TIMEOUT, None, OnFailure::WaitForAll) {
            let disk = &mut self.list[answer.disk];
            disk.held = disk.asked.map_or(Duration::ZERO, |asked| answer.when.saturating_duration_since(asked));
            if let Err(why) = answer.result {
                keep_first(&mut failure, disk.blame("was not held until the snapshot was taken", why));
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Sends commands to disks, all at once: (index, command, arguments). Returns the answers in the same order. A
    /// connection that owes a reply at the end is closed.
    pub fn ask(
        &mut self,
        requests: Vec<(usize, &'static str, Value)>,
        deadline: Instant,
        stop: Stop<'_>,
        unanswered: OnFailure,
    ) -> Vec<DiskReply> {
        let mut answers: Vec<(usize, Option<DiskReply>)> = Vec::new();
        for (disk, name, arguments) in requests {
            let sent = self.list[disk].client().and_then(|client| client.send(name, arguments));
            answers.push((disk, sent.err().map(|lost| DiskReply { disk, when: Instant::now(), result: Err(lost) })));
        }
        let end = loop {
            for (disk, answer) in answers.iter_mut().filter(|(_, answer)| answer.is_none()) {
                let result = self.list[*disk].try_reply();
                *answer = result.map(|result| DiskReply { disk: *disk, when: Instant::now(), result });
            }
            let failed = answers.iter().any(|(_, answer)| answer.as_ref().is_some_and(|a| a.result.is_err()));
            let waiting: Vec<BorrowedFd<'_>> =
                answers.iter().filter(|(_, a)| a.is_none()).filter_map(|(disk, _)| self.list[*disk].fd()).collect();
            if waiting.is_empty() || (failed && unanswered == OnFailure::StopWaiting) {
                break Failure::new(NOT_WAITED, "another disk failed first");
            }
            match wait(&waiting, stop, deadline) {
                Ok(Wake::Ready(_)) => {}
                Ok(Wake::Stopped) => break interrupted(),
                Ok(Wake::TimedOut) => {
                    let late = "its daemon does not answer in time: it is stopped or stuck; see its log";
                    break Failure::new("timeout", late);
                }
                Err(error) => break Failure::new("internal", format!("poll: {error}")),
            }
        };
        let mut outstanding = |disk: usize| {
            self.list[disk].client = None;
            DiskReply { disk, when: Instant::now(), result: Err(Failure::new(&end.code, end.message.clone())) }
        };
        answers.into_iter().map(|(disk, answer)| answer.unwrap_or_else(|| outstanding(disk))).collect()
    }
}

/// The reply of a disk's daemon, and when it arrived.
pub struct DiskReply {
    /// The disk's index.
    pub disk: usize,
    /// When it arrived.
    pub when: Instant,
    /// The reply, or the failure.
    pub result: Result<Value, Failure>,
}

/// The code of replies that were not waited for. It is never the cause of a failure.
const NOT_WAITED: &str = "not-waited";

/// What a failure does to the other requests that were sent with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// The other replies are not waited for: all or nothing.
    StopWaiting,
    /// The other replies are waited for.
    WaitForAll,
}

/// The path of the image, from a daemon's status.
pub fn image_path(status: &DiskStatus) -> Option<PathBuf> {
    let bytes = status.image_path_b64.as_ref().and_then(|text| BASE64.decode(text).ok());
    bytes.map(|bytes| OsString::from_vec(bytes).into()).or_else(|| status.image_path.as_ref().map(PathBuf::from))
}

/// The failure of whatever a signal ended.
pub fn interrupted() -> Failure {
    Failure::new("interrupted", "interrupted by a signal")
}

/// Keeps the first failure, but prefers a cause to "another disk failed first".
fn keep_first(kept: &mut Option<Failure>, failure: Failure) {
    if kept.as_ref().is_none_or(|kept| kept.code == NOT_WAITED) {
        *kept = Some(failure);
    }
}

impl Disk {
    fn connect(control: &Path) -> Result<Self, Failure> {
        let mut client = Client::connect(control)?;
        let status = client.query_status(REPLY_TIMEOUT)?;
        let own = rustix::process::geteuid().as_raw();
        let daemon =
            Daemon { pid: client.writer_pid(), is_trusted: client.writer().is_some_and(|uid| is_trusted(uid, own)) };
        Ok(Disk {
            client: Some(client),
            control: control.to_owned(),
            image_path: image_path(&status.disk),
            image: status.disk.image,
            image_snapshots: status.image_snapshots,
            daemon,
            token: None,
            asked: None,
            figures: Value::Null,
            held: Duration::ZERO,
        })
    }

    /// The connection to its daemon, or why there is none.
    pub fn client(&mut self) -> Result<&mut Client, Failure> {
        let Disk { client, control, .. } = self;
        client.as_mut().ok_or_else(|| {
            Failure::new("no-daemon", format!("the connection to '{}' was closed before", control.display()))
        })
    }

    /// The token of its hold.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// The descriptor to poll.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.client.as_ref().map(AsFd::as_fd)
    }

    fn try_reply(&mut self) -> Option<Result<Value, Failure>> {
        match self.client().and_then(Client::try_reply) {
            Ok(answer) => answer,
            Err(lost) => {
                self.client = None;
                Some(Err(lost))
            }
        }
    }

    /// A failure whose message begins with the disk's name.
    pub fn blame(&self, what: &str, why: Failure) -> Failure {
        Failure::new(&why.code, format!("the disk behind '{}' {what}: {}", self.control.display(), why.message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn a_path_that_is_no_text_is_read_from_its_bytes() {
        let path = |status| {
            let status: DiskStatus = serde_json::from_value(status).unwrap();
            image_path(&status).map(|path| path.as_os_str().as_bytes().to_vec())
        };
        assert_eq!(path(json!({"image-path": "/a"})).unwrap(), b"/a");
        assert_eq!(path(json!({"image-path": "/\u{fffd}", "image-path-b64": "L/8="})).unwrap(), b"/\xff");
        assert_eq!(path(json!({"image-path": "/a", "image-path-b64": "no base64"})).unwrap(), b"/a");
        assert_eq!(path(json!({})), None);
    }
}
