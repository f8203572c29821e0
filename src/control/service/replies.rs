//! Words and JSON for holders and failures, in replies, events and the log.

use std::io;

use serde_json::{Value, json};

use crate::control::creds::Credentials;
use crate::control::protocol::Error;
use crate::control::protocol::return_types::Requester;
use crate::control::quiesce::{ClientIdentity, EndReason, Hold, Refusal};
use crate::engine::Errno;

/// Returns the error for a token that names no hold. `ended`: why its hold ended; `held`: the disk is held.
pub(in crate::control) fn no_such_hold(ended: Option<EndReason>, held: bool) -> Error {
    match ended {
        Some(EndReason::LeaseExpired) => Error::new(
            "lease-expired",
            "the lease of this token ran out, and writes may have continued since: a snapshot that was not complete by \
             then cannot be trusted. Quiesce again with a longer lease-ms, or renew-lease in time; no lease goes beyond \
             the disk's --max-hold",
        ),
        Some(EndReason::ConnectionClosed) => {
            Error::new("not-held", "this hold ended with its connection; ask with 'detached': true to outlive it")
        }
        Some(EndReason::Resume | EndReason::Shutdown) => Error::new("not-held", "this hold was resumed already"),
        None if !held => Error::new("not-quiesced", "the disk is not held, and this token is unknown"),
        None => Error::new("unknown-token", "this token is unknown; 'virtioblkctl status' names the holders"),
    }
}

/// Returns the error for a request to hold the disk that was refused.
pub(in crate::control) fn refused(why: Refusal) -> Error {
    match why {
        Refusal::Timeout => Error::new(
            "timeout",
            "the writes in flight and the sync did not end in time: nothing is promised, and this request no \
             longer holds the disk. Ask again with a longer timeout-ms; query-stats shows what is in flight",
        ),
        Refusal::SyncFailed(errno) => Error::new(
            "sync-failed",
            format!(
                "the data could not be made durable ({}), and the guest's writes continue: nothing is promised. See the \
                 daemon's log and the image's device",
                self::errno(errno)
            ),
        ),
        Refusal::Stopped(errno) => Error::new(
            "stopped",
            format!(
                "the disk is stopped because a request of the guest failed ({}), part of which may be in the image: \
                 nothing is promised. Fix the cause, continue the disk ('virtioblkctl continue'), and ask again",
                self::errno(errno)
            ),
        ),
        Refusal::NotOurs => Error::new(
            "not-ours",
            "another process uses the image, perhaps because its guest has moved there: what it writes cannot be held \
             from here, and nothing is promised. Quiesce the disk where its guest is; the daemon's log says more",
        ),
        Refusal::Cancelled => {
            Error::new("cancelled", "everything was resumed, or the requester gave up, before this quiesce was granted")
        }
        Refusal::TooMany => Error::new(
            "too-many-holders",
            "too many holders: 'virtioblkctl status' names them, 'virtioblkctl resume' ends their holds",
        ),
        Refusal::MaxHold => Error::new(
            "max-hold",
            "the disk was held for as long as its holders together may hold it (--max-hold): it takes writes first. Ask \
             again in a second; 'virtioblkctl status' names the holders",
        ),
        Refusal::NotPrepared => Error::new(
            "not-prepared",
            "the attendant that must consent did not, or is lost: no snapshot is made. See what 'virtioblkctl attend' \
             said",
        ),
        Refusal::Shutdown => Error::new("shutting-down", "the daemon ends"),
    }
}

/// Returns the word for `reason` of the event `RESUMED`.
pub(in crate::control) fn reason(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Resume => "resume",
        EndReason::LeaseExpired => "lease-expired",
        EndReason::ConnectionClosed => "connection-closed",
        EndReason::Shutdown => "shutdown",
    }
}

/// Returns a hold's token and client, for events.
pub(in crate::control) fn holder_json(hold: &Hold) -> Value {
    let mut value = who_json(&hold.who);
    value["token"] = json!(hold.token);
    value
}

/// Returns a client, for status and events.
pub(in crate::control) fn requester(who: &ClientIdentity) -> Requester {
    Requester {
        who: who.text.clone(),
        pid: who.client.map(|client| client.pid),
        uid: who.client.map(|client| client.uid),
    }
}

/// Returns a client in JSON, for events.
pub(in crate::control) fn who_json(who: &ClientIdentity) -> Value {
    json!(requester(who))
}

/// Describes a client, for the log.
pub(in crate::control) fn describe_holder(who: &ClientIdentity) -> String {
    // Debug quotes the client's text, so that it cannot forge a log line.
    let text = who.text.as_ref().map(|text| format!("{text:?}"));
    let client = who.client.map(|Credentials { pid, uid }| format!("pid {pid}, uid {uid}"));
    match (text, client) {
        (Some(text), Some(client)) => format!("{text} ({client})"),
        (text, client) => text.or(client).unwrap_or_default(),
    }
}

/// Returns the error number that the image's store gets for a refusal. It is one with which librbd's client fails
/// cleanly: after ETIMEDOUT and ERESTART librbd would retry for ever, and it takes EOPNOTSUPP for consent.
pub(in crate::control) fn store_errno(why: Refusal) -> Errno {
    Errno(match why {
        Refusal::Timeout => libc::EAGAIN,
        Refusal::SyncFailed(_) | Refusal::Stopped(_) => libc::EIO,
        Refusal::Cancelled | Refusal::Shutdown => libc::ECANCELED,
        Refusal::TooMany | Refusal::MaxHold | Refusal::NotPrepared | Refusal::NotOurs => libc::EBUSY,
    })
}

/// Returns the system's message for an error number.
pub(in crate::control) fn errno(errno: Errno) -> String {
    io::Error::from_raw_os_error(errno.0).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_cannot_forge_a_log_line() {
        let who = ClientIdentity { text: Some("a\nERROR b".into()), client: Some(Credentials { pid: 1, uid: 2 }) };
        assert!(!describe_holder(&who).contains('\n'));
    }
}
