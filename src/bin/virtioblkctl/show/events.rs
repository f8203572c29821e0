//! PURE. An event as a sentence.

use serde_json::Value;
use virtioblkd::disk::CopyStatus;
use virtioblkd::internal::base::text::{clean, clean_json};
use virtioblkd::internal::control::protocol::return_types::{HoldEnded, QuiesceFigures, Requester};

use super::units::{bytes, count, time};
use super::{describe, figures};

/// An event in one line: the time (UTC), the name, and a sentence. An event that this version does not know shows its data.
pub fn event(event: &Value) -> String {
    let seconds = event["timestamp"]["seconds"].as_u64().unwrap_or(0);
    let milliseconds = event["timestamp"]["microseconds"].as_u64().unwrap_or(0) / 1000;
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    let name = event["event"].as_str().unwrap_or_default();
    let said = sentence(name, &event["data"]).unwrap_or_else(|| members(&event["data"]));
    let line = format!("{hours:02}:{minutes:02}:{:02}.{milliseconds:03}Z {} {said}", seconds % 60, clean(name));
    line.trim_end().to_owned()
}

/// The data as it is, `name=value`.
fn members(data: &Value) -> String {
    let given = data.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let words: Vec<String> =
        given.map(|(name, value)| format!("{}={}", clean(name), clean_json(&value.to_string()))).collect();
    words.join(" ")
}

/// `None`: this version does not know the event, or its data is not understood.
fn sentence(name: &str, data: &Value) -> Option<String> {
    let text = |member: &str| clean(data[member].as_str().unwrap_or_default());
    let number = |member: &str| data[member].as_u64().unwrap_or(0);
    let said = match name {
        "QUIESCED" => {
            let taken: QuiesceFigures = serde_json::from_value(data.clone()).ok()?;
            format!("{} holds the disk ({}): {}", who(data), text("token"), figures(&taken))
        }
        "RESUMED" => resumed(data)?,
        "LEASE_EXPIRED" => format!("the lease of {} ran out", who(data)),
        "QUIESCE_FAILED" => format!("the disk could not be held for {}: {}", who(data), text("code")),
        "QUIESCE_EXPIRED" => format!(
            "the image's store released the disk for {} after {}: a snapshot of several images may not be of one instant",
            text("who"),
            time(number("held-ms"))
        ),
        "PREPARED" => match data["level"].as_str() {
            Some(level) => format!("the attendant consented to a snapshot, the guest is prepared: {}", clean(level)),
            None => "the attendant consented to a snapshot".into(),
        },
        "PREPARE_FAILED" => format!("the attendant did not consent to a snapshot: {}", text("message")),
        "FRONTEND_CONNECTED" => "a front-end connected".into(),
        "FRONTEND_DISCONNECTED" => format!("the front-end disconnected: {}", text("reason")),
        "IO_ERROR" => format!("{}; the guest got the error{}", failed(data), suppressed(data)),
        "IO_STOPPED" => format!("{}; the disk is STOPPED until 'virtioblkctl continue'", failed(data)),
        "IO_CONTINUED" => format!("the failed requests of queue {} are retried", number("ring")),
        "IO_STALLED" => format!(
            "{} of queue {} wait for the image's storage, the oldest for {}",
            count(number("requests"), "request"),
            number("ring"),
            time(number("oldest-ms"))
        ),
        "IO_RESUMED" => format!("the requests of queue {} that waited for the storage are completed", number("ring")),
        "SYNC_ERROR" => format!("a sync failed: {}{}", text("message"), suppressed(data)),
        "COPY_COMPLETED" | "COPY_FAILED" | "COPY_CANCELLED" => copy(data)?,
        "BUFFER_CHANGED" => format!(
            "the guest changed the buffer of a write of {} at {} in flight{}",
            bytes(number("length")),
            number("offset"),
            suppressed(data)
        ),
        "IMAGE_STATE" => match data["trouble"].as_str() {
            Some(trouble) => format!("the image cannot be used, {}: {}", clean(trouble), text("trouble-detail")),
            None => "the image can be used".into(),
        },
        "PROTOCOL_ERROR" => format!("{}{}", text("message"), suppressed(data)),
        "UPGRADE" => "another process takes the disk over".into(),
        "SHUTDOWN" => "the daemon ends".into(),
        _ => return None,
    };
    Some(said)
}

/// The client that asked for a hold.
fn who(data: &Value) -> String {
    let requester: Requester = serde_json::from_value(data.clone()).unwrap_or_default();
    match describe(&requester) {
        text if text.is_empty() => "the image's store".into(),
        text => text,
    }
}

