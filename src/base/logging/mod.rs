//! The log: lines on stderr. Where the journal reads them, each has its priority (sd-daemon(3)), and the journal adds
//! the time. Elsewhere each has the time in UTC and the level. One record is one line; line breaks in it are escaped.
//!
//! No thread but the log's own waits for its reader (`output`). When the log is not read, lines are dropped and
//! counted. The end of the process waits for `FLUSH_TIMEOUT` at most.

mod output;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};

use super::text::{clean, clean_lines, shown};
use output::{Output, wait_for_room, write_now};

/// How long the end of the daemon waits for the reader of the log.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the end of a command of `virtioblkctl` waits. No guest's disk depends on it.
const COMMAND_FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// How long [`last_line`] waits for the lines before it, and then for room.
const LAST_LINE_TIMEOUT: Duration = Duration::from_millis(200);

struct Stderr;

/// Standard error.
static OUTPUT: Output = Output::new(rustix::stdio::stderr, |lost| {
    let text = format!(
        "{} missing here in the log: its reader did not keep up, or it could not be written",
        if lost == 1 { "1 line is".to_owned() } else { format!("{lost} lines are") }
    );
    line(Level::Warn, &text)
});

/// Standard output. A loss is not reported there, because the output may be JSON.
static PRINTED: Output = Output::new(rustix::stdio::stdout, |_| String::new());

/// Whether the journal reads stderr.
static JOURNAL: AtomicBool = AtomicBool::new(false);

/// Sets up the process's log. Called once, by main, before the first thread starts. Later calls change the level only.
pub fn start(level: LevelFilter) {
    let journal = journal_reads_stderr(std::env::var("JOURNAL_STREAM").ok().as_deref());
    // The only error: this logger was set before.
    let _ = log::set_logger(&Stderr);
    JOURNAL.store(journal, Ordering::Relaxed);
    OUTPUT.hold_file_until_thread();
    log::set_max_level(level);
}

/// Starts the thread that writes the log. Called once, after the sandbox was entered. Before that, a line that the
/// output does not take at once waits for the next one, and all lines wait if the log is a regular file.
pub fn start_thread() {
    if let Err(error) = OUTPUT.start_thread() {
        log::warn!(
            "no thread for the log ({error}): lines that the log's reader does not take at once wait for the next one"
        );
    }
}

/// Writes a message of `virtioblkctl` on standard error. Never blocks: a disk may be held or a guest frozen.
pub fn message(text: impl fmt::Display) {
    OUTPUT.put(&format!("virtioblkctl: {}\n", shown(text)));
}

/// Writes a text of several lines on standard error, and escapes only what a terminal obeys.
pub fn message_lines(text: impl fmt::Display) {
    OUTPUT.put(&format!("{}\n", clean_lines(&text.to_string())));
}

/// Shows progress on one line, which each call overwrites, unless the terminal has not taken the previous text yet.
/// `is_last` ends the line.
pub fn show_progress(text: &str, is_last: bool) {
    if is_last || !OUTPUT.is_pending() {
        // Padded, because it may be shorter than the text before it.
        OUTPUT.put(&format!("\r{:<50}{}", clean(text), if is_last { "\n" } else { "" }));
    }
}

/// Queues a line for standard output, for a process that continues. Returns whether there was room. Never blocks.
pub fn print_line(text: &str) -> bool {
    if let Err(error) = PRINTED.start_thread() {
        log::debug!("no thread for standard output: {error}");
    }
    PRINTED.put(&format!("{}\n", clean(text)))
}

/// Waits at the end of a command until all its output is written, for at most `COMMAND_FLUSH_TIMEOUT`: a person may
/// have stopped the terminal.
pub fn finish_command() {
    let deadline = Instant::now() + COMMAND_FLUSH_TIMEOUT;
    OUTPUT.flush(COMMAND_FLUSH_TIMEOUT);
    PRINTED.flush(deadline.saturating_duration_since(Instant::now()));
}

/// Writes on standard output, and waits for at most `FLUSH_TIMEOUT`. Returns whether all of it was written.
pub(crate) fn print_in_time(text: &str) -> bool {
    PRINTED.put(text);
    PRINTED.flush(FLUSH_TIMEOUT);
    !PRINTED.is_pending()
}

/// Waits until the log is written, for at most `FLUSH_TIMEOUT`. Called at the end of the process.
pub fn finish() {
    OUTPUT.flush(FLUSH_TIMEOUT);
}

