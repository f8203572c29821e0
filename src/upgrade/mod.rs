//! Upgrade in place: another process takes over the guest's connection while the guest runs. What the two daemons say to
//! each other; who does what is in `server/upgrade.rs` (the old one) and `server/take_over.rs` (the new one).
//!
//! The new daemon is an ordinary one, started with `--take-over CTL` by `virtioblkctl upgrade`, by a unit or by hand:
//! the old one's sandbox starts no program. It opens and checks the image, locks apart, and asks for the hand-over on
//! the old one's control socket. From then on that connection carries the messages below.
//!
//! | new | old | |
//! |---|---|---|
//! | `Begin` | | with its starter's pipe, if virtioblkctl started it (`Starter`) |
//! | | `Hello` | what the guest was told, and copies of the sockets that outlive the old one |
//! | `Ready` | | everything that can fail without the guest's rings has succeeded: sandbox included |
//! | | | syncs; **the pause begins**: its rings come to rest, are stopped and synced, the image is let go |
//! | | `State` | the front-end's connection and all that was said on it |
//! | `Prepared` | | it is in the same state, and the image is its own; its rings do not run |
//! | | `Go` | the commit, if the starter has not given up: the old one never touches the image again, and ends |
//! | | | the rings run: **the pause ends** |
//!
//! Until `Go` was sent, an error, an end or silence of the new one, or the starter's giving up, makes the old one take its image and start its rings
//! again; the guest has noticed a pause. If the new one dies after `Go` that is a crash like any: what was in flight is
//! in the front-end's memory. A message of the front-end's that comes meanwhile waits in its socket, and the new one
//! reads it: the hand-over happens between two messages.

mod channel;
pub(crate) mod session_state;
mod starter;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::disk::RingStatus;
pub(crate) use channel::{Channel, Descriptors};
use session_state::SessionState;
pub use starter::VARIABLE as STARTER_VARIABLE;
pub(crate) use starter::{GAVE_UP, Starter};

/// Of these messages. One who takes over says which it speaks, and whoever does not know it refuses.
pub const VERSION: u64 = 1;

/// What the new daemon says.
#[derive(Serialize, Deserialize)]
pub(crate) enum FromNew {
    /// Let us begin.
    Begin,
    /// Everything is open and checked; which of the old one's files it goes on with.
    Ready(FilesTakenOver),
    /// The connection's state is taken over, the image is locked.
    Prepared,
    /// It gives up; why.
    Failed(String),
}

/// Files of the old daemon's that the new one goes on with. The others are the old one's to remove.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct FilesTakenOver {
    /// The vhost-user socket.
    pub(crate) front: bool,
    /// The control socket.
    pub(crate) control: bool,
    /// The pid file.
    pub(crate) pid_file: bool,
}

/// What the old daemon says. Numbers of descriptors are places in the list that comes with the message.
#[derive(Serialize, Deserialize)]
pub(crate) enum FromOld {
    /// What it serves, and where.
    Hello(Box<Hello>),
    /// What the guest's front-end said.
    State(Box<State>),
    /// It is yours.
    Go,
    /// The hand-over is off; why.
    Refused(String),
}

/// What must stay as it is, and what outlives the old daemon.
#[derive(Serialize, Deserialize)]
pub(crate) struct Hello {
    /// Its process: the kernel names who made the control socket, which may be an earlier one.
    pub(crate) pid: u32,
    /// What the guest was told of its disk.
    pub(crate) disk: DiskFacts,
    /// Where it listens for front-ends; `None`: on a socket that it was given.
    pub(crate) front_path: Option<PathBuf>,
    /// That socket.
    pub(crate) front_socket: usize,
    /// Where it listens for clients, and the socket.
    pub(crate) control: Option<(PathBuf, usize)>,
    /// Its pid file and the open, locked file.
    pub(crate) pid_file: Option<(PathBuf, usize)>,
    /// Where it logs.
    pub(crate) log: usize,
    /// Which is the journal.
    pub(crate) log_is_journal: bool,
    /// Snapshots of the image by others wait for an attendant that must find the new one first.
    pub(crate) misses_attendant: bool,
}

/// What a guest may rely on for as long as it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct DiskFacts {
    /// Names the image whoever has it open ([`crate::backend::Backend::identity`]).
    pub(crate) image: String,
    /// Bytes. It may have grown.
    pub(crate) size: u64,
    /// Bytes of a block.
    pub(crate) logical_block: u32,
    /// Writes are refused.
    pub(crate) read_only: bool,
    /// The most rings.
    pub(crate) num_queues: u16,
    /// The largest ring.
    pub(crate) queue_size: u16,
}

impl DiskFacts {
    /// Whether a guest that was told these may go on with `new`. `Err`: what changed, and the mend.
    pub(crate) fn allow(&self, new: &DiskFacts) -> Result<(), String> {
        if new.image != self.image {
            return Err(format!(
                "the image is another one ({}; the guest has {}): a running guest keeps its image, so give the same one",
                new.image, self.image
            ));
        }
        if new.size < self.size {
            return Err(format!(
                "the image has {} bytes and the guest was told {}: `virtioblkctl resize` first",
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
            return Err(fixed("the largest ring", "--queue-size", &self.queue_size, &new.queue_size));
        }
        Ok(())
    }
}

/// What the new daemon goes on from.
#[derive(Serialize, Deserialize)]
pub(crate) struct State {
    /// When the pause began: nanoseconds of CLOCK_MONOTONIC, which is one for all processes.
    pub(crate) since: u64,
    /// How long it took until nothing was in flight, in nanoseconds.
    pub(crate) drained_in: u64,
    /// What the rings have counted; none from a daemon that does not tell.
    #[serde(default)]
    pub(crate) counts: Vec<RingStatus>,
    /// The front-end's connection, and what was said on it; `None`: nobody is connected.
    pub(crate) front_end: Option<(usize, SessionState)>,
}

/// Nanoseconds of CLOCK_MONOTONIC.
pub(crate) fn monotonic() -> u64 {
    // It cannot fail where Linux runs; a pause that is measured wrong harms nobody.
    let now = nix::time::ClockId::CLOCK_MONOTONIC.now().map(std::time::Duration::from);
    now.map_or(0, |now| now.as_nanos() as u64)
}
