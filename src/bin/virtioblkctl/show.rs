//! Replies and events as text. Whatever a daemon of another version leaves out is left out here, too.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;
use virtioblkd::internal::base::text::{self, clean_json};

/// A string of the daemon's, or of another client's, which cannot begin a line of its own.
fn clean(value: &Value) -> String {
    text::clean(value.as_str().unwrap_or(""))
}

/// `12 ms`, `3.4 s`, `12 min`, `3.5 h`, `9 days`.
fn time(milliseconds: u64) -> String {
    match milliseconds {
        0..=999 => format!("{milliseconds} ms"),
        1_000..=119_999 => format!("{:.1} s", milliseconds as f64 / 1e3),
        120_000..=7_199_999 => format!("{} min", milliseconds / 60_000),
        7_200_000..=172_799_999 => format!("{:.1} h", milliseconds as f64 / 3.6e6),
        _ => format!("{} days", milliseconds / 86_400_000),
    }
}

/// `1500` microseconds as `1.5 ms`.
fn short_time(microseconds: &Value) -> String {
    match microseconds.as_u64().unwrap_or(0) {
        few @ 0..=999 => format!("{few} us"),
        some @ 1_000..=999_999 => format!("{:.1} ms", some as f64 / 1e3),
        many => time(many / 1000),
    }
}

/// `512 B`, `4.0 KiB`, `10 GiB`.
fn bytes(count: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut size = count as f64 / 1024.0;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < units.len() {
        size /= 1024.0;
        unit += 1;
    }
    if size < 10.0 { format!("{size:.1} {}", units[unit]) } else { format!("{size:.0} {}", units[unit]) }
}

fn who(holder: &Value) -> String {
    // The image's store is no process.
    if holder["pid"].is_null() {
        return clean(&holder["who"]);
    }
    let process = format!("pid {}, uid {}", holder["pid"], holder["uid"]);
    match holder["who"].as_str() {
        Some(_) => format!("{} ({process})", clean(&holder["who"])),
        None => process,
    }
}

/// The page of `status`.
pub fn status(status: &Value) -> String {
    let mut page = String::new();
    let mut line = |name: &str, text: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(page, "{name:<11}{text}");
    };
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let read_only = if status["read-only"] == true { ", read-only" } else { "" };
    line("image", clean(&status["image"]));
    line("", format!("{}, {}-byte blocks{read_only}", bytes(number(&status["size"])), status["logical-block-size"]));
    if !status["detected-format"].is_null() {
        let format = clean(&status["detected-format"]);
        line(
            "WARNING",
            format!("it is an image of the format {format} by its header or footer, and served as raw: convert it"),
        );
        line("", "with qemu-img, or say --format raw if the guest itself wrote that".into());
    }
    if !status["trouble"].is_null() {
        line("TROUBLE", format!("{}: {}", clean(&status["trouble"]), clean(&status["trouble-detail"])));
    }
    let stopped = &status["stopped"];
    if stopped.is_object() {
        let (operation, why) = (clean(&stopped["operation"]), clean(&stopped["message"]));
        let (len, offset, ring) = (&stopped["length"], &stopped["offset"], &stopped["ring"]);
        line("STOPPED", format!("{operation} of {len} bytes at {offset} (ring {ring}) failed: {why}"));
        let kept = &stopped["requests"];
        line("", format!("{kept} request(s) are kept from the guest: mend the cause, then 'virtioblkctl continue'"));
    }
    line("cache mode", clean(&status["cache-mode"]));
    line("", format!("a write is acknowledged {}", clean(&status["write-acknowledged"])));
    let (flush, sees) = (clean(&status["guest-flush"]), clean(&status["guest-sees"]));
    line("", format!("a guest's flush is {flush}; the guest sees {sees}"));
    let mut first = "buffers";
    for text in stable_writes(&status["stable-writes"]) {
        line(std::mem::take(&mut first), text);
    }
    line("front-end", front_end(status));
    line("rings", rings(status));
    if let Some(text) = untracked(status) {
        line("", text);
    }
    let mut first = "quiesced";
    for text in quiesce(&status["quiesce"]) {
        line(std::mem::take(&mut first), text);
    }
    let mut first = "rbd";
    for text in rbd(&status["rbd"]) {
        line(std::mem::take(&mut first), text);
    }
    if let Some(text) = attendant(&status["attendant"]) {
        line("attendant", text);
    }
    if status["sync-failed"] == true {
        line(
            "WARNING",
            "a sync failed for good: writes are no longer made durable; replace the medium, restart".into(),
        );
    }
    match number(&status["copies-ending"]) {
        0 => {}
        count => {
            line("copies", format!("{count} over, WAITING for storage that does not answer: `virtioblkctl copies`"))
        }
    }
    let mut first = "errors";
    for text in errors(&status["last-errors"]) {
        line(std::mem::take(&mut first), text);
    }
    let daemon = &status["daemon"];
    let up = time(number(&daemon["uptime-seconds"]) * 1000);
    line("daemon", format!("virtioblkd {}, pid {}, up {up}", clean(&daemon["version"]), daemon["pid"]));
    if let (Some(from), Some(pause)) =
        (daemon["took-over"]["from-pid"].as_u64(), daemon["took-over"]["pause-us"].as_f64())
    {
        line("", format!("took over from pid {from}, the guest was paused for {:.1} ms", pause / 1e3));
    }
    page
}

