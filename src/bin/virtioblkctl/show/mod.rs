//! Prints replies and events for people. What a daemon of another version does not send is left out, or has its default.

mod events;
mod tables;
pub mod units;

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use virtioblkd::disk::{DiskStatus, ImageStatus, LastError, RbdStatus, RingStatus, StableWritesStatus, StoppedStatus};
use virtioblkd::internal::base::text::clean;
use virtioblkd::internal::control::protocol::return_types::{
    AttendantStatus, DaemonStatus, HolderStatus, QuiesceFigures, QuiesceStatus, Requester, Status,
};

pub use events::event;
pub use tables::{copies, stats};
use units::{bytes, count, short_time, time};

/// A page of lines: each has a name, or continues the line before it.
#[derive(Default)]
struct Page(String);

impl Page {
    fn line(&mut self, name: &str, text: impl AsRef<str>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.0, "{name:<14}{}", text.as_ref());
    }

    fn lines(&mut self, name: &str, lines: &[String]) {
        for (at, text) in lines.iter().enumerate() {
            self.line(if at == 0 { name } else { "" }, text);
        }
    }
}

/// The page of `status`.
pub fn status(status: &Status) -> String {
    let Status { disk, quiesce, attendant, daemon, image_snapshots: _ } = status;
    let mut page = Page::default();
    let read_only = if disk.read_only { ", read-only" } else { "" };
    page.line("image", clean(&disk.image));
    page.line("", format!("{}, {}-byte blocks{read_only}", bytes(disk.size), disk.logical_block_size));
    if let Some(format) = &disk.detected_format {
        let format = clean(format);
        page.line(
            "WARNING",
            format!("the image's header or footer is that of the format {format}, but the image is served"),
        );
        page.line("", "as raw: convert it with qemu-img, or give --format raw if the guest wrote the header");
    }
    let ImageStatus { trouble, trouble_detail, stable_writes, rbd } = &disk.image_status;
    if let Some(trouble) = trouble {
        let detail = clean(trouble_detail.as_deref().unwrap_or_default());
        page.line("TROUBLE", format!("{}: {detail}", clean(trouble)));
    }
    if let Some(stopped) = &disk.stopped {
        page.lines("STOPPED", &stopped_lines(stopped));
    }
    page.line("cache mode", clean(&disk.cache_mode));
    let cannot_flush =
        if cannot_flush(disk) { " (the guest's driver cannot flush: every write is synced)" } else { "" };
    page.line("", format!("a write is acknowledged {}{cannot_flush}", clean(&disk.write_acknowledged)));
    let (flush, cache) = (clean(&disk.guest_flush), clean(&disk.guest_sees));
    page.line("", format!("a guest's flush is {flush}; the guest sees a {cache} cache"));
    page.lines("stable writes", &stable_writes.as_ref().map(stable_writes_lines).unwrap_or_default());
    page.line("front-end", front_end(status));
    page.line("queues", queues(&disk.rings));
    let untracked = disk.rings.iter().filter(|ring| ring.untracked).count();
    if untracked > 0 {
        let text = "whose requests in flight are NOT TRACKED: the guest may hang if this daemon is killed";
        page.line("", format!("{untracked} {text}"));
    }
    if let Some(throttle) = &disk.throttle {
        let waits = if disk.rings.iter().any(|ring| ring.limited) { "; a request waits for them" } else { "" };
        page.line("limits", format!("{}{waits}", throttle.limits()));
    }
    page.lines("quiesced", &quiesce_lines(quiesce));
    page.lines("rbd", &rbd.as_ref().map(rbd_lines).unwrap_or_default());
    if let Some(attendant) = attendant {
        page.line("attendant", attendant_line(attendant));
    }
    if disk.sync_failed {
        let text = "a sync failed for good: writes are no longer made durable; replace the medium, then restart";
        page.line("WARNING", text);
    }
    if disk.copies_ending > 0 {
        let copies = match disk.copies_ending {
            1 => "1 copy is over and WAITS".to_owned(),
            copies => format!("{copies} copies are over and WAIT"),
        };
        page.line("copies", format!("{copies} for storage that does not reply: see 'virtioblkctl copies'"));
    }
    page.lines("errors", &errors(&disk.last_errors));
    page.lines("daemon", &daemon_lines(daemon));
    page.0
}

/// Whether the driver knows no flush, so that each of its writes is synced although the mode does not need it.
fn cannot_flush(disk: &DiskStatus) -> bool {
    disk.driver_ready && disk.guest_sees == "write back" && disk.write_acknowledged == "when durable"
}

