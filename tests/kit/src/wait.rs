//! Waiting for what a test expects.

use std::time::{Duration, Instant};

/// How long a test waits before it fails. A guest under TCG on a busy machine is slow, and no test asserts a time.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(180);

/// Waits until `done` returns `true`. Fails the test, with `what` was expected, when it never does.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < WAIT_TIMEOUT, "waited {WAIT_TIMEOUT:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
