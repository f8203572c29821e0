//! One front-end at a time. Another that connects meanwhile is turned away at once, since it would wait in its handshake
//! with its QEMU frozen; but if the first has hung up and is only being drained, the next is kept waiting for that.
//!
//! A connection keeps the place only once it has sent a valid vhost-user message. While it has not, connections that come
//! after it are candidates: the first that sends one takes the place.

mod candidate;
mod failures;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use log::Level;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::socket::FrontSocket;
use super::{Served, ServerError, new_bell};
use crate::base::rate_limit::{FRONT_END_LOG, LogLimit, log_limited};
use crate::base::sync::Bell;
use crate::virtio::SessionEnd;
use crate::virtio::device::hand_over::Steps;
use crate::virtio::vhost_user::save_restore::SavedSession;
use candidate::{Candidate, FirstBytes, MAX_CANDIDATES};
use failures::Failures;

/// How long to leave connections waiting when the process or the system is out of descriptors or memory.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// While front-ends fail again and again for one reason, one that stays connected for so long is logged.
const ANNOUNCE_DELAY: Duration = Duration::from_secs(2);

const ONE_AT_A_TIME: &str = "a disk serves one at a time";

pub(super) struct FrontEnds {
    served: Arc<dyn Served>,
    /// Rung by the front-end's thread at its end.
    left: Arc<Bell>,
    current: Option<FrontEnd>,
    /// Oldest first. Empty unless `current` has sent nothing yet.
    candidates: Vec<Candidate>,
    /// The candidate that takes the place when `current` is drained.
    next: Option<Candidate>,
    failures: Arc<Mutex<Failures>>,
    turned_away: LogLimit,
}

struct FrontEnd {
    /// The connection, to see its end; dropped when its thread is through, or the front-end would not see ours.
    connection: UnixStream,
    /// Whose it is.
    peer: String,
    thread: JoinHandle<()>,
    /// It hung up, or was silent and another takes its place, and is being drained.
    leaving: bool,
    /// When to log that it is connected, if that is not logged yet.
    announce_at: Option<Instant>,
}

impl FrontEnds {
    pub(super) fn new(served: Arc<dyn Served>) -> Result<Self, ServerError> {
        Ok(FrontEnds {
            served,
            left: new_bell()?,
            current: None,
            candidates: Vec::new(),
            next: None,
            failures: Arc::default(),
            turned_away: LogLimit::of(10, Duration::from_secs(600)),
        })
    }

