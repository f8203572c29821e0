//! Notifies systemd of the daemon's state (sd_notify(3)), if systemd asked for it (`Type=notify`).
//!
//! When systemd does not read for a while, its socket is full. No thread waits for that: states that were not sent stay
//! in a queue, and the main thread, which polls anyway, sends them when there is room ([`pending`], [`flush`]).

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::base::wait::poll_until;

/// The most states that wait in the queue. A process sends fewer in its life.
const MAX_QUEUED: usize = 8;

/// The connection to systemd. `None`: systemd did not ask for notifications, or cannot be reached.
static SOCKET: OnceLock<Option<Notifier>> = OnceLock::new();

/// Connects to systemd, if it asked for notifications. Called before the sandbox is entered, which allows no new
/// socket.
pub(crate) fn connect() {
    SOCKET.get_or_init(|| {
        let address = std::env::var_os("NOTIFY_SOCKET")?;
        match Notifier::new(&address) {
            Ok(notifier) => Some(notifier),
            Err(error) => {
                log::warn!(
                    "cannot reach systemd on NOTIFY_SOCKET {}: {error}; it gets no notifications",
                    address.display()
                );
                None
            }
        }
    });
}

fn notifier() -> Option<&'static Notifier> {
    SOCKET.get().and_then(Option::as_ref)
}

/// Whether there is a connection to systemd.
pub(crate) fn is_connected() -> bool {
    notifier().is_some()
}

/// Sends one state, such as `READY=1`, now or when [`flush`] finds room for it. Never blocks. A failure is only logged:
/// no guest may lose its disk by it.
pub(crate) fn systemd(state: &str) {
    connect();
    if let Some(notifier) = notifier() {
        notifier.send(state);
    }
}

/// Sends one state if systemd's socket takes it now, after those that wait. For a process that ends, in which no thread
/// polls any more.
pub(crate) fn systemd_if_room(state: &str) {
    connect();
    if let Some(notifier) = notifier() {
        notifier.send_if_room(state);
    }
}

/// The socket to poll for `OUT` before the next [`flush`]. `None`: the queue is empty.
pub(crate) fn pending() -> Option<BorrowedFd<'static>> {
    notifier().and_then(Notifier::pending)
}

/// Sends the queued states, as far as there is room. Never blocks.
pub(crate) fn flush() {
    if let Some(notifier) = notifier() {
        notifier.flush();
    }
}

/// Sends the queued states, and waits for room for at most `limit`. Called at the end of a process.
pub(crate) fn finish(limit: Duration) {
    if let Some(notifier) = notifier() {
        notifier.finish(limit);
    }
}

/// The connection, and the states that could not be sent yet.
struct Notifier {
    socket: UnixDatagram,
    queue: Mutex<VecDeque<String>>,
}

impl Notifier {
    fn new(address: &OsStr) -> io::Result<Notifier> {
        Ok(Notifier { socket: connect_to(address)?, queue: Mutex::default() })
    }

    fn send(&self, state: &str) {
        {
            let mut queue = self.lock();
            if queue.len() >= MAX_QUEUED {
                log::warn!("systemd does not read its NOTIFY_SOCKET: the notification {state} is dropped");
                return;
            }
            queue.push_back(state.to_owned());
        }
        self.flush();
        if self.pending().is_some() {
            log::warn!("systemd does not read its NOTIFY_SOCKET now: the notification {state} is sent when it does");
        }
    }

    fn send_if_room(&self, state: &str) {
        self.flush();
        if self.pending().is_some() {
            log::debug!("systemd does not read its NOTIFY_SOCKET: {state} was not sent");
            return;
        }
        if let Err(error) = self.socket.send(state.as_bytes()) {
            log::debug!("cannot send {state} to systemd's NOTIFY_SOCKET: {error}");
        }
    }

