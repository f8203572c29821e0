//! Accepts front-ends and serves one at a time. A second front-end is turned away at once, because it would otherwise wait
//! in its handshake with its QEMU frozen. If the first one has hung up and is only being drained, the second one waits
//! for the end of that.
//!
//! A connection is not replaced any more once it has sent a valid vhost-user message. Until then, later connections are
//! candidates: the first candidate that sends such a message replaces the current connection.

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
use rustix::event::{PollFd, PollFlags};

use super::socket::FrontSocket;
use super::{Served, ServerError, new_notifier};
use crate::base::rate_limit::{FRONT_END_LOG, LogLimit, log_limited};
use crate::base::sync::EventNotifier;
use crate::base::wait::is_ready;
use crate::virtio::SessionEnd;
use crate::virtio::device::hand_over::Steps;
use crate::virtio::vhost_user::save_restore::SavedSession;
use candidate::{Candidate, FirstBytes, MAX_CANDIDATES};
use failures::FrontEndFailures;

/// How long to wait before the next accept when the process or the system is out of descriptors or memory.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);
/// While front-ends fail repeatedly for one reason, a new one is logged as connected after this delay.
const ANNOUNCE_DELAY: Duration = Duration::from_secs(2);

/// How long a front-end may send nothing before that is logged. QEMU sends its first message as soon as it has connected.
const SILENCE_TIMEOUT: Duration = Duration::from_secs(10);

const ONE_AT_A_TIME: &str = "a disk serves one at a time";

/// The front-end that is served, and the connections that may replace it. Owned by the main thread.
pub(super) struct FrontEnds {
    served: Arc<dyn Served>,
    /// The front-end's thread notifies at its end.
    session_ended: Arc<EventNotifier>,
    current: Option<FrontEnd>,
    /// Oldest first. Empty unless `current` has sent nothing yet.
    candidates: Vec<Candidate>,
    /// The candidate that is served when `current` is drained.
    next: Option<Candidate>,
    failures: Arc<Mutex<FrontEndFailures>>,
    turned_away: LogLimit,
}

/// The front-end that is served, and its thread.
struct FrontEnd {
    /// A duplicate of the connection, to detect that the front-end hangs up. It is dropped as soon as the thread has
    /// ended: the front-end would not see that the daemon hung up while a duplicate is open.
    connection: UnixStream,
    /// The connected process, for the log.
    peer: String,
    thread: JoinHandle<()>,
    /// The front-end hung up, or it was silent and another replaces it; its requests are being drained.
    draining: bool,
    /// When to log that the front-end is connected; `None` once that is logged.
    announce_at: Option<Instant>,
    /// When to log that the front-end has sent nothing; `None` once that is logged, and if it was taken over.
    silent_until: Option<Instant>,
}

impl FrontEnds {
    pub(super) fn new(served: Arc<dyn Served>) -> Result<Self, ServerError> {
        Ok(FrontEnds {
            served,
            session_ended: new_notifier()?,
            current: None,
            candidates: Vec::new(),
            next: None,
            failures: Arc::default(),
            turned_away: LogLimit::of(10, Duration::from_secs(600)),
        })
    }

