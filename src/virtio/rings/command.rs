//! What a running ring can be asked, and how a worker is reached.

use std::sync::Arc;

use crate::base::sync::Bell;
use crate::base::sync::mpsc::Sender;

/// What a worker can be asked; the only way to reach a running ring.
pub(in crate::virtio) enum Command {
    /// Block writes, drain, sync, then `Rings::ring_settled` with this epoch.
    CloseGate(u64),
    /// Unblock writes.
    OpenGate,
    /// The image has so many bytes now.
    Resize(u64),
    /// Look whether requests are in flight for too long.
    Look,
    /// Replace the call descriptor; then send the answer.
    SetCall(Option<std::fs::File>, Sender<()>),
    /// Try again what failed and is kept.
    Retry,
    /// Stop popping, finish what is in flight and publish it, then tell; the ring stays.
    Rest(Sender<()>),
    /// Pop again, if it was told to rest; and send an answer. A ring that did not rest has looked at what is in it by then.
    GoOn(Sender<()>),
    /// Stop popping, finish what is in flight, publish it, hand the ring back.
    StopMode(StopMode),
}

/// Where to send a worker commands: its queue, and the bell that wakes it.
#[derive(Clone)]
pub(in crate::virtio) struct Mailbox {
    commands: Sender<Command>,
    wake: Arc<Bell>,
    threads: Arc<dyn RingThreads>,
}

impl Mailbox {
    pub(in crate::virtio) fn new(commands: Sender<Command>, wake: Arc<Bell>, threads: Arc<dyn RingThreads>) -> Self {
        Mailbox { commands, wake, threads }
    }

    /// The ring's threads.
    pub(in crate::virtio) fn threads(&self) -> Arc<dyn RingThreads> {
        self.threads.clone()
    }

    /// Sends and wakes. A worker that has ended takes no more commands; whoever sent finds out by its own means (a
    /// hold by `Rings::ring_left`, a change of the ring by the thread's join).
    pub(in crate::virtio) fn send(&self, command: Command) {
        self.wake.ring_after(|| self.commands.send(command).is_ok());
    }
}

/// How a ring is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::virtio) enum StopMode {
    /// It runs again here, or another server does that knows what was in flight: what is kept is left to that.
    Restartable,
    /// Perhaps for good: everything popped is answered.
    Final,
}

/// The threads that serve one running ring, as the connection's watch sees them.
pub(in crate::virtio) trait RingThreads: Send + Sync {
    /// Has another thread continue the ring if the call of the last look has not returned. Returns whether the ring's thread
    /// made a call since then. Called by the connection's watch.
    fn look(self: Arc<Self>) -> bool;

    /// Whether another thread took the ring over from the one that started it.
    fn was_taken_over(&self) -> bool;
}
