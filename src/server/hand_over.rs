//! The old daemon's side of an upgrade in place ([`crate::upgrade`]): hands its guest over to a process that took all
//! else already, or keeps it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Served, ServerError, new_bell};
use crate::base::logging;
use crate::base::rate_limit::{COMMAND_LOG, log_limited};
use crate::base::sync::Bell;
use crate::control::CommandLine;
use crate::upgrade::{Channel, Descriptors, FromNew, FromOld, GAVE_UP, Hello, Starter, State};

/// For requests in flight, and for the connection to be between two messages.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// For the new daemon while the guest's rings run: it enters its sandbox, and may speak to a cluster.
const ANSWER_TIMEOUT_RINGS_RUNNING: Duration = Duration::from_secs(60);
/// For the new daemon while they do not.
const ANSWER_TIMEOUT_RINGS_STOPPED: Duration = Duration::from_secs(5);
/// Syncs ahead of the pause: another one while the last took longer than this, and so many at most.
const LONG_SYNC: Duration = Duration::from_millis(20);
const MAX_SYNCS: u32 = 4;

/// Requests of the control thread's for main: somebody wants to take over.
pub(super) struct Requests {
    pub(super) bell: Arc<Bell>,
    asked: Mutex<Option<(UnixStream, bool)>>,
    /// Somebody is at it: the control thread sets it, main clears it when nothing came of it.
    pub(super) under_way: Arc<AtomicBool>,
    /// And is about to: clients of the control socket wait for whoever it will be.
    pub(super) leaving: Arc<AtomicBool>,
}

impl Requests {
    pub(super) fn new() -> Result<Arc<Self>, ServerError> {
        let flag = || Arc::new(AtomicBool::new(false));
        Ok(Arc::new(Requests { bell: new_bell()?, asked: Mutex::default(), under_way: flag(), leaving: flag() }))
    }

    /// The control thread. `misses`: an attendant is relied on.
    pub(super) fn put(&self, stream: UnixStream, misses: bool) {
        self.bell.ring_after(|| {
            *self.asked.lock().expect("no panic while held") = Some((stream, misses));
            true
        });
    }

    /// Main: who asks.
    pub(super) fn take(&self) -> Option<(UnixStream, bool)> {
        self.bell.silence_before(|| self.asked.lock().expect("no panic while held").take())
    }
}

/// What outlives this process, in copies.
pub(super) struct InheritedFiles<'a> {
    /// The path of the vhost-user socket, if it is ours, and the socket.
    pub(super) front: (Option<&'a Path>, &'a dyn AsFd),
    pub(super) control: Option<(&'a Path, &'a dyn AsFd)>,
    pub(super) pid_file: Option<(&'a Path, &'a dyn AsFd)>,
}

impl InheritedFiles<'_> {
    fn hello(&self, served: &dyn Served, misses_attendant: bool) -> Result<(Hello, Descriptors), String> {
        let disk = served.facts().ok_or("its image lives in this process and ends with it")?;
        let mut descriptors = Descriptors::default();
        let told = (|| {
            let mut named = |place: Option<(&Path, &dyn AsFd)>| {
                place
                    .map(|(path, fd)| Ok::<_, io::Error>((std::path::absolute(path)?, descriptors.add_copy(fd)?)))
                    .transpose()
            };
            let (control, pid_file) = (named(self.control)?, named(self.pid_file)?);
            let front_path = self.front.0.map(std::path::absolute).transpose()?;
            let front_socket = descriptors.add_copy(self.front.1)?;
            let log = descriptors.add_copy(io::stderr())?;
            let log_is_journal = logging::is_journal();
            let pid = std::process::id();
            Ok(Hello { pid, disk, front_path, front_socket, control, pid_file, log, log_is_journal, misses_attendant })
        })();
        told.map(|hello| (hello, descriptors)).map_err(|error: io::Error| format!("no descriptor to spare: {error}"))
    }
}

/// What became of it.
pub(super) enum Outcome {
    /// Everything is as before; why.
    Stayed(String),
    /// The disk is another process's.
    Gone(NewDaemon),
}

