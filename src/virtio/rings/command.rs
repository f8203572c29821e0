//! The commands that a running virtqueue's worker obeys, and the mailbox that takes them to it.

use std::sync::Arc;

use super::limiter::Limiter;
use crate::base::sync::EventNotifier;
use crate::base::sync::mpsc::Sender;

/// A command for a worker; the only way to reach a running virtqueue.
pub(in crate::virtio) enum WorkerCommand {
    /// Block writes, drain and sync, then call `Rings::ring_settled` with this epoch.
    CloseGate(u64),
    /// Unblock writes.
    OpenGate,
    /// The image has this many bytes from now on.
    Resize(u64),
    /// Check whether requests have been in flight for too long.
    CheckStalls,
    /// Keep these limits from now on; `None`: there are none.
    Limit(Option<Arc<Limiter>>),
    /// Replace the call descriptor, then reply.
    SetCall(Option<std::fs::File>, Sender<()>),
    /// Retry the failed requests that are retained.
    Retry,
    /// Stop popping, complete what is in flight, then reply. The worker keeps the virtqueue.
    Pause(Sender<()>),
    /// End a pause, if there is one, and reply. The worker of a virtqueue that was not paused has popped what was in it by
    /// the time of the reply.
    Resume(Sender<()>),
    /// Stop popping, complete what is in flight, and hand the virtqueue back.
    Stop(StopMode),
}

/// Sends commands to one worker: the queue of its commands, and the notifier that wakes it.
#[derive(Clone)]
pub(in crate::virtio) struct Mailbox {
    commands: Sender<WorkerCommand>,
    wake: Arc<EventNotifier>,
    threads: Arc<dyn RingThreads>,
}

impl Mailbox {
    pub(in crate::virtio) fn new(
        commands: Sender<WorkerCommand>,
        wake: Arc<EventNotifier>,
        threads: Arc<dyn RingThreads>,
    ) -> Self {
        Mailbox { commands, wake, threads }
    }

    /// The threads that serve the virtqueue.
    pub(in crate::virtio) fn threads(&self) -> Arc<dyn RingThreads> {
        self.threads.clone()
    }

    /// Sends a command and wakes the worker. A worker that has ended takes no commands. The sender learns that by other
    /// means: a hold by `Rings::ring_left`, a change of the virtqueue when it joins the thread.
    pub(in crate::virtio) fn send(&self, command: WorkerCommand) {
        self.wake.notify_after(|| self.commands.send(command).is_ok());
    }
}

/// How a virtqueue is to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::virtio) enum StopMode {
    /// It runs again in this process, or in another server that knows what was in flight. Retained requests are left to
    /// that server.
    Restartable,
    /// It may never run again: everything popped is completed.
    Final,
}

/// The threads that serve one running virtqueue, as the connection's [`Watch`](super::stall_watch::Watch) sees them.
pub(in crate::virtio) trait RingThreads: Send + Sync {
    /// Starts another thread for the virtqueue if the call that the last check saw has not returned. Returns whether the
    /// thread in charge has made a call since the last check. Called by the connection's watch.
    fn check_call(self: Arc<Self>) -> bool;

    /// Whether another thread took the virtqueue over from the one that started it.
    fn was_taken_over(&self) -> bool;
}
