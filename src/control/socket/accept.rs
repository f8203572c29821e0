//! Accepts clients. Decides which users are served, and how many at a time.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::ControlThread;
use crate::base::rate_limit::{CONTROL_LOG, log_limited};
use crate::control::access::Access;
use crate::control::creds::Credentials;
use crate::control::peer::Peer;
use crate::control::protocol;
use crate::control::service::ClientInfo;

/// The most connections at a time.
const MAX_PEERS: usize = 32;
/// The most connections of users other than root and the daemon's own. The rest is reserved, so that the operator can
/// always connect.
const MAX_OTHERS: usize = 28;
/// When [`MAX_PEERS`] clients are connected, one that has not negotiated after this time is disconnected for a new one.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(10);
/// The places that clients which only listen may have for as long as they like. The others are for commands.
const MAX_LISTENING: usize = 24;
/// When [`MAX_PEERS`] clients are connected, and more than [`MAX_LISTENING`] of them have sent no request for this time, the
/// newest of these is disconnected for a new one.
const LISTENING_TIMEOUT: Duration = Duration::from_secs(5);
/// The most connections that are accepted in one turn.
const MAX_ACCEPTS_PER_TURN: usize = 8;
/// How long no connection is accepted after file descriptors ran out.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// How long no connection is accepted while another process may take the socket over.
const HAND_OVER_PAUSE: Duration = Duration::from_millis(20);

impl ControlThread {
    /// Accepts the clients that wait to connect.
    pub(super) fn accept(&mut self, now: Instant) {
        self.accept_again = None;
        if self.service.is_leaving() {
            self.accept_again = Some(now + HAND_OVER_PAUSE);
            return;
        }
        // Only a few in one turn, so that the connected clients do not wait.
        for _ in 0..MAX_ACCEPTS_PER_TURN {
            let Some(listener) = &self.listener else { return };
            match listener.accept() {
                Ok((stream, _)) => self.add_peer(stream, now),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                        log_limited!(CONTROL_LOG, Warn, "control: cannot accept, trying again in a second: {error}");
                        self.accept_again = Some(now + ACCEPT_PAUSE);
                        return;
                    }
                    Some(libc::EAGAIN) => return,
                    // The client has disconnected already, or a signal came.
                    _ => {}
                },
            }
        }
    }

    /// Serves a new client, or refuses it with one line.
    fn add_peer(&mut self, stream: UnixStream, now: Instant) {
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
        if let Some(most) = self.limit_reached(access)
            && !self.make_room(access, now)
        {
            log_limited!(CONTROL_LOG, Warn, "control: {most} clients are connected, another one is refused");
            let desc = format!("{most} clients are connected, which is as many as this server keeps; try again");
            turn_away(&stream, protocol::Error::new("too-many-clients", desc));
            return;
        }
        self.last_peer += 1;
        let client = ClientInfo { peer: self.last_peer, credentials, access };
        match Peer::new(client, stream, now) {
            Ok(mut peer) => {
                peer.queue(&protocol::greeting());
                peer.flush();
                self.peers.push(peer);
            }
            Err(error) => log_limited!(CONTROL_LOG, Warn, "control: a connection cannot be served: {error}"),
        }
    }

    /// Whether a client is served. Root and the daemon's user always are; other users are if the operator widened the
    /// socket's mode, because the filesystem has checked them then.
    fn allows(&self, peer: Credentials) -> bool {
        if peer.uid == 0 || peer.uid == rustix::process::geteuid().as_raw() {
            return true;
        }
        let address = self.listener.as_ref().and_then(|listener| listener.local_addr().ok());
        let mode = address.and_then(|address| Some(address.as_pathname()?.metadata().ok()?.permissions().mode()));
        mode.is_some_and(|mode| mode & 0o077 != 0)
    }

    /// Returns the limit that one more client with `access` would exceed, if there is one.
    fn limit_reached(&self, access: Access) -> Option<usize> {
        let others = self.peers.iter().filter(|peer| peer.client.access < Access::All).count();
        match access {
            Access::All => (self.peers.len() >= MAX_PEERS).then_some(MAX_PEERS),
            _ if self.peers.len() >= MAX_PEERS => Some(MAX_PEERS),
            _ => (others >= MAX_OTHERS).then_some(MAX_OTHERS),
        }
    }

    /// Disconnects a client, so that a new client with `access` can be served: the oldest that has not negotiated in time,
    /// or the newest of too many that only listen. Never disconnects a client with more access, or one that something
    /// depends on. Returns `false` when there is no such client.
    fn make_room(&mut self, access: Access, now: Instant) -> bool {
        let Some(index) = self.silent(access, now).or_else(|| self.listening(access, now)) else { return false };
        let mut peer = self.peers.remove(index);
        if peer.negotiated {
            let desc = "all places are taken, and this connection has sent no request lately: connect again to listen";
            peer.queue(&protocol::reply(None, Err(protocol::Error::new("too-many-clients", desc))));
            peer.flush();
        }
        self.service.peer_gone(peer.client.peer, now);
        self.deliver();
        true
    }

    fn silent(&self, access: Access, now: Instant) -> Option<usize> {
        self.peers.iter().position(|peer| {
            !peer.negotiated
                && peer.client.access <= access
                && now.saturating_duration_since(peer.since) > NEGOTIATION_TIMEOUT
        })
    }

    fn listening(&self, access: Access, now: Instant) -> Option<usize> {
        let listens = |peer: &Peer| peer.is_idle(LISTENING_TIMEOUT, now) && !self.service.depends_on(peer.client.peer);
        let listening: Vec<usize> = (0..self.peers.len()).filter(|&index| listens(&self.peers[index])).collect();
        if listening.len() <= MAX_LISTENING {
            return None;
        }
        // The newest is the last one. Monitors that have listened for long keep their places.
        listening.into_iter().rev().find(|&index| self.peers[index].client.access <= access)
    }
}

/// Sends one error line in place of the greeting. A new socket has room for it, so this does not block.
fn turn_away(mut stream: &UnixStream, error: protocol::Error) {
    let sent =
        stream.set_nonblocking(true).and_then(|()| io::Write::write(&mut stream, &protocol::reply(None, Err(error))));
    if let Err(error) = sent {
        log::debug!("control: the refused client disconnected before the reason could be sent: {error}");
    }
}