/// The other process.
#[derive(Clone, Copy, Default)]
pub(super) struct NewDaemon {
    /// 0: it has no number here.
    pub(super) pid: i32,
    /// Which of our files it goes on with.
    pub(super) keeps: FilesTakenOver,
}

pub(super) use crate::upgrade::FilesTakenOver;

/// A hand-over, in a thread of its own: main hears signals meanwhile.
pub(super) struct HandOver {
    /// Rung at the end.
    pub(super) done: Arc<Bell>,
    /// To end it early.
    line: UnixStream,
    thread: JoinHandle<Outcome>,
}

impl HandOver {
    /// Begins. Nobody may begin to be served from now on, until the end.
    pub(super) fn start(
        (stream, misses_attendant): (UnixStream, bool),
        served: &Arc<dyn Served>,
        estate: &InheritedFiles<'_>,
        requests: &Requests,
    ) -> Result<HandOver, String> {
        let failed = |error: io::Error| format!("no thread or descriptor left for it: {error}");
        let line = stream.try_clone().map_err(failed)?;
        let channel = Channel::new(stream).map_err(failed)?;
        let hello = estate.hello(&**served, misses_attendant);
        let done = Bell::new().map(Arc::new).map_err(failed)?;
        let (served, finished, leaving) = (served.clone(), done.clone(), requests.leaving.clone());
        let work = move || {
            let outcome = match give(&channel, &*served, hello, &leaving) {
                Ok(successor) => Outcome::Gone(successor),
                Err(why) => {
                    refuse(&channel, &why);
                    Outcome::Stayed(why)
                }
            };
            finished.ring();
            outcome
        };
        let thread = thread::Builder::new().name("hand-over".into()).spawn(work).map_err(failed)?;
        Ok(HandOver { done, line, thread })
    }

    /// Ends it as soon as the other process is waited for: we are told to end. It may have succeeded before.
    pub(super) fn cancel(&self) {
        // The other end may have hung up.
        let _ = self.line.shutdown(std::net::Shutdown::Both);
    }

    /// Waits for the end.
    pub(super) fn outcome(self) -> Outcome {
        // A panic would have ended the process.
        self.thread.join().unwrap_or_else(|_| Outcome::Stayed("a defect".into()))
    }
}

/// Tells the other process, if it still listens, why it is off.
fn refuse(channel: &Channel, why: &str) {
    if let Err(error) = channel.send(&FromOld::Refused(why.to_owned()), &[], ANSWER_TIMEOUT_RINGS_STOPPED) {
        log::debug!("the other process does not hear why it is refused: {error}");
    }
}

fn give(
    channel: &Channel,
    served: &dyn Served,
    hello: Result<(Hello, Descriptors), String>,
    leaving: &AtomicBool,
) -> Result<NewDaemon, String> {
    let starter = match next(channel, ANSWER_TIMEOUT_RINGS_RUNNING, None)? {
        (FromNew::Begin, descriptors) => Starter::received(descriptors).map_err(|error| error.to_string())?,
        _ => return Err(OUT_OF_TURN.into()),
    };
    let starter = starter.as_ref();
    // Not before the other one has said that it is done with the control socket's own language.
    let (hello, descriptors) = hello?;
    send(channel, &FromOld::Hello(Box::new(hello)), &descriptors.into_list())?;
    let keeps = match next(channel, ANSWER_TIMEOUT_RINGS_RUNNING, starter)? {
        (FromNew::Ready(keeps), _) => keeps,
        _ => return Err(OUT_OF_TURN.into()),
    };
    sync_ahead(served)?;
    is_wanted(starter)?;
    leaving.store(true, Ordering::Release);
    let mut handed_over = served.hand_over(DRAIN_TIMEOUT)?;
    let (mut descriptors, mut front_end) = (Descriptors::default(), None);
    if let Some(moved) = handed_over.session.take() {
        descriptors = moved.descriptors;
        front_end = Some((descriptors.add(moved.stream.into()), moved.record));
    }
    let counts = handed_over.counts();
    let state = State { since: handed_over.since, drained_in: handed_over.drained_in, counts, front_end };
    let descriptors: Vec<OwnedFd> = descriptors.into_list();
    send(channel, &FromOld::State(Box::new(state)), &descriptors)?;
    match next(channel, ANSWER_TIMEOUT_RINGS_STOPPED, starter)? {
        (FromNew::Prepared, _) => {}
        _ => return Err(OUT_OF_TURN.into()),
    }
    is_wanted(starter)?;
    send(channel, &FromOld::Go, &[])?;
    handed_over.commit();
    let pid = getsockopt(&channel.stream().as_fd(), PeerCredentials).map_or(0, |peer| peer.pid());
    Ok(NewDaemon { pid, keeps })
}

