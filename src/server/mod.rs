//! The daemon's life: what is opened in which order, who is served, and how it ends.
//!
//! Order: the inherited socket and the group are looked at, the image is opened and checked, the control socket is
//! bound, the vhost-user socket is bound, the pid file is written, the sandbox is entered. The vhost-user socket comes
//! after whatever may take time or fail, since a listener that does not answer freezes QEMU. The main thread then waits
//! for front-ends, signals and the control socket's `quit`; it never waits for I/O of the image, except at the very
//! end.
//!
//! A panic in any thread ends the process at once (SIGABRT): the front-end sees that its server is gone and its QEMU
//! reconnects to the next one, while a guest whose ring has no thread would hang and nobody would know why.

mod daemon;
mod files;
mod front_ends;
mod hand_over;
mod inherited;
pub mod permissions;
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
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::Value;

use crate::base::logging;
use crate::base::pid_file::PidFileError;
use crate::base::signals::Signals;
use crate::base::sync::Bell;
use crate::base::unix_listener;
use crate::base::unix_listener::BindError;
use crate::config::Config;
use crate::disk::RingStatus;
use crate::sandbox::SandboxError;
use crate::upgrade::DiskFacts;
use crate::virtio::SessionEnd;
use crate::virtio::device::hand_over::{HandedOver, Steps};
use crate::virtio::vhost_user::save_restore::SavedSession;
use daemon::Daemon;
use files::Files;
use front_ends::FrontEnds;
use hand_over::{HandOver, NewDaemon, Outcome, Requests};
use socket::SocketError;
use take_over::TakeOverError;

/// The disk as the server drives it.
pub(crate) trait Served: Send + Sync {
    /// Speaks vhost-user until the front-end leaves, breaks the protocol, or `shutdown`; when it returns, nothing of
    /// this front-end is in flight. Tells why it ended. In a thread of its own; never twice at a time.
    fn serve(&self, stream: UnixStream) -> io::Result<SessionEnd>;

    /// Whether the front-end that is served has sent a valid message. Main.
    fn has_spoken(&self) -> bool {
        true
    }

    /// Takes no more requests, now or later, and returns when those taken are answered. Once, at the end.
    fn shutdown(&self);

    /// Makes everything written durable, in every mode. After `shutdown`.
    fn sync(&self) -> io::Result<()>;

    /// The image and how it is open, in one line.
    fn describe(&self) -> String;

    /// Requests taken and not yet answered.
    fn in_flight(&self) -> u64;

    /// The image, and what the guest was told of it. `None`: it cannot go on in another process.
    fn facts(&self) -> Option<DiskFacts>;

    /// Syncs ahead of [`Served::hand_over`], while requests are served. Its thread.
    fn sync_ahead(&self) -> io::Result<()>;

    /// Brings the disk to a stand, durable, for another process to go on with; no front-end is begun with meanwhile. What
    /// is in flight has `timeout` to finish. Errors: why it goes on here. A thread of its own.
    fn hand_over(&self, timeout: Duration) -> Result<HandedOver, String>;

    /// Takes what keeps others from the image, which the process before us gave up. Main.
    fn take_over(&self) -> io::Result<()>;

    /// Goes on from what the process before us counted. Main, before [`Served::restore_session`].
    fn go_on_counting(&self, _before: &[RingStatus]) {}

    /// Gives it up again, since the other process goes on after all. Main.
    fn give_back(&self);

    /// [`Served::serve`] for a connection that another process served. Its thread.
    fn restore_session(&self, moved: SavedSession, steps: &Steps) -> io::Result<SessionEnd>;
}

/// Who holds the disk still, and a control socket if there is one, until it is dropped, which waits for its thread.
pub(crate) trait Control {
    /// The disk is ours now, as it was another process's: its clients are served on `listener`, `figures` are in the
    /// status, and an attendant may be missed.
    fn take_over(&self, listener: Option<UnixListener>, figures: Value, misses_attendant: bool) -> io::Result<()>;
}