/// What is done about guests that change a buffer under way, and what was seen.
fn stable_writes(stable: &Value) -> Vec<String> {
    let figure = |name: &str| stable[name].as_u64().unwrap_or(0);
    let effect = clean(&stable["in-effect"]);
    let mut lines = match effect.as_str() {
        "" => return Vec::new(),
        "copy" => vec![format!("copied before each write ({}): {}", clean(&stable["asked"]), clean(&stable["why"]))],
        "detect" => vec![format!("compared before and after each write: {}", clean(&stable["why"]))],
        _ => vec![format!("not copied ({}): {}", clean(&stable["asked"]), clean(&stable["why"]))],
    };
    if effect == "detect" {
        lines.push(format!("{} of {} writes changed under way", figure("changed-writes"), figure("checked-writes")));
    }
    if let Some(last) = stable["last-changed"].as_array().and_then(|changed| changed.last()) {
        lines.push(format!("the last one: {} bytes at {}", last["length"], last["offset"]));
    }
    lines
}

fn front_end(status: &Value) -> String {
    let state = match (status["connected"] == true, status["driver-ready"] == true) {
        (true, true) => "connected, driver ready",
        (true, false) => "connected, no driver yet",
        (false, _) => "not connected",
    };
    match clean(&status["daemon"]["vhost-socket"]) {
        socket if socket.is_empty() => state.to_owned(),
        socket => format!("{state} ({socket})"),
    }
}

fn rings(status: &Value) -> String {
    let rings = status["rings"].as_array().map(Vec::as_slice).unwrap_or_default();
    let in_flight: u64 = rings.iter().filter_map(|ring| ring["in-flight"].as_u64()).sum();
    let held = rings.iter().filter(|ring| ring["held"] == true).count();
    let stalled: u64 = rings.iter().filter_map(|ring| ring["stalled"].as_u64()).sum();
    let oldest = rings.iter().filter_map(|ring| ring["oldest-stalled-ms"].as_u64()).max().map(time);
    let stalled = match oldest {
        Some(oldest) if stalled > 0 => format!(", {stalled} STALLED (the oldest for {oldest})"),
        _ => String::new(),
    };
    format!("{} running, {in_flight} in flight{stalled}, {held} with a held write", rings.len())
}

/// Rings whose requests in flight the front-end does not keep for the next server.
fn untracked(status: &Value) -> Option<String> {
    let rings = status["rings"].as_array()?;
    let untracked = rings.iter().filter(|ring| ring["untracked"] == true).count();
    (untracked > 0)
        .then(|| format!("{untracked} with requests in flight NOT TRACKED: a guest may hang if this daemon is killed"))
}

