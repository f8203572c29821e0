//! The old daemon's side of an upgrade in place ([`crate::upgrade`]): hands its guest over to a process that is ready for
//! it, or serves on if that fails.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::event::{PollFd, PollFlags};

use super::hand_over_failure::HandOverFailure;
use super::{Served, ServerError, new_notifier};
use crate::base::logging;
use crate::base::rate_limit::{COMMAND_LOG, log_limited};
use crate::base::sync::EventNotifier;
use crate::base::wait::wait_until;
use crate::config::with_own_name;
use crate::control::CommandLine;
use crate::upgrade::{Channel, Descriptors, HandOverState, Hello, NewDaemonMessage, OldDaemonMessage, Starter};

/// How long the requests in flight, and a message of the front-end, may take to finish.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for a message of the new daemon while the virtqueues run. It enters its sandbox meanwhile, and may
/// connect to a cluster.
const MESSAGE_TIMEOUT_RINGS_RUNNING: Duration = Duration::from_secs(60);
/// How long to wait for a message of the new daemon while the virtqueues are stopped.
const MESSAGE_TIMEOUT_RINGS_STOPPED: Duration = Duration::from_secs(5);
/// A sync before the pause that takes longer than this is followed by another one.
const LONG_SYNC: Duration = Duration::from_millis(20);
/// The maximum number of syncs before the pause.
const MAX_SYNCS: u32 = 4;

/// A new daemon's request to take over.
pub(super) struct HandOverRequest {
    /// The connection of the control socket on which the new daemon sent the request.
    pub(super) stream: UnixStream,
    /// Snapshots of other hosts need the consent of an attendant, which must connect to the new daemon first.
    pub(super) requires_attendant: bool,
}

/// Passes the request of a new daemon from the control thread to the main thread.
pub(super) struct HandOverRequests {
    /// The control thread notifies when it has stored a request.
    pub(super) notifier: Arc<EventNotifier>,
    request: Mutex<Option<HandOverRequest>>,
    /// A hand-over was requested or is running. The control thread sets the flag; main clears it when the hand-over
    /// fails.
    pub(super) is_running: Arc<AtomicBool>,
    /// The guest is about to be handed over. Clients of the control socket wait until it is known which daemon replies.
    pub(super) leaving: Arc<AtomicBool>,
}

impl HandOverRequests {
    pub(super) fn new() -> Result<Arc<Self>, ServerError> {
        let flag = || Arc::new(AtomicBool::new(false));
        let request = Mutex::default();
        Ok(Arc::new(HandOverRequests { notifier: new_notifier()?, request, is_running: flag(), leaving: flag() }))
    }

    /// Stores a request and notifies the main thread. Called by the control thread.
    pub(super) fn put(&self, request: HandOverRequest) {
        self.notifier.notify_after(|| {
            *self.request.lock().expect("no panic while held") = Some(request);
            true
        });
    }

    /// Takes the request, if there is one. Called by the main thread.
    pub(super) fn take(&self) -> Option<HandOverRequest> {
        self.notifier.clear_before(|| self.request.lock().expect("no panic while held").take())
    }
}

/// The files that outlive this process. The new daemon receives duplicates of their descriptors.
pub(super) struct InheritedFiles<'a> {
    /// The path of the vhost-user socket, unless the service manager bound it, and the socket.
    pub(super) front: (Option<&'a Path>, &'a dyn AsFd),
    /// The path of the control socket, and the socket.
    pub(super) control: Option<(&'a Path, &'a dyn AsFd)>,
    /// The path of the pid file, and the open file.
    pub(super) pid_file: Option<(&'a Path, &'a dyn AsFd)>,
}

impl InheritedFiles<'_> {
    fn hello(&self, served: &dyn Served, requires_attendant: bool) -> Result<(Hello, Descriptors), HandOverFailure> {
        let disk = served.facts().ok_or(HandOverFailure::ImageInProcess)?;
        let mut descriptors = Descriptors::default();
        let hello = (|| {
            let mut duplicate = |file: Option<(&Path, &dyn AsFd)>| {
                file.map(|(path, fd)| Ok::<_, io::Error>((std::path::absolute(path)?, descriptors.add_copy(fd)?)))
                    .transpose()
            };
            let (control, pid_file) = (duplicate(self.control)?, duplicate(self.pid_file)?);
            let front_path = self.front.0.map(std::path::absolute).transpose()?;
            let front_socket = descriptors.add_copy(self.front.1)?;
            let log = descriptors.add_copy(io::stderr())?;
            let log_is_journal = logging::is_journal();
            Ok(Hello {
                pid: std::process::id(),
                disk,
                front_path,
                front_socket,
                control,
                pid_file,
                log,
                log_is_journal,
                misses_attendant: requires_attendant,
            })
        })();
        hello.map(|hello| (hello, descriptors)).map_err(HandOverFailure::OutOfDescriptors)
    }
}

