//! Handles the vhost-user messages of one session (QEMU's docs/interop/vhost-user.rst). There is no data path here: every
//! message that changes a ring goes through [`Vring::change`], and is replied to when the change is complete.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::activation::Activation;
use super::eventfd;
use super::vring::{RingContext, Vring};
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};
use crate::disk::Event;
use crate::virtio::blk::features;
use crate::virtio::blk::request::ID_BYTES;
use crate::virtio::rings::{Rings, SHARE_MEMORY, StopMode};
use crate::virtio::shared_memory::dirty_log::DirtyLog;
use crate::virtio::shared_memory::inflight::{Inflight, MAX_ENTRIES};
use crate::virtio::shared_memory::memory_table::{MAX_REGIONS, MemoryTable};
use crate::virtio::shared_memory::sigbus::SessionSocket;
use crate::virtio::virtqueue::split_ring::RingAddresses;
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

/// The protocol features that this handler serves. The vhost crate serves REPLY_ACK by itself.
fn protocol_features() -> VhostUserProtocolFeatures {
    VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD
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

    /// Gives a session back that was restored and not started, because the other process keeps it. The image is released,
    /// untouched.
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
                "the front-end names ring {index}, but only {} are allowed: give its num-queues a smaller number or \
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

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.change_all(|this| {
            this.acked_features = None;
            this.rings.negotiated(None);
            this.queues.clear();
            this.inflight = None;
            this.log = None;
            Ok(())
        })?;
        self.sync_and_release();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.advertised.features)
    }

    fn set_features(&mut self, acked: u64) -> Result<()> {
        let unknown = acked & !features::acceptable();
        if unknown != 0 {
            log_limited!(
                FRONT_END_LOG,
                Error,
                "the front-end acknowledges features {unknown:#x}, which were not offered"
            );
            return Err(Error::InvalidParam);
        }
        // QEMU repeats the message when migration logging starts and stops. Where the features are the same, nothing changes.
        if self.acked_features == Some(acked) {
            return Ok(());
        }
        self.change_all(|this| {
            this.acked_features = Some(acked);
            this.rings.negotiated(Some(acked));
            if acked & features::PROTOCOL_FEATURES == 0 {
                for queue in &mut this.queues {
                    queue.enable_while_stopped();
                }
            }
            Ok(())
        })
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.change_all(|this| this.memory.replace(table, files))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let largest = u32::from(self.limits.queue_size);
        if num == 0 || num > largest || !num.is_power_of_two() {
            log_limited!(
                FRONT_END_LOG,
                Error,
                "the front-end asks for a ring of {num} descriptors: a power of two up to {largest} is allowed; give \
                 --queue-size a larger number, or the front-end's queue-size a smaller one (QEMU 10.0.13 ignores it and \
                 needs --queue-size 1024)"
            );
            return Err(Error::InvalidParam);
        }
        self.change(index, |_, ring| {
            ring.size = num as u16;
            Ok(())
        })
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let rings = self.rings.clone();
        self.change(index, |memory, ring| {
            ring.addresses = None;
            let [descriptors, available, used] = [descriptor, available, used].map(|at| memory.guest_address(at));
            let (Some(descriptors), Some(available), Some(used)) = (descriptors, available, used) else {
                let shared = memory.record().count();
                rings.report(Event::ProtocolError(format!(
                    "the front-end places ring {index} in guest memory that it does not share with virtioblkd (it shares {shared} regions): the disk \
                     cannot be served. Share the memory. \
                     {SHARE_MEMORY}"
                )));
                return Err(Error::InvalidParam);
            };
            let addresses = RingAddresses { descriptors, available, used };
            ring.set_addresses(addresses, memory.memory()).map_err(|fault| {
                log_limited!(FRONT_END_LOG, Error, "the front-end places ring {index} at {addresses:x?}: {fault}");
                Error::InvalidParam
            })
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.change(index, |_, ring| {
            ring.next_available = base as u16;
            Ok(())
        })
    }

    /// Stops the ring for good, and syncs. QEMU sends a vhost-user disk no flush at `stop` or migration, so this sync makes
    /// `virsh suspend` as safe as with an in-process disk. Blocked writes stay in the ring, so a quiesced disk replies at
    /// once.
    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.finish(index)?;
        let base = self.change(index, |_, ring| {
            ring.kick = None;
            ring.call = None;
            Ok(ring.next_available)
        })?;
        self.sync_and_release();
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, kick: Option<File>) -> Result<()> {
        if kick.is_none() {
            log_limited!(
                FRONT_END_LOG,
                Error,
                "the front-end wants ring {index} to be polled without a kick descriptor: not supported"
            );
            return Err(Error::InvalidParam);
        }
        let kick = eventfd::checked(kick, "kick", index)?;
        self.change(u32::from(index), |_, ring| {
            ring.kick = kick;
            Ok(())
        })
    }

    fn set_vring_call(&mut self, index: u8, call: Option<File>) -> Result<()> {
        let call = eventfd::checked(call, "call", index)?;
        let (queue, context) = self.queue(u32::from(index))?;
        queue.set_call(&context, call);
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, err: Option<File>) -> Result<()> {
        let err = eventfd::checked(err, "error", index)?;
        self.change(u32::from(index), |_, ring| {
            ring.err = err;
            Ok(())
        })
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(protocol_features() & self.advertised.protocol_features)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.acked_protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.limits.num_queues))
    }

    /// QEMU disables a ring right before GET_VRING_BASE.
    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if !enable {
            self.finish(index)?;
        }
        self.change(index, |_, ring| {
            ring.enabled = enable;
            Ok(())
        })
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let config = features::with_capacity(self.advertised.config, self.rings.capacity().read());
        Ok(features::read_config(&config, offset, size))
    }

    /// Ignores the write: nothing is writable, since CONFIG_WCE is not offered. A guest can try it all the same, and an
    /// error would cost it the disk.
    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        log::debug!("the guest's write of {} bytes at {offset} of the configuration space is ignored", buf.len());
        Ok(())
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        self.backend_channel = Some(backend);
        match self.peeked.take() {
            Some(channel) => self.rings.capacity().set_channel(channel),
            None => log_limited!(
                FRONT_END_LOG,
                Warn,
                "the front-end's channel could not be duplicated: the front-end will not be informed of a resize"
            ),
        }
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.change_all(|this| this.memory.add(region, file))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.change_all(|this| this.memory.remove(region))
    }

    /// Creates a region for the front-end to keep. The guest's rings may have more descriptors than the front-end asks for,
    /// so the region has room for the largest that are allowed.
    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (rings, entries) = (wanted.num_queues, wanted.queue_size);
        if rings > self.limits.num_queues || entries > MAX_ENTRIES {
            let most = self.limits.num_queues;
            log_limited!(
                FRONT_END_LOG,
                Error,
                "the front-end asks for an in-flight region of {rings} rings of {entries}; {most} of {MAX_ENTRIES} are \
                 allowed: give its num-queues a smaller number, or --num-queues a larger one"
            );
            return Err(Error::InvalidParam);
        }
        Inflight::create(rings, entries, self.limits.queue_size).map_err(Error::ReqHandlerError)
    }

    /// Maps what an earlier server left, or this one. The rings resubmit it when they start.
    fn set_inflight_fd(&mut self, message: &VhostUserInflight, file: File) -> Result<()> {
        let inflight = Inflight::map(message, file, self.memory.socket())?;
        self.change_all(|this| {
            this.inflight = Some(inflight);
            Ok(())
        })
    }

    /// Maps the dirty log of a live migration. QEMU sends another one when memory was added.
    fn set_log_base(&mut self, message: &VhostUserLog, file: File) -> Result<()> {
        let log = Arc::new(DirtyLog::map(message, file, self.memory.socket())?);
        self.change_all(|this| {
            this.log = Some(log);
            Ok(())
        })
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(not_offered("GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(not_offered("SHARED_OBJECT"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(not_offered("DEVICE_STATE"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(not_offered("DEVICE_STATE"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(not_offered("SHMEM"))
    }
}

fn not_offered(what: &'static str) -> Error {
    log_limited!(FRONT_END_LOG, Error, "the front-end uses {what}, which was not offered");
    Error::InvalidOperation("not offered")
}
