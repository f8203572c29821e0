//! Accepts the clients of one export until it is over, or until no client has been connected for a while.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::protocol::{BASE_ALLOCATION, Export};
use super::session::{self, Activity, ClientTimeouts};
use crate::backend::point_in_time::InstantReader;
use crate::base::rate_limit::{COPY_LOG, log_limited};
use crate::base::sync::EventNotifier;
use crate::base::wait::poll_until;

/// The most clients. Others wait in the socket's queue until one leaves, as with `max-connections` of QEMU's NBD server, or
/// until one has been silent for [`ClientTimeouts::silence`].
const MAX_CLIENTS: usize = 16;

/// How long the clients of an export that is over are told so before they are disconnected.
const FAREWELL: Duration = Duration::from_secs(2);

/// How long no client is accepted after file descriptors or threads ran out.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// What a server serves.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The export's name.
    pub name: String,
    /// The export ends when no client has been connected for this long.
    pub idle: Duration,
    /// How long its clients may take.
    pub timeouts: ClientTimeouts,
}

/// A client that is served by a thread of its own.
struct Client {
    /// Its socket, to end the thread's waits.
    socket: Arc<UnixStream>,
    gone: Arc<AtomicBool>,
    activity: Arc<Activity>,
    /// Its place was given to another client.
    displaced: bool,
}

/// Serves the instant of `reader` to the clients of `listener`, in threads of its own, until the export is over. Nothing is
/// accepted before the instant. Fails when no thread or descriptor is left.
pub fn start(listener: UnixListener, reader: InstantReader, options: ServerOptions) -> io::Result<()> {
    let export = Export { name: options.name.clone(), size: reader.size(), contexts: vec![BASE_ALLOCATION.to_owned()] };
    let left = Arc::new(EventNotifier::new()?);
    let server = Server {
        listener,
        reader,
        options,
        export: Arc::new(export),
        left,
        clients: Vec::new(),
        accept_again: None,
        served_any: Arc::default(),
    };
    thread::Builder::new().name("export-accept".into()).spawn(move || server.run())?;
    Ok(())
}

struct Server {
    listener: UnixListener,
    reader: InstantReader,
    options: ServerOptions,
    export: Arc<Export>,
    /// Notified when a client's thread ends.
    left: Arc<EventNotifier>,
    clients: Vec<Client>,
    accept_again: Option<Instant>,
    /// A client has begun to use the export: it has negotiated.
    served_any: Arc<AtomicBool>,
}

impl Server {
    fn run(mut self) {
        let mut idle_since = Instant::now();
        loop {
            let is_prepared = self.reader.is_prepared();
            let now = Instant::now();
            self.clients.retain(|client| !client.gone.load(Ordering::Acquire));
            if is_prepared || !self.clients.is_empty() {
                idle_since = now;
            }
            if self.reader.is_over() {
                break;
            }
            let idle_end = idle_since + self.options.idle;
            if idle_end <= now {
                self.end_idle();
                break;
            }
            match self.wait(is_prepared, idle_end) {
                Ok(false) => {}
                Ok(true) if self.is_full() => self.displace_silent(),
                Ok(true) => self.accept(),
                Err(error) => {
                    self.reader.fail(&format!("cannot wait for its clients ({error}); see the daemon's log"));
                    break;
                }
            }
        }
        let Server { listener, mut clients, left, reader, .. } = self;
        // No new client. The others' requests are replied to with the reason of the end ("Terminating the transmission
        // phase"), for a while.
        drop(listener);
        let end = Instant::now() + FAREWELL;
        while !clients.is_empty() && Instant::now() < end {
            if poll_until(&mut [PollFd::new(&*left, PollFlags::IN)], Some(end)).is_err() {
                break;
            }
            left.test_and_clear();
            clients.retain(|client| !client.gone.load(Ordering::Acquire));
        }
        for client in &clients {
            // It may be gone.
            let _ = client.socket.shutdown(Shutdown::Both);
        }
        log_limited!(COPY_LOG, Info, "{}: no client is served any more", reader.name());
    }

    fn end_idle(&self) {
        if self.served_any.load(Ordering::Acquire) {
            return self.reader.complete();
        }
        let idle = self.options.idle;
        self.reader.fail(&format!("no client has used it within {idle:?}; connect sooner, or allow more (--idle)"));
    }

    fn is_full(&self) -> bool {
        self.clients.len() >= MAX_CLIENTS
    }

