//! The words of [`super::Coordinator`]: what is requested of it, what it grants, and what its caller must do.

use std::time::{Duration, Instant};

use super::super::creds::Credentials;
use crate::disk::HoldFigures;
use crate::engine::Errno;

/// Identifies a connection of the control socket.
pub type PeerId = u64;
/// Stands for the image's store in place of a connection: another host takes a snapshot of the image.
pub const STORE: PeerId = 0;
/// Identifies a request that waits for its reply.
pub type RequestId = u64;

/// The most holds and waiting requests together.
pub const MAX_HOLDERS: usize = 64;
/// The client that sent a request, as the kernel and the client itself describe it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientIdentity {
    /// The name that the client gave (`who`).
    pub text: Option<String>,
    /// The client's process and user when it connected. `None`: the request is the image's store's.
    pub client: Option<Credentials>,
}

/// A request to hold the disk: a client's `quiesce`, or one of the image's store.
#[derive(Clone, Debug)]
pub struct HoldRequest {
    /// The number of the request, which its [`HoldEffect`] repeats.
    pub id: RequestId,
    /// The token of the hold that may be granted. It cannot be guessed and is never used twice.
    pub token: String,
    /// The connection that sent the request.
    pub owner: PeerId,
    /// How long the request may wait until it is refused.
    pub timeout: Duration,
    /// How long the hold lasts from its grant on, unless less is left of the bound on all holds.
    pub lease: Duration,
    /// The hold outlives the connection.
    pub detached: bool,
    /// The client, for status and events.
    pub who: ClientIdentity,
}

/// Why a request was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The gate did not settle in time.
    Timeout,
    /// The disk could not make everything durable.
    SyncFailed(Errno),
    /// A request that changes the disk failed with this error and is retained: part of it may be in the image.
    Stopped(Errno),
    /// Another process uses the image, so the image may change although the disk is held here.
    NotOurs,
    /// A client resumed all holds, or the store that sent the request withdrew it.
    Cancelled,
    /// There are [`MAX_HOLDERS`] holds and waiting requests already.
    TooMany,
    /// The disk was held for as long as its holders together may hold it.
    MaxHold,
    /// The attendant that must consent did not ([`crate::control::protocol::AttendCommand`]). The coordinator itself never
    /// returns this.
    NotPrepared,
    /// The daemon ends.
    Shutdown,
}

/// Why a hold ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// A client sent `resume` with the hold's token, or for all holds.
    Resume,
    /// The hold's lease ended without a renewal.
    LeaseExpired,
    /// The connection that requested the hold ended.
    ConnectionClosed,
    /// The daemon ends.
    Shutdown,
}

/// What the caller must do, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HoldEffect {
    /// Call [`crate::disk::Disk::close_gate`] with this epoch.
    CloseGate(u64),
    /// Call [`crate::disk::Disk::open_gate`].
    OpenGate,
    /// Reply that a request is granted.
    Granted {
        /// The number of the request.
        request: RequestId,
        /// The hold that was granted.
        hold: Hold,
        /// The epoch that settled.
        epoch: u64,
        /// The measurements of the hold.
        figures: HoldFigures,
        /// The number of holders now.
        holders: usize,
    },
    /// Reply that a request is refused.
    Refused {
        /// The number of the request.
        request: RequestId,
        /// The client that sent the request.
        who: ClientIdentity,
        /// Why the request is refused.
        why: Refusal,
    },
    /// Report that a hold has ended.
    Ended {
        /// The hold that ended.
        hold: Hold,
        /// Why the hold ended.
        reason: EndReason,
        /// How long the hold lasted.
        held: Duration,
        /// The number of holders left.
        holders: usize,
    },
}

/// A hold: one client's claim that keeps the disk quiet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The token that names the hold.
    pub token: String,
    /// The connection that requested the hold.
    pub owner: PeerId,
    /// The hold outlives that connection.
    pub detached: bool,
    /// The client that requested the hold.
    pub who: ClientIdentity,
    /// When the hold was granted.
    pub since: Instant,
    /// When the lease ends, unless it is renewed.
    pub until: Instant,
}