fn stopped_lines(stopped: &StoppedStatus) -> [String; 2] {
    let StoppedStatus { operation, ring, offset, length, errno: _, message, requests } = stopped;
    let retained = match requests {
        1 => "1 failed request is".to_owned(),
        requests => format!("{requests} failed requests are"),
    };
    [
        format!("{} of {length} bytes at {offset} (queue {ring}) failed: {}", clean(operation), clean(message)),
        format!("{retained} retained: fix the cause, then run 'virtioblkctl continue'"),
    ]
}

/// What the daemon does about guests that change a buffer in flight, and the changes that it detected.
fn stable_writes_lines(stable: &StableWritesStatus) -> Vec<String> {
    let (configured, why) = (clean(&stable.asked), clean(&stable.why));
    let mut lines = match stable.in_effect.as_str() {
        "" => return Vec::new(),
        "copy" => vec![format!("copy ({configured}): {why}")],
        "detect" => vec![
            format!("detect ({configured}): {why}"),
            format!("{} of {} writes changed in flight", stable.changed_writes, stable.checked_writes),
        ],
        _ => vec![format!("off ({configured}): {why}")],
    };
    if let Some(last) = stable.last_changed.last() {
        lines.push(format!("the last change: {} bytes at {}", last.length, last.offset));
    }
    lines
}

fn front_end(status: &Status) -> String {
    let state = match (status.disk.connected, status.disk.driver_ready) {
        (true, true) => "connected, driver ready",
        (true, false) => "connected, no driver yet",
        (false, _) => "not connected",
    };
    match clean(&status.daemon.vhost_socket) {
        socket if socket.is_empty() => state.to_owned(),
        socket => format!("{state} ({socket})"),
    }
}

fn queues(rings: &[RingStatus]) -> String {
    let in_flight: u64 = rings.iter().map(|ring| ring.in_flight).sum();
    let blocked = rings.iter().filter(|ring| ring.held).count();
    let stalled: u64 = rings.iter().map(|ring| ring.stalled).sum();
    let oldest = rings.iter().map(|ring| ring.oldest_stalled_ms).max().unwrap_or(0);
    let stalled = match stalled {
        0 => String::new(),
        stalled => format!(", {stalled} STALLED (the oldest for {})", time(oldest)),
    };
    format!("{} running, {in_flight} in flight{stalled}, {blocked} with a blocked write", rings.len())
}

fn quiesce_lines(quiesce: &QuiesceStatus) -> Vec<String> {
    let closed = time(quiesce.closed_ms.unwrap_or(0));
    let mut lines = match quiesce.state.as_str() {
        "quiesced" => vec![format!("for {closed}, {}", count(quiesce.holders.len() as u64, "holder"))],
        "settling" => vec![format!("not yet: draining for {closed}, {} waiting", quiesce.waiting)],
        _ => vec!["no".to_owned()],
    };
    if quiesce.held_ms > 0 {
        let limit = quiesce.max_hold_ms.map(|limit| format!(", at most {}", time(limit))).unwrap_or_default();
        lines.push(format!("writes wait for {} in all{limit}", time(quiesce.held_ms)));
    }
    lines.extend(quiesce.holders.iter().map(holder_line));
    lines
}

fn holder_line(holder: &HolderStatus) -> String {
    let HolderStatus { requester, token, detached, held_ms, lease_left_ms } = holder;
    let detached = if *detached { ", outlives its client" } else { "" };
    let (token, by, held, left) = (clean(token), describe(requester), time(*held_ms), time(*lease_left_ms));
    format!("{token} by {by}: held {held}, lease {left} left{detached}")
}

/// `NAME (pid 1, uid 0)`. The image's store is not a process.
fn describe(requester: &Requester) -> String {
    let name = requester.who.as_deref().map(clean);
    let process = requester.pid.map(|pid| format!("pid {pid}, uid {}", requester.uid.unwrap_or(0)));
    match (name, process) {
        (Some(name), Some(process)) => format!("{name} ({process})"),
        (name, process) => name.or(process).unwrap_or_default(),
    }
}

/// What only a Ceph RBD image has.
fn rbd_lines(rbd: &RbdStatus) -> Vec<String> {
    let lock = match clean(&rbd.lock).as_str() {
        "none" => "no exclusive lock is used".to_owned(),
        lock => format!("exclusive lock: {lock}"),
    };
    let snapshots = match &rbd.quiesce {
        None => "snapshots by others do not wait for this disk".to_owned(),
        Some(quiesce) => {
            let mut text = match quiesce.watching {
                false => "snapshots by others DO NOT WAIT for this disk: there is no quiesce watch".to_owned(),
                true => format!("snapshots by others: {} requested, {} refused", quiesce.asked, quiesce.refused),
            };
            if quiesce.expired > 0 {
                let _ = write!(text, ", {} RELEASED EARLY, perhaps not of one instant", quiesce.expired);
            }
            text
        }
    };
    vec![lock, snapshots]
}

