//! Handles the vhost-user messages of one session (QEMU's docs/interop/vhost-user.rst). There is no data path here: every
//! message that changes a ring goes through [`Vring::change`], and is replied to when the change is complete.

mod messages;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Backend, Error, Result};

use super::activation::Activation;
use super::vring::{RingContext, Vring};
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};
use crate::virtio::blk::features;
use crate::virtio::blk::request::ID_BYTES;
use crate::virtio::rings::{Rings, StopMode};
use crate::virtio::shared_memory::dirty_log::DirtyLog;
use crate::virtio::shared_memory::inflight::Inflight;
use crate::virtio::shared_memory::memory_table::MemoryTable;
use crate::virtio::shared_memory::sigbus::SessionSocket;
use crate::virtio::worker::stopped_ring::StoppedRing;

/// What GET_FEATURES, GET_CONFIG and GET_PROTOCOL_FEATURES return.
#[derive(Clone)]
pub(in crate::virtio) struct AdvertisedFeatures {
    pub features: u64,
    pub config: [u8; 60],
    pub protocol_features: VhostUserProtocolFeatures,
}

/// What is fixed for the life of a device.
pub(in crate::virtio) struct DeviceLimits {
    pub num_queues: u16,
    pub queue_size: u16,
    pub serial: Arc<[u8; ID_BYTES]>,
}

/// What one front-end has set up, from its connection to its end. The vhost-user thread owns it.
pub(in crate::virtio) struct Handler {
    pub(in crate::virtio) rings: Arc<Rings>,
    advertised: AdvertisedFeatures,
    limits: Arc<DeviceLimits>,
    pub(in crate::virtio) memory: MemoryTable,
    pub(in crate::virtio) activation: Activation,
    pub(in crate::virtio) queues: Vec<Vring>,
    /// The in-flight region: what an earlier server left, and what this one leaves to the next.
    pub(in crate::virtio) inflight: Option<Inflight>,
    /// The dirty log. Workers write it while LOG_ALL is acknowledged.
    pub(in crate::virtio) log: Option<Arc<DirtyLog>>,
    /// The features of SET_FEATURES. `None` before that message.
    pub(in crate::virtio) acked_features: Option<u64>,
    /// The features of SET_PROTOCOL_FEATURES. The message layer obeys them.
    pub(in crate::virtio) acked_protocol_features: u64,
    /// The channel for messages to the front-end, as the `vhost` crate has it. It stays open, because QEMU logs an error
    /// when it ends.
    backend_channel: Option<Backend>,
    /// A duplicate of the channel that the next message carries ([`super::backend_channel::peek`]).
    peeked: Option<OwnedFd>,
}

impl Handler {
    pub(in crate::virtio) fn new(
        rings: Arc<Rings>,
        advertised: AdvertisedFeatures,
        limits: Arc<DeviceLimits>,
        socket: Arc<SessionSocket>,
    ) -> Self {
        Handler {
            rings,
            advertised,
            limits,
            activation: Activation::default(),
            memory: MemoryTable::new(socket),
            queues: Vec::new(),
            inflight: None,
            log: None,
            acked_features: None,
            acked_protocol_features: 0,
            backend_channel: None,
            peeked: None,
        }
    }

    /// Stops every ring. What is in flight completes.
    pub(in crate::virtio) fn stop_all(&mut self, how: StopMode) {
        for queue in &mut self.queues {
            queue.pause(&self.rings, how);
        }
    }

    /// Changes one ring ([`Vring::change`]). A ring is created when a message first names it.
    fn change<T>(&mut self, index: u32, change: impl FnOnce(&MemoryTable, &mut StoppedRing) -> Result<T>) -> Result<T> {
        let (queue, context) = self.queue(index)?;
        queue.change(&context, |ring| change(context.memory, ring))
    }

    /// Changes all rings at once: they stop before the change and start after it.
    fn change_all(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.stop_all(StopMode::Restartable);
        let result = change(self);
        self.start_all();
        result
    }

    /// Starts every ring that is stopped and may run. Claims the image first, if that is not done.
    pub(in crate::virtio) fn start_all(&mut self) {
        let (queues, context) = self.queues_and_context();
        for queue in queues {
            queue.start_again(&context);
        }
    }

    /// Whether rings wait for the image. The caller then retries [`Handler::start_all`] every second.
    pub(in crate::virtio) fn waits_for_image(&self) -> bool {
        self.activation.is_refused()
    }

    /// Syncs what the rings acknowledged and, if no ring may run, releases the image. Called after rings have stopped for
    /// good: at the end of the session, on GET_VRING_BASE, and on a reset.
    fn sync_and_release(&mut self) {
        self.rings.sync_unless_ignored();
        if !self.queues.iter().any(Vring::may_run) {
            self.activation.release(&self.rings);
        }
    }

    /// Ends the session: stops every ring, syncs what it acknowledged, and releases the image.
    pub(in crate::virtio) fn end(&mut self) {
        self.queues.iter_mut().for_each(|queue| queue.end(&self.rings));
        self.queues.clear();
        self.sync_and_release();
    }

    /// Abandons a session that was restored and not started, because the old daemon continues it. Releases the image, which
    /// this process has not used.
    pub(in crate::virtio) fn abandon_take_over(&mut self) {
        self.queues.clear();
        self.activation.release(&self.rings);
    }

    /// Takes a duplicate of the channel that the next message carries.
    pub(in crate::virtio) fn offer_channel(&mut self, channel: OwnedFd) {
        self.peeked = Some(channel);
    }

    /// Stops a ring that may continue elsewhere, or never: everything popped is completed.
    fn finish(&mut self, index: u32) -> Result<()> {
        let (queue, context) = self.queue(index)?;
        queue.pause(context.rings, StopMode::Final);
        Ok(())
    }

    fn queue(&mut self, index: u32) -> Result<(&mut Vring, RingContext<'_>)> {
        if index >= u32::from(self.limits.num_queues) {
            log_limited!(
                FRONT_END_LOG,
                Error,
                "the front-end names queue {index}, but only {} are allowed: give its num-queues a smaller number or \
                 --num-queues a larger one",
                self.limits.num_queues
            );
            return Err(Error::InvalidParam);
        }
        // Without protocol features there is no SET_VRING_ENABLE, so rings are created enabled. (QEMU sends SET_VRING_CALL
        // before SET_FEATURES. A ring is not enabled that early.)
        let enabled = self.acked_features.is_some_and(|acked| acked & features::PROTOCOL_FEATURES == 0);
        while self.queues.len() <= index as usize {
            let next = self.queues.len() as u32;
            self.queues.push(Vring::new(next, self.limits.queue_size, enabled));
        }
        let (queues, context) = self.queues_and_context();
        Ok((&mut queues[index as usize], context))
    }

    /// The rings, and what they need to start.
    fn queues_and_context(&mut self) -> (&mut Vec<Vring>, RingContext<'_>) {
        let acked_features = self.acked_features.unwrap_or(0);
        let context = RingContext {
            rings: &self.rings,
            memory: &self.memory,
            activation: &self.activation,
            inflight: self.inflight.as_ref(),
            log: self.log.as_ref().filter(|_| acked_features & features::LOG_ALL != 0),
            acked_features,
            max_segments: features::max_segments(self.limits.queue_size),
            serial: &self.limits.serial,
        };
        (&mut self.queues, context)
    }
}
