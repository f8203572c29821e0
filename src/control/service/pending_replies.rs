//! The requests whose reply is sent later, by their number.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use serde_json::Value;

use crate::control::quiesce::{PeerId, RequestId};

/// A request for a hold that is not made yet.
pub(super) struct NewHold {
    /// The number of the request.
    pub(super) request: RequestId,
    /// The token of the hold, if it is granted.
    pub(super) token: String,
}

/// The requests that wait for their reply. Also makes the numbers and tokens of requests.
#[derive(Default)]
pub(super) struct PendingReplies {
    /// The connection that waits, and the `id` of its request.
    waiting: HashMap<RequestId, (PeerId, Option<Value>)>,
    last: RequestId,
    tokens: RandomState,
}

impl PendingReplies {
    /// Makes a number for a request.
    pub(super) fn next_id(&mut self) -> RequestId {
        self.last += 1;
        self.last
    }

    /// Makes a number for a request, and the token of the hold that it may get. Tokens are keyed with the system's
    /// random numbers, so that a script that runs too late cannot name another client's hold.
    pub(super) fn next_hold(&mut self) -> NewHold {
        let request = self.next_id();
        NewHold { request, token: format!("{:016x}", self.tokens.hash_one(request)) }
    }

    /// Records that a connection waits for the reply. `id`: the `id` that its request has.
    pub(super) fn add(&mut self, request: RequestId, peer: PeerId, id: Option<Value>) {
        self.waiting.insert(request, (peer, id));
    }

    /// Whether a connection still waits for the reply.
    pub(super) fn contains(&self, request: RequestId) -> bool {
        self.waiting.contains_key(&request)
    }

    /// Returns the connection that waits for the reply, and the `id` of its request. The caller sends the reply now.
    pub(super) fn take(&mut self, request: RequestId) -> Option<(PeerId, Option<Value>)> {
        self.waiting.remove(&request)
    }

    /// Whether a connection waits for a reply.
    pub(super) fn awaits(&self, peer: PeerId) -> bool {
        self.waiting.values().any(|(waiting, _)| *waiting == peer)
    }

    /// Forgets the requests of a connection that ended.
    pub(super) fn peer_gone(&mut self, peer: PeerId) {
        self.waiting.retain(|_, (waiting, _)| *waiting != peer);
    }
}
