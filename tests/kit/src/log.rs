//! Reading what a program logs. A thread of its own writes the daemon's log, so a line may be there only after the event
//! that it reports: a test waits for it.

use std::time::{Duration, Instant};

/// How long a line may take on a loaded machine.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// Waits until the log, as `read` returns it, contains all of `parts`; panics with the log if one of them never comes.
/// Returns the log.
pub fn wait_for(read: impl Fn() -> String, parts: &[&str]) -> String {
    let end = Instant::now() + WAIT_TIMEOUT;
    loop {
        let log = read();
        let Some(missing) = parts.iter().find(|&&part| !log.contains(part)) else { return log };
        assert!(Instant::now() < end, "'{missing}' is never logged:\n{log}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
