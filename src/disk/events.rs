//! The events that a disk reports to the control thread, and the bounded queue for them.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::{CopyStatus, FailedRequest, HoldFigures, ImageStatus};
use crate::base::sync::{EventNotifier, Mutex};
use crate::engine::Errno;

/// An event of a disk for its operators.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A front-end connected.
    Connected,
    /// The front-end disconnected, for this reason.
    Disconnected(String),
    /// The hold of this epoch is settled.
    HoldSettled {
        /// The epoch given to [`super::Disk::close_gate`].
        epoch: u64,
        /// `Err`: the sync failed, or a virtqueue's thread died.
        result: Result<HoldFigures, Errno>,
    },
    /// The hold of this epoch can never settle, because another process uses the image, and this one cannot promise what
    /// the image holds.
    HoldRefused {
        /// The epoch given to [`super::Disk::close_gate`].
        epoch: u64,
    },
    /// A request failed, and the guest got the error.
    IoError(FailedRequest),
    /// A request failed and is retained; its virtqueue takes no further request that changes the disk. Sent once until
    /// `IoContinued`, and a second time if the first request was a read and then a change fails.
    IoStopped(FailedRequest),
    /// The virtqueue's retained requests are retried, by this process or by the one that serves it next.
    IoContinued {
        /// Index of the virtqueue.
        ring: u32,
    },
    /// Requests are in flight for so long that something must be wrong. Sent once until `IoResumed`.
    IoStalled {
        /// Index of the virtqueue.
        ring: u32,
        /// The number of such requests.
        requests: u64,
        /// How long the oldest of them has been in flight.
        oldest: Duration,
    },
    /// The virtqueue's stalled requests have completed.
    IoResumed {
        /// Index of the virtqueue.
        ring: u32,
    },
    /// A sync failed: a guest's flush, a hold's sync or another one.
    SyncError(Errno),
    /// A point-in-time copy ended: completed, failed or cancelled.
    CopyEnded(CopyStatus),
    /// A virtqueue or the front-end violated the protocol and was stopped, or was set up so that requests cannot
    /// complete. The text gives the reason.
    ProtocolError(String),
    /// The guest changed the buffer of a write while the write was in flight. Only with `--stable-writes detect`.
    BufferChanged {
        /// Byte offset in the image.
        offset: u64,
        /// Length in bytes.
        len: u64,
        /// The number of such changes before this one without an event: a guest can cause any number.
        suppressed: u64,
    },
    /// The image's state changed.
    ImageState(ImageStatus),
}

/// The queue of events for the control thread. It is bounded, so that a guest that causes errors costs no memory.
/// `HoldSettled`, `HoldRefused` and `CopyEnded`, which operators cause, are never dropped.
pub struct Events {
    state: Mutex<EventsState>,
    ready: EventNotifier,
}

/// The events that [`Events::take`] returned.
#[derive(Debug, Default)]
pub struct EventBatch {
    /// The events, oldest first.
    pub events: Vec<Event>,
    /// How many events were dropped since the batch before, because the queue was full.
    pub dropped: u64,
}

#[derive(Default)]
struct EventsState {
    queue: VecDeque<Event>,
    dropped: u64,
}

/// The most events in the queue, apart from those that are never dropped.
const MAX_EVENTS: usize = 256;

impl Events {
    /// Creates an empty queue. Fails when no file descriptor is left.
    pub fn new() -> std::io::Result<Self> {
        Ok(Events { state: Mutex::default(), ready: EventNotifier::new()? })
    }

    /// Adds an event. Any thread may call it; it never blocks on I/O.
    pub fn send(&self, event: Event) {
        self.ready.notify_after(|| self.add(event));
    }

    /// Adds an event unless the queue is full. Returns whether it was added.
    fn add(&self, event: Event) -> bool {
        let mut state = self.state.lock().expect("no panic while held");
        let limit = match event {
            Event::HoldSettled { .. } | Event::HoldRefused { .. } | Event::CopyEnded(_) => usize::MAX,
            // A guest that causes many of these leaves room for the other events.
            Event::ProtocolError(_) | Event::BufferChanged { .. } => MAX_EVENTS / 2,
            _ => MAX_EVENTS,
        };
        if state.queue.len() >= limit {
            state.dropped += 1;
            return false;
        }
        state.queue.push_back(event);
        true
    }

    /// Takes all events. Called by the control thread when [`Events::as_fd`] is readable.
    pub fn take(&self) -> EventBatch {
        self.ready.clear_before(|| {
            let mut state = self.state.lock().expect("no panic while held");
            EventBatch { events: state.queue.drain(..).collect(), dropped: std::mem::take(&mut state.dropped) }
        })
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

#[cfg(all(test, feature = "model"))]
mod interleavings {
    use std::sync::Arc;

    use super::*;
    use crate::base::sync::interleavings::{Mutant, holds};
    use crate::base::sync::{thread, yield_until_readable};

    /// A thread that polls the notifier, and then takes all events, gets every event.
    #[test]
    fn a_polling_thread_misses_no_event() {
        let model = || {
            let events = Arc::new(Events::new().unwrap());
            let sender = |epoch| {
                let events = events.clone();
                thread::spawn(move || events.send(Event::HoldSettled { epoch, result: Err(Errno(5)) }))
            };
            let senders = [sender(0), sender(1)];
            let mut taken = 0;
            while taken < senders.len() {
                yield_until_readable(&[events.as_fd()], None);
                taken += events.take().events.len();
            }
            senders.into_iter().for_each(|sender| sender.join().unwrap());
        };
        holds(model, &[Mutant::NotifyBeforeMessage, Mutant::ClearAfterTake]);
    }
}