/// So that little is left to be synced while the guest waits.
fn sync_ahead(served: &dyn Served) -> Result<(), String> {
    for _ in 0..MAX_SYNCS {
        let start = Instant::now();
        served.sync_ahead().map_err(|error| format!("the image cannot be synced: {error}; mend the storage"))?;
        if start.elapsed() < LONG_SYNC {
            break;
        }
    }
    Ok(())
}

const OUT_OF_TURN: &str = "the new virtioblkd said something out of turn; please report it as a defect";

/// An error if the starter has given up. What follows right after it is carried out.
fn is_wanted(starter: Option<&Starter>) -> Result<(), String> {
    if starter.is_some_and(Starter::has_given_up) { Err(GAVE_UP.into()) } else { Ok(()) }
}

fn next(channel: &Channel, timeout: Duration, starter: Option<&Starter>) -> Result<(FromNew, Vec<OwnedFd>), String> {
    let mut left = timeout;
    if let Some(starter) = starter {
        left = wait_for_either(channel, starter, timeout);
        is_wanted(Some(starter))?;
    }
    match channel.receive(left) {
        Ok((FromNew::Failed(why), _)) => Err(format!("the new virtioblkd gives up: {why}")),
        Ok(message) => Ok(message),
        Err(error) => Err(format!("the new virtioblkd: {error}")),
    }
}

/// Waits until the new daemon says something or hangs up, or the starter gives up. Returns how long to wait for the whole
/// message: `timeout` once it has begun, next to nothing when the time is over.
fn wait_for_either(channel: &Channel, starter: &Starter, timeout: Duration) -> Duration {
    let end = Instant::now() + timeout;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let mut fds = [PollFd::new(channel.stream(), PollFlags::IN), PollFd::new(starter, PollFlags::empty())];
        match poll(&mut fds, Some(&left)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => return Duration::from_millis(1),
            _ => return timeout,
        }
    }
}

fn send(channel: &Channel, message: &FromOld, descriptors: &[OwnedFd]) -> Result<(), String> {
    channel
        .send(message, descriptors, ANSWER_TIMEOUT_RINGS_STOPPED)
        .map_err(|error| format!("the new virtioblkd does not listen: {error}"))
}

/// How this process was started, for whoever starts the next one. `None`: a part of it is no text. Called at the start,
/// when the program's file still has its name.
pub(super) fn command_line() -> Option<CommandLine> {
    let text = |path: io::Result<std::path::PathBuf>| path.ok()?.into_os_string().into_string().ok();
    let mut arguments = Vec::new();
    let mut given = std::env::args_os().skip(1);
    while let Some(argument) = given.next() {
        let argument = argument.into_string().ok()?;
        match argument.as_str() {
            TAKE_OVER => drop(given.next()),
            word if word.starts_with(TAKE_OVER) && word[TAKE_OVER.len()..].starts_with('=') => {}
            _ => arguments.push(argument),
        }
    }
    let (program, directory) = (text(std::env::current_exe())?, text(std::env::current_dir())?);
    let notify_socket = std::env::var("NOTIFY_SOCKET").ok();
    Some(CommandLine { program, arguments, directory, notify_socket })
}

/// The option of whoever takes over.
const TAKE_OVER: &str = "--take-over";

/// Main, when it is over and nothing came of it.
pub(super) fn stayed(requests: &Requests, why: &str) {
    log_limited!(COMMAND_LOG, Error, "the upgrade failed, and this daemon serves on: {why}");
    requests.leaving.store(false, Ordering::Release);
    requests.under_way.store(false, Ordering::Release);
}