/// Why the daemon could not start, or did not end well. Each text names the thing, the cause and the mend.
#[derive(Debug)]
pub enum ServerError {
    /// The vhost-user socket.
    Socket(SocketError),
    /// The control socket.
    Control(BindError),
    /// The control thread.
    ControlThread(io::Error),
    /// The image.
    Image(Box<dyn Error + Send + Sync>),
    /// The pid file.
    PidFile(PidFileError),
    /// The sandbox.
    Sandbox(SandboxError),
    /// A descriptor, or poll(2); what for.
    System(&'static str, io::Error),
    /// The final sync failed; of which image.
    Sync(String, io::Error),
    /// Told a second time to end while ending; what was left undone.
    Impatient(String),
    /// The guest stays with the daemon that it was to be taken over from.
    TakeOver(TakeOverError),
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServerError::Socket(error) => error.fmt(f),
            ServerError::Control(error) => write!(f, "--control-path: {error}"),
            ServerError::ControlThread(error) => write!(f, "cannot start the control thread: {error}"),
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
            ServerError::Impatient(undone) => f.write_str(undone),
            ServerError::TakeOver(error) => error.fmt(f),
        }
    }
}

impl Error for ServerError {}

/// The daemon.
pub struct Server {
    served: Arc<dyn Served>,
    signals: Signals,
    /// Rung by the control socket's `quit`.
    quit: Arc<Bell>,
    /// Who wants to take over.
    requests: Arc<Requests>,
    /// Signals seen that ask for an end and count.
    asked: u32,
}

/// One that threads share.
fn new_bell() -> Result<Arc<Bell>, ServerError> {
    Bell::new().map(Arc::new).map_err(|error| ServerError::System("cannot make an eventfd", error))
}

/// Why the daemon serves nobody any more.
enum Ending {
    /// It was told to end.
    Told,
    /// Another process has the disk.
    HandedOver(NewDaemon),
}

/// A hand-over, looked at.
enum HandOverPoll {
    Lasts(HandOver),
    Gone(NewDaemon),
    Stayed,
}

impl Server {
    /// Serves the disk until told to end, or until another process has it. Called by main, once, before any other thread
    /// exists.
    pub fn run(config: &Config) -> Result<(), ServerError> {
        abort_on_panic();
        let signals = Signals::block().map_err(|error| ServerError::System("cannot receive signals", error))?;
        raise_descriptor_limit();
        let mut daemon = Daemon::start(config, signals)?;
        let describe = daemon.server.served.describe();
        log::info!("{describe}: cache mode {}, serving on {}", config.cache, config.listen);
        systemd::systemd("READY=1");
        match daemon.server.serve(&daemon.files, &mut daemon.front_ends) {
            Ok(Ending::HandedOver(successor)) => {
                daemon.leave(successor);
                Ok(())
            }
            served => daemon.end(served.map(drop)),
        }
    }