fn quiesce(quiesce: &Value) -> Vec<String> {
    let closed = time(quiesce["closed-ms"].as_u64().unwrap_or(0));
    let holders = quiesce["holders"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut lines = match quiesce["state"].as_str() {
        Some("quiesced") => vec![format!("for {closed}, {} holder(s)", holders.len())],
        Some("settling") => vec![format!("not yet: draining for {closed}, {} waiting", quiesce["waiting"])],
        _ => vec!["no".to_owned()],
    };
    if let Some(waited) = quiesce["held-ms"].as_u64().filter(|waited| *waited > 0) {
        let most = quiesce["max-hold-ms"].as_u64().map(|most| format!(", at most {}", time(most))).unwrap_or_default();
        lines.push(format!("writes wait for {} in all{most}", time(waited)));
    }
    for holder in holders {
        let milliseconds = |name: &str| time(holder[name].as_u64().unwrap_or(0));
        let detached = if holder["detached"] == true { ", detached" } else { "" };
        lines.push(format!(
            "{} by {}: held {}, lease {} left{detached}",
            clean(&holder["token"]),
            who(holder),
            milliseconds("held-ms"),
            milliseconds("lease-left-ms")
        ));
    }
    lines
}

/// What only a Ceph RBD image has.
fn rbd(rbd: &Value) -> Vec<String> {
    if !rbd.is_object() {
        return Vec::new();
    }
    let lock = match clean(&rbd["lock"]).as_str() {
        "none" => "no exclusive lock is used".to_owned(),
        lock => format!("exclusive lock: {lock}"),
    };
    let quiesce = &rbd["quiesce"];
    let figure = |name: &str| quiesce[name].as_u64().unwrap_or(0);
    let mut snapshots = match (quiesce.is_object(), quiesce["watching"] == true) {
        (false, _) => "snapshots by others do not wait for this disk".to_owned(),
        (true, false) => "snapshots by others DO NOT WAIT for this disk: there is no quiesce watch".to_owned(),
        (true, true) => format!("snapshots by others: {} asked, {} refused", figure("asked"), figure("refused")),
    };
    if figure("expired") > 0 {
        snapshots += &format!(", {} LET GO EARLY, perhaps not of one instant", figure("expired"));
    }
    vec![lock, snapshots]
}

fn attendant(attendant: &Value) -> Option<String> {
    if !attendant.is_object() {
        return None;
    }
    if attendant["who"].is_null() && attendant["present"] == false {
        return Some("NOBODY: snapshots by others are refused until somebody attends".to_owned());
    }
    let state = match (attendant["present"] == true, attendant["required"] == true) {
        (true, true) => "required",
        (true, false) => "not required",
        (false, _) => "LOST: snapshots by others are refused until one is back",
    };
    Some(format!("{}: {state}", who(attendant)))
}

fn errors(errors: &Value) -> Vec<String> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let errors = errors.as_array().map(Vec::as_slice).unwrap_or_default();
    if errors.is_empty() {
        return vec!["none".to_owned()];
    }
    let line = |error: &Value| {
        let age = now.saturating_sub(error["when"].as_u64().unwrap_or(now));
        let times = match error["times"].as_u64() {
            Some(times) if times > 1 => format!(" ({times} times)"),
            _ => String::new(),
        };
        format!("{} ago: {}{times}", time(age * 1000), clean(&error["what"]))
    };
    errors.iter().rev().map(line).collect()
}

/// The page of `copies`: two lines a copy, the newest last.
pub fn copies(copies: &Value) -> String {
    let mut page = String::new();
    for copy in copies.as_array().into_iter().flatten() {
        let figure = |name: &str| copy[name].as_u64().unwrap_or(0);
        let (done, total) = (figure("done-bytes"), figure("total-bytes").max(1));
        let percent = (u128::from(done) * 100 / u128::from(total)) as u64;
        // Writing to a string cannot fail.
        let _ = writeln!(
            page,
            "{:<8}  {:<9}  {percent:>3} % of {}  {}",
            clean(&copy["copy"]),
            clean(&copy["state"]),
            bytes(total),
            clean(&copy["target"])
        );
        let seconds = copy["seconds"].as_f64().unwrap_or(0.0);
        let _ = write!(
            page,
            "          {} stored, {} saved before the guest overwrote it, {}",
            bytes(figure("stored-bytes")),
            bytes(figure("saved-before-write-bytes")),
            time((seconds * 1e3) as u64)
        );
        let scratch = figure("scratch-bytes");
        if scratch > 0 {
            let _ = write!(page, ", {} in the scratch", bytes(scratch));
        }
        let slowed = copy["slowed-seconds"].as_f64().unwrap_or(0.0);
        if slowed >= 1.0 {
            let _ = write!(page, ", the guest's writes waited {} for it", time((slowed * 1e3) as u64));
        }
        if copy["ending"] == true {
            let _ = write!(page, ", STILL WAITS for the target to end");
        }
        let _ = match copy["error"].as_str() {
            Some(_) => writeln!(page, ": {}", clean(&copy["error"])),
            None => writeln!(page),
        };
    }
    if page.is_empty() { "no copies\n".to_owned() } else { page }
}

