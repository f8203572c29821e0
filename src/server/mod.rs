//! Starts the daemon, serves front-ends, and ends the daemon.
//!
//! The start has this order: it checks the inherited socket or looks up the group, opens and checks the image, binds the
//! control socket, binds the vhost-user socket, writes the pid file and enters the sandbox. The vhost-user socket follows
//! the steps that may take time or fail, because a listener that does not reply freezes QEMU. The main thread then waits
//! for front-ends, signals and the control socket's `quit`. It never waits for I/O of the image, except at the very end.
//!
//! A panic in any thread ends the process at once (SIGABRT). QEMU then sees that the connection is closed and reconnects
//! to the next daemon. Otherwise the thread of a virtqueue would be missing, and its guest would hang without a message.
//!
//! | file | what |
//! |---|---|
//! | `daemon`, `files` | the steps of the start and of the end; sockets and pid file |
//! | `wiring` | builds the disk that a configuration describes, from its parts |
//! | `permissions` | what the sandbox must permit for it |
//! | `socket`, `inherited` | the vhost-user socket, bound here or inherited from the service manager (UNSAFE) |
//! | `front_ends/` | accepts front-ends and serves one at a time |
//! | `hand_over`, `hand_over_failure`, `take_over` | an upgrade in place: the old daemon's side, and the new one's |
//! | `check`, `run_command` | `--check` starts nothing; `--run` serves as long as a command runs |

mod check;
mod daemon;
mod files;
mod front_ends;
mod hand_over;
mod hand_over_failure;
mod inherited;
pub mod permissions;
pub mod run_command;
mod socket;
mod take_over;
mod wiring;

