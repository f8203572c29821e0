//! Carries commands out: gives the coordinator's decisions to the disk, and replies and events to the peers. Knows no
//! socket.

pub(super) mod attendance;
mod commands;
pub(super) mod copies;
mod disk_events;
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
use pending_replies::PendingReplies;
use snapshot_jobs::SnapshotJobs;
use store_quiesce::StoreQuiesce;
pub use upgrade::Upgrade;
use upgrade::UpgradeState;

use crate::base::rate_limit::RateLimiter;
use crate::disk::{Disk, ImageStatus};

/// What `query-status` says of the daemon itself.
#[derive(Clone, Debug, Default)]
pub struct DaemonInfo {
    /// Where the front-end connects, for people: a path, or `fd N`.
    pub vhost_socket: String,
    /// How the daemon was started, for the process that starts the next one; `None`: it is not reported.
    pub command_line: Option<CommandLine>,
}

/// Whom a line is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recipient {
    /// The reply that this connection waits for.
    Requester(PeerId),
    /// An event that concerns this connection alone.
    One(PeerId),
    /// An event: every connection that has negotiated.
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

/// What a [`Service`] is made from. The fields are those of [`super::Setup`].
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

/// The disk, its holders, and the lines that wait to be sent.
pub(super) struct Service {
    disk: Arc<dyn Disk>,
    info: DaemonInfo,
    started: Instant,
    coordinator: Coordinator,
    /// When the gate closed; `None` while it is open.
    closed_at: Option<Instant>,
    copies: CopyOwners,
    /// Snapshots of the image that clients asked for.
    jobs: SnapshotJobs,
    /// Where the threads of `jobs` report.
    inbox: Arc<NoticeInbox>,
    /// Snapshots of the image that others take through its store.
    store: StoreQuiesce,
    /// [`super::Setup::resized`].
    resized: Box<dyn Fn(u64) + Send>,
    /// As the last `IMAGE_STATE` reported it.
    image_state: ImageStatus,
    /// Requests whose reply comes later.
    pending: PendingReplies,
    /// Limits the events of the disk's own errors.
    error_events: RateLimiter,
    /// Limits the events of errors that a guest or a front-end causes: they cannot crowd out the disk's own.
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

    /// When [`Service::tick`] is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        [self.coordinator.next_deadline(), self.store.next_deadline()].into_iter().flatten().min()
    }

    /// Ends the leases and timeouts that have run out.
    pub(super) fn tick(&mut self, now: Instant) {
        self.coordinator.tick(now);
        self.carry_out(now);
        self.store.tick(now);
        self.carry_out_store(now);
    }

    /// A connection ended.
    pub(super) fn peer_gone(&mut self, peer: PeerId, now: Instant) {
        self.pending.peer_gone(peer);
        self.coordinator.peer_gone(peer, now);
        self.carry_out(now);
        self.copies.peer_gone(&*self.disk, peer);
        self.jobs.peer_gone(peer);
        self.next_job();
        self.store.peer_gone(peer, now);
        self.carry_out_store(now);
    }

    /// The daemon ends: every hold ends, and every client is told.
    pub(super) fn shutdown(&mut self, now: Instant) {
        self.coordinator.shutdown(now);
        self.carry_out(now);
        self.store.end();
        self.carry_out_store(now);
        self.report_left_snapshots();
        self.event("SHUTDOWN", json!({}));
    }

    /// Takes one request of a client. [`Service::outgoing`] returns its reply exactly once, now or later.
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
        // The guest goes on before any client is told; and as in QEMU the events of a command come before its reply.
        self.carry_out(now);
        if let commands::CommandReply::Now(result) = answer {
            self.outgoing.push((Recipient::Requester(client.peer), protocol::reply(request.id.as_ref(), result)));
        }
    }

    /// Sends the reply to a request that was answered with [`commands::CommandReply::Later`].
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
    /// Opens the gate, whatever ends the control thread: a guest is not left frozen.
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