/// The table of `stats`: a row a ring, and their sum.
pub fn stats(stats: &Value) -> String {
    const COLUMNS: [(&str, &str); 15] = [
        ("size", "size"),
        ("in-flight", "in-flight"),
        ("held", "held"),
        ("reads", "reads"),
        ("read-bytes", "read"),
        ("writes", "writes"),
        ("written-bytes", "written"),
        ("flushes", "flushes"),
        ("syncs", "syncs"),
        ("discards", "discards"),
        ("write-zeroes", "zeroes"),
        ("errors", "errors"),
        ("unsupported", "unsupp"),
        ("interrupts", "irqs"),
        ("polled", "polled"),
    ];
    let heading = std::iter::once("ring").chain(COLUMNS.map(|(_, heading)| heading)).map(str::to_owned).collect();
    let mut rows: Vec<Vec<String>> = vec![heading];
    let rings = stats["rings"].as_array().map(Vec::as_slice).unwrap_or_default();
    let rings = rings.iter().map(|ring| (ring["index"].to_string(), ring));
    for (name, ring) in rings.chain([("total".to_owned(), &stats["total"])]) {
        let cell = |(member, _): (&str, &str)| match (&ring[member], member) {
            (_, "size" | "held") if name == "total" => String::new(),
            (Value::Bool(held), _) => if *held { "yes" } else { "no" }.to_owned(),
            (value, "read-bytes" | "written-bytes") => bytes(value.as_u64().unwrap_or(0)),
            (Value::Null, _) => "-".to_owned(),
            (value, _) => value.to_string(),
        };
        rows.push(std::iter::once(name.clone()).chain(COLUMNS.map(cell)).collect());
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=COLUMNS.len()).map(width).collect();
    let mut table = String::new();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        table.push_str(cells.join("  ").trim_end());
        table.push('\n');
    }
    table
}

/// What a quiesce took, in a line.
pub fn figures(figures: &Value) -> String {
    format!(
        "{} request(s) drained in {}, {} synced in {}, {} ring(s), {} holder(s)",
        figures["drained"],
        short_time(&figures["drain-us"]),
        bytes(figures["bytes-synced"].as_u64().unwrap_or(0)),
        short_time(&figures["sync-us"]),
        figures["rings"],
        figures["holders"]
    )
}

/// An event in a line: the time (UTC), the name and the data.
pub fn event(event: &Value) -> String {
    let seconds = event["timestamp"]["seconds"].as_u64().unwrap_or(0);
    let milliseconds = event["timestamp"]["microseconds"].as_u64().unwrap_or(0) / 1000;
    let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
    let mut line = format!("{hours:02}:{minutes:02}:{:02}.{milliseconds:03}Z {}", seconds % 60, clean(&event["event"]));
    for (name, value) in event["data"].as_object().into_iter().flatten() {
        if !value.is_null() {
            // Writing to a String cannot fail.
            let _ = write!(line, " {}={}", text::clean(name), clean_json(&value.to_string()));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn units_are_readable() {
        let times = [0, 999, 1000, 119_999, 120_000, 7_200_000, 864_000_000].map(time);
        assert_eq!(times, ["0 ms", "999 ms", "1.0 s", "120.0 s", "2 min", "2.0 h", "10 days"]);
        let sizes = [0, 1023, 1024, 10 << 20, 10 << 30, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "10 MiB", "10 GiB", "16384 PiB"]);
        let times = [json!(12), json!(1500), json!(2_500_000), json!(null)].map(|value| short_time(&value));
        assert_eq!(times, ["12 us", "1.5 ms", "2.5 s", "0 us"]);
    }

    #[test]
    fn nothing_plays_with_the_terminal() {
        let holder = json!({"who": "\u{1b}[2Jgone\nx", "pid": 1, "uid": 0, "token": "t"});
        let page = status(&json!({"quiesce": {"state": "quiesced", "holders": [holder]}}));
        assert!(!page.contains('\u{1b}') && page.contains("gone"), "{page}");
        let line = event(&json!({"event": "QUIESCED", "data": {"who": "\u{1b}[2J\n\u{9b}", "na\nme\u{9b}": 1}}));
        assert!(!line.contains(['\u{1b}', '\n', '\u{9b}']), "{line}");
    }

    #[test]
    fn what_others_may_do_with_an_image_of_ceph_is_shown() {
        let page = |quiesce: Value| status(&json!({"rbd": {"lock": "waiting", "quiesce": quiesce}}));
        let well = page(json!({"watching": true, "asked": 3, "refused": 1, "expired": 0}));
        assert!(well.contains("exclusive lock: waiting") && well.contains("3 asked, 1 refused\n"), "{well}");
        assert!(page(json!({"watching": true, "expired": 2})).contains("2 LET GO EARLY"));
        assert!(page(json!({"watching": false})).contains("DO NOT WAIT"));
        assert!(page(Value::Null).contains("do not wait"));
        let nobody = status(&json!({"attendant": {"who": null, "present": false, "required": true}}));
        assert!(nobody.contains("NOBODY") && !status(&json!({})).contains("rbd"), "{nobody}");
    }

    #[test]
    fn a_daemon_that_says_little_is_no_error() {
        assert!(status(&json!({})).contains("not connected"));
        assert!(stats(&json!({"rings": [{"index": 0}]})).contains("total"));
        assert!(event(&json!({})).starts_with("00:00:00"));
    }
}
