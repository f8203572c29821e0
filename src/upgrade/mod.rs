//! Upgrade in place: another process takes over the guest's connection while the guest runs. This module has the messages
//! between the two daemons. `server/hand_over.rs` is the old daemon's side, `server/take_over.rs` the new one's.
//!
//! The new daemon is an ordinary one, started with `--take-over CTL` by `virtioblkctl upgrade`, by a unit or by hand; the
//! old one's sandbox cannot start a program. It opens and checks the image without its locks, and asks for the hand-over
//! on the old daemon's control socket. From then on that connection carries these messages:
//!
//! | new | old | |
//! |---|---|---|
//! | `Begin` | | with the starter's pipe, if virtioblkctl started the new daemon (`Starter`) |
//! | | `Hello` | what the guest knows of its disk, and copies of the sockets that outlive the old daemon |
//! | `Ready` | | everything that can fail without the virtqueues has succeeded, including the sandbox |
//! | | | syncs; **the pause begins**: pauses, stops and syncs the virtqueues, and releases the image |
//! | | `State` | the front-end's connection and its state |
//! | `Prepared` | | has the same state and owns the image; its virtqueues do not run |
//! | | `Go` | the commit, unless the starter has given up: the old daemon never uses the image again, and ends |
//! | | | the virtqueues run: **the pause ends** |
//!
//! Until `Go` is sent, the old daemon takes its image back and restarts its virtqueues if the new one fails, ends or is
//! silent, or if the starter gives up; the guest has noticed only a pause. If the new daemon dies after `Go`, that is a
//! crash like any other: the requests in flight are in the front-end's memory. A message of the front-end that comes
//! meanwhile waits in its socket until the new daemon reads it, because the hand-over happens between two messages.

mod channel;
pub(crate) mod session_state;
mod starter;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::disk::{LatencyStatus, RingStatus, ThrottleStatus};
use crate::engine::throttle::{Limits, Words};
pub(crate) use channel::{Channel, Descriptors};
use session_state::SessionState;
pub use starter::VARIABLE as STARTER_VARIABLE;
pub(crate) use starter::{GAVE_UP, Starter};

/// The version of these messages. The new daemon names its version, and an old daemon that does not know it refuses.
pub const VERSION: u64 = 1;

/// The messages of the new daemon.
#[derive(Serialize, Deserialize)]
pub(crate) enum NewDaemonMessage {
    /// Asks for the hand-over.
    Begin,
    /// Everything is open and checked. Names the files of the old daemon that the new one takes over.
    Ready(FilesTakenOver),
    /// The connection's state is taken over, and the image is locked.
    Prepared,
    /// The new daemon gives up, for this reason.
    Failed(String),
}

/// The files of the old daemon that the new one takes over. The old daemon removes the others.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct FilesTakenOver {
    /// The vhost-user socket.
    pub(crate) front: bool,
    /// The control socket.
    pub(crate) control: bool,
    /// The pid file.
    pub(crate) pid_file: bool,
}

/// The messages of the old daemon. They refer to a descriptor by its index in the list that comes with the message.
#[derive(Serialize, Deserialize)]
pub(crate) enum OldDaemonMessage {
    /// What the old daemon serves, and where.
    Hello(Box<Hello>),
    /// The state of the connection.
    State(Box<HandOverState>),
    /// The commit: the disk belongs to the new daemon.
    Go,
    /// The old daemon ends the hand-over, for this reason.
    Refused(String),
}

/// The properties of the disk that must not change, and the files that outlive the old daemon.
#[derive(Serialize, Deserialize)]
pub(crate) struct Hello {
    /// The old daemon's process. The kernel reports the process that created the control socket, which may be an earlier
    /// daemon.
    pub(crate) pid: u32,
    /// The properties of the disk that the guest knows.
    pub(crate) disk: DiskFacts,
    /// The path on which the old daemon listens for front-ends. `None`: the service manager bound the socket.
    pub(crate) front_path: Option<PathBuf>,
    /// The socket on which the old daemon listens for front-ends.
    pub(crate) front_socket: usize,
    /// The path and the socket on which the old daemon listens for clients.
    pub(crate) control: Option<(PathBuf, usize)>,
    /// The pid file's path and the open, locked file.
    pub(crate) pid_file: Option<(PathBuf, usize)>,
    /// The descriptor to which the old daemon logs.
    pub(crate) log: usize,
    /// `log` is the journal.
    pub(crate) log_is_journal: bool,
    /// Snapshots of other hosts need the consent of an attendant, which must connect to the new daemon first.
    pub(crate) misses_attendant: bool,
}

