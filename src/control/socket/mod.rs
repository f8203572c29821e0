//! The control thread: one `poll` over the listener, the connections, the disk's events and the notices of the image's
//! back-end.

mod accept;

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::access::Access;
use super::image_notices::{ImageNotices, NoticeInbox};
use super::peer::Peer;
use super::protocol::return_types::TookOver;
use super::quiesce::{PeerId, STORE};
use super::service::{DaemonInfo, Recipient, Service, ServiceSetup, Upgrade};
use crate::base::sync::{EventNotifier, Mutex};
use crate::base::wait::poll_until;
use crate::disk::{Disk, Events};

/// The most requests of one connection that are carried out in one turn. One: a quiesce beside clients that ask for the
/// status again and again waits for one status of each, not for all that they have sent. Describing hundreds of rings takes
/// milliseconds.
const MAX_REQUESTS_PER_TURN: usize = 1;
/// How long the clients may take to read their last lines when the server stops.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(250);

/// The arguments of [`Server::start`].
pub struct Setup {
    /// The disk that clients hold.
    pub disk: Arc<dyn Disk>,
    /// The queue of the disk's events.
    pub events: Arc<Events>,
    /// The notices of the image's back-end. [`crate::backend::ImageStore::start_notices`] gets the same object.
    pub notices: Arc<ImageNotices>,
    /// How long a snapshot that another host takes of the image may wait for the disk to be quiet, before it is
    /// refused.
    pub store_timeout: Duration,
    /// Refuse snapshots that other hosts take of the image while no attendant is registered.
    pub attended: bool,
    /// How long the holders together may keep writes waiting (`--max-hold`).
    pub max_hold: Option<Duration>,
    /// The control thread calls this with the image's size in bytes when the size may have changed. It must not block
    /// on I/O.
    pub resized: Box<dyn Fn(u64) + Send>,
    /// The control thread calls this once, after the reply to a client's `quit` was queued. It must not call
    /// [`Server::stop`], which joins the control thread; another thread must.
    pub quit: Arc<dyn Fn() + Send + Sync>,
    /// The access of users other than root and the daemon's own; [`Access::All`] counts as [`Access::Operate`].
    pub others: Access,
    /// The properties of the daemon that the status shows.
    pub info: DaemonInfo,
    /// How another process takes the disk over. `None`: no process can.
    pub upgrade: Option<Upgrade>,
}

/// The running control thread, with or without a control socket. Dropping it stops the thread.
pub struct Server {
    commands: Arc<ThreadCommands>,
    thread: Option<JoinHandle<()>>,
}

/// The commands of the thread that started the control thread.
struct ThreadCommands {
    notifier: EventNotifier,
    report: Mutex<ThreadReport>,
}

#[derive(Default)]
struct ThreadReport {
    stop: bool,
    /// This process has taken the disk over from another one.
    took_over: Option<TakenOver>,
}

/// What the control thread needs when this process has taken the disk over.
struct TakenOver {
    /// The listener to serve from now on.
    listener: Option<UnixListener>,
    /// The figures of the hand-over, for the status.
    figures: TookOver,
    /// A required attendant has yet to connect to this process.
    attendant_missing: bool,
}

impl Server {
    /// Starts the control thread, named `control`. Without a listener it serves no clients, but still handles the
    /// notices of the image's back-end. The caller removes the listener's path at the end. Fails when no thread or file
    /// descriptor is left.
    pub fn start(listener: Option<UnixListener>, setup: Setup) -> io::Result<Server> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        let Setup { disk, events, notices, store_timeout, attended, max_hold, resized, quit, others, info, upgrade } =
            setup;
        let commands = Arc::new(ThreadCommands { notifier: EventNotifier::new()?, report: Mutex::default() });
        let mut control = ControlThread {
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
        let for_thread = commands.clone();
        let thread = std::thread::Builder::new().name("control".into()).spawn(move || control.run(&for_thread))?;
        Ok(Server { commands, thread: Some(thread) })
    }

