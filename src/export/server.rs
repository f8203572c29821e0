//! Accepts the clients of one export until it is over, or until no client has been connected for a while.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::protocol::{BASE_ALLOCATION, Export};
use super::session;
use crate::backend::point_in_time::InstantReader;
use crate::base::rate_limit::{COPY_LOG, log_limited};
use crate::base::sync::EventNotifier;

/// The most clients. Others wait in the socket's queue until one leaves, as with `max-connections` of QEMU's NBD server.
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
}

/// A client that is served by a thread of its own.
struct Client {
    /// Its socket, to end the thread's waits.
    socket: Arc<UnixStream>,
    gone: Arc<AtomicBool>,
}

/// Serves the instant of `reader` to the clients of `listener`, in threads of its own, until the export is over. Nothing is
/// accepted before the instant. Fails when no thread or descriptor is left.
pub fn start(listener: UnixListener, reader: InstantReader, options: ServerOptions) -> io::Result<()> {
    listener.set_nonblocking(true)?;
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
            if let Err(error) = self.wait(is_prepared, idle_end) {
                self.reader.fail(&format!("cannot wait for its clients ({error}); see the daemon's log"));
                break;
            }
            // The listener may wait: a client that ends makes room first.
            if !is_prepared && self.may_accept() {
                self.accept();
            }
        }
        let Server { listener, mut clients, left, reader, .. } = self;
        // No new client. The others' requests are replied to with the reason of the end ("Terminating the transmission
        // phase"), for a while.
        drop(listener);
        let end = Instant::now() + FAREWELL;
        while !clients.is_empty() && Instant::now() < end {
            let wait = end.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            if sleep(&mut [PollFd::new(&*left, PollFlags::IN)], wait).is_err() {
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

    fn may_accept(&self) -> bool {
        self.clients.len() < MAX_CLIENTS && self.accept_again.is_none_or(|again| again <= Instant::now())
    }

    /// Sleeps until a client comes or leaves, the instant changes, or there is something to do by time.
    fn wait(&self, is_prepared: bool, idle_end: Instant) -> io::Result<()> {
        let changed = self.reader.changed();
        let mut sources = vec![PollFd::new(changed, PollFlags::IN), PollFd::new(&*self.left, PollFlags::IN)];
        if !is_prepared && self.may_accept() {
            sources.push(PollFd::new(&self.listener, PollFlags::IN));
        }
        // While a client is connected the idle time does not run, and its end says when to look again.
        let until =
            self.accept_again.filter(|again| *again > Instant::now()).map_or(idle_end, |again| again.min(idle_end));
        let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        sleep(&mut sources, left)?;
        // Whoever made the socket has shut it down. accept(2) only says that there is no client.
        let is_shut =
            |source: &PollFd<'_>| source.revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL);
        if sources.get(2).is_some_and(is_shut) {
            self.reader.fail("its socket was shut down, so no client can connect any more");
        }
        changed.test_and_clear();
        self.left.test_and_clear();
        Ok(())
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok((stream, _)) => {
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
        let (is_gone, left) = (Arc::clone(&gone), Arc::clone(&self.left));
        let (reader, export, negotiated) =
            (self.reader.clone(), Arc::clone(&self.export), Arc::clone(&self.served_any));
        thread::Builder::new().name("export-client".into()).spawn(move || {
            reader.count_client(1);
            session::serve(&stream, &reader, export, &negotiated);
            drop(stream);
            reader.count_client(-1);
            is_gone.store(true, Ordering::Release);
            left.notify();
        })?;
        self.clients.push(Client { socket, gone });
        Ok(())
    }
}

/// Sleeps until one of the sources is readable, a signal comes, or the time is over.
fn sleep(sources: &mut [PollFd<'_>], time: Duration) -> io::Result<()> {
    let timeout = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
    match poll(sources, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
