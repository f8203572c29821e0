//! What a daemon's log says of a start that failed.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// So many of a log's errors say why a daemon did not start.
const MAX_REASONS: usize = 3;
/// Bytes at a log's end that are searched for them.
pub(super) const MAX_TAIL: u64 = 16 << 10;

/// Why the daemon did not start: its last errors, or its last line, without the log's time and level.
pub(super) fn reason(log: &str) -> Option<String> {
    errors(log).or_else(|| log.lines().rfind(|line| !line.trim().is_empty()).map(str::to_owned))
}

/// The last errors of a log, without its time and level.
pub(super) fn errors(log: &str) -> Option<String> {
    let mut said: Vec<&str> = log.lines().filter_map(|line| Some(line.split_once(" error: ")?.1)).collect();
    // A wrong configuration is reported before there is a log.
    said.extend(log.lines().filter_map(|line| line.strip_prefix("virtioblkd: ")));
    let last = said.len().saturating_sub(MAX_REASONS);
    (!said.is_empty()).then(|| said[last..].join("; "))
}

/// The end of a log, without what is before `start`.
pub(super) fn tail(path: &Path, start: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(start.max(length.saturating_sub(MAX_TAIL))))?;
        let mut bytes = Vec::new();
        file.take(MAX_TAIL).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_what_the_daemon_said_last() {
        let log = "2026-11-28T07:23:45Z info: starting\n2026-11-28T07:23:45Z error: /a: there is no such file\n";
        assert_eq!(reason(log).unwrap(), "/a: there is no such file");
        assert_eq!(reason("virtioblkd: no socket given\n").unwrap(), "no socket given");
        assert_eq!(reason("thread panicked\n").unwrap(), "thread panicked");
        assert_eq!(reason("\n"), None);
    }
}