/// The result of a hand-over.
pub(super) enum HandOverOutcome {
    /// This daemon serves on, for this reason.
    Failed(HandOverFailure),
    /// The disk belongs to the new daemon.
    HandedOver(NewDaemon),
}

/// The process that took the disk over.
#[derive(Clone, Copy, Default)]
pub(super) struct NewDaemon {
    /// The process's id. 0 if it has none in this pid namespace.
    pub(super) pid: i32,
    /// The files of this process that the new daemon took over.
    pub(super) files: FilesTakenOver,
}

pub(super) use crate::upgrade::FilesTakenOver;

/// A running hand-over. It has a thread of its own, so that main can react to signals meanwhile.
pub(super) struct HandOver {
    /// The thread notifies at its end.
    pub(super) done: Arc<EventNotifier>,
    /// A duplicate of the connection, for [`HandOver::cancel`].
    connection: UnixStream,
    thread: JoinHandle<HandOverOutcome>,
}

impl HandOver {
    /// Starts a hand-over. Until its end no front-end may be accepted.
    pub(super) fn start(
        request: HandOverRequest,
        served: &Arc<dyn Served>,
        files: &InheritedFiles<'_>,
        requests: &HandOverRequests,
    ) -> Result<HandOver, HandOverFailure> {
        let failed = HandOverFailure::OutOfResources;
        let connection = request.stream.try_clone().map_err(failed)?;
        let channel = Channel::new(request.stream).map_err(failed)?;
        let hello = files.hello(&**served, request.requires_attendant);
        let done = EventNotifier::new().map(Arc::new).map_err(failed)?;
        let (served, finished, leaving) = (served.clone(), done.clone(), requests.leaving.clone());
        let work = move || {
            let outcome = match hand_over(&channel, &*served, hello, &leaving) {
                Ok(new) => HandOverOutcome::HandedOver(new),
                Err(reason) => {
                    refuse(&channel, &reason.to_string());
                    HandOverOutcome::Failed(reason)
                }
            };
            finished.notify();
            outcome
        };
        let thread = thread::Builder::new().name("hand-over".into()).spawn(work).map_err(failed)?;
        Ok(HandOver { done, connection, thread })
    }

    /// Makes the hand-over fail at its next wait for the new daemon, because this daemon is to end. The hand-over may
    /// succeed before that.
    pub(super) fn cancel(&self) {
        // This fails only if the new daemon has hung up already.
        let _ = self.connection.shutdown(std::net::Shutdown::Both);
    }

    /// Waits for the end of the hand-over. Returns its result.
    pub(super) fn outcome(self) -> HandOverOutcome {
        // A panic would have ended the process.
        self.thread.join().unwrap_or(HandOverOutcome::Failed(HandOverFailure::Panicked))
    }
}

/// Reports to the new daemon why it is refused, if it is still connected.
fn refuse(channel: &Channel, reason: &str) {
    if let Err(error) = channel.send(&OldDaemonMessage::Refused(reason.to_owned()), &[], MESSAGE_TIMEOUT_RINGS_STOPPED)
    {
        log::debug!("cannot report to the new virtioblkd why it is refused: {error}");
    }
}

/// Exchanges the messages of [`crate::upgrade`] with the new daemon, in the hand-over's thread.
fn hand_over(
    channel: &Channel,
    served: &dyn Served,
    hello: Result<(Hello, Descriptors), HandOverFailure>,
    leaving: &AtomicBool,
) -> Result<NewDaemon, HandOverFailure> {
    let starter = match receive(channel, MESSAGE_TIMEOUT_RINGS_RUNNING, None)? {
        (NewDaemonMessage::Begin, descriptors) => Starter::received(descriptors).map_err(HandOverFailure::Starter)?,
        _ => return Err(HandOverFailure::UnexpectedMessage),
    };
    let starter = starter.as_ref();
    // An error of `hello` can be sent only now: before `Begin`, the new daemon expects JSON of the control protocol.
    let (hello, descriptors) = hello?;
    send(channel, &OldDaemonMessage::Hello(Box::new(hello)), &descriptors.into_list())?;
    let files = match receive(channel, MESSAGE_TIMEOUT_RINGS_RUNNING, starter)? {
        (NewDaemonMessage::Ready(files), _) => files,
        _ => return Err(HandOverFailure::UnexpectedMessage),
    };
    sync_ahead(served)?;
    check_starter(starter)?;
    leaving.store(true, Ordering::Release);
    let mut handed_over = served.hand_over(DRAIN_TIMEOUT).map_err(HandOverFailure::Disk)?;
    let (mut descriptors, mut front_end) = (Descriptors::default(), None);
    if let Some(saved) = handed_over.session.take() {
        descriptors = saved.descriptors;
        front_end = Some((descriptors.add(saved.stream.into()), saved.record));
    }
    let state = HandOverState {
        since: handed_over.since,
        drained_in: handed_over.drained_in,
        counts: handed_over.counts(),
        latency: handed_over.latencies(),
        limits: Some(handed_over.limits()),
        front_end,
    };
    let descriptors: Vec<OwnedFd> = descriptors.into_list();
    send(channel, &OldDaemonMessage::State(Box::new(state)), &descriptors)?;
    match receive(channel, MESSAGE_TIMEOUT_RINGS_STOPPED, starter)? {
        (NewDaemonMessage::Prepared, _) => {}
        _ => return Err(HandOverFailure::UnexpectedMessage),
    }
    check_starter(starter)?;
    send(channel, &OldDaemonMessage::Go, &[])?;
    handed_over.commit();
    let pid = getsockopt(&channel.stream().as_fd(), PeerCredentials).map_or(0, |peer| peer.pid());
    Ok(NewDaemon { pid, files })
}