    /// Serves one front-end after another until told to end, or until another process has the disk.
    fn serve(&mut self, files: &Files, front_ends: &mut FrontEnds) -> Result<Ending, ServerError> {
        let mut handing: Option<HandOver> = None;
        let mut told_to_end = false;
        loop {
            let mut sources = vec![PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&*self.quit, PollFlags::IN)];
            match &handing {
                Some(handing) => sources.push(PollFd::new(&*handing.done, PollFlags::IN)),
                None => {
                    sources.push(PollFd::new(&*self.requests.bell, PollFlags::IN));
                    front_ends.watch(&files.front, &mut sources);
                }
            }
            if let Some(socket) = systemd::pending() {
                sources.push(PollFd::from_borrowed_fd(socket, PollFlags::OUT));
            }
            let deadline = handing.is_none().then(|| front_ends.deadline()).flatten();
            wait(&mut sources, deadline)?;
            drop(sources);
            systemd::flush();
            if let Some(signal) = self.signal()? {
                log::info!("{signal}: draining, then ending");
                told_to_end = true;
            }
            if self.quit.was_rung() {
                log::info!("told to quit by the control socket: draining, then ending");
                told_to_end = true;
            }
            if let Some(running) = handing.take() {
                match self.tend_hand_over(running, told_to_end)? {
                    HandOverPoll::Lasts(running) => {
                        handing = Some(running);
                        continue;
                    }
                    HandOverPoll::Gone(successor) => return Ok(Ending::HandedOver(successor)),
                    HandOverPoll::Stayed => {}
                }
            }
            if told_to_end {
                return Ok(Ending::Told);
            }
            if let Some(asked) = self.requests.take() {
                match HandOver::start(asked, &self.served, &files.estate(), &self.requests) {
                    Ok(started) => handing = Some(started),
                    Err(why) => hand_over::stayed(&self.requests, &why),
                }
                continue;
            }
            front_ends.tend(&files.front)?;
        }
    }

    /// Looks how far a hand-over is. Never blocks.
    fn tend_hand_over(&self, running: HandOver, told_to_end: bool) -> Result<HandOverPoll, ServerError> {
        if told_to_end {
            running.cancel();
        }
        if self.asked > 1 {
            return Err(ServerError::Impatient(self.undone(Signal::SIGTERM, false)));
        }
        if !running.done.was_rung() {
            return Ok(HandOverPoll::Lasts(running));
        }
        Ok(match running.outcome() {
            Outcome::Gone(successor) => HandOverPoll::Gone(successor),
            Outcome::Stayed(why) => {
                hand_over::stayed(&self.requests, &why);
                HandOverPoll::Stayed
            }
        })
    }

    /// The signal that came, if one did.
    fn signal(&mut self) -> Result<Option<Signal>, ServerError> {
        let signal = self.signals.next().map_err(|error| ServerError::System("cannot receive signals", error))?;
        // A terminal that closes sends SIGHUP twice, and the kernel SIGXCPU every second: that is not impatience.
        if matches!(signal, Some(Signal::SIGTERM | Signal::SIGINT)) {
            self.asked += 1;
        }
        Ok(signal)
    }

    /// Finishes what was taken and syncs, in a thread, so that a second signal is heard meanwhile.
    fn end(&mut self) -> Result<(), ServerError> {
        let (sender, outcome) = mpsc::channel();
        let finished = new_bell()?;
        let drained = Arc::new(AtomicBool::new(false));
        let work = {
            let (served, finished, drained) = (Arc::clone(&self.served), Arc::clone(&finished), Arc::clone(&drained));
            move || {
                served.shutdown();
                drained.store(true, Ordering::Relaxed);
                // Nobody listens any more after a second signal.
                let _ = sender.send(served.sync());
                finished.ring();
            }
        };
        let mut thread = match thread::Builder::new().name("end".into()).spawn(work.clone()) {
            Ok(thread) => Some(thread),
            Err(error) => {
                log::warn!("no thread to end in ({error}): a second signal will not be heard");
                work();
                None
            }
        };
        // The other sender would keep the channel open.
        drop(work);
        loop {
            wait(&mut [PollFd::new(&self.signals, PollFlags::IN), PollFd::new(&*finished, PollFlags::IN)], None)?;
            if let Ok(result) = outcome.try_recv() {
                // It has said its last word, and lets go of the image. A panic would have ended the process.
                let _ = thread.take().map(thread::JoinHandle::join);
                let image = self.served.describe();
                result.map_err(|error| ServerError::Sync(image.clone(), error))?;
                log::info!("{image}: drained and synced");
                return Ok(());
            }
            if let Some(signal) = self.signal()?
                && self.asked > 1
            {
                return Err(ServerError::Impatient(self.undone(signal, drained.load(Ordering::Relaxed))));
            }
        }
    }

    fn undone(&self, signal: Signal, drained: bool) -> String {
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

/// Waits until a source is ready or the deadline has passed; each source is then asked by itself, without blocking.
fn wait(sources: &mut [PollFd<'_>], deadline: Option<Instant>) -> Result<(), ServerError> {
    let timeout = deadline.map(|deadline| {
        // A millisecond more, so that it has passed when poll returns.
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
    });
    match poll(sources, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(ServerError::System("cannot wait for front-ends", errno.into())),
    }
}

/// See this module's head.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        report(panic);
        log::error!(
            "a bug: the daemon ends at once so that no guest hangs silently; nothing more was acknowledged. Start it \
             again (QEMU reconnects if told to) and report the lines above"
        );
        logging::finish();
        std::process::abort();
    }));
}

/// Logs what the standard hook prints: it would wait for whoever reads standard error.
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

/// A ring needs a handful of descriptors and a front-end may ask for hundreds of rings.
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
