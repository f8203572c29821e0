//! Carries commands out: applies the coordinator's decisions to the disk, and makes replies and events for the clients.
//! Does not know sockets. Only the control thread calls it.
//!
//! | file | what |
//! |---|---|
//! | `commands` | one match arm a command |
//! | `holds` | carries out the decisions of [`super::quiesce`] |
//! | `disk_events`, `notice_handler` | what the disk and the image's back-end report |
//! | `attendance`, `store_quiesce` | PURE: the client that must consent, and the hold for another host's snapshot |
//! | `image_snapshot`, `snapshot_jobs` | snapshots by the image's own store; PURE: their order and their owners |
//! | `copies`, `exports` | the commands for copies and exports |
//! | `upgrade` | whether a hand-over may begin, and what is refused while it runs |
//! | `pending_replies`, `replies` | replies that are sent later; words and JSON for holders and failures |
//! | `recorded` | (test) the JSON that clients parse, byte for byte |

pub(super) mod attendance;
mod commands;
pub(super) mod copies;
mod disk_events;
mod exports;
mod holds;
mod image_snapshot;
mod notice_handler;
mod pending_replies;
#[cfg(test)]
mod recorded;
pub(super) mod replies;
pub(super) mod snapshot_jobs;
mod store_quiesce;
mod upgrade;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use serde_json::{Value, json};

use super::access::Access;
use super::creds::Credentials;
use super::image_notices::NoticeInbox;
use super::protocol;
use super::protocol::Error;
use super::protocol::json_stream::MalformedInput;
use super::protocol::return_types::CommandLine;
use super::quiesce::{Coordinator, PeerId};
use copies::CopyOwners;
use exports::ClientDescriptors;
use pending_replies::PendingReplies;
use snapshot_jobs::SnapshotJobs;
use store_quiesce::StoreQuiesce;
pub use upgrade::Upgrade;
use upgrade::UpgradeState;

use crate::base::rate_limit::RateLimiter;
use crate::disk::{Disk, ImageStatus};

/// The properties of the daemon itself that `query-status` shows.
#[derive(Clone, Debug, Default)]
pub struct DaemonInfo {
    /// The vhost-user socket, for people: a path, or `fd N`.
    pub vhost_socket: String,
    /// How the daemon was started, for the process that starts the next one. `None`: the arguments cannot be reported.
    pub command_line: Option<CommandLine>,
}

/// The connections that get a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recipient {
    /// This connection, which waits for the line as its reply.
    Requester(PeerId),
    /// This connection alone gets the line, which is an event.
    One(PeerId),
    /// Every connection that has negotiated gets the line, which is an event.
    All,
}

/// The client of a connection: who it is, and which commands it may use.
#[derive(Clone, Copy)]
pub(super) struct ClientInfo {
    /// The connection.
    pub(super) peer: PeerId,
    /// The client's process and user when it connected.
    pub(super) credentials: Credentials,
    /// The commands that the client may use.
    pub(super) access: Access,
}

/// The arguments of [`Service::new`]. The fields are those of [`super::Setup`].
pub(super) struct ServiceSetup {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) info: DaemonInfo,
    pub(super) inbox: Arc<NoticeInbox>,
    pub(super) store_timeout: Duration,
    pub(super) attended: bool,
    pub(super) max_hold: Option<Duration>,
    pub(super) resized: Box<dyn Fn(u64) + Send>,
    pub(super) upgrade: Option<Upgrade>,
}

/// The state behind the control socket: the disk, its holders, and the lines that wait to be sent.
pub(super) struct Service {
    disk: Arc<dyn Disk>,
    info: DaemonInfo,
    started: Instant,
    coordinator: Coordinator,
    /// When the gate closed; `None` while it is open.
    closed_at: Option<Instant>,
    copies: CopyOwners,
    /// What clients passed by SCM_RIGHTS.
    descriptors: ClientDescriptors,
    /// The snapshots that clients have the image's store make.
    jobs: SnapshotJobs,
    /// The queue into which the threads of `jobs` put their results.
    inbox: Arc<NoticeInbox>,
    /// Snapshots that other hosts take of the image.
    store: StoreQuiesce,
    /// See [`super::Setup::resized`].
    resized: Box<dyn Fn(u64) + Send>,
    /// The image's state in the last `IMAGE_STATE`.
    image_state: ImageStatus,
    /// Requests whose reply is sent later.
    pending: PendingReplies,
    /// Limits the rate of events about the disk's own errors.
    error_events: RateLimiter,
    /// Limits the rate of events about errors that a guest or a front-end causes, apart from the disk's own, so that
    /// those are not suppressed, too.
    guest_error_events: RateLimiter,
    upgrade: UpgradeState,
    outgoing: Vec<(Recipient, Vec<u8>)>,
    quit: bool,
}

