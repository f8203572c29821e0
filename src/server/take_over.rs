//! The new daemon's side of an upgrade in place ([`crate::upgrade`]): takes the guest over from the old daemon, which the
//! control socket of `--take-over` leads to. A failure before the old daemon has sent `Go` ends this process, and the old
//! daemon serves on.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::json;

use super::Served;
use super::front_ends::FrontEnds;
use crate::base::logging;
use crate::config::{Config, Listen};
use crate::control::client::{Client, Failure, REPLY_TIMEOUT};
use crate::control::protocol::return_types::TookOver;
use crate::upgrade::{
    self, Channel, Descriptors, FilesTakenOver, GAVE_UP, HandOverState, Hello, NewDaemonMessage, OldDaemonMessage,
    Starter, VERSION,
};
use crate::virtio::device::hand_over::Steps;
use crate::virtio::vhost_user::save_restore::SavedSession;

/// How long to wait for a message of the old daemon.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait for `State`, before which the old daemon syncs while its guest runs.
const SYNC_TIMEOUT: Duration = Duration::from_secs(600);

/// Why this process does not take over, and how to fix it.
#[derive(Debug)]
pub struct TakeOverError {
    /// The path of the old daemon's control socket.
    control: PathBuf,
    cause: TakeOverFailure,
}

impl fmt::Display for TakeOverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "--take-over '{}': {}", self.control.display(), self.cause)
    }
}

impl std::error::Error for TakeOverError {}

/// What ended a take-over.
#[derive(Debug)]
enum TakeOverFailure {
    /// The starter's pipe cannot be used.
    Starter(io::Error),
    /// The starter no longer wants the upgrade.
    StarterGaveUp,
    /// The old daemon's control socket cannot be used, or it refuses the request.
    Control(Failure),
    /// The old daemon does not know the request.
    TooOld,
    /// The connection cannot be used.
    Channel(io::Error),
    /// The old daemon does not read its messages.
    NotRead(io::Error),
    /// The old daemon sends nothing, or nothing that can be read.
    NotReceived(io::Error),
    /// The old daemon gave this reason and serves on.
    Refused(String),
    /// The old daemon sent a message that is not the next one.
    UnexpectedMessage,
    /// A step of this process failed, and the old daemon got this reason.
    Aborted(String),
}

impl fmt::Display for TakeOverFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TakeOverFailure::Starter(error) | TakeOverFailure::Channel(error) => error.fmt(f),
            TakeOverFailure::StarterGaveUp => f.write_str(GAVE_UP),
            TakeOverFailure::Control(failure) => f.write_str(&failure.message),
            TakeOverFailure::TooOld => {
                f.write_str("the running virtioblkd is too old for an upgrade: restart it instead")
            }
            TakeOverFailure::NotRead(error) => {
                write!(f, "the running virtioblkd does not read its messages: {error}")
            }
            TakeOverFailure::NotReceived(error) => write!(f, "the running virtioblkd: {error}; see its log"),
            TakeOverFailure::UnexpectedMessage => f.write_str(
                "the running virtioblkd sent a message out of turn; restart it instead, and please report it as a defect",
            ),
            TakeOverFailure::Refused(reason) | TakeOverFailure::Aborted(reason) => f.write_str(reason),
        }
    }
}

/// A take-over: the connection to the old daemon, and what that sent with `Hello`.
pub(super) struct TakeOver {
    path: PathBuf,
    channel: Channel,
    hello: Hello,
    descriptors: Descriptors,
    files: FilesTakenOver,
    starter: Option<Starter>,
}

/// The old daemon's files that this process takes over.
#[derive(Default)]
pub(super) struct TakenFiles {
    pub(super) front: Option<UnixListener>,
    pub(super) control: Option<UnixListener>,
    pub(super) pid_file: Option<File>,
}

/// The result of a take-over that succeeded.
pub(super) struct TakenOver {
    /// The figures for the status.
    pub(super) figures: TookOver,
    /// An attendant was connected to the old daemon and has to connect to this one.
    pub(super) attendant_missing: bool,
}