    /// The time from which a client that waits is accepted or gets the place of a silent one. `None`: when a client has left.
    fn accept_from(&self) -> Option<Instant> {
        let place = match self.is_full() {
            false => Instant::now(),
            // One at a time: its place is free as soon as its thread has ended.
            true if self.clients.iter().any(|client| client.displaced) => return None,
            true => self.clients.iter().map(|client| client.activity.last()).min()? + self.options.timeouts.silence,
        };
        Some(self.accept_again.map_or(place, |again| again.max(place)))
    }

    /// Disconnects the client that has been silent for longest. Its thread then ends.
    fn displace_silent(&mut self) {
        let Some(client) = self.clients.iter_mut().min_by_key(|client| client.activity.last()) else { return };
        client.displaced = true;
        // It may be gone.
        let _ = client.socket.shutdown(Shutdown::Both);
        log_limited!(
            COPY_LOG,
            Warn,
            "{}: a silent client is disconnected, because {MAX_CLIENTS} are served and another waits",
            self.reader.name()
        );
    }

    /// Sleeps until a client comes or leaves, the instant changes, or there is something to do by time. Returns whether a
    /// client waits that may be accepted, or that may have the place of a silent one.
    fn wait(&self, is_prepared: bool, idle_end: Instant) -> io::Result<bool> {
        let changed = self.reader.changed();
        let mut sources = vec![PollFd::new(changed, PollFlags::IN), PollFd::new(&*self.left, PollFlags::IN)];
        let accept_from = self.accept_from().filter(|_| !is_prepared);
        let accepts = accept_from.is_some_and(|from| from <= Instant::now());
        if accepts {
            sources.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        // While a client is connected the idle time does not run, and its end says when to look again.
        let until = accept_from.filter(|_| !accepts).map_or(idle_end, |from| from.min(idle_end));
        poll_until(&mut sources, Some(until))?;
        // Whoever made the socket has shut it down. accept(2) only says that there is no client.
        let is_shut =
            |source: &PollFd<'_>| source.revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
        if sources.get(2).is_some_and(is_shut) {
            self.reader.fail("its socket was shut down, so no client can connect any more");
        }
        let client_waits = sources.get(2).is_some_and(|source| source.revents().contains(PollFlags::IN));
        changed.test_and_clear();
        self.left.test_and_clear();
        Ok(client_waits)
    }

    fn accept(&mut self) {
        match accept_now(&self.listener) {
            Ok(stream) => {
                if let Err(error) = self.serve(stream) {
                    self.pause(&error);
                }
            }
            Err(error) => match error.kind() {
                // There is no client, it has disconnected already, or a signal came.
                ErrorKind::WouldBlock | ErrorKind::ConnectionAborted | ErrorKind::Interrupted => {}
                _ => self.pause(&error),
            },
        }
    }

    fn pause(&mut self, error: &io::Error) {
        log_limited!(
            COPY_LOG,
            Warn,
            "{}: cannot accept a client, trying again in a second: {error}",
            self.reader.name()
        );
        self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
    }

    fn serve(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        let socket = Arc::new(stream);
        let stream = Arc::clone(&socket);
        let gone = Arc::new(AtomicBool::new(false));
        let activity = Arc::new(Activity::new());
        let (is_gone, left) = (Arc::clone(&gone), Arc::clone(&self.left));
        let (reader, export, negotiated) =
            (self.reader.clone(), Arc::clone(&self.export), Arc::clone(&self.served_any));
        let (timeouts, noted) = (self.options.timeouts, Arc::clone(&activity));
        thread::Builder::new().name("export-client".into()).spawn(move || {
            reader.count_client(1);
            session::serve(&stream, &reader, export, timeouts, &noted, &negotiated);
            drop(stream);
            reader.count_client(-1);
            is_gone.store(true, Ordering::Release);
            left.notify();
        })?;
        self.clients.push(Client { socket, gone, activity, displaced: false });
        Ok(())
    }
}

/// Accepts a client that waits, or fails at once when another process that has the socket was faster. O_NONBLOCK is the
/// socket's, and the socket its maker's too, so it is set for the time of the call alone.
fn accept_now(listener: &UnixListener) -> io::Result<UnixStream> {
    let flags = fcntl_getfl(listener)?;
    if flags.contains(OFlags::NONBLOCK) {
        return listener.accept().map(|(stream, _)| stream);
    }
    fcntl_setfl(listener, flags | OFlags::NONBLOCK)?;
    let accepted = listener.accept();
    fcntl_setfl(listener, flags)?;
    accepted.map(|(stream, _)| stream)
}
