//! The control thread: one `poll` over the listener, the peers, the disk's events and what its image says.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

use super::access::Access;
use super::creds::Credentials;
use super::image_notices::{ImageNotices, Inbox};
use super::peer::Peer;
use super::protocol;
use super::quiesce::{PeerId, STORE};
use super::service::{Client, Info, Recipient, Service, ServiceSetup, Upgrade};
use crate::base::rate_limit::{CONTROL_LOG, log_limited};
use crate::base::sync::{Bell, Mutex};
use crate::disk::{Disk, Events};

/// Connections at most.
const MAX_PEERS: usize = 32;
/// And at most of users beside root and the daemon's own: the operator can always reach the disk.
const MAX_OTHERS: usize = 28;
/// A client that has not even negotiated in this time gives way to a new one when all places are taken.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests of one connection in one turn.
const MAX_ACCEPTS_PER_TURN: usize = 8;
/// Accepting rests this long when file descriptors run out.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Or while another process may take the socket over.
const HAND_OVER_PAUSE: Duration = Duration::from_millis(20);
/// How long the last lines may take on their way out when the server stops.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(250);

/// What the control room is joined to.
pub struct Setup {
    /// The disk that it holds still.
    pub disk: Arc<dyn Disk>,
    /// What the disk says.
    pub events: Arc<Events>,
    /// What its image says; for [`crate::backend::Backend::start_notices`], too.
    pub notices: Arc<ImageNotices>,
    /// How long a snapshot that somebody else takes of the image may wait until the disk is still; then it is refused.
    pub store_timeout: Duration,
    /// Such a snapshot is refused while nobody attends.
    pub attended: bool,
    /// How long the holders together may keep writes waiting (`--max-hold`).
    pub max_hold: Option<Duration>,
    /// Called from the control thread when the image's size may have changed, with the size in bytes; must not block on
    /// I/O.
    pub resized: Box<dyn Fn(u64) + Send>,
    /// Called from the control thread, once, when a client asked for the daemon's end and its reply is on its way. It
    /// must not call [`Server::stop`] itself (that joins the thread) but make somebody do so.
    pub quit: Arc<dyn Fn() + Send + Sync>,
    /// What users beside root and the daemon's own may do; [`Access::All`] gives no more than [`Access::Operate`].
    pub others: Access,
    /// For people.
    pub info: Info,
    /// For a process that takes over; `None`: none can.
    pub upgrade: Option<Upgrade>,
}

/// The running control room, with or without a quiesce socket. Dropping it stops it.
pub struct Server {
    orders: Arc<ThreadCommands>,
    thread: Option<JoinHandle<()>>,
}

/// What the control thread is told by whoever started it.
struct ThreadCommands {
    bell: Bell,
    news: Mutex<ThreadReport>,
}

#[derive(Default)]
struct ThreadReport {
    stop: bool,
    /// To be served from now on; what is said in the status of how we got it; whether an attendant is missed.
    took_over: Option<(Option<UnixListener>, Value, bool)>,
}

impl Server {
    /// Serves in a thread named `control`. Without a listener nobody connects, but the image's store is answered. The
    /// listener's file is the caller's to unlink.
    ///
    /// Errors: no thread or file descriptor to be had.
    pub fn start(listener: Option<UnixListener>, setup: Setup) -> io::Result<Server> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        let Setup { disk, events, notices, store_timeout, attended, max_hold, resized, quit, others, info, upgrade } =
            setup;
        let orders = Arc::new(ThreadCommands { bell: Bell::new()?, news: Mutex::default() });
        let mut control = Control {
            listener,
            accept_again: None,
            service: Service::new(ServiceSetup {
                disk,
                info,
                inbox: notices.inbox(),
                store_timeout,
                attended,
                max_hold,
                resized,
                upgrade,
            }),
            events,
            inbox: notices.inbox(),
            peers: Vec::new(),
            last_peer: STORE,
            others,
            quit: Some(quit),
        };
        let heard = orders.clone();
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || control.run(&heard))?;
        Ok(Server { orders, thread: Some(thread) })
    }

    /// The disk is ours from now on, as it was another process's: serves its clients, too. `figures`: of the hand-over,
    /// for the status; `misses`: an attendant is missed. Errors: the listener cannot be made non-blocking.
    pub fn take_over(&self, listener: Option<UnixListener>, figures: Value, misses: bool) -> io::Result<()> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        self.order(|news| news.took_over = Some((listener, figures, misses)));
        Ok(())
    }

    fn order(&self, change: impl FnOnce(&mut ThreadReport)) {
        self.orders.bell.ring_after(|| {
            change(&mut self.orders.news.lock().expect("no panic while held"));
            true
        });
    }

    /// Ends every hold, tells the peers (`RESUMED`, `SHUTDOWN`), closes and joins the thread. Takes a quarter of a
    /// second at most. Not from the control thread.
    pub fn stop(mut self) {
        self.join();
    }

    fn join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.order(|news| news.stop = true);
        if thread.join().is_err() {
            log::error!("the control thread had panicked");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.join();
    }
}