/// Writes the last line of a process that a signal's handler ends, after the queued ones. Waits for a limited time;
/// allocates nothing and takes no lock (signal-safety(7)).
pub(crate) fn last_line(text: &[u8]) {
    let deadline = Instant::now() + LAST_LINE_TIMEOUT;
    while OUTPUT.is_pending() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
    let stderr = rustix::stdio::stderr();
    if wait_for_room(stderr, LAST_LINE_TIMEOUT) {
        // The process ends, so there is no further attempt.
        let _ = write_now(stderr, text);
    }
}

/// Whether the journal reads the log.
pub(crate) fn is_journal() -> bool {
    JOURNAL.load(Ordering::Relaxed)
}

/// Continues the log of the process that this one takes over from. `journal`: the journal reads that log. Lines before
/// this went to the log that this process was started with.
pub(crate) fn continue_log(log: &OwnedFd, journal: bool) {
    finish();
    match rustix::stdio::dup2_stderr(log) {
        Ok(()) => JOURNAL.store(journal, Ordering::Relaxed),
        Err(errno) => log::warn!("the log of the daemon before this one cannot be continued: {errno}"),
    }
}

/// Whether stderr is the stream that `JOURNAL_STREAM` names, as `device:inode` (systemd.exec(5)). The variable alone
/// does not show it, because it outlives a redirection.
fn journal_reads_stderr(variable: Option<&str>) -> bool {
    let Some((device, inode)) = variable.and_then(|text| text.split_once(':')) else {
        return false;
    };
    let stderr = rustix::fs::fstat(std::io::stderr());
    stderr.is_ok_and(|stat| device.parse() == Ok(stat.st_dev) && inode.parse() == Ok(stat.st_ino))
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The vhost crates log every message of the protocol. Only their warnings and errors are logged, unless the
        // level is debug.
        let ours = metadata.target().starts_with(env!("CARGO_PKG_NAME"));
        metadata.level() <= log::max_level()
            && (ours || metadata.level() <= Level::Warn || log::max_level() > Level::Info)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        OUTPUT.put(&line(record.level(), &record.args().to_string()));
    }

    fn flush(&self) {
        finish();
    }
}

fn line(level: Level, text: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    if is_journal() { for_journal(level, text) } else { for_people(now, level, text) }
}

fn for_journal(level: Level, text: &str) -> String {
    let priority = match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    };
    format!("<{priority}>{}\n", clean(text.trim_end()))
}

fn for_people(since_1970: Duration, level: Level, text: &str) -> String {
    let level = level.as_str().to_lowercase();
    format!("{} {level}: {}\n", utc(since_1970), clean(text.trim_end()))
}

/// `2026-01-31T23:59:59.123Z` (RFC 3339).
pub fn utc(since_1970: Duration) -> String {
    let seconds = since_1970.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let milli = since_1970.subsec_millis();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z")
}

/// Year, month and day of a day counted from 1 January 1970, by walking the calendar: years first, then months.
fn date(mut day: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    (year, month as u64 + 1, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_converted_to_dates() {
        // From date(1): date -u -d @N
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (1_795_228_800, "2026-11-21T02:40:00.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(utc(Duration::from_secs(seconds)), text);
        }
        assert_eq!(utc(Duration::from_millis(1_042)), "1970-01-01T00:00:01.042Z");
    }

    #[test]
    fn each_record_is_one_line_and_carries_its_priority_in_the_journal() {
        assert_eq!(for_journal(Level::Error, "one\n<6>two\n"), "<3>one\\n<6>two\n");
        assert_eq!(for_journal(Level::Info, "x"), "<6>x\n");
    }

    #[test]
    fn a_log_line_outside_the_journal_has_time_and_level() {
        assert_eq!(for_people(Duration::ZERO, Level::Warn, "x\n"), "1970-01-01T00:00:00.000Z warn: x\n");
        let forged = "x\n1970-01-01T00:00:00.000Z info: y\u{9b}";
        assert_eq!(for_people(Duration::ZERO, Level::Warn, forged).lines().count(), 1);
    }

    #[test]
    fn the_journal_is_known_by_the_stream_that_it_reads() {
        let stat = rustix::fs::fstat(std::io::stderr()).unwrap();
        assert!(journal_reads_stderr(Some(&format!("{}:{}", stat.st_dev, stat.st_ino))));
        assert!(!journal_reads_stderr(Some(&format!("{}:{}", stat.st_dev, stat.st_ino + 1))));
        assert!(!journal_reads_stderr(Some("journal")));
        assert!(!journal_reads_stderr(None));
    }
}
