//! One front-end at a time. Another that comes meanwhile is turned away at once, since it would wait in its handshake
//! with its QEMU frozen; but if the first has hung up and is only being drained, the next is kept waiting for that.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::socket::FrontSocket;
use super::{Served, ServerError, new_bell};
use crate::base::rate_limit::{FRONT_END_LOG, LogLimit, log_limited};
use crate::base::sync::Bell;
use crate::virtio::SessionEnd;
use crate::virtio::device::hand_over::Steps;
use crate::virtio::vhost_user::save_restore::SavedSession;

/// How long to leave connections waiting when the process or the system is out of descriptors or memory.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

pub(super) struct FrontEnds {
    served: Arc<dyn Served>,
    /// Rung by the front-end's thread at its end.
    left: Arc<Bell>,
    current: Option<FrontEnd>,
    turned_away: LogLimit,
}

struct FrontEnd {
    /// The connection, to see its end; dropped when its thread is through, or the front-end would not see ours.
    connection: UnixStream,
    /// Whose it is.
    peer: String,
    thread: JoinHandle<()>,
    /// It hung up and is being drained.
    leaving: bool,
}

impl FrontEnds {
    pub(super) fn new(served: Arc<dyn Served>) -> Result<Self, ServerError> {
        Ok(FrontEnds {
            served,
            left: new_bell()?,
            current: None,
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
            }
            // Neither the end that is known nor the next in the queue is news before this one is gone.
            Some(_) => {}
        }
    }

    /// Looks after whoever came or left. Never blocks.
    pub(super) fn tend(&mut self, socket: &FrontSocket) -> Result<(), ServerError> {
        if self.left.was_rung() {
            self.join();
        }
        // Before the listener: whoever hung up and comes again finds the place free, or waits for it.
        if let Some(current) = self.current.as_mut().filter(|current| !current.leaving)
            && hung_up(&current.connection)
        {
            log::debug!("the front-end ({}) hung up: draining", current.peer);
            current.leaving = true;
        }
        if self.current.as_ref().is_some_and(|current| current.leaving) {
            return Ok(());
        }
        match socket.accept() {
            Ok(connection) => self.admit(connection),
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

    fn admit(&mut self, connection: UnixStream) {
        let peer = peer(&connection);
        if let Some(current) = &self.current {
            log_limited!(
                self.turned_away,
                Warn,
                "turned away a front-end ({peer}): another ({}) is connected, and a disk serves one at a time",
                current.peer
            );
            return;
        }
        match self.start(connection, &peer) {
            Ok(current) => {
                log_limited!(FRONT_END_LOG, Info, "front-end connected ({peer})");
                self.current = Some(current);
            }
            Err(error) => log_limited!(
                FRONT_END_LOG,
                Error,
                "turned away a front-end ({peer}): no thread or descriptor left for it: {error}"
            ),
        }
    }

    /// Goes on with a front-end that another process served.
    pub(super) fn restore_session(&mut self, moved: SavedSession, steps: Steps) -> io::Result<()> {
        let (watched, peer) = (moved.stream.try_clone()?, peer(&moved.stream));
        self.current = Some(self.spawn(watched, &peer, move |served| served.restore_session(moved, &steps))?);
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
        let thread = thread::Builder::new().name("vhost-user".into()).spawn(move || {
            match serve(&*served) {
                Ok(why) => log_limited!(FRONT_END_LOG, Info, "front-end gone ({name}): {why}"),
                Err(error) => log_limited!(FRONT_END_LOG, Warn, "front-end dropped ({name}): {error}"),
            }
            left.ring();
        })?;
        Ok(FrontEnd { connection: watched, peer: peer.to_string(), thread, leaving: false })
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