/// Syncs the image while the virtqueues run, so that the sync during the guest's pause is short.
fn sync_ahead(served: &dyn Served) -> Result<(), HandOverFailure> {
    for _ in 0..MAX_SYNCS {
        let start = Instant::now();
        served.sync_ahead().map_err(HandOverFailure::NotSynced)?;
        if start.elapsed() < LONG_SYNC {
            break;
        }
    }
    Ok(())
}

/// Fails if the starter has given up. The caller takes its next step right after this check.
fn check_starter(starter: Option<&Starter>) -> Result<(), HandOverFailure> {
    if starter.is_some_and(Starter::has_given_up) { Err(HandOverFailure::StarterGaveUp) } else { Ok(()) }
}

/// Receives the next message of the new daemon. Fails early if the starter gives up.
fn receive(
    channel: &Channel,
    timeout: Duration,
    starter: Option<&Starter>,
) -> Result<(NewDaemonMessage, Vec<OwnedFd>), HandOverFailure> {
    let mut left = timeout;
    if let Some(starter) = starter {
        left = wait_for_either(channel, starter, timeout);
        check_starter(Some(starter))?;
    }
    match channel.receive(left) {
        Ok((NewDaemonMessage::Failed(reason), _)) => Err(HandOverFailure::NewDaemon(reason)),
        Ok(message) => Ok(message),
        Err(error) => Err(HandOverFailure::NotReceived(error)),
    }
}

/// Waits until the new daemon sends something or hangs up, or the starter gives up. Returns how long to wait for the whole
/// message: `timeout` if it has begun, and 1 ms if the time is over.
fn wait_for_either(channel: &Channel, starter: &Starter, timeout: Duration) -> Duration {
    let mut sources = [PollFd::new(channel.stream(), PollFlags::IN), PollFd::new(starter, PollFlags::empty())];
    match wait_until(&mut sources, Some(Instant::now() + timeout)) {
        Ok(false) => Duration::from_millis(1),
        _ => timeout,
    }
}

fn send(channel: &Channel, message: &OldDaemonMessage, descriptors: &[OwnedFd]) -> Result<(), HandOverFailure> {
    channel.send(message, descriptors, MESSAGE_TIMEOUT_RINGS_STOPPED).map_err(HandOverFailure::NotRead)
}

/// How this process was started, for `virtioblkctl upgrade`, which starts the new daemon the same way. Returns `None` if a
/// part of it is not UTF-8. Called at the start, while the program's file still has its name.
pub(super) fn command_line() -> Option<CommandLine> {
    let text = |path: io::Result<std::path::PathBuf>| path.ok()?.into_os_string().into_string().ok();
    let mut arguments = Vec::new();
    let mut given = std::env::args_os().skip(1);
    while let Some(argument) = given.next() {
        let argument = argument.into_string().ok()?;
        match argument.as_str() {
            TAKE_OVER => drop(given.next()),
            word if word.starts_with(TAKE_OVER) && word[TAKE_OVER.len()..].starts_with('=') => {}
            _ => arguments.push(with_own_name(&argument)),
        }
    }
    let (program, directory) = (text(std::env::current_exe())?, text(std::env::current_dir())?);
    let notify_socket = std::env::var("NOTIFY_SOCKET").ok();
    Some(CommandLine { program, arguments, directory, notify_socket })
}

/// The option with which a new daemon takes over. The next daemon gets its own.
const TAKE_OVER: &str = "--take-over";

/// Logs that a hand-over failed, and allows the next one. Called by the main thread.
pub(super) fn record_failure(requests: &HandOverRequests, reason: &HandOverFailure) {
    log_limited!(COMMAND_LOG, Error, "the upgrade failed, and this daemon serves on: {reason}");
    requests.leaving.store(false, Ordering::Release);
    requests.is_running.store(false, Ordering::Release);
}
