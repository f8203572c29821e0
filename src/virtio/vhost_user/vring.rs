//! A ring's two lives. Stopped, it belongs to the handler, which may change anything about it. Running, it belongs to
//! its worker's thread, and nobody else can touch it: the ring is *moved* there and back.
//!
//! So every control change has one rule, [`Vring::change`]: stop popping, finish what is in flight, publish it,
//! take the ring back; then change it; then start it again if it may run.

use crate::virtio::worker::stopped_ring::StoppedRing;
use std::fs::File;
use std::sync::Arc;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::activation::Activation;
use crate::base::sync::reused;
use crate::base::sync::reused::Task;
use crate::base::sync::{Bell, mpsc};
use crate::disk::Event;
use crate::virtio::blk::features;
use crate::virtio::rings::StopMode;
use crate::virtio::rings::{Mailbox, Rings, WorkerCommand};
use crate::virtio::shared_memory::dirty_log::DirtyLog;
use crate::virtio::shared_memory::inflight::Inflight;
use crate::virtio::shared_memory::memory_table::MemoryTable;
use crate::virtio::virtqueue::guest_memory::GuestMemory;
use crate::virtio::virtqueue::split_ring::SplitRing;
use crate::virtio::worker::{Relay, Setup};

/// What a ring needs to start, besides itself.
pub(in crate::virtio) struct RingContext<'a> {
    pub rings: &'a Arc<Rings>,
    pub memory: &'a MemoryTable,
    pub activation: &'a Activation,
    pub inflight: Option<&'a Inflight>,
    /// What we write is logged here.
    pub log: Option<&'a Arc<DirtyLog>>,
    pub acked_features: u64,
    /// seg_max of the configuration space.
    pub max_segments: u32,
    pub serial: &'a Arc<[u8; crate::virtio::blk::request::ID_BYTES]>,
}

impl RingContext<'_> {
    /// Reports a ring of `size` descriptors that is too small for the largest request that its driver may make. The text
    /// is the same for every ring of the disk.
    fn report_a_small_ring(&self, size: u16) {
        if !features::may_overfill(self.acked_features, size, self.max_segments) {
            return;
        }
        self.rings.report(Event::ProtocolError(format!(
            "a ring has {size} descriptors, and its driver does not use indirect descriptors: a request of {} segments, \
             which the driver may make, does not fit into the ring, and the guest would wait for it for ever: start \
             virtioblkd with --queue-size {size}, or give the disk a queue-size of {} in QEMU",
            self.max_segments,
            self.max_segments.saturating_add(2).next_power_of_two(),
        )));
    }
}

/// One ring of a connection.
pub(in crate::virtio) struct Vring {
    index: u32,
    /// What it has in flight is tracked for the next server, since its last start.
    tracked: bool,
    /// `None` only inside `change`.
    life: Option<VringState>,
}

enum VringState {
    Stopped(StoppedRing),
    Running { mailbox: Mailbox, thread: Task<()>, ended: mpsc::Receiver<StoppedRing> },
}