    /// Serves the clients on `listener` from now on, because this process has taken the disk over. `figures`: the
    /// hand-over's figures for the status; `attendant_missing`: a required attendant has yet to connect to this
    /// process. Fails if the listener cannot be made non-blocking.
    pub fn take_over(
        &self,
        listener: Option<UnixListener>,
        figures: TookOver,
        attendant_missing: bool,
    ) -> io::Result<()> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        self.command(|report| report.took_over = Some(TakenOver { listener, figures, attendant_missing }));
        Ok(())
    }

    fn command(&self, change: impl FnOnce(&mut ThreadReport)) {
        self.commands.notifier.notify_after(|| {
            change(&mut self.commands.report.lock().expect("no panic while held"));
            true
        });
    }

    /// Ends every hold, sends the clients their last events (`RESUMED`, `SHUTDOWN`), closes the connections and joins
    /// the thread. Takes a quarter of a second at most. The control thread must not call it.
    pub fn stop(mut self) {
        self.join();
    }

    fn join(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        self.command(|report| report.stop = true);
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

/// The sources that poll reported as ready.
struct ReadySources {
    commands: bool,
    events: bool,
    image: bool,
    accept: bool,
    peers: Vec<(PeerId, PollFlags)>,
}

struct ControlThread {
    listener: Option<UnixListener>,
    accept_again: Option<Instant>,
    service: Service,
    events: Arc<Events>,
    inbox: Arc<NoticeInbox>,
    peers: Vec<Peer>,
    last_peer: PeerId,
    others: Access,
    quit: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl ControlThread {
    fn run(&mut self, commands: &ThreadCommands) {
        loop {
            let ready = match self.wait(&commands.notifier) {
                Ok(ready) => ready,
                Err(error) => {
                    log::error!("control: poll failed, the quiesce socket ends: {error}");
                    break;
                }
            };
            if ready.commands && self.carry_out_commands(commands) {
                break;
            }
            self.turn(ready);
        }
        self.finish();
    }

    /// Carries out the commands of the thread that started this one. Returns whether to stop.
    fn carry_out_commands(&mut self, commands: &ThreadCommands) -> bool {
        let ThreadReport { stop, took_over } = commands
            .notifier
            .clear_before(|| std::mem::take(&mut *commands.report.lock().expect("no panic while held")));
        if let Some(TakenOver { listener, figures, attendant_missing }) = took_over {
            self.listener = listener;
            self.service.took_over(figures, attendant_missing);
        }
        stop
    }

    fn turn(&mut self, ready: ReadySources) {
        let now = Instant::now();
        self.service.tick(now);
        if ready.events {
            self.service.disk_events(self.events.take(), now);
        }
        if ready.image {
            self.service.handle_image_notices(self.inbox.take(), now);
        }
        self.deliver();
        for (id, found) in ready.peers {
            if let Some(peer) = self.peers.iter_mut().find(|peer| peer.client.peer == id) {
                peer.ready(found);
                for descriptor in peer.take_descriptors() {
                    self.service.add_descriptor(id, descriptor);
                }
            }
        }
        let mut index = 0;
        while index < self.peers.len() {
            for _ in 0..MAX_REQUESTS_PER_TURN {
                let peer = &mut self.peers[index];
                let Some(found) = peer.next(now) else { break };
                self.service.request(peer.client, &mut peer.negotiated, found, now);
                self.deliver();
                if self.service.take_hand_over_request().is_some() {
                    self.hand_over_connection(index, now);
                    // The peer was removed; the next one is at its index.
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

    /// Passes the connection that sent `hand-over`, after its reply, to the hand-over.
    fn hand_over_connection(&mut self, index: usize, now: Instant) {
        let mut peer = self.peers.remove(index);
        // The reply fits into the socket's buffer. If it does not, the new process misses it and gives up.
        peer.flush();
        let id = peer.client.peer;
        self.service.hand_over_connection(peer.into_stream());
        self.service.peer_gone(id, now);
        self.deliver();
    }

    /// Sleeps until a source is ready or a deadline has passed.
    fn wait(&self, commands: &EventNotifier) -> io::Result<ReadySources> {
        let now = Instant::now();
        let accepting = self.accept_again.is_none_or(|again| again <= now);
        let mut fds = vec![
            PollFd::new(commands, PollFlags::IN),
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
                ids.push(peer.client.peer);
            }
        }
        let deadlines = self.peers.iter().filter_map(|peer| peer.next_turn(now));
        let deadline =
            deadlines.chain(self.service.next_deadline()).chain(self.accept_again.filter(|_| !accepting)).min();
        poll_until(&mut fds, deadline)?;
        let found: Vec<PollFlags> = fds.iter().map(PollFd::revents).collect();
        Ok(ReadySources {
            commands: !found[0].is_empty(),
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

    /// Queues the service's lines for the connections that they are for.
    fn deliver(&mut self) {
        for (to, line) in self.service.outgoing() {
            for peer in &mut self.peers {
                match to {
                    Recipient::Requester(id) if id == peer.client.peer => peer.reply(&line),
                    Recipient::One(id) if id == peer.client.peer => peer.queue(&line),
                    Recipient::All if peer.negotiated => peer.queue(&line),
                    _ => {}
                }
            }
        }
    }

    /// Writes to the connections and removes those that have ended, which may cause events for the others.
    fn sweep(&mut self, now: Instant) {
        loop {
            for peer in &mut self.peers {
                peer.flush();
            }
            let Some(index) = self.peers.iter().position(Peer::is_finished) else { return };
            let peer = self.peers.remove(index);
            self.service.peer_gone(peer.client.peer, now);
            self.deliver();
        }
    }

    /// Ends the holds and sends the clients their last lines, for [`FLUSH_TIMEOUT`] at most.
    fn finish(&mut self) {
        let now = Instant::now();
        // This thread takes no more notices from it.
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
                log::warn!("control: the peers may not have received the end of their lines: {error}");
                return;
            }
        }
    }
}
