//! `continue --wait`: retries the failed requests of a stopped disk, and waits until they are completed.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use virtioblkd::internal::control::client::{Client, Failure, Message, REPLY_TIMEOUT};
use virtioblkd::internal::control::protocol::return_types::{Continued, Quiesced, Status};

use crate::parse;

/// How long the hold lasts that finds out whether all writes are completed, if this process dies meanwhile.
const LEASE: Duration = Duration::from_secs(5);

/// Retries the requests and waits. Returns the daemon's reply to `continue`. Fails if a request fails again.
pub(crate) fn run(mut client: Client, timeout: Duration) -> Result<Value, Failure> {
    let until = Instant::now() + timeout;
    let before: Status = parse(client.execute("query-status", json!({}), REPLY_TIMEOUT)?)?;
    let mut stopped: BTreeSet<u64> =
        before.disk.rings.iter().filter(|ring| ring.kept > 0).map(|ring| u64::from(ring.index)).collect();
    client.send("continue", json!({}))?;
    let mut reply = None;
    // The events say when each ring has begun to retry; a ring that fails again may do so at once.
    while reply.is_none() || !stopped.is_empty() {
        match client.next(Some(until))? {
            Message::Reply(answer) => {
                let answer = answer?;
                if parse::<Continued>(answer.clone())?.retried == 0 {
                    return Ok(answer);
                }
                reply = Some(answer);
            }
            Message::Event(event) if event["event"] == "IO_CONTINUED" => {
                stopped.remove(&event["data"]["ring"].as_u64().unwrap_or(0));
            }
            Message::Event(event) if event["event"] == "IO_STOPPED" => return Err(failed_again(&event["data"])),
            Message::Event(_) => {}
        }
    }
    drain(&mut client, until)?;
    let after: Status = parse(client.execute("query-status", json!({}), REPLY_TIMEOUT)?)?;
    match after.disk.stopped {
        Some(stopped) => Err(failed_again(&json!(stopped))),
        None => Ok(reply.unwrap_or_default()),
    }
}

/// Holds the disk for an instant: a hold succeeds when every write that the disk has taken is completed and durable.
fn drain(client: &mut Client, until: Instant) -> Result<(), Failure> {
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let arguments = json!({
        "timeout-ms": left.as_millis() as u64,
        "lease-ms": LEASE.as_millis() as u64,
        "who": "virtioblkctl continue",
    });
    let held = client.execute("quiesce", arguments, left + REPLY_TIMEOUT);
    let held: Quiesced = parse(held.map_err(|failure| match failure.code.as_str() {
        "stopped" => Failure::new(&failure.code, format!("a retried request failed again: {}", failure.message)),
        _ => failure,
    })?)?;
    client.execute("resume", json!({"token": held.token}), REPLY_TIMEOUT).map(drop)
}

/// `failed`: the request, as the event `IO_STOPPED` and the status have it.
fn failed_again(failed: &Value) -> Failure {
    let text = |name: &str| failed[name].as_str().unwrap_or("?").to_owned();
    Failure::new(
        "stopped",
        format!(
            "a {} failed again: {}; the disk is still stopped: fix the cause, and continue it again",
            text("operation"),
            text("message")
        ),
    )
}

pub(crate) fn readable(reply: &Continued) -> String {
    match reply.retried {
        0 => "the disk was not stopped\n".to_owned(),
        1 => "1 failed request was retried and is completed\n".to_owned(),
        some => format!("{some} failed requests were retried and are completed\n"),
    }
}