    /// Adds the descriptors that the main thread must poll.
    pub(super) fn watch<'a>(&'a self, socket: &'a FrontSocket, sources: &mut Vec<PollFd<'a>>) {
        sources.push(PollFd::new(&*self.session_ended, PollFlags::IN));
        match &self.current {
            None => sources.push(PollFd::new(socket, PollFlags::IN)),
            Some(current) if !current.draining => {
                sources.push(PollFd::new(socket, PollFlags::IN));
                sources.push(PollFd::new(&current.connection, PollFlags::RDHUP));
                sources.extend(self.candidates.iter().map(|candidate| PollFd::new(candidate, PollFlags::IN)));
            }
            // While the current one is drained, its hang-up is known and no new connection is accepted.
            Some(_) => {}
        }
    }

    /// When [`FrontEnds::poll`] must be called even if no descriptor is ready.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let current = self.current.as_ref().filter(|current| !current.draining)?;
        let silent_until = current.silent_until.filter(|_| !self.served.has_received_message());
        self.candidates.iter().map(|candidate| candidate.deadline).chain(current.announce_at).chain(silent_until).min()
    }

    /// Handles new connections, hang-ups and the ends of sessions. Never blocks, except for [`ACCEPT_RETRY_DELAY`].
    pub(super) fn poll(&mut self, socket: &FrontSocket) -> Result<(), ServerError> {
        if self.session_ended.test_and_clear() {
            self.join();
            let next = self.next.take().or_else(|| (!self.candidates.is_empty()).then(|| self.candidates.remove(0)));
            if let Some(Candidate { connection, peer, .. }) = next {
                self.admit(connection, peer);
            }
        }
        // This precedes the accept: a front-end that hung up and reconnects is served, or waits, but is not turned away.
        if let Some(current) = self.current.as_mut().filter(|current| !current.draining)
            && hung_up(&current.connection)
        {
            log::debug!("the front-end ({}) hung up: draining", current.peer);
            current.draining = true;
        }
        self.poll_candidates(Instant::now());
        if self.current.as_ref().is_some_and(|current| current.draining) {
            return Ok(());
        }
        self.announce(Instant::now());
        self.report_silence(Instant::now());
        match socket.accept() {
            Ok(connection) => self.sort_in(connection),
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
                        "cannot accept a front-end yet: {error}; retrying; if this lasts, raise RLIMIT_NOFILE"
                    );
                    thread::sleep(ACCEPT_RETRY_DELAY);
                }
                _ => return Err(ServerError::System("cannot accept front-ends any more", error)),
            },
        }
        Ok(())
    }

    /// Serves a new connection, makes it a candidate, or turns it away.
    pub(super) fn sort_in(&mut self, connection: UnixStream) {
        let peer = peer(&connection);
        let Some(current) = self.current.as_mut() else { return self.admit(connection, peer) };
        // The front-end may have hung up since the last check, and this may be the same QEMU, which reconnects.
        if hung_up(&current.connection) {
            current.draining = true;
            self.next = Some(Candidate::new(connection, peer));
            return;
        }
        if self.served.has_received_message() {
            return self.turn_away(&peer, ONE_AT_A_TIME);
        }
        if self.candidates.len() == MAX_CANDIDATES {
            let oldest = self.candidates.remove(0);
            self.turn_away(&oldest.peer, "it sent nothing, and too many others wait");
        }
        self.candidates.push(Candidate::new(connection, peer));
    }

    /// Replaces a front-end that has sent nothing by the first candidate that sent a vhost-user message. Turns away the
    /// candidates that sent something else, or nothing in time.
    fn poll_candidates(&mut self, now: Instant) {
        let Some(current) = self.current.as_mut().filter(|current| !current.draining) else { return };
        let current_is_established = self.served.has_received_message();
        let mut refused = Vec::new();
        self.candidates.retain(|candidate| {
            let reason = match candidate.first_bytes() {
                FirstBytes::End => return false,
                _ if current_is_established => ONE_AT_A_TIME,
                FirstBytes::Message => return true,
                FirstBytes::None if now < candidate.deadline => return true,
                FirstBytes::None => "it sent nothing for two seconds, and a disk serves one at a time",
                FirstBytes::Other => "it does not speak vhost-user",
            };
            refused.push((candidate.peer.clone(), reason));
            false
        });
        let ready = self.candidates.iter().position(|it| it.first_bytes() == FirstBytes::Message);
        if let Some(ready) = ready {
            let next = self.candidates.remove(ready);
            log_limited!(
                FRONT_END_LOG,
                Warn,
                "the front-end ({}) sent nothing: another ({}) replaces it",
                current.peer,
                next.peer
            );
            // This ends the front-end's thread. It fails only if the front-end has hung up already.
            let _ = current.connection.shutdown(std::net::Shutdown::Both);
            current.draining = true;
            self.next = Some(next);
        }
        refused.into_iter().for_each(|(peer, reason)| self.turn_away(&peer, reason));
    }

    fn turn_away(&self, peer: &str, reason: &str) {
        let current = self.current.as_ref().map_or("none", |current| &current.peer);
        log_limited!(
            self.turned_away,
            Warn,
            "turned away a front-end ({peer}): another ({current}) is connected; {reason}"
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

    /// Logs that the front-end is connected, once `announce_at` has passed.
    fn announce(&mut self, now: Instant) {
        if let Some(current) = &mut self.current
            && current.announce_at.is_some_and(|at| at <= now)
        {
            log_limited!(FRONT_END_LOG, Info, "front-end connected ({})", current.peer);
            current.announce_at = None;
        }
    }

    /// Logs that the front-end has sent nothing, once `silent_until` has passed. QEMU 7.2 stays so for good if it loses a
    /// daemon while the guest's driver starts: `vhost_user_async_close_bh` then installs no handler for the next
    /// connection.
    fn report_silence(&mut self, now: Instant) {
        if let Some(current) = &mut self.current
            && current.silent_until.is_some_and(|until| until <= now)
        {
            current.silent_until = None;
            if !self.served.has_received_message() {
                log_limited!(
                    FRONT_END_LOG,
                    Warn,
                    "the front-end ({}) has sent no message for {} s, so the disk is not served: QEMU 7.2 does this for \
                     good once it has lost a daemon while the guest's driver started; power the guest off and start it \
                     again, or unplug and plug the disk, and use a newer QEMU. End the process if it is no QEMU",
                    current.peer,
                    SILENCE_TIMEOUT.as_secs()
                );
            }
        }
    }

    /// Serves a front-end whose session the old daemon has saved.
    pub(super) fn restore_session(&mut self, saved: SavedSession, steps: Steps) -> io::Result<()> {
        let (watched, peer) = (saved.stream.try_clone()?, peer(&saved.stream));
        let current = self.spawn(watched, &peer, move |served| served.restore_session(saved, &steps))?;
        self.current = Some(FrontEnd { announce_at: None, silent_until: None, ..current });
        Ok(())
    }

    fn start(&self, connection: UnixStream, peer: &str) -> io::Result<FrontEnd> {
        let watched = connection.try_clone()?;
        self.spawn(watched, peer, |served| served.serve(connection))
    }

    fn spawn(
        &self,
        watched: UnixStream,
        peer: &str,
        serve: impl FnOnce(&dyn Served) -> io::Result<SessionEnd> + Send + 'static,
    ) -> io::Result<FrontEnd> {
        let (served, ended, name) = (Arc::clone(&self.served), Arc::clone(&self.session_ended), peer.to_string());
        let failures = Arc::clone(&self.failures);
        let thread = thread::Builder::new().name("vhost-user".into()).spawn(move || {
            match serve(&*served) {
                Ok(SessionEnd::Left) => log_limited!(FRONT_END_LOG, Info, "front-end disconnected ({name})"),
                Ok(end) => {
                    let what = format!("front-end disconnected ({name})");
                    failures::log(&failures, Level::Info, &what, &end.to_string());
                }
                Err(error) => {
                    failures::log(&failures, Level::Warn, &format!("front-end dropped ({name})"), &error.to_string());
                }
            }
            ended.notify();
        })?;
        let now = Instant::now();
        let repeating = self.failures.lock().expect("no panic while held").are_repeating(now);
        let announce_at = if repeating { now + ANNOUNCE_DELAY } else { now };
        let peer = peer.to_string();
        let (announce_at, silent_until) = (Some(announce_at), Some(now + SILENCE_TIMEOUT));
        Ok(FrontEnd { connection: watched, peer, thread, draining: false, announce_at, silent_until })
    }

    /// Waits for the end of the current front-end's thread, if there is one.
    pub(super) fn join(&mut self) {
        if let Some(current) = self.current.take() {
            // A panic would have ended the process.
            let _ = current.thread.join();
        }
    }
}

/// Whether the other end is closed.
fn hung_up(connection: &UnixStream) -> bool {
    is_ready(connection, PollFlags::RDHUP).unwrap_or(false)
}

/// The connected process and its user, for the log (SO_PEERCRED, unix(7)).
fn peer(connection: &UnixStream) -> String {
    match getsockopt(&connection.as_fd(), PeerCredentials) {
        Ok(peer) => format!("pid {}, uid {}", peer.pid(), peer.uid()),
        Err(errno) => format!("unknown: {errno}"),
    }
}