/// The properties of a disk on which a running guest relies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskFacts {
    /// The image's identity, the same in every process ([`crate::backend::ImageUpgrade::identity`]).
    pub(crate) image: String,
    /// The size of the disk in bytes. The new daemon's may be larger.
    pub(crate) size: u64,
    /// Size of a logical block in bytes.
    pub(crate) logical_block: u32,
    /// The disk is read-only.
    pub(crate) read_only: bool,
    /// The largest number of virtqueues.
    pub(crate) num_queues: u16,
    /// The largest size of a virtqueue.
    pub(crate) queue_size: u16,
}

impl DiskFacts {
    /// Checks whether a guest that knows these properties can continue with `new`. The error says what changed and how to
    /// fix it.
    pub(crate) fn allow(&self, new: &DiskFacts) -> Result<(), String> {
        if new.image != self.image {
            return Err(format!(
                "the image is another one ({}; the guest has {}): a running guest keeps its image, so leave out --blk-file \
                 and --rbd; to serve another image, end the guest and this daemon, and start a new one",
                new.image, self.image
            ));
        }
        if new.size < self.size {
            return Err(format!(
                "the image has {} bytes and the guest's disk has {}: run `virtioblkctl resize` first",
                new.size, self.size
            ));
        }
        let fixed = |what: &str, option: &str, old: &dyn std::fmt::Display, new: &dyn std::fmt::Display| {
            format!("{what} would change from {old} to {new} under a running guest: leave {option} as it is")
        };
        if new.logical_block != self.logical_block {
            let (old, new) = (&self.logical_block, &new.logical_block);
            return Err(fixed("the logical block size", "--logical-block-size", old, new));
        }
        if new.read_only != self.read_only {
            return Err(fixed("read-only", "--read-only", &self.read_only, &new.read_only));
        }
        if new.num_queues < self.num_queues {
            return Err(fixed("the number of queues", "--num-queues", &self.num_queues, &new.num_queues));
        }
        if new.queue_size < self.queue_size {
            return Err(fixed("the largest virtqueue size", "--queue-size", &self.queue_size, &new.queue_size));
        }
        Ok(())
    }
}

/// The state from which the new daemon continues to serve the guest.
#[derive(Serialize, Deserialize)]
pub(crate) struct HandOverState {
    /// When the pause began, in nanoseconds of CLOCK_MONOTONIC, which is the same for all processes.
    pub(crate) since: u64,
    /// How long it took from then until no request was in flight, in nanoseconds.
    pub(crate) drained_in: u64,
    /// The virtqueues' counters; empty from an older daemon that does not send them.
    #[serde(default)]
    pub(crate) counts: Vec<RingStatus>,
    /// The disk's latencies; empty from an older daemon that does not send them.
    #[serde(default)]
    pub(crate) latency: LatencyStatus,
    /// The limits of the disk's rates; `None` from an older daemon that has none.
    #[serde(default)]
    pub(crate) limits: Option<LimitsState>,
    /// The front-end's connection and its state; `None`: no front-end is connected.
    pub(crate) front_end: Option<(usize, SessionState)>,
}

/// The limits of a disk's rates.
#[derive(Serialize, Deserialize)]
pub(crate) struct LimitsState {
    /// Those with which the old daemon was started.
    pub(crate) configured: ThrottleStatus,
    /// Those in effect, which an operator may have changed since.
    pub(crate) current: ThrottleStatus,
}

impl LimitsState {
    /// The limits that a daemon started with `configured` must keep, because they were changed while the old one ran. `None`:
    /// none were, or the new daemon is started with others than the old one was, so the operator wants those.
    pub(crate) fn changed(&self, configured: &Limits) -> Option<Result<Limits, String>> {
        if self.configured != ThrottleStatus::of(configured) || self.current == self.configured {
            return None;
        }
        let limits = self.current.limits();
        Some(limits.check(Words::Libvirt).map(|()| limits))
    }
}

/// Returns the current time in nanoseconds of CLOCK_MONOTONIC.
pub(crate) fn monotonic() -> u64 {
    // This cannot fail on Linux, and 0 would only make the reported pause wrong.
    let now = nix::time::ClockId::CLOCK_MONOTONIC.now().map(std::time::Duration::from);
    now.map_or(0, |now| now.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_of_the_old_daemon_are_kept_if_they_were_changed_and_are_valid() {
        let status = |json: &str| serde_json::from_str::<ThrottleStatus>(json).unwrap();
        let state = |current| LimitsState { configured: status("{}"), current: status(current) };
        let own = Limits::default();
        let changed = state(r#"{"total-iops-sec": 5}"#).changed(&own).unwrap().unwrap();
        assert_eq!(changed.to_string(), "total-iops-sec=5");
        assert_eq!(state("{}").changed(&own), None);
        assert_eq!(state(r#"{"total-iops-sec": 5}"#).changed(&changed), None, "started with others");
        let wrong = state(r#"{"total-iops-sec": 5, "total-iops-sec-max-length": 2}"#);
        assert!(wrong.changed(&own).unwrap().unwrap_err().contains("needs total-iops-sec-max"));
    }
}
