//! One wait with a deadline: poll(2) on descriptors. A wait may return later than its deadline, never earlier.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// Waits until a source is ready, a signal arrives or the deadline has passed; without a deadline it may wait for ever.
/// Returns whether a source is ready. For callers that check everything anew after each return.
pub fn poll_until(sources: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<bool> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let timeout = left.map(|left| Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    });
    match poll(sources, timeout.as_ref()) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Waits as [`poll_until`] does, but goes on after a signal. Returns `false` only when the deadline has passed.
pub fn wait_until(sources: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        if poll_until(sources, deadline)? {
            return Ok(true);
        }
        if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Ok(false);
        }
    }
}

/// Whether the descriptor reports one of these events, its end or an error now. Never waits.
pub fn is_ready(descriptor: impl AsFd, events: PollFlags) -> io::Result<bool> {
    poll_until(&mut [PollFd::new(&descriptor, events)], Some(Instant::now()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_wait_ends_with_a_ready_source_or_after_the_deadline() {
        let (mut sender, receiver) = UnixStream::pair().unwrap();
        let wait = |time| {
            let deadline = Instant::now() + time;
            let ready = wait_until(&mut [PollFd::new(&receiver, PollFlags::IN)], Some(deadline)).unwrap();
            assert!(ready || Instant::now() >= deadline);
            ready
        };
        assert!(!wait(Duration::ZERO));
        assert!(!wait(Duration::from_millis(3)));
        assert!(!is_ready(&receiver, PollFlags::IN).unwrap());
        sender.write_all(b"x").unwrap();
        assert!(wait(Duration::from_secs(600)));
        assert!(wait_until(&mut [PollFd::new(&receiver, PollFlags::IN)], None).unwrap());
        assert!(is_ready(&receiver, PollFlags::IN).unwrap());
        let past = Instant::now();
        assert!(poll_until(&mut [PollFd::new(&receiver, PollFlags::IN)], Some(past)).unwrap(), "a past deadline");
    }
}
