//! The disks of a snapshot, with a connection to each daemon. They are all held together or not at all.
//!
//! A hold is bound to its connection, so whatever ends this process ends the hold. If a daemon still accepts our token
//! when we resume, its disk was held all the time.

use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::wait::{CancelFd, WaitEnd, wait};
use crate::control::client::{Client, Failure, REPLY_TIMEOUT};
use crate::control::is_trusted;
use crate::disk::DiskStatus;

/// How much later our deadline is than the daemon's, so that the user sees the daemon's message and not ours.
const REPLY_MARGIN: Duration = Duration::from_secs(1);

/// One disk of a snapshot.
pub struct Disk {
    /// The connection to the daemon. `None`: it is lost, or a reply is outstanding for which we no longer wait.
    client: Option<Client>,
    /// The disk's control socket.
    pub control: PathBuf,
    /// The member `image` of the daemon's status, for people.
    pub image: String,
    /// The path of the image's file or device, if it has one.
    pub image_path: Option<PathBuf>,
    /// The image's store makes snapshots.
    pub image_snapshots: bool,
    /// The process that reported the members above, according to the kernel.
    pub daemon: Daemon,
    /// The token of the hold.
    token: Option<String>,
    /// When we requested to close the gate. `None`: not requested yet.
    asked: Option<Instant>,
    /// The daemon's reply to `quiesce`, with its figures.
    pub figures: Value,
    /// The time from the request to close the gate until the gate was open again. The guest's writes waited at most
    /// this long.
    pub held: Duration,
}

/// The process that serves a disk.
#[derive(Clone, Copy, Debug)]
pub struct Daemon {
    /// The process id in our process namespace, if the process has one there.
    pub pid: Option<u32>,
    /// The process is root's or ours. Another user's daemon may be controlled by an intruder, and lie.
    pub is_trusted: bool,
}

/// All disks of a snapshot.
pub struct Disks {
    /// The disks, in the order of the command line.
    pub list: Vec<Disk>,
    lease: Duration,
    lease_ends: Option<Instant>,
}

impl Disks {
    /// Connects to every daemon and queries its status. Holds no disk yet.
    pub fn connect(controls: &[PathBuf], lease: Duration) -> Result<Self, Failure> {
        let list = controls.iter().map(|control| Disk::connect(control)).collect::<Result<_, _>>()?;
        Ok(Disks { list, lease, lease_ends: None })
    }

    /// Closes every gate at once and waits until all disks are still. Returns the instant: from now until
    /// [`Disks::resume`] nothing changes on any disk. The caller must call [`Disks::resume`] also after an error.
    pub fn hold(&mut self, timeout: Duration, who: &str, cancel: CancelFd<'_>) -> Result<SystemTime, Failure> {
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
        for answer in self.execute(requests, now + timeout + REPLY_MARGIN, cancel, OnFailure::StopWaiting) {
            let disk = &mut self.list[answer.disk];
            match answer.result {
                Ok(figures) => {
                    disk.token = figures["token"].as_str().map(str::to_owned);
                    disk.figures = figures;
                }
                Err(why) => record_first(&mut failure, disk.blame("could not be held", why)),
            }
        }
        failure.map_or(Ok(SystemTime::now()), Err)
    }

    /// Returns when the first lease may end. Whatever needs the disks to be held must be done by then.
    pub fn lease_ends(&self) -> Instant {
        self.lease_ends.unwrap_or_else(Instant::now)
    }

    /// Resumes all disks at once, even if some fail. Fails if a disk was not held until now, so that the snapshot is
    /// useless, or if a daemon does not reply; its hold then ends with the connection.
    pub fn resume(&mut self) -> Result<(), Failure> {
        let mut held = Vec::new();
        for (at, disk) in self.list.iter_mut().enumerate() {
            match disk.token.take() {
                Some(token) => held.push((at, "resume", json!({"token": token}))),
                // The quiesce of this disk may still be waiting. It ends with the connection.
                None if disk.asked.is_some() => disk.client = None,
                None => {}
            }
        }
        let mut failure = None;
        for answer in self.execute(held, Instant::now() + REPLY_TIMEOUT, None, OnFailure::WaitForAll) {
            let disk = &mut self.list[answer.disk];
            disk.held = disk.asked.map_or(Duration::ZERO, |asked| answer.when.saturating_duration_since(asked));
            if let Err(why) = answer.result {
                record_first(&mut failure, disk.blame("was not held until the snapshot was taken", why));
            }
        }
        failure.map_or(Ok(()), Err)
    }

    /// Sends commands to disks, all at once: (index of the disk, command, arguments). Returns the replies in the same
    /// order. Closes a connection whose reply has not arrived at the end. `on_failure`: what a failure does to the
    /// other requests.
    pub fn execute(
        &mut self,
        requests: Vec<(usize, &'static str, Value)>,
        deadline: Instant,
        cancel: CancelFd<'_>,
        on_failure: OnFailure,
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
            if waiting.is_empty() || (failed && on_failure == OnFailure::StopWaiting) {
                break Failure::new(NOT_WAITED, "another disk failed first");
            }
            match wait(&waiting, cancel, deadline) {
                Ok(WaitEnd::Ready(_)) => {}
                Ok(WaitEnd::Cancelled) => break interrupted(),
                Ok(WaitEnd::TimedOut) => {
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
    /// The disk's index in [`Disks::list`].
    pub disk: usize,
    /// When the reply arrived, or the failure was detected.
    pub when: Instant,
    /// The reply, or the failure.
    pub result: Result<Value, Failure>,
}

/// The code for replies that were not waited for. Such a failure is never the cause of another one.
const NOT_WAITED: &str = "not-waited";

/// What a failure does to the other requests that were sent with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnFailure {
    /// The other replies are not waited for, because all requests must succeed.
    StopWaiting,
    /// The other replies are waited for.
    WaitForAll,
}

/// Returns the path of the image from a daemon's status.
pub fn image_path(status: &DiskStatus) -> Option<PathBuf> {
    let bytes = status.image_path_b64.as_ref().and_then(|text| BASE64.decode(text).ok());
    bytes.map(|bytes| OsString::from_vec(bytes).into()).or_else(|| status.image_path.as_ref().map(PathBuf::from))
}

/// Creates the failure of an operation that a signal ended.
pub fn interrupted() -> Failure {
    Failure::new("interrupted", "interrupted by a signal")
}

/// Stores the first failure, but prefers a cause to "another disk failed first".
fn record_first(first: &mut Option<Failure>, failure: Failure) {
    if first.as_ref().is_none_or(|first| first.code == NOT_WAITED) {
        *first = Some(failure);
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

    /// Returns the connection to the daemon. Fails if it was closed.
    pub fn client(&mut self) -> Result<&mut Client, Failure> {
        let Disk { client, control, .. } = self;
        client.as_mut().ok_or_else(|| {
            Failure::new("no-daemon", format!("the connection to '{}' was closed before", control.display()))
        })
    }

    /// Returns the token of the hold, if the disk is held.
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Returns the descriptor to poll for replies, if there is a connection.
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

    /// Returns the failure with a message that begins with the disk's control socket.
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