use crate::base::systemd;
use std::error::Error;
use std::fmt;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use rustix::event::{PollFd, PollFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::base::logging;
use crate::base::pid_file::PidFileError;
use crate::base::signals::Signals;
use crate::base::sync::EventNotifier;
use crate::base::syscalls;
use crate::base::unix_listener;
use crate::base::unix_listener::BindError;
use crate::base::wait::poll_until;
use crate::config::Config;
use crate::control::protocol::return_types::TookOver;
use crate::disk::{LatencyStatus, RingStatus};
use crate::sandbox::SandboxError;
use crate::upgrade::{DiskFacts, LimitsState};
use crate::virtio::SessionEnd;
use crate::virtio::device::hand_over::{HandedOver, Steps};
use crate::virtio::vhost_user::save_restore::{HandOverError, SavedSession};
use check::PlaceError;
use daemon::Daemon;
use files::DaemonFiles;
use front_ends::FrontEnds;
use hand_over::{HandOver, HandOverOutcome, HandOverRequests, NewDaemon};
use socket::SocketError;
use take_over::TakeOverError;

/// The disk as the server uses it.
pub(crate) trait Served: Send + Sync {
    /// Serves a vhost-user connection until the front-end hangs up or breaks the protocol, or until [`Served::shutdown`].
    /// When this returns, no request of the front-end is in flight. Returns why the session ended. Called in a thread of
    /// its own, and never twice at a time.
    fn serve(&self, stream: UnixStream) -> io::Result<SessionEnd>;

    /// Whether the current front-end has sent a valid message. Called by the main thread.
    fn has_received_message(&self) -> bool {
        true
    }

    /// Stops taking requests for good, and returns when those taken are completed. Called once, at the end.
    fn shutdown(&self);

    /// Makes everything written durable, in every cache mode. Called after `shutdown`.
    fn sync(&self) -> io::Result<()>;

    /// Describes the image and how it is open, in one line.
    fn describe(&self) -> String;

    /// The number of requests that were taken and are not completed yet.
    fn in_flight(&self) -> u64;

    /// The image's identity and the properties that the guest knows. `None` if another process cannot serve the image.
    fn facts(&self) -> Option<DiskFacts>;

    /// Syncs before [`Served::hand_over`], while requests are served. Called by the hand-over's thread.
    fn sync_ahead(&self) -> io::Result<()>;

    /// Pauses the disk and makes it durable, so that another process can take it over. The caller starts no front-end
    /// meanwhile. Requests in flight have `timeout` to finish. On an error, which says why, this process serves on. Called
    /// by the hand-over's thread.
    fn hand_over(&self, timeout: Duration) -> Result<HandedOver, HandOverError>;

    /// Claims the image, which the old daemon has released. Called by the main thread.
    fn take_over(&self) -> io::Result<()>;

    /// Adds the old daemon's counts to this process's. Called by the main thread before [`Served::restore_session`].
    fn resume_counts(&self, _before: &[RingStatus], _latency: &LatencyStatus) {}

    /// Continues with the limits that were in effect, unless this process is started with other ones than the old daemon.
    /// Called by the main thread before [`Served::restore_session`].
    fn resume_limits(&self, _before: &LimitsState) {}

    /// Releases the image again, because the old daemon serves on after all. Called by the main thread.
    fn release_image(&self);

    /// Like [`Served::serve`], for a session that the old daemon has saved. Called by the front-end's thread.
    fn restore_session(&self, saved: SavedSession, steps: &Steps) -> io::Result<SessionEnd>;
}

/// The control thread, which serves the control socket, if there is one, and the image's store. Dropping it waits for the
/// thread's end.
pub(crate) trait Control {
    /// Starts to serve clients on `listener`, after the disk was taken over from another process. The status shows
    /// `figures`. `attendant_missing`: an attendant was connected to the old daemon and has to connect to this one.
    fn take_over(&self, listener: Option<UnixListener>, figures: TookOver, attendant_missing: bool) -> io::Result<()>;
}

/// Why the daemon could not start, or did not end well. Each text says what failed, why, and how to fix it.
#[derive(Debug)]
pub enum ServerError {
    /// The vhost-user socket cannot be bound or used.
    Socket(SocketError),
    /// The control socket cannot be bound.
    Control(BindError),
    /// The control thread cannot be started.
    ControlThread(io::Error),
    /// The place of a socket or of the pid file cannot be used.
    Place(PlaceError),
    /// The image cannot be opened, or has the wrong properties.
    Image(Box<dyn Error + Send + Sync>),
    /// The pid file cannot be created.
    PidFile(PidFileError),
    /// The sandbox cannot be prepared or entered.
    Sandbox(SandboxError),
    /// A system call failed; the text says what it was for.
    System(&'static str, io::Error),
    /// The final sync of this image failed.
    Sync(String, io::Error),
    /// A second signal arrived while the daemon was ending. The text says what was left undone.
    Interrupted(String),
    /// The guest could not be taken over; the old daemon serves on.
    TakeOver(TakeOverError),
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServerError::Socket(error) => error.fmt(f),
            ServerError::Control(error) => write!(f, "--control-path: {error}"),
            ServerError::ControlThread(error) => write!(f, "cannot start the control thread: {error}"),
            ServerError::Place(error) => error.fmt(f),
            ServerError::Image(error) => error.fmt(f),
            ServerError::PidFile(error) => error.fmt(f),
            ServerError::Sandbox(error) => error.fmt(f),
            ServerError::System(what, error) if unix_listener::out_of_descriptors(error) => {
                write!(f, "{what}: {error}; {}", unix_listener::MORE_DESCRIPTORS)
            }
            ServerError::System(what, error) => write!(f, "{what}: {error}"),
            ServerError::Sync(image, error) => write!(
                f,
                "{image}: the final sync failed: {error}; what the guest wrote since its last flush may not be on the \
                 medium: check the medium and the host's kernel log"
            ),
            ServerError::Interrupted(undone) => f.write_str(undone),
            ServerError::TakeOver(error) => error.fmt(f),
        }
    }
}

impl Error for ServerError {}

/// The main thread's state.
pub struct Server {
    served: Arc<dyn Served>,
    signals: Signals,
    /// The control thread notifies when a client sends `quit`.
    quit: Arc<EventNotifier>,
    /// Requests of new daemons to take over.
    requests: Arc<HandOverRequests>,
    /// How many SIGTERM and SIGINT have arrived.
    end_signals: u32,
}

/// Creates a notifier that threads share. Fails when no file descriptor is left.
fn new_notifier() -> Result<Arc<EventNotifier>, ServerError> {
    EventNotifier::new().map(Arc::new).map_err(|error| ServerError::System("cannot create an eventfd", error))
}

/// Why the daemon stopped serving.
enum Ending {
    /// A signal or a client of the control socket ended it.
    Requested,
    /// Another process serves the disk.
    HandedOver(NewDaemon),
}