fn resumed(data: &Value) -> Option<String> {
    let ended: HoldEnded = serde_json::from_value(data.clone()).ok()?;
    let why = match ended.reason.as_str() {
        "resume" => "it was resumed".into(),
        "lease-expired" => "its lease ran out".into(),
        "connection-closed" => "its client left".into(),
        "shutdown" => "the daemon ends".into(),
        other => clean(other),
    };
    let rest = match ended.holders {
        0 => "the guest's writes continue".to_owned(),
        left => format!("{} left", count(left as u64, "holder")),
    };
    Some(format!("the hold of {} ended after {}, because {why}; {rest}", who(data), time(ended.held_ms)))
}

/// What failed: the request and the error.
fn failed(data: &Value) -> String {
    let text = |member: &str| clean(data[member].as_str().unwrap_or_default());
    let number = |member: &str| data[member].as_u64().unwrap_or(0);
    let (operation, message, ring) = (text("operation"), text("message"), number("ring"));
    match operation.as_str() {
        "flush" => format!("a flush (queue {ring}) failed: {message}"),
        _ => format!(
            "a {operation} of {} at {} (queue {ring}) failed: {message}",
            bytes(number("length")),
            number("offset")
        ),
    }
}

/// How many events like this one were left out before it.
fn suppressed(data: &Value) -> String {
    match data["suppressed"].as_u64().unwrap_or(0) {
        0 => String::new(),
        others => format!(" (and {others} others before it)"),
    }
}

fn copy(data: &Value) -> Option<String> {
    let copy: CopyStatus = serde_json::from_value(data.clone()).ok()?;
    let what = match &copy.export {
        Some(export) => format!("the export {} at {}", clean(&export.name), clean(&copy.target)),
        None => format!("{} to {}", clean(&copy.copy), clean(&copy.target)),
    };
    let took = time((copy.seconds * 1e3) as u64);
    Some(match (copy.state.as_str(), &copy.error) {
        ("completed", _) if copy.export.is_none() => {
            format!("{what} is complete and durable: {} stored in {took}", bytes(copy.stored_bytes))
        }
        ("failed", Some(error)) => format!("{what} failed after {took}: {}", clean(error)),
        (state, _) => format!("{what} is {} after {took}", clean(state)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::collections::BTreeSet;

    /// The events in the examples of the protocol's page.
    fn examples() -> Vec<Value> {
        let page = include_str!("../../../../docs/control-protocol.md");
        let blocks = page.split("```qmp").skip(1).filter_map(|rest| rest.split("```").next());
        let messages = blocks.flat_map(|block| block.split("\n<- ").skip(1));
        let messages = messages.filter_map(|message| message.split("\n-> ").next());
        messages
            .filter_map(|text| serde_json::from_str(text).ok())
            .filter(|value: &Value| value["event"].is_string())
            .collect()
    }

    #[test]
    fn each_event_of_the_protocol_is_a_sentence_without_names_of_members() {
        let examples = examples();
        let names: BTreeSet<&str> = examples.iter().filter_map(|event| event["event"].as_str()).collect();
        assert!(names.len() > 20, "{names:?}");
        // Only the attendant gets these.
        for example in examples.iter().filter(|event| event["event"] != "PREPARE" && event["event"] != "RELEASED") {
            let line = event(example);
            assert!(!line.contains('=') && line.split(' ').count() > 4 && !line.contains("  "), "{line}");
        }
    }

    #[test]
    fn events_say_what_happened() {
        let said = |name: &str, data: Value| event(&json!({"event": name, "data": data}));
        let hold =
            json!({"token": "t", "who": "nightly", "pid": 7, "uid": 0, "reason": "lease-expired", "held-ms": 1500});
        assert_eq!(
            said("RESUMED", hold),
            "00:00:00.000Z RESUMED the hold of nightly (pid 7, uid 0) ended after 1.5 s, because its lease ran out; the \
             guest's writes continue"
        );
        let error =
            json!({"operation": "write", "ring": 1, "offset": 4096, "length": 512, "message": "EIO", "suppressed": 3});
        assert_eq!(
            said("IO_ERROR", error),
            "00:00:00.000Z IO_ERROR a write of 512 B at 4096 (queue 1) failed: EIO; the guest got the error (and 3 others \
             before it)"
        );
        assert_eq!(said("NEW_ONE", json!({"a": 1, "b": null})), "00:00:00.000Z NEW_ONE a=1");
        assert_eq!(said("QUIESCED", json!("strange")), "00:00:00.000Z QUIESCED");
    }
}