fn attendant_line(attendant: &AttendantStatus) -> String {
    let AttendantStatus { requester, present, required, preparing: _ } = attendant;
    if requester.who.is_none() && requester.pid.is_none() && !present {
        return "NONE: snapshots by others are refused until 'virtioblkctl attend' runs".to_owned();
    }
    let state = match (present, required) {
        (true, true) => "required",
        (true, false) => "not required",
        (false, _) => "LOST: snapshots by others are refused until 'virtioblkctl attend' runs again",
    };
    format!("{}: {state}", describe(requester))
}

fn errors(errors: &[LastError]) -> Vec<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    if errors.is_empty() {
        return vec!["none".to_owned()];
    }
    let line = |error: &LastError| {
        let LastError { what, when, times } = error;
        let times = if *times > 1 { format!(" ({times} times)") } else { String::new() };
        format!("{} ago: {}{times}", time(now.saturating_sub(*when).saturating_mul(1000)), clean(what))
    };
    errors.iter().rev().map(line).collect()
}

fn daemon_lines(daemon: &DaemonStatus) -> Vec<String> {
    let DaemonStatus { version, revision, pid, uptime_seconds, vhost_socket: _, took_over } = daemon;
    let up = time(uptime_seconds.saturating_mul(1000));
    let revision = revision.as_ref().map(|revision| format!(" ({})", clean(revision))).unwrap_or_default();
    let mut lines = vec![format!("virtioblkd {}{revision}, pid {pid}, up {up}", clean(version))];
    if let Some(took_over) = took_over {
        let pause = took_over.pause_us as f64 / 1e3;
        lines.push(format!("took over from pid {}, the guest was paused for {pause:.1} ms", took_over.from_pid));
    }
    lines
}

/// What a quiesce took, in one line.
pub fn figures(figures: &QuiesceFigures) -> String {
    let QuiesceFigures { epoch: _, rings, drained, drain_us, sync_us, bytes_synced, holders } = figures;
    format!(
        "{} drained in {}, {} synced in {}, {}, {}",
        count(*drained, "request"),
        short_time(*drain_us),
        bytes(*bytes_synced),
        short_time(*sync_us),
        count(*rings, "queue"),
        count(*holders as u64, "holder")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn page(reply: Value) -> String {
        status(&serde_json::from_value(reply).expect("a reply that is understood"))
    }

    #[test]
    fn control_characters_of_other_clients_do_not_reach_the_terminal() {
        let holder = json!({"who": "\u{1b}[2Jgone\nx", "pid": 1, "uid": 0, "token": "t"});
        let page = page(json!({"quiesce": {"state": "quiesced", "holders": [holder]}}));
        assert!(!page.contains('\u{1b}') && page.contains("gone"), "{page}");
        let line = event(&json!({"event": "QUIESCED", "data": {"who": "\u{1b}[2J\n\u{9b}", "na\nme\u{9b}": 1}}));
        assert!(!line.contains(['\u{1b}', '\n', '\u{9b}']), "{line}");
    }

    #[test]
    fn the_status_of_an_rbd_image_shows_its_lock_and_the_snapshots_by_others() {
        let rbd = |quiesce: Value| page(json!({"rbd": {"lock": "waiting", "quiesce": quiesce}}));
        let well = rbd(json!({"watching": true, "asked": 3, "refused": 1, "expired": 0}));
        assert!(well.contains("exclusive lock: waiting") && well.contains("3 requested, 1 refused\n"), "{well}");
        assert!(rbd(json!({"watching": true, "expired": 2})).contains("2 RELEASED EARLY"));
        assert!(rbd(json!({"watching": false})).contains("DO NOT WAIT"));
        assert!(rbd(Value::Null).contains("do not wait"));
        let none = page(json!({"attendant": {"who": null, "present": false, "required": true}}));
        assert!(none.contains("NONE") && !page(json!({})).contains("rbd"), "{none}");
    }

    #[test]
    fn replies_of_daemons_of_other_versions_are_shown() {
        assert!(page(json!({})).contains("not connected"));
        let newer = json!({"size": 1024, "new": {"x": 1}, "daemon": {"pid": 7, "new": []}, "total": {"new": 1}});
        let newer = page(newer);
        assert!(newer.contains("1.0 KiB") && newer.contains("pid 7"), "{newer}");
        assert!(event(&json!({})).starts_with("00:00:00"));
    }
}