impl TakeOver {
    /// Requests the hand-over from the old daemon, whose control socket is at `path`. Fails if the old daemon's disk is not
    /// the same as `served`. Called by the main thread, after the image was opened.
    pub(super) fn begin(path: &Path, served: &dyn Served) -> Result<TakeOver, TakeOverError> {
        // A terminal that closes, or a shell that ends its job, must not end the new daemon. This fails if the process leads
        // a session already, which is as good.
        if let Err(errno) = rustix::process::setsid() {
            log::debug!("cannot start a session: {errno}");
        }
        let refuse = |cause| TakeOverError { control: path.to_owned(), cause };
        let starter = Starter::of_this_process().map_err(|error| refuse(TakeOverFailure::Starter(error)))?;
        if starter.as_ref().is_some_and(Starter::has_given_up) {
            return Err(refuse(TakeOverFailure::StarterGaveUp));
        }
        let mut client = Client::connect(path).map_err(|failure| refuse(TakeOverFailure::Control(failure)))?;
        let reply = client.execute("hand-over", json!({ "version": VERSION }), REPLY_TIMEOUT);
        reply.map_err(|failure| match failure.code.as_str() {
            "unknown-command" => refuse(TakeOverFailure::TooOld),
            _ => refuse(TakeOverFailure::Control(failure)),
        })?;
        let stream = client.into_stream().map_err(|failure| refuse(TakeOverFailure::Control(failure)))?;
        let channel = Channel::new(stream).map_err(|error| refuse(TakeOverFailure::Channel(error)))?;
        let pipe: Result<Vec<OwnedFd>, io::Error> = starter.iter().map(Starter::copy).collect();
        let pipe = pipe.map_err(|error| refuse(TakeOverFailure::Starter(error)))?;
        channel
            .send(&NewDaemonMessage::Begin, &pipe, MESSAGE_TIMEOUT)
            .map_err(|error| refuse(TakeOverFailure::NotRead(error)))?;
        let (hello, descriptors) = match receive(&channel, MESSAGE_TIMEOUT).map_err(refuse)? {
            (OldDaemonMessage::Hello(hello), descriptors) => (*hello, Descriptors::new(descriptors)),
            _ => return Err(refuse(TakeOverFailure::UnexpectedMessage)),
        };
        let files = FilesTakenOver::default();
        let take_over = TakeOver { path: path.to_owned(), channel, hello, descriptors, files, starter };
        let Some(facts) = served.facts() else {
            return Err(take_over.abort("an image in memory ends with its process"));
        };
        take_over.hello.disk.allow(&facts).map_err(|reason| take_over.abort(&reason))?;
        Ok(take_over)
    }

    /// Takes over those sockets and that pid file of the old daemon that the configuration of this one names, too. The
    /// caller creates the others.
    pub(super) fn files(&mut self, config: &Config) -> Result<TakenFiles, TakeOverError> {
        let same = |ours: Option<&PathBuf>, theirs: Option<&PathBuf>| match (ours, theirs) {
            (Some(ours), Some(theirs)) => std::path::absolute(ours).is_ok_and(|ours| ours == *theirs),
            _ => false,
        };
        let front = match &config.listen {
            Listen::Path { path, .. } => same(Some(path), self.hello.front_path.as_ref()),
            // The service manager passed the old daemon a socket, perhaps under another number.
            Listen::Fd(_) if self.hello.front_path.is_none() => true,
            // The old daemon bound its socket itself, so this process inherited none under that number.
            Listen::Fd(_) => {
                return Err(self.abort("--fd: the running virtioblkd bound its socket itself: give --socket-path"));
            }
        };
        let control = self.hello.control.clone();
        let control = control.filter(|(path, _)| same(config.control.as_ref().map(|it| &it.path), Some(path)));
        let pid_file = self.hello.pid_file.clone();
        let pid_file = pid_file.filter(|(path, _)| same(config.pid_file.as_ref(), Some(path)));
        self.files = FilesTakenOver { front, control: control.is_some(), pid_file: pid_file.is_some() };
        let front_socket = self.hello.front_socket;
        let front = front.then(|| self.take(front_socket)).transpose()?;
        let control = control.map(|(_, number)| self.take(number)).transpose()?;
        let pid_file = pid_file.map(|(_, number)| self.take(number)).transpose()?;
        let (front, control) = (front.map(Into::into), control.map(Into::into));
        Ok(TakenFiles { front, control, pid_file: pid_file.map(Into::into) })
    }

    fn take(&mut self, number: usize) -> Result<OwnedFd, TakeOverError> {
        self.descriptors.take(number).map_err(|error| self.abort(&error.to_string()))
    }

    /// Reports to the old daemon that this process gives up, and why. Returns the error for the caller.
    pub(super) fn abort(&self, reason: &str) -> TakeOverError {
        if let Err(error) = self.channel.send(&NewDaemonMessage::Failed(reason.to_owned()), &[], MESSAGE_TIMEOUT) {
            log::debug!("cannot report to the running virtioblkd why the take-over ends: {error}");
        }
        TakeOverError { control: self.path.clone(), cause: TakeOverFailure::Aborted(reason.to_owned()) }
    }

