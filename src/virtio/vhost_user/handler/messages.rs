//! Handles each message of the front-end. Every change of a ring stops the ring first, and the reply follows the change.

use std::fs::File;
use std::sync::Arc;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use super::Handler;
use crate::base::rate_limit::{FRONT_END_LOG, log_limited};
use crate::disk::Event;
use crate::virtio::blk::features;
use crate::virtio::rings::SHARE_MEMORY;
use crate::virtio::shared_memory::dirty_log::DirtyLog;
use crate::virtio::shared_memory::inflight::{Inflight, MAX_ENTRIES};
use crate::virtio::shared_memory::memory_table::MAX_REGIONS;
use crate::virtio::vhost_user::eventfd;
use crate::virtio::virtqueue::split_ring::RingAddresses;

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
                "the front-end asks for a queue of {num} descriptors: a power of two up to {largest} is allowed; give \
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
                    "the front-end places queue {index} in guest memory that it does not share with virtioblkd (it shares {shared} regions): the disk \
                     cannot be served. Share the memory. \
                     {SHARE_MEMORY}"
                )));
                return Err(Error::InvalidParam);
            };
            let addresses = RingAddresses { descriptors, available, used };
            ring.set_addresses(addresses, memory.memory()).map_err(|fault| {
                log_limited!(FRONT_END_LOG, Error, "the front-end places queue {index} at {addresses:x?}: {fault}");
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
                "the front-end wants queue {index} to be polled without a kick descriptor: not supported"
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
                "the front-end asks for an in-flight region of {rings} queues of {entries}; {most} of {MAX_ENTRIES} are \
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