/// The state of a hand-over at one poll.
enum HandOverPoll {
    Running(HandOver),
    HandedOver(NewDaemon),
    Failed,
}

impl Server {
    /// Checks that the disk could be served, and starts nothing. Returns a description of the disk. Called once by main,
    /// instead of [`Server::run`].
    pub fn check(config: &Config) -> Result<String, ServerError> {
        check::check(config)
    }

    /// Serves the disk until a signal or a client ends the daemon, or until another process has taken the disk over.
    /// Called once by main, before any other thread exists.
    pub fn run(config: &Config) -> Result<(), ServerError> {
        abort_on_panic();
        run_command::end_with_parent();
        let signals = Signals::block().map_err(|error| ServerError::System("cannot receive signals", error))?;
        raise_descriptor_limit();
        let mut daemon = Daemon::start(config, signals)?;
        let describe = daemon.server.served.describe();
        log::info!("{describe}: cache mode {}, serving on {}", config.cache, config.listen);
        systemd::systemd("READY=1");
        match daemon.server.serve(&daemon.files, &mut daemon.front_ends) {
            Ok(Ending::HandedOver(new)) => {
                daemon.end_after_hand_over(new);
                Ok(())
            }
            served => daemon.end(served.map(drop)),
        }
    }

    /// Serves one front-end after another until the daemon is to end, or until another process has taken the disk over.
    fn serve(&mut self, files: &DaemonFiles, front_ends: &mut FrontEnds) -> Result<Ending, ServerError> {
        let mut hand_over: Option<HandOver> = None;
        let mut end_requested = false;
        loop {
            let mut sources = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&*self.quit, PollFlags::IN)];
            match &hand_over {
                Some(running) => sources.push(PollFd::new(&*running.done, PollFlags::IN)),
                None => {
                    sources.push(PollFd::new(&*self.requests.notifier, PollFlags::IN));
                    front_ends.watch(&files.front, &mut sources);
                }
            }
            if let Some(socket) = systemd::pending() {
                sources.push(PollFd::from_borrowed_fd(socket, PollFlags::OUT));
            }
            let deadline = hand_over.is_none().then(|| front_ends.deadline()).flatten();
            wait(&mut sources, deadline)?;
            drop(sources);
            systemd::flush();
            if let Some(signal) = self.signal()? {
                log::info!("{signal}: draining, then ending");
                end_requested = true;
            }
            if self.quit.test_and_clear() {
                log::info!("a client of the control socket sent quit: draining, then ending");
                end_requested = true;
            }
            if let Some(running) = hand_over.take() {
                match self.poll_hand_over(running, end_requested)? {
                    HandOverPoll::Running(running) => {
                        hand_over = Some(running);
                        continue;
                    }
                    HandOverPoll::HandedOver(new) => return Ok(Ending::HandedOver(new)),
                    HandOverPoll::Failed => {}
                }
            }
            if end_requested {
                return Ok(Ending::Requested);
            }
            if let Some(request) = self.requests.take() {
                match HandOver::start(request, &self.served, &files.to_inherit(), &self.requests) {
                    Ok(started) => hand_over = Some(started),
                    Err(reason) => hand_over::record_failure(&self.requests, &reason),
                }
                continue;
            }
            front_ends.poll(&files.front)?;
        }
    }

    /// Checks whether a hand-over has ended, and cancels it if the daemon is to end. Never blocks.
    fn poll_hand_over(&self, running: HandOver, end_requested: bool) -> Result<HandOverPoll, ServerError> {
        if end_requested {
            running.cancel();
        }
        if self.end_signals > 1 {
            return Err(ServerError::Interrupted(self.describe_undone(Signal::SIGTERM, false)));
        }
        if !running.done.test_and_clear() {
            return Ok(HandOverPoll::Running(running));
        }
        Ok(match running.outcome() {
            HandOverOutcome::HandedOver(new) => HandOverPoll::HandedOver(new),
            HandOverOutcome::Failed(reason) => {
                hand_over::record_failure(&self.requests, &reason);
                HandOverPoll::Failed
            }
        })
    }

    /// Returns the next signal, if one has arrived.
    fn signal(&mut self) -> Result<Option<Signal>, ServerError> {
        let signal = self.signals.next().map_err(|error| ServerError::System("cannot receive signals", error))?;
        // Other signals repeat without an operator who insists: a terminal that closes sends SIGHUP twice, and the kernel
        // sends SIGXCPU every second.
        if matches!(signal, Some(Signal::SIGTERM | Signal::SIGINT)) {
            self.end_signals += 1;
        }
        Ok(signal)
    }

    /// Completes the requests in flight and syncs. A thread does this, so that main can react to a second signal.
    fn end(&mut self) -> Result<(), ServerError> {
        let (sender, outcome) = mpsc::channel();
        let finished = new_notifier()?;
        let drained = Arc::new(AtomicBool::new(false));
        let work = {
            let (served, finished, drained) = (Arc::clone(&self.served), Arc::clone(&finished), Arc::clone(&drained));
            move || {
                served.shutdown();
                drained.store(true, Ordering::Relaxed);
                // This fails if main has returned after a second signal.
                let _ = sender.send(served.sync());
                finished.notify();
            }
        };
        let mut thread = match thread::Builder::new().name("end".into()).spawn(work.clone()) {
            Ok(thread) => Some(thread),
            Err(error) => {
                log::warn!(
                    "cannot start a thread for the end ({error}): a second signal has no effect until it is over"
                );
                work();
                None
            }
        };
        // This drops the second sender, which would prevent the channel from closing.
        drop(work);
        loop {
            wait(&mut [PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&*finished, PollFlags::IN)], None)?;
            if let Ok(result) = outcome.try_recv() {
                // The thread has sent its result and releases the image. A panic would have ended the process.
                let _ = thread.take().map(thread::JoinHandle::join);
                let image = self.served.describe();
                result.map_err(|error| ServerError::Sync(image.clone(), error))?;
                log::info!("{image}: drained and synced");
                return Ok(());
            }
            if let Some(signal) = self.signal()?
                && self.end_signals > 1
            {
                return Err(ServerError::Interrupted(self.describe_undone(signal, drained.load(Ordering::Relaxed))));
            }
        }
    }

    /// Describes what a second signal left undone.
    fn describe_undone(&self, signal: Signal, drained: bool) -> String {
        let what = match drained {
            true => "drained, but the final sync had not finished".to_string(),
            false => format!("neither drained ({} requests in flight) nor synced", self.served.in_flight()),
        };
        format!(
            "{signal} again while ending: ended at once. {}: {what}; what the guest wrote since its last flush may be \
             lost if the host fails now",
            self.served.describe()
        )
    }
}