    /// Adds what main must wait for.
    pub(super) fn watch<'a>(&'a self, socket: &'a FrontSocket, sources: &mut Vec<PollFd<'a>>) {
        sources.push(PollFd::new(&*self.left, PollFlags::IN));
        match &self.current {
            None => sources.push(PollFd::new(socket, PollFlags::IN)),
            Some(current) if !current.leaving => {
                sources.push(PollFd::new(socket, PollFlags::IN));
                sources.push(PollFd::new(&current.connection, PollFlags::RDHUP));
                sources.extend(self.candidates.iter().map(|candidate| PollFd::new(candidate, PollFlags::IN)));
            }
            // Neither the end that is known nor the next in the queue is news before this one is gone.
            Some(_) => {}
        }
    }

    /// When [`FrontEnds::tend`] has something to do, whatever main waits for.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let current = self.current.as_ref().filter(|current| !current.leaving)?;
        self.candidates.iter().map(|candidate| candidate.until).chain(current.announce_at).min()
    }

    /// Looks after whoever came or left. Never blocks.
    pub(super) fn tend(&mut self, socket: &FrontSocket) -> Result<(), ServerError> {
        if self.left.was_rung() {
            self.join();
            let next = self.next.take().or_else(|| (!self.candidates.is_empty()).then(|| self.candidates.remove(0)));
            if let Some(Candidate { connection, peer, .. }) = next {
                self.admit(connection, peer);
            }
        }
        // Before the listener: whoever hung up and comes again finds the place free, or waits for it.
        if let Some(current) = self.current.as_mut().filter(|current| !current.leaving)
            && hung_up(&current.connection)
        {
            log::debug!("the front-end ({}) hung up: draining", current.peer);
            current.leaving = true;
        }
        self.tend_candidates(Instant::now());
        if self.current.as_ref().is_some_and(|current| current.leaving) {
            return Ok(());
        }
        self.announce(Instant::now());
        match socket.accept() {
            Ok(connection) => self.welcome(connection),
            Err(error) => match rustix::io::Errno::from_io_error(&error) {
                Some(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Some(
                    rustix::io::Errno::MFILE
                    | rustix::io::Errno::NFILE
                    | rustix::io::Errno::NOBUFS
                    | rustix::io::Errno::NOMEM,
                ) => {
                    log_limited!(
                        FRONT_END_LOG,
                        Error,
                        "cannot accept a front-end yet: {error}; trying again (see RLIMIT_NOFILE)"
                    );
                    thread::sleep(ACCEPT_RETRY_DELAY);
                }
                _ => return Err(ServerError::System("cannot accept front-ends any more", error)),
            },
        }
        Ok(())
    }

    /// A connection that was just accepted: the front-end, a candidate, or one too many.
    fn welcome(&mut self, connection: UnixStream) {
        let peer = peer(&connection);
        if self.current.is_none() {
            return self.admit(connection, peer);
        }
        if self.served.has_spoken() {
            return self.turn_away(&peer, ONE_AT_A_TIME);
        }
        if self.candidates.len() == MAX_CANDIDATES {
            let oldest = self.candidates.remove(0);
            self.turn_away(&oldest.peer, "it said nothing, and too many others wait");
        }
        self.candidates.push(Candidate::new(connection, peer));
    }

    /// Gives the place to the first candidate that speaks vhost-user, if the front-end still says nothing. Turns away the
    /// candidates that speak something else, or nothing in time.
    fn tend_candidates(&mut self, now: Instant) {
        let Some(current) = self.current.as_mut().filter(|current| !current.leaving) else { return };
        let has_spoken = self.served.has_spoken();
        let mut refused = Vec::new();
        self.candidates.retain(|candidate| {
            let why = match candidate.first_bytes() {
                FirstBytes::End => return false,
                _ if has_spoken => ONE_AT_A_TIME,
                FirstBytes::Message => return true,
                FirstBytes::None if now < candidate.until => return true,
                FirstBytes::None => "it said nothing for two seconds, and a disk serves one at a time",
                FirstBytes::Other => "it does not speak vhost-user",
            };
            refused.push((candidate.peer.clone(), why));
            false
        });
        let speaker = self.candidates.iter().position(|it| it.first_bytes() == FirstBytes::Message);
        if let Some(speaker) = speaker {
            let next = self.candidates.remove(speaker);
            log_limited!(
                FRONT_END_LOG,
                Warn,
                "the front-end ({}) said nothing: another ({}) takes its place",
                current.peer,
                next.peer
            );
            // Its thread hears of it. Already closed by the other side is fine.
            let _ = current.connection.shutdown(std::net::Shutdown::Both);
            current.leaving = true;
            self.next = Some(next);
        }
        refused.into_iter().for_each(|(peer, why)| self.turn_away(&peer, why));
    }

    fn turn_away(&self, peer: &str, why: &str) {
        let current = self.current.as_ref().map_or("none", |current| &current.peer);
        log_limited!(
            self.turned_away,
            Warn,
            "turned away a front-end ({peer}): another ({current}) is connected; {why}"
        );
    }

    fn admit(&mut self, connection: UnixStream, peer: String) {
        match self.start(connection, &peer) {
            Ok(current) => {
                self.current = Some(current);
                self.announce(Instant::now());
            }
            Err(error) => log_limited!(
                FRONT_END_LOG,
                Error,
                "turned away a front-end ({peer}): no thread or descriptor left for it: {error}"
            ),
        }
    }

    /// Logs that the front-end is connected, when it is time.
    fn announce(&mut self, now: Instant) {
        if let Some(current) = &mut self.current
            && current.announce_at.is_some_and(|at| at <= now)
        {
            log_limited!(FRONT_END_LOG, Info, "front-end connected ({})", current.peer);
            current.announce_at = None;
        }
    }

    /// Goes on with a front-end that another process served.
    pub(super) fn restore_session(&mut self, moved: SavedSession, steps: Steps) -> io::Result<()> {
        let (watched, peer) = (moved.stream.try_clone()?, peer(&moved.stream));
        let current = self.spawn(watched, &peer, move |served| served.restore_session(moved, &steps))?;
        self.current = Some(FrontEnd { announce_at: None, ..current });
        Ok(())
    }

    fn start(&self, connection: UnixStream, peer: &str) -> io::Result<FrontEnd> {
        // Ours must not be what keeps the other's half open, nor must accept's own setting reach the handler.
        let watched = connection.try_clone()?;
        self.spawn(watched, peer, |served| served.serve(connection))
    }

    fn spawn(
        &self,
        watched: UnixStream,
        peer: &str,
        serve: impl FnOnce(&dyn Served) -> io::Result<SessionEnd> + Send + 'static,
    ) -> io::Result<FrontEnd> {
        let (served, left, name) = (Arc::clone(&self.served), Arc::clone(&self.left), peer.to_string());
        let failures = Arc::clone(&self.failures);
        let thread = thread::Builder::new().name("vhost-user".into()).spawn(move || {
            match serve(&*served) {
                Ok(end @ SessionEnd::Left) => log_limited!(FRONT_END_LOG, Info, "front-end gone ({name}): {end}"),
                Ok(end) => {
                    failures::log(&failures, Level::Info, &format!("front-end gone ({name})"), &end.to_string());
                }
                Err(error) => {
                    failures::log(&failures, Level::Warn, &format!("front-end dropped ({name})"), &error.to_string());
                }
            }
            left.ring();
        })?;
        let now = Instant::now();
        let repeats = self.failures.lock().expect("no panic while held").repeat(now);
        let announce_at = if repeats { now + ANNOUNCE_DELAY } else { now };
        let peer = peer.to_string();
        Ok(FrontEnd { connection: watched, peer, thread, leaving: false, announce_at: Some(announce_at) })
    }

    /// Waits for the thread of a front-end that is gone.
    pub(super) fn join(&mut self) {
        if let Some(current) = self.current.take() {
            // A panic would have ended the process.
            let _ = current.thread.join();
        }
    }
}

/// Whether the other end is closed.
fn hung_up(connection: &UnixStream) -> bool {
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Who is at the other end, for the log (SO_PEERCRED, unix(7)).
fn peer(connection: &UnixStream) -> String {
    match getsockopt(&connection.as_fd(), PeerCredentials) {
        Ok(peer) => format!("pid {}, uid {}", peer.pid(), peer.uid()),
        Err(errno) => format!("unknown: {errno}"),
    }
}
