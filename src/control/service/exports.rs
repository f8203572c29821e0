//! The commands for exports, and the descriptors that clients pass for them.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::net::{AddressFamily, SocketType, sockopt};
use serde_json::{Value, json};

use super::Service;
use crate::control::protocol::{Error, ExportCommand};
use crate::control::quiesce::PeerId;
use crate::disk::ExportOptions;

/// The most descriptors of one connection that have a name.
const MAX_NAMED: usize = 4;

/// The most descriptors of one connection that have none yet. When more come, the oldest is closed.
const MAX_UNNAMED: usize = 2;

/// The descriptors of the connections.
#[derive(Default)]
pub(super) struct ClientDescriptors {
    unnamed: HashMap<PeerId, VecDeque<OwnedFd>>,
    named: HashMap<PeerId, HashMap<String, OwnedFd>>,
}

impl ClientDescriptors {
    /// Names the descriptor that came last. One that has the name already is closed, as in QEMU (`monitor_add_fd`).
    fn name(&mut self, peer: PeerId, name: String) -> Result<(), Error> {
        let Some(descriptor) = self.unnamed.get_mut(&peer).and_then(VecDeque::pop_back) else {
            return Err(Error::new(
                "no-descriptor",
                "no file descriptor came with getfd (SCM_RIGHTS): send it in the same message",
            ));
        };
        let named = self.named.entry(peer).or_default();
        if named.len() >= MAX_NAMED && !named.contains_key(&name) {
            return Err(Error::new("no-descriptor", "this connection has too many descriptors: closefd some"));
        }
        named.insert(name, descriptor);
        Ok(())
    }

    fn take(&mut self, peer: PeerId, name: &str) -> Result<OwnedFd, Error> {
        let found = self.named.get_mut(&peer).and_then(|named| named.remove(name));
        found.ok_or_else(|| Error::new("no-descriptor", "no descriptor of this name was given by getfd"))
    }

    /// Whether a connection has given descriptors that it has not used yet.
    pub(super) fn has_some(&self, peer: PeerId) -> bool {
        self.unnamed.contains_key(&peer) || self.named.get(&peer).is_some_and(|named| !named.is_empty())
    }

    /// A connection ended: closes its descriptors.
    pub(super) fn peer_gone(&mut self, peer: PeerId) {
        self.unnamed.remove(&peer);
        self.named.remove(&peer);
    }
}

impl Service {
    /// A descriptor came from a connection.
    pub(in crate::control) fn add_descriptor(&mut self, peer: PeerId, descriptor: OwnedFd) {
        let unnamed = self.descriptors.unnamed.entry(peer).or_default();
        if unnamed.len() == MAX_UNNAMED {
            unnamed.pop_front();
        }
        unnamed.push_back(descriptor);
    }

    /// Carries a command out.
    pub(super) fn export(&mut self, peer: PeerId, command: ExportCommand) -> Result<Value, Error> {
        match command {
            ExportCommand::GetFd { name } => self.descriptors.name(peer, name).map(|()| json!({})),
            ExportCommand::CloseFd { name } => self.descriptors.take(peer, &name).map(|_| json!({})),
            ExportCommand::Prepare { fdname, options, detached } => {
                let listener = listener(self.descriptors.take(peer, &fdname)?)?;
                let address = listener.local_addr().ok();
                let path = address.as_ref().and_then(|address| address.as_pathname()).unwrap_or(Path::new("(socket)"));
                let options = ExportOptions { target: path.to_owned(), ..options };
                let prepared = self.disk.prepare_export(listener, &options);
                let copy = prepared.map_err(|error| Error::new(error.code, error.message))?;
                self.copies.own(&copy, peer, detached);
                Ok(json!({ "copy": copy }))
            }
        }
    }
}

/// Checks that the descriptor is a listening Unix socket: this daemon serves no network.
fn listener(descriptor: OwnedFd) -> Result<UnixListener, Error> {
    let is_listening = sockopt::socket_domain(&descriptor) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(&descriptor) == Ok(SocketType::STREAM)
        && sockopt::socket_acceptconn(&descriptor) == Ok(true);
    match is_listening {
        true => Ok(UnixListener::from(descriptor)),
        false => Err(Error::new("no-descriptor", "the descriptor is not a listening Unix socket (SOCK_STREAM)")),
    }
}