    fn flush(&self) {
        let mut queue = self.lock();
        while let Some(state) = queue.front() {
            match self.socket.send(state.as_bytes()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::warn!("cannot send the notification {state} to systemd on its NOTIFY_SOCKET: {error}")
                }
                Ok(_) => {}
            }
            queue.pop_front();
        }
    }

    fn pending(&self) -> Option<BorrowedFd<'_>> {
        (!self.lock().is_empty()).then(|| self.socket.as_fd())
    }

    fn finish(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        self.flush();
        while let Some(socket) = self.pending() {
            if deadline <= Instant::now() {
                return;
            }
            // After an error the next attempt to send shows what is wrong.
            let _ = poll_until(&mut [PollFd::from_borrowed_fd(socket, PollFlags::OUT)], Some(deadline));
            self.flush();
        }
    }

    /// Takes the lock, also after a panic: the queue is consistent at every moment.
    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<String>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn connect_to(address: &OsStr) -> io::Result<UnixDatagram> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        _ => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A full socket must not delay the front-ends.
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_and_an_abstract_name_are_notified() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let abstract_name = format!("virtioblkd-test-{}", std::process::id());
        let addresses = [
            (SocketAddr::from_pathname(&path).unwrap(), path.into_os_string()),
            (SocketAddr::from_abstract_name(&abstract_name).unwrap(), format!("@{abstract_name}").into()),
        ];
        for (address, variable) in addresses {
            let systemd = UnixDatagram::bind_addr(&address).unwrap();
            connect_to(&variable).unwrap().send(b"READY=1").unwrap();
            let mut text = [0; 32];
            let length = systemd.recv(&mut text).unwrap();
            assert_eq!(&text[..length], b"READY=1");
        }
        assert!(connect_to(OsStr::new("/does/not/exist")).is_err());
    }

    /// A socket that is read again gets what was said meanwhile, in its order; nothing waits for it before.
    #[test]
    fn a_full_queue_delays_states_and_loses_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier::new(path.as_os_str()).unwrap();
        let other = connect_to(path.as_os_str()).unwrap();
        let mut foreign = 0;
        while other.send(b"STATUS=another service").is_ok() {
            foreign += 1;
        }
        notifier.send("READY=1");
        notifier.send("MAINPID=7");
        let socket = notifier.pending().expect("the queue is full");
        let ready = |limit| {
            let deadline = Instant::now() + Duration::from_secs(limit);
            poll_until(&mut [PollFd::from_borrowed_fd(socket, PollFlags::OUT)], Some(deadline)).unwrap()
        };
        assert!(!ready(0), "the main thread's poll sleeps");
        notifier.finish(Duration::from_millis(20));
        assert!(notifier.pending().is_some(), "it has an end without a reader, too");
        let mut text = [0; 64];
        for _ in 0..foreign {
            systemd.recv(&mut text).unwrap();
        }
        assert!(ready(30), "the main thread's poll returns");
        notifier.flush();
        assert!(notifier.pending().is_none());
        for state in ["READY=1", "MAINPID=7"] {
            let length = systemd.recv(&mut text).unwrap();
            assert_eq!(std::str::from_utf8(&text[..length]), Ok(state));
        }
    }

    #[test]
    fn a_state_of_the_end_does_not_wait_for_room() {
        let (socket, reader) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let notifier = Notifier { socket, queue: Mutex::default() };
        let mut text = [0; 64];
        notifier.send_if_room("STOPPING=1");
        let length = reader.recv(&mut text).unwrap();
        assert_eq!(&text[..length], b"STOPPING=1");
        while notifier.socket.send(b"STATUS=full").is_ok() {}
        notifier.send_if_room("STOPPING=1");
        assert!(notifier.pending().is_none(), "it is not queued");
        notifier.send("READY=1");
        notifier.send_if_room("STOPPING=1");
        assert_eq!(*notifier.lock(), ["READY=1"], "it goes before no state that waits");
    }

    #[test]
    fn queued_states_are_bounded() {
        let (socket, _reader) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        while socket.send(b"STATUS=full").is_ok() {}
        let notifier = Notifier { socket, queue: Mutex::default() };
        for _ in 0..3 * MAX_QUEUED {
            notifier.send("READY=1");
        }
        assert_eq!(notifier.lock().len(), MAX_QUEUED);
    }
}
