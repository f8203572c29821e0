//! The states of a ring. A stopped ring belongs to the handler, which may change anything about it. A running ring belongs
//! to its worker's thread, and no other thread can touch it: the ring is *moved* there and back.
//!
//! So every change by a message follows one rule, [`Vring::change`]: stop popping, complete what is in flight, take the ring
//! back, change it, and start it again if it may run.

use std::fs::File;
use std::sync::Arc;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::activation::Activation;
use crate::base::sync::reused::{self, Task};
use crate::base::sync::{EventNotifier, mpsc};
use crate::disk::Event;
use crate::virtio::blk::features;
use crate::virtio::blk::request::ID_BYTES;
use crate::virtio::rings::{Mailbox, Rings, StopMode, WorkerCommand};
use crate::virtio::shared_memory::dirty_log::DirtyLog;
use crate::virtio::shared_memory::inflight::Inflight;
use crate::virtio::shared_memory::memory_table::MemoryTable;
use crate::virtio::virtqueue::guest_memory::GuestMemory;
use crate::virtio::virtqueue::split_ring::SplitRing;
use crate::virtio::worker::stopped_ring::StoppedRing;
use crate::virtio::worker::{Relay, Setup};

/// What a ring needs from its session to start.
pub(in crate::virtio) struct RingContext<'a> {
    pub rings: &'a Arc<Rings>,
    pub memory: &'a MemoryTable,
    pub activation: &'a Activation,
    pub inflight: Option<&'a Inflight>,
    /// The dirty log, while LOG_ALL is acknowledged.
    pub log: Option<&'a Arc<DirtyLog>>,
    pub acked_features: u64,
    /// seg_max of the configuration space.
    pub max_segments: u32,
    pub serial: &'a Arc<[u8; ID_BYTES]>,
}

impl RingContext<'_> {
    /// Reports a ring of `size` descriptors that is too small for the largest request that its driver may make. The text
    /// is the same for every ring of the disk.
    fn report_small_ring(&self, size: u16) {
        if !features::may_overfill(self.acked_features, size, self.max_segments) {
            return;
        }
        self.rings.report(Event::ProtocolError(format!(
            "a queue has {size} descriptors, and its driver does not use indirect descriptors: a request of {} segments, \
             which the driver may make, does not fit into the queue, and the guest would wait for it for ever: start \
             virtioblkd with --queue-size {size}, or give the disk a queue-size of {} in QEMU",
            self.max_segments,
            self.max_segments.saturating_add(2).next_power_of_two(),
        )));
    }
}

/// One ring of a session.
pub(in crate::virtio) struct Vring {
    index: u32,
    /// Since its last start, what the ring has in flight is marked in the in-flight region for the next server.
    tracked: bool,
    /// `None` only inside [`Vring::change`].
    state: Option<VringState>,
}

enum VringState {
    Stopped(StoppedRing),
    Running { mailbox: Mailbox, thread: Task<()>, ended: mpsc::Receiver<StoppedRing> },
}

impl Vring {
    /// A ring that the front-end has set nothing of. `largest`: the number of descriptors, a power of two.
    pub(in crate::virtio) fn new(index: u32, largest: u16, enabled: bool) -> Self {
        let stopped = StoppedRing {
            size: largest,
            addresses: None,
            next_available: 0,
            kick: None,
            call: None,
            err: None,
            enabled,
            resubmit: Vec::new(),
        };
        Vring { index, tracked: false, state: Some(VringState::Stopped(stopped)) }
    }

    /// Stops the ring, changes it, and starts it again if it may run.
    pub(in crate::virtio) fn change<T>(
        &mut self,
        context: &RingContext,
        change: impl FnOnce(&mut StoppedRing) -> T,
    ) -> T {
        let mut stopped = self.stop(context.rings, StopMode::Restartable);
        let result = change(&mut stopped);
        self.state = Some(self.start(stopped, context));
        result
    }

    /// Stops the ring until [`Vring::change`] or [`Vring::start_again`]. For changes of all rings at once.
    pub(in crate::virtio) fn pause(&mut self, rings: &Arc<Rings>, how: StopMode) {
        let mut stopped = self.stop(rings, how);
        if how == StopMode::Final && !stopped.resubmit.is_empty() {
            // The ring did not start again, because its memory is gone or the image was refused. So there is no place to
            // complete these requests, or no image to retry them on.
            let (index, failed) = (self.index, std::mem::take(&mut stopped.resubmit).len());
            let what = format!(
                "queue {index}: {failed} failed requests stay unanswered: reset the guest if it waits for them"
            );
            rings.report(Event::ProtocolError(what));
        }
        self.state = Some(VringState::Stopped(stopped));
    }

    /// Stops the ring at the end of the session. Retained requests are left to the next server if they are marked for it.
    pub(in crate::virtio) fn end(&mut self, rings: &Arc<Rings>) {
        self.pause(rings, if self.tracked { StopMode::Restartable } else { StopMode::Final });
    }

    /// Whether the ring runs, or would if the image were not refused.
    pub(in crate::virtio) fn may_run(&self) -> bool {
        match &self.state {
            Some(VringState::Stopped(stopped)) => stopped.may_run(),
            _ => true,
        }
    }

    /// Starts the ring if it is stopped and may run.
    pub(in crate::virtio) fn start_again(&mut self, context: &RingContext) {
        if let Some(VringState::Stopped(_)) = &self.state {
            self.change(context, |_| ());
        }
    }

    /// Enables a stopped ring, because the front-end negotiated no protocol features.
    pub(in crate::virtio) fn enable_while_stopped(&mut self) {
        if let Some(stopped) = self.stopped() {
            stopped.enabled = true;
        }
    }