/// What poll reported, sorted.
struct Ready {
    orders: bool,
    events: bool,
    image: bool,
    accept: bool,
    peers: Vec<(PeerId, PollFlags)>,
}

struct Control {
    listener: Option<UnixListener>,
    accept_again: Option<Instant>,
    service: Service,
    events: Arc<Events>,
    inbox: Arc<Inbox>,
    peers: Vec<Peer>,
    last_peer: PeerId,
    others: Access,
    quit: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Control {
    fn run(&mut self, orders: &ThreadCommands) {
        loop {
            let ready = match self.wait(&orders.bell) {
                Ok(ready) => ready,
                Err(error) => {
                    log::error!("control: poll failed, the quiesce socket ends: {error}");
                    break;
                }
            };
            if ready.orders && self.obey(orders) {
                break;
            }
            self.turn(ready);
        }
        self.finish();
    }

    /// Whether it is to stop.
    fn obey(&mut self, orders: &ThreadCommands) -> bool {
        let ThreadReport { stop, took_over } =
            orders.bell.silence_before(|| std::mem::take(&mut *orders.news.lock().expect("no panic while held")));
        if let Some((listener, figures, misses)) = took_over {
            self.listener = listener;
            self.service.took_over(figures, misses);
        }
        stop
    }

    fn turn(&mut self, ready: Ready) {
        let now = Instant::now();
        self.service.tick(now);
        if ready.events {
            self.service.disk_events(self.events.take(), now);
        }
        if ready.image {
            self.service.image_notes(self.inbox.take(), now);
        }
        self.deliver();
        for (id, found) in ready.peers {
            if let Some(peer) = self.peers.iter_mut().find(|peer| peer.id == id) {
                peer.ready(found);
            }
        }
        let mut index = 0;
        while index < self.peers.len() {
            for _ in 0..MAX_ACCEPTS_PER_TURN {
                let peer = &mut self.peers[index];
                let Some(found) = peer.next(now) else { break };
                let client = Client { peer: peer.id, credentials: peer.credentials, access: peer.access };
                self.service.request(client, &mut peer.negotiated, found, now);
                self.deliver();
                if self.service.hands_over().is_some() {
                    self.pass_on(index, now);
                    // The next one has its place.
                    break;
                }
            }
            index += 1;
        }
        self.sweep(now);
        if self.service.quit_asked()
            && let Some(quit) = self.quit.take()
        {
            log::info!("control: a client asked for the end of the daemon");
            quit();
        }
        if ready.accept {
            self.accept(now);
        }
    }

    /// A connection that asked for the hand-over, and has its answer, is no client any more.
    fn pass_on(&mut self, index: usize, now: Instant) {
        let mut peer = self.peers.remove(index);
        // A line on a fresh connection fits; what does not is missed by the other end, which gives up.
        peer.flush();
        let id = peer.id;
        self.service.pass_on(peer.into_stream());
        self.service.peer_gone(id, now);
        self.deliver();
    }

    /// Sleeps until something is to be done.
    fn wait(&self, orders: &Bell) -> io::Result<Ready> {
        let now = Instant::now();
        let accepting = self.accept_again.is_none_or(|again| again <= now);
        let mut fds = vec![
            PollFd::new(orders, PollFlags::IN),
            PollFd::from_borrowed_fd(self.events.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.inbox.as_fd(), PollFlags::IN),
        ];
        if let Some(listener) = self.listener.as_ref().filter(|_| accepting) {
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        let others = fds.len();
        let mut ids = Vec::with_capacity(self.peers.len());
        for peer in &self.peers {
            if let Some(flags) = peer.interest() {
                fds.push(PollFd::new(peer, flags));
                ids.push(peer.id);
            }
        }
        let deadlines = self.peers.iter().filter_map(|peer| peer.next_turn(now));
        let deadline =
            deadlines.chain(self.service.next_deadline()).chain(self.accept_again.filter(|_| !accepting)).min();
        poll_until(&mut fds, deadline)?;
        let found: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        Ok(Ready {
            orders: !found[0].is_empty(),
            events: !found[1].is_empty(),
            image: !found[2].is_empty(),
            accept: found[3..others].iter().any(|found| !found.is_empty()),
            peers: ids
                .into_iter()
                .zip(found[others..].iter().copied())
                .filter(|(_, found)| !found.is_empty())
                .collect(),
        })
    }

    /// Hands the due lines to the peers.
    fn deliver(&mut self) {
        for (to, line) in self.service.outgoing() {
            for peer in &mut self.peers {
                match to {
                    Recipient::Reply(id) if id == peer.id => peer.reply(&line),
                    Recipient::Only(id) if id == peer.id => peer.queue(&line),
                    Recipient::Everyone if peer.negotiated => peer.queue(&line),
                    _ => {}
                }
            }
        }
    }

    /// Writes, and takes leave of those who are gone. Their leaving may be news to the others.
    fn sweep(&mut self, now: Instant) {
        loop {
            for peer in &mut self.peers {
                peer.flush();
            }
            let Some(index) = self.peers.iter().position(Peer::is_over) else { return };
            let peer = self.peers.remove(index);
            self.service.peer_gone(peer.id, now);
            self.deliver();
        }
    }

    fn accept(&mut self, now: Instant) {
        self.accept_again = None;
        if self.service.is_leaving() {
            self.accept_again = Some(now + HAND_OVER_PAUSE);
            return;
        }
        // A few at a time: those who are here already come first.
        for _ in 0..MAX_ACCEPTS_PER_TURN {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((stream, _)) => self.welcome(stream, now),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        log_limited!(CONTROL_LOG, Warn, "control: cannot accept, trying again in a second: {error}");
                        self.accept_again = Some(now + ACCEPT_PAUSE);
                        return;
                    }
                    Some(libc::EAGAIN) => return,
                    // The client is gone already, or a signal came.
                    _ => {}
                },
            }
        }
    }

    fn welcome(&mut self, stream: UnixStream, now: Instant) {
        let credentials = match Credentials::of(&stream) {
            Ok(credentials) => credentials,
            Err(error) => {
                log_limited!(CONTROL_LOG, Warn, "control: a client without credentials is refused: {error}");
                return;
            }
        };
        if !self.allows(credentials) {
            log_limited!(CONTROL_LOG, Warn, "control: user {} (pid {}) is refused", credentials.uid, credentials.pid);
            let error = protocol::Error::new(
                "not-allowed",
                format!(
                    "user {} may not use this socket; be root or the daemon's user, or widen the socket's mode",
                    credentials.uid
                ),
            );
            turn_away(&stream, error);
            return;
        }
        let access = Access::of(credentials, rustix::process::geteuid().as_raw(), self.others);
        if let Some(most) = self.crowd(access)
            && !self.make_room(access, now)
        {
            log_limited!(CONTROL_LOG, Warn, "control: {most} clients are connected, another one is refused");
            let desc = format!("{most} clients are connected, which is as many as this server keeps; try again");
            turn_away(&stream, protocol::Error::new("too-many-clients", desc));
            return;
        }
        self.last_peer += 1;
        match Peer::new(self.last_peer, stream, (credentials, access), now) {
            Ok(mut peer) => {
                peer.queue(&protocol::greeting());
                peer.flush();
                self.peers.push(peer);
            }
            Err(error) => log_limited!(CONTROL_LOG, Warn, "control: a connection cannot be served: {error}"),
        }
    }

    /// Our own user and root; others if the operator widened the socket's mode, for then the file system judged them.
    fn allows(&self, peer: Credentials) -> bool {
        if peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw() {
            return true;
        }
        let address = self.listener.as_ref().and_then(|listener| listener.local_addr().ok());
        let mode = address.and_then(|address| Some(address.as_pathname()?.metadata().ok()?.permissions().mode()));
        mode.is_some_and(|mode| mode & 0o077 != 0)
    }

    /// The limit that a further client with `access` would exceed, if there is one.
    fn crowd(&self, access: Access) -> Option<usize> {
        let others = self.peers.iter().filter(|peer| peer.access < Access::All).count();
        match access {
            Access::All => (self.peers.len() >= MAX_PEERS).then_some(MAX_PEERS),
            _ if self.peers.len() >= MAX_PEERS => Some(MAX_PEERS),
            _ => (others >= MAX_OTHERS).then_some(MAX_OTHERS),
        }
    }

    /// Ends the oldest connection that never said a word, for a client with `access`: none that may do more. `false`: there
    /// is none.
    fn make_room(&mut self, access: Access, now: Instant) -> bool {
        let silent = |peer: &Peer| {
            !peer.negotiated && peer.access <= access && now.saturating_duration_since(peer.since) > NEGOTIATION_TIMEOUT
        };
        let Some(index) = self.peers.iter().position(silent) else { return false };
        let peer = self.peers.remove(index);
        self.service.peer_gone(peer.id, now);
        self.deliver();
        true
    }

    /// The last words, for as long as the peers are willing to listen but not longer than [`FLUSH_TIMEOUT`].
    fn finish(&mut self) {
        let now = Instant::now();
        // Nobody takes anything out of it any more.
        self.inbox.close();
        self.service.shutdown(now);
        self.deliver();
        let deadline = now + FLUSH_TIMEOUT;
        loop {
            for peer in &mut self.peers {
                peer.flush();
            }
            let slow = self.peers.iter().filter(|peer| peer.unsent() > 0);
            let mut fds: Vec<PollFd> = slow.map(|peer| PollFd::new(peer, PollFlags::OUT)).collect();
            if fds.is_empty() || Instant::now() >= deadline {
                return;
            }
            if let Err(error) = poll_until(&mut fds, Some(deadline)) {
                log::warn!("control: the last words may be lost: {error}");
                return;
            }
        }
    }
}

/// `poll` until a deadline; returns early, with nothing, when a signal came.
fn poll_until(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<()> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let timeout = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// One error line in place of the greeting. A fresh socket has room for it.
fn turn_away(mut stream: &UnixStream, error: protocol::Error) {
    let told =
        stream.set_nonblocking(true).and_then(|()| io::Write::write(&mut stream, &protocol::reply(None, Err(error))));
    if let Err(error) = told {
        log::debug!("control: the refused client did not wait to hear why: {error}");
    }
}