    /// Takes the guest over. On success the guest's virtqueues run in this process. Returns the figures for the status, and
    /// whether an attendant has to connect again. Called by the main thread, after every step that can fail.
    pub(super) fn finish(
        mut self,
        served: &dyn Served,
        front_ends: &mut FrontEnds,
    ) -> Result<TakenOver, TakeOverError> {
        let refuse = |cause| TakeOverError { control: self.path.clone(), cause };
        send(&self.channel, &NewDaemonMessage::Ready(self.files)).map_err(refuse)?;
        let (state, descriptors) = match receive(&self.channel, SYNC_TIMEOUT).map_err(refuse)? {
            (OldDaemonMessage::State(state), descriptors) => (*state, Descriptors::new(descriptors)),
            _ => return Err(refuse(TakeOverFailure::UnexpectedMessage)),
        };
        let HandOverState { since, drained_in, counts, latency, limits, front_end } = state;
        served.resume_counts(&counts, &latency);
        if let Some(limits) = limits {
            served.resume_limits(&limits);
        }
        served.take_over().map_err(|error| self.abort(&error.to_string()))?;
        let session = front_end.map(|(number, record)| Self::restore_session(number, record, descriptors, front_ends));
        let session = session.transpose().map_err(|reason| {
            // The image is released before the old daemon is informed, because that claims it at once.
            served.release_image();
            self.abort(&reason.to_string())
        })?;
        // An old daemon of a version before the starter's pipe does not check the starter itself.
        if self.starter.as_ref().is_some_and(Starter::has_given_up) {
            served.release_image();
            return Err(self.abort(GAVE_UP));
        }
        send(&self.channel, &NewDaemonMessage::Prepared).map_err(refuse)?;
        match receive(&self.channel, MESSAGE_TIMEOUT).map_err(refuse)? {
            (OldDaemonMessage::Go, _) => {}
            _ => return Err(refuse(TakeOverFailure::UnexpectedMessage)),
        }
        // From here on the guest belongs to this process, and no error may end the take-over.
        if let Some((go, running)) = session
            && (go.send(()).is_err() || running.recv().is_err())
        {
            log::error!("the front-end's thread has ended; the lines above say why");
        }
        let pause = upgrade::monotonic().saturating_sub(since);
        match self.descriptors.take(self.hello.log) {
            Ok(log) => logging::continue_log(&log, self.hello.log_is_journal),
            Err(error) => log::warn!("cannot continue the old daemon's log: {error}; logging to standard error"),
        }
        let microseconds = |nanoseconds: u64| nanoseconds / 1000;
        let figures = TookOver {
            from_pid: self.hello.pid,
            pause_us: microseconds(pause),
            drained_us: Some(microseconds(drained_in)),
        };
        Ok(TakenOver { figures, attendant_missing: self.hello.misses_attendant })
    }

    /// Restores the front-end's session, with its virtqueues stopped. Returns a sender that starts the virtqueues, and a
    /// receiver that reports that they run.
    fn restore_session(
        number: usize,
        record: crate::upgrade::session_state::SessionState,
        mut descriptors: Descriptors,
        front_ends: &mut FrontEnds,
    ) -> io::Result<(mpsc::Sender<()>, mpsc::Receiver<()>)> {
        let stream = descriptors.take(number).map(UnixStream::from)?;
        let (prepared, is_prepared) = mpsc::channel();
        let (go, may_go) = mpsc::channel();
        let (running, is_running) = mpsc::channel();
        let steps = Steps { prepared, go: may_go, running };
        let started = front_ends.restore_session(SavedSession { stream, record, descriptors }, steps);
        let failed = |what: &str, error: io::Error| io::Error::new(error.kind(), format!("{what}: {error}"));
        started.map_err(|error| failed("no thread or descriptor left for the front-end", error))?;
        match is_prepared.recv() {
            Ok(prepared) => {
                prepared.map_err(|error| failed("the front-end's connection cannot be taken over", error))?;
            }
            Err(_) => return Err(io::Error::other("the front-end's thread ended")),
        }
        Ok((go, is_running))
    }
}

/// Prints the figures on standard output, for the program that started this one. The old daemon has ended by then, or ends
/// at once.
pub(super) fn print_figures(figures: &TookOver) {
    let line = format!("{}\n", json!({ "took-over": figures }));
    if !logging::print_in_time(&line) {
        log::debug!("standard output was not read: the figures of the take-over are not printed");
    }
}

fn send(channel: &Channel, message: &NewDaemonMessage) -> Result<(), TakeOverFailure> {
    channel.send(message, &[], MESSAGE_TIMEOUT).map_err(TakeOverFailure::NotRead)
}

fn receive(channel: &Channel, timeout: Duration) -> Result<(OldDaemonMessage, Vec<OwnedFd>), TakeOverFailure> {
    match channel.receive(timeout) {
        Ok((OldDaemonMessage::Refused(reason), _)) => Err(TakeOverFailure::Refused(reason)),
        Ok(received) => Ok(received),
        Err(error) => Err(TakeOverFailure::NotReceived(error)),
    }
}