/// Writes what is left of the log, and ends the process. Called last by main.
///
/// exit(3) would run the destructors of static variables in libraries. librbd's and librados' threads run as long as an image is open
/// or a call to a cluster hangs, and abort when they find their options destroyed.
pub fn exit(status: u8) -> ! {
    logging::finish();
    syscalls::exit(status.into())
}

/// Waits until a source is ready or the deadline has passed. The caller then checks each source itself, without blocking.
fn wait(sources: &mut [PollFd<'_>], deadline: Option<Instant>) -> Result<(), ServerError> {
    poll_until(sources, deadline).map(drop).map_err(|error| ServerError::System("cannot wait for front-ends", error))
}

/// Makes a panic in any thread end the process; see this module's head.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        report(panic);
        log::error!(
            "a bug: the daemon ends at once, so that no guest hangs silently. No further request was acknowledged. Start \
             the daemon again (QEMU reconnects if its chardev has reconnect-ms=) and report the lines above"
        );
        logging::finish();
        std::process::abort();
    }));
}

/// Logs what Rust's standard hook prints. That hook could block, if the reader of standard error does not read.
fn report(panic: &std::panic::PanicHookInfo<'_>) {
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
    let place = panic.location().map(ToString::to_string).unwrap_or_default();
    let thread = thread::current();
    let name = thread.name().unwrap_or("<unnamed>");
    log::error!("thread '{name}' panicked at {place}: {}", text.unwrap_or("no text"));
    let backtrace = std::backtrace::Backtrace::capture();
    if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
        backtrace.to_string().lines().for_each(|line| log::error!("{line}"));
    }
}

/// Raises the soft limit of open files to the hard limit. Each virtqueue needs several descriptors, and a front-end may
/// start hundreds of virtqueues.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    if let Err(errno) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        log::warn!("cannot raise the limit of open files (RLIMIT_NOFILE) from {:?}: {errno}", limit.current);
    }
}

#[cfg(test)]
mod tests;