    /// Replaces the call descriptor (SET_VRING_CALL). The worker of a running ring swaps it between two batches, without a
    /// drain: a guest that moves an interrupt to another CPU causes this message, and must not wait for its slowest request.
    pub(in crate::virtio) fn set_call(&mut self, context: &RingContext, call: Option<File>) {
        if let Some(VringState::Running { mailbox, .. }) = &self.state {
            let (sender, done) = mpsc::channel();
            mailbox.send(WorkerCommand::SetCall(call, sender));
            if done.recv().is_err() {
                log::error!("queue {}: the worker ended before it took the new call descriptor", self.index);
            }
        } else {
            let index = self.index;
            self.change(context, |ring| ring.set_call(index, call));
        }
    }

    /// Asks the worker of a running ring to pause. The receiver gets a message when it has. `None`: the ring does not run.
    pub(in crate::virtio) fn request_pause(&self) -> Option<mpsc::Receiver<()>> {
        self.send_with_reply(WorkerCommand::Pause)
    }

    /// Asks the worker of a running ring to resume. The receiver gets a message when it has. The worker of a ring that has
    /// just started has popped what was in it by then. `None`: the ring does not run.
    pub(in crate::virtio) fn request_resume(&self) -> Option<mpsc::Receiver<()>> {
        self.send_with_reply(WorkerCommand::Resume)
    }

    fn send_with_reply(&self, command: impl FnOnce(mpsc::Sender<()>) -> WorkerCommand) -> Option<mpsc::Receiver<()>> {
        let Some(VringState::Running { mailbox, .. }) = &self.state else { return None };
        let (sender, reply) = mpsc::channel();
        mailbox.send(command(sender));
        Some(reply)
    }

    /// The ring, if no worker serves it.
    pub(in crate::virtio) fn stopped(&mut self) -> Option<&mut StoppedRing> {
        match &mut self.state {
            Some(VringState::Stopped(stopped)) => Some(stopped),
            _ => None,
        }
    }

    fn stop(&mut self, rings: &Arc<Rings>, how: StopMode) -> StoppedRing {
        match self.state.take().expect("set outside of change") {
            VringState::Stopped(stopped) => stopped,
            VringState::Running { mailbox, thread, ended } => {
                mailbox.send(WorkerCommand::Stop(how));
                // A panic in a worker ends the process (the server's panic hook). A ring whose state is unknown must not be
                // served on, and a front-end sees a closed socket, but not a dead thread.
                let stopped = ended.recv().expect("a worker's panic ends the process");
                // A thread that another one took the ring over from ends when its call returns, which may be never.
                if !mailbox.threads().was_taken_over() {
                    thread.join().expect("a worker's panic ends the process");
                }
                rings.ring_left(self.index);
                log::debug!("queue {} stopped at {}", self.index, stopped.next_available);
                stopped
            }
        }
    }

    fn start(&mut self, stopped: StoppedRing, context: &RingContext) -> VringState {
        let addresses = match stopped.addresses {
            Some(addresses) if stopped.may_run() => addresses,
            _ => return VringState::Stopped(stopped),
        };
        if !context.activation.claim(context.rings) {
            return VringState::Stopped(stopped);
        }
        let memory = GuestMemory::new(context.memory.pin());
        let event_idx = features::has(context.acked_features, VIRTIO_RING_F_EVENT_IDX);
        let used = addresses.used_index(context.memory.memory());
        let ring = used.and_then(|used| {
            SplitRing::open(&memory, &addresses, stopped.size, event_idx, (stopped.next_available, used))
        });
        let Some(ring) = ring else {
            let what = format!(
                "queue {}: its descriptors lie outside the guest's memory, or a part of it in two regions of that; not started",
                self.index
            );
            context.rings.report(Event::ProtocolError(what));
            return VringState::Stopped(stopped);
        };
        context.report_small_ring(stopped.size);
        let (sender, commands) = mpsc::channel();
        let wake = match EventNotifier::new() {
            Ok(wake) => Arc::new(wake),
            Err(error) => return self.not_started(stopped, context, &error),
        };
        let relay = Relay::new(self.index);
        let mailbox = Mailbox::new(sender, wake.clone(), relay.clone());
        let inflight = context.inflight.and_then(|inflight| inflight.ring(self.index, stopped.size, ring.next_used()));
        self.tracked = inflight.is_some();
        let setup = Setup {
            index: self.index,
            rings: context.rings.clone(),
            memory,
            inflight,
            log: context.log.cloned(),
            acked_features: context.acked_features,
            serial: context.serial.clone(),
            commands,
            wake,
        };
        // The ring goes through a channel, so that it is not lost if the thread cannot be created.
        let (hand_over, received) = mpsc::sync_channel(1);
        let joined = context.rings.ring_joined(self.index, mailbox.clone());
        let (ending, ended) = mpsc::channel();
        let name = format!("ring {}", self.index);
        let body = move || {
            let stopped = received.recv().expect("sent right after the thread was created");
            relay.run(setup, ring, stopped, joined, ending);
        };
        match reused::spawn(name, body) {
            Ok(thread) => {
                log::debug!("queue {} runs, {} descriptors", self.index, stopped.size);
                let sent = hand_over.send(stopped);
                assert!(sent.is_ok(), "the thread waits for its queue");
                VringState::Running { mailbox, thread, ended }
            }
            Err(error) => {
                context.rings.ring_left(self.index);
                self.not_started(stopped, context, &error)
            }
        }
    }

    fn not_started(&self, stopped: StoppedRing, context: &RingContext, error: &std::io::Error) -> VringState {
        let what = format!("queue {} cannot run: {error}; raise the limit on threads and files", self.index);
        context.rings.report(Event::ProtocolError(what));
        VringState::Stopped(stopped)
    }
}