impl Vring {
    /// A ring as it is before the front-end said anything about it. `largest`: a power of two.
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
        Vring { index, tracked: false, life: Some(VringState::Stopped(stopped)) }
    }

    /// The one rule: stop, change, start again if it may run.
    pub(in crate::virtio) fn change<T>(
        &mut self,
        context: &RingContext,
        change: impl FnOnce(&mut StoppedRing) -> T,
    ) -> T {
        let mut stopped = self.stop(context.rings, StopMode::Restartable);
        let answer = change(&mut stopped);
        self.life = Some(self.start(stopped, context));
        answer
    }

    /// Stops the ring and leaves it stopped until [`Vring::change`]: for changes of all rings at once.
    pub(in crate::virtio) fn pause(&mut self, rings: &Arc<Rings>, how: StopMode) {
        let mut stopped = self.stop(rings, how);
        if how == StopMode::Final && !stopped.resubmit.is_empty() {
            // Its memory is gone, or its image is another's: there is nowhere to answer, or nothing to try.
            let (index, kept) = (self.index, std::mem::take(&mut stopped.resubmit).len());
            let what =
                format!("ring {index}: {kept} failed requests stay unanswered: reset the guest if it waits for them");
            rings.report(Event::ProtocolError(what));
        }
        self.life = Some(VringState::Stopped(stopped));
    }

    /// The connection ends: what failed and is kept is left to the next server, if the front-end can tell it.
    pub(in crate::virtio) fn end(&mut self, rings: &Arc<Rings>) {
        self.pause(rings, if self.tracked { StopMode::Restartable } else { StopMode::Final });
    }

    /// Whether it is to run, and perhaps does.
    pub(in crate::virtio) fn may_run(&self) -> bool {
        match &self.life {
            Some(VringState::Stopped(stopped)) => stopped.may_run(),
            _ => true,
        }
    }

    /// Starts the ring if it may run and does not: the image was refused before.
    pub(in crate::virtio) fn start_again(&mut self, context: &RingContext) {
        if let Some(VringState::Stopped(_)) = &self.life {
            self.change(context, |_| ());
        }
    }

    /// Every ring is enabled where the front-end negotiated no protocol features. Only between `pause` and `change`.
    pub(in crate::virtio) fn enable_while_stopped(&mut self) {
        if let Some(stopped) = self.stopped() {
            stopped.enabled = true;
        }
    }

    /// SET_VRING_CALL on a running ring: swapped between two batches without a drain. A guest that moves an interrupt
    /// to another CPU sends it, and must not wait for its slowest request.
    pub(in crate::virtio) fn set_call(&mut self, context: &RingContext, call: Option<File>) {
        if let Some(VringState::Running { mailbox, .. }) = &self.life {
            let (sender, done) = mpsc::channel();
            mailbox.send(WorkerCommand::SetCall(call, sender));
            if done.recv().is_err() {
                log::error!("ring {}: the worker ended before it took the new call descriptor", self.index);
            }
        } else {
            let index = self.index;
            self.change(context, |ring| ring.set_call(index, call));
        }
    }

    /// Asks a running ring to come to rest; the receiver hears when it has. `None`: it does not run.
    pub(in crate::virtio) fn ask_to_rest(&self) -> Option<mpsc::Receiver<()>> {
        self.ask(WorkerCommand::Pause)
    }

    /// Lets a ring that was asked to rest go on. Of one that was just started the receiver hears when it has looked at
    /// what is in it.
    pub(in crate::virtio) fn ask_to_go_on(&self) -> Option<mpsc::Receiver<()>> {
        self.ask(WorkerCommand::Resume)
    }

    fn ask(&self, command: impl FnOnce(mpsc::Sender<()>) -> WorkerCommand) -> Option<mpsc::Receiver<()>> {
        let Some(VringState::Running { mailbox, .. }) = &self.life else { return None };
        let (sender, told) = mpsc::channel();
        mailbox.send(command(sender));
        Some(told)
    }

    /// The ring, if nobody serves it.
    pub(in crate::virtio) fn stopped(&mut self) -> Option<&mut StoppedRing> {
        match &mut self.life {
            Some(VringState::Stopped(stopped)) => Some(stopped),
            _ => None,
        }
    }

    fn stop(&mut self, rings: &Arc<Rings>, how: StopMode) -> StoppedRing {
        match self.life.take().expect("set outside of change") {
            VringState::Stopped(stopped) => stopped,
            VringState::Running { mailbox, thread, ended } => {
                mailbox.send(WorkerCommand::Stop(how));
                // A panic in a worker ends the process (server's panic hook): a ring whose state is unknown must not
                // be served on, and a front-end sees a closed socket but no dead thread.
                let stopped = ended.recv().expect("a worker's panic ends the process");
                // One that another thread took the ring over from ends when its call returns.
                if !mailbox.threads().was_taken_over() {
                    thread.join().expect("a worker's panic ends the process");
                }
                rings.ring_left(self.index);
                log::debug!("ring {} stopped at {}", self.index, stopped.next_available);
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
                "ring {}: its descriptors lie outside the guest's memory, or a part of it in two regions of that; not started",
                self.index
            );
            context.rings.report(Event::ProtocolError(what));
            return VringState::Stopped(stopped);
        };
        context.report_a_small_ring(stopped.size);
        let (sender, commands) = mpsc::channel();
        let wake = match Bell::new() {
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
        // The ring travels through a channel, so that it comes back if the thread cannot be made.
        let (hand_over, received) = mpsc::sync_channel(1);
        let joined = context.rings.ring_joined(self.index, mailbox.clone());
        let (ending, ended) = mpsc::channel();
        let name = format!("ring {}", self.index);
        let body = move || {
            let stopped = received.recv().expect("sent right after the thread was made");
            relay.run(setup, ring, stopped, joined, ending);
        };
        match reused::spawn(name, body) {
            Ok(thread) => {
                log::debug!("ring {} runs, {} descriptors", self.index, stopped.size);
                let sent = hand_over.send(stopped);
                assert!(sent.is_ok(), "the thread waits for its ring");
                VringState::Running { mailbox, thread, ended }
            }
            Err(error) => {
                context.rings.ring_left(self.index);
                self.not_started(stopped, context, &error)
            }
        }
    }

    fn not_started(&self, stopped: StoppedRing, context: &RingContext, error: &std::io::Error) -> VringState {
        let what = format!("ring {} cannot run: {error}; raise the limit on threads and files", self.index);
        context.rings.report(Event::ProtocolError(what));
        VringState::Stopped(stopped)
    }
}