impl Service {
    pub(super) fn new(setup: ServiceSetup) -> Self {
        let ServiceSetup { disk, info, inbox, store_timeout, attended, max_hold, resized, upgrade } = setup;
        Service {
            disk,
            info,
            started: Instant::now(),
            coordinator: Coordinator::new(max_hold),
            closed_at: None,
            copies: CopyOwners::default(),
            descriptors: ClientDescriptors::default(),
            jobs: SnapshotJobs::default(),
            inbox,
            store: StoreQuiesce::new(store_timeout, attended),
            resized,
            image_state: ImageStatus::default(),
            pending: PendingReplies::default(),
            error_events: RateLimiter::for_events(),
            guest_error_events: RateLimiter::for_events(),
            upgrade: UpgradeState::new(upgrade),
            outgoing: Vec::new(),
            quit: false,
        }
    }

    /// Takes the lines that wait to be sent, in order.
    pub(super) fn outgoing(&mut self) -> Vec<(Recipient, Vec<u8>)> {
        std::mem::take(&mut self.outgoing)
    }

    /// Whether a client has sent `quit`.
    pub(super) fn quit_asked(&self) -> bool {
        self.quit
    }

    /// Returns when [`Service::tick`] is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        [self.coordinator.next_deadline(), self.store.next_deadline()].into_iter().flatten().min()
    }

    /// Carries out what is due: the ends of leases and timeouts.
    pub(super) fn tick(&mut self, now: Instant) {
        self.coordinator.tick(now);
        self.carry_out(now);
        self.store.tick(now);
        self.carry_out_store(now);
    }

    /// Ends the holds, copies and snapshots of a connection that ended, as far as they do not outlive it.
    pub(super) fn peer_gone(&mut self, peer: PeerId, now: Instant) {
        self.pending.peer_gone(peer);
        self.coordinator.peer_gone(peer, now);
        self.carry_out(now);
        self.copies.peer_gone(&*self.disk, peer);
        self.descriptors.peer_gone(peer);
        self.jobs.peer_gone(peer);
        self.next_job();
        self.store.peer_gone(peer, now);
        self.carry_out_store(now);
    }

    /// Whether something would end with a connection: a reply that it awaits, a hold, a copy, a snapshot, an attendant.
    pub(super) fn depends_on(&self, peer: PeerId) -> bool {
        self.pending.awaits(peer)
            || self.coordinator.ends_with(peer)
            || self.copies.owns_some(peer)
            || self.descriptors.has_some(peer)
            || self.jobs.owns_some(peer)
            || self.store.has(peer)
    }

    /// Ends every hold and reports the end to every client, because the daemon ends.
    pub(super) fn shutdown(&mut self, now: Instant) {
        self.coordinator.shutdown(now);
        self.carry_out(now);
        self.store.end();
        self.carry_out_store(now);
        self.report_left_snapshots();
        self.event("SHUTDOWN", json!({}));
    }

    /// Carries out one request of a client. [`Service::outgoing`] returns its reply exactly once, now or later.
    pub(super) fn request(
        &mut self,
        client: ClientInfo,
        negotiated: &mut bool,
        found: Result<Value, MalformedInput>,
        now: Instant,
    ) {
        let request = match found {
            Ok(value) => protocol::parse(value, *negotiated, client.access),
            Err(malformed) => {
                let error = Error::new("parse-error", malformed.to_string());
                protocol::Request { id: None, command: Err(error) }
            }
        };
        let command = request.command.and_then(|command| self.refuse_while_upgrading(&command).map(|()| command));
        let answer = match command {
            Ok(command) => self.execute(client, negotiated, request.id.as_ref(), command, now),
            Err(error) => commands::CommandReply::Now(Err(error)),
        };
        // The gate opens before any client gets its line, and as in QEMU the events of a command precede its reply.
        self.carry_out(now);
        if let commands::CommandReply::Now(result) = answer {
            self.outgoing.push((Recipient::Requester(client.peer), protocol::reply(request.id.as_ref(), result)));
        }
    }

    /// Sends the reply to a request that got [`commands::CommandReply::Later`].
    fn reply_later(&mut self, request: super::quiesce::RequestId, result: Result<Value, Error>) {
        // `None`: the connection ended meanwhile.
        let Some((peer, id)) = self.pending.take(request) else { return };
        self.outgoing.push((Recipient::Requester(peer), protocol::reply(id.as_ref(), result)));
    }

    fn event(&mut self, name: &str, data: Value) {
        self.send(Recipient::All, name, data);
    }

    fn send(&mut self, to: Recipient, name: &str, data: Value) {
        self.outgoing.push((to, protocol::event(name, data, SystemTime::now())));
    }
}

impl Drop for Service {
    /// Opens the gate, whatever ended the control thread, so that no guest stays frozen.
    fn drop(&mut self) {
        if self.closed_at.is_some() {
            log::error!("the control thread ends while the disk is quiesced: the disk is released");
            self.disk.open_gate();
        }
    }
}

fn to_json(value: &impl Serialize) -> Result<Value, Error> {
    serde_json::to_value(value).map_err(|error| Error::new("internal", error.to_string()))
}
