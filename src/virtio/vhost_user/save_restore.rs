//! Saves a session for another process, and restores one from another process ([`crate::upgrade`]). The saved state is what
//! the front-end has sent, as numbers and descriptors. It is saved while every ring is stopped and nothing is in flight. A
//! new handler is brought into that state by the same methods that handle the front-end's messages.
//!
//! What the guest's memory holds is not saved: the used rings, and the marks of the in-flight region.

use crate::upgrade::session_state::RegionState;
use crate::upgrade::session_state::SessionState;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog, VhostUserMemoryRegion};
use vhost::vhost_user::{Backend, Result, VhostUserBackendReqHandlerMut};

use super::handler::Handler;
use super::vring::Vring;
use crate::base::sync::mpsc::Receiver;
use crate::upgrade::Descriptors;
use crate::upgrade::session_state::{InflightState, Region, RingState};
use crate::virtio::rings::StopMode;
use crate::virtio::virtqueue::split_ring::RingAddresses;
use crate::virtio::worker::stopped_ring::StoppedRing;

/// A session that another process continues.
pub(crate) struct SavedSession {
    /// The front-end's connection.
    pub(crate) stream: UnixStream,
    pub(crate) record: SessionState,
    /// The descriptors that the record refers to by number.
    pub(crate) descriptors: Descriptors,
}

/// Why a disk cannot be handed to another process. It continues here.
#[derive(Debug)]
pub(crate) enum HandOverError {
    /// The front-end has sent a part of a message, and nothing follows.
    FrontEndBusy,
    /// Requests did not complete in this time.
    RequestsInFlight(Duration),
    /// What the guest wrote cannot be made durable.
    SyncFailed(io::Error),
    /// The descriptors of the session cannot be duplicated.
    OutOfDescriptors(io::Error),
}

impl fmt::Display for HandOverError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HandOverError::FrontEndBusy => {
                f.write_str("the front-end is in the middle of a message: check whether its QEMU hangs")
            }
            HandOverError::RequestsInFlight(timeout) => write!(
                f,
                "requests are in flight for more than {timeout:?}: the storage hangs (see `virtioblkctl status`); fix it \
                 and try again"
            ),
            HandOverError::SyncFailed(error) => write!(f, "the image cannot be synced: {error}; fix the storage"),
            HandOverError::OutOfDescriptors(error) => write!(
                f,
                "no descriptor is left to hand the front-end's connection over: {error}; raise the limit of open files"
            ),
        }
    }
}

impl Handler {
    /// Stops every ring with nothing in flight, and releases the image. `drained` is called when nothing is in flight any
    /// more. After an error the rings run again.
    pub(in crate::virtio) fn pause_all(
        &mut self,
        timeout: Duration,
        drained: impl FnOnce(),
    ) -> std::result::Result<(), HandOverError> {
        if let Err(error) = self.pause_workers(timeout) {
            wait_for(self.queues.iter().filter_map(Vring::request_resume).collect(), None);
            return Err(error);
        }
        drained();
        log::debug!("hand-over: nothing is in flight");
        self.stop_all(StopMode::Restartable);
        log::debug!("hand-over: the rings are stopped");
        if let Err(error) = self.rings.sync() {
            self.start_all();
            return Err(HandOverError::SyncFailed(error));
        }
        log::debug!("hand-over: all is synced");
        self.activation.release(&self.rings);
        log::debug!("hand-over: the image is released");
        Ok(())
    }

    /// Pauses all workers at once, so that the pause is as long as the slowest request, and not as all of them together.
    fn pause_workers(&mut self, timeout: Duration) -> std::result::Result<(), HandOverError> {
        let pausing: Vec<_> = self.queues.iter().filter_map(Vring::request_pause).collect();
        if wait_for(pausing, Some(Instant::now() + timeout)) {
            return Ok(());
        }
        Err(HandOverError::RequestsInFlight(timeout))
    }

    /// The state of the session, for another process. Called while every ring is stopped.
    pub(in crate::virtio) fn record(&mut self, descriptors: &mut Descriptors) -> io::Result<SessionState> {
        let memory = self.memory.record().map(|(region, file)| {
            Ok(Region {
                guest_addr: region.guest_phys_addr,
                user_addr: region.user_addr,
                size: region.memory_size,
                offset: region.mmap_offset,
                file: descriptors.add_copy(file)?,
            })
        });
        let memory = memory.collect::<io::Result<_>>()?;
        let inflight = match &self.inflight {
            None => None,
            Some(inflight) => {
                let (rings, entries) = inflight.shape();
                Some(InflightState { memory: inflight.region().record(descriptors)?, rings, entries })
            }
        };
        let log = self.log.as_ref().map(|log| log.region().record(descriptors)).transpose()?;
        let (channel, knows) = self.rings.capacity().record();
        let channel = channel?.map(|channel| descriptors.add(channel));
        let mut rings = Vec::new();
        for queue in &mut self.queues {
            let stopped = queue.stopped().expect("every ring is stopped");
            rings.push(record_ring(stopped, descriptors)?);
        }
        Ok(SessionState {
            features: self.acked_features,
            protocol_features: self.acked_protocol_features,
            memory,
            inflight,
            log,
            channel,
            knows,
            rings,
        })
    }

    /// Brings a new handler into the state of `record`. The features ([`SessionState::negotiated`]) were set before. No ring
    /// runs until [`Handler::start_all`]. Errors are those of the front-end's messages.
    pub(in crate::virtio) fn restore(&mut self, record: SessionState, descriptors: &mut Descriptors) -> Result<()> {
        let file = |descriptors: &mut Descriptors, number| descriptors.take(number).map(File::from).map_err(failed);
        let mut regions = Vec::new();
        let mut files = Vec::new();
        for Region { guest_addr, user_addr, size, offset, file: number } in record.memory {
            regions.push(VhostUserMemoryRegion {
                guest_phys_addr: guest_addr,
                memory_size: size,
                user_addr,
                mmap_offset: offset,
            });
            files.push(file(descriptors, number)?);
        }
        if !regions.is_empty() {
            self.set_mem_table(&regions, files, None)?;
        }
        if let Some(InflightState { memory, rings, entries }) = record.inflight {
            let message = VhostUserInflight::new(memory.len, memory.offset, rings, entries);
            let file = file(descriptors, memory.file)?;
            self.set_inflight_fd(&message, file)?;
        }
        if let Some(RegionState { offset, len, file: number }) = record.log {
            let file = file(descriptors, number)?;
            self.set_log_base(&VhostUserLog { mmap_size: len, mmap_offset: offset }, file)?;
        }
        if let Some(number) = record.channel {
            let channel = descriptors.take(number).map_err(failed)?;
            self.offer_channel(channel.try_clone().map_err(failed)?);
            self.set_backend_req_fd(Backend::from_stream(UnixStream::from(channel)));
        }
        self.rings.capacity().set_known(record.knows);
        for (index, ring) in record.rings.into_iter().enumerate() {
            self.restore_ring(index as u32, ring, descriptors)?;
        }
        Ok(())
    }

    /// Restores one ring. Nothing may run until the image is claimed, so the ring is not enabled by a message.
    fn restore_ring(&mut self, index: u32, ring: RingState, descriptors: &mut Descriptors) -> Result<()> {
        let mut file = |number: Option<usize>| {
            number.map(|number| descriptors.take(number).map(File::from)).transpose().map_err(failed)
        };
        let (kick, call, err) = (file(ring.kick)?, file(ring.call)?, file(ring.err)?);
        // These messages create the ring. It has no addresses yet, so it does not start.
        self.set_vring_err(index as u8, err)?;
        self.set_vring_num(index, u32::from(ring.size))?;
        let stopped = self.queues[index as usize].stopped().expect("it has no addresses yet");
        stopped.next_available = ring.next_avail;
        if let Some([descriptors, available, used]) = ring.at {
            let addresses = RingAddresses { descriptors, available, used };
            let set = stopped.set_addresses(addresses, self.memory.memory());
            set.map_err(|fault| failed(io::Error::other(fault)))?;
        }
        stopped.kick = kick;
        stopped.resubmit = ring.kept;
        stopped.enabled = ring.enabled;
        // This interrupts the guest, too. One interrupt too many is harmless.
        stopped.set_call(index, call);
        Ok(())
    }

    /// Claims the image if rings are to run. Returns `false` when it is refused; the log and the status say why.
    pub(in crate::virtio) fn claim(&self) -> bool {
        !self.queues.iter().any(Vring::may_run) || self.activation.claim(&self.rings)
    }

    /// Returns when the worker of every running ring has popped what was in it.
    pub(in crate::virtio) fn wait_until_polled(&self) {
        wait_for(self.queues.iter().filter_map(Vring::request_resume).collect(), None);
    }
}

/// Whether all workers replied in time. A worker that is late sends its reply to no receiver, which is harmless.
fn wait_for(replies: Vec<Receiver<()>>, deadline: Option<Instant>) -> bool {
    replies.into_iter().all(|reply| match deadline {
        Some(deadline) => reply.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok(),
        None => reply.recv().is_ok(),
    })
}

fn record_ring(stopped: &StoppedRing, descriptors: &mut Descriptors) -> io::Result<RingState> {
    let mut copy = |file: &Option<File>| file.as_ref().map(|file| descriptors.add_copy(file.as_fd())).transpose();
    let (kick, call, err) = (copy(&stopped.kick)?, copy(&stopped.call)?, copy(&stopped.err)?);
    Ok(RingState {
        size: stopped.size,
        at: stopped.addresses.map(|at| [at.descriptors, at.available, at.used]),
        next_avail: stopped.next_available,
        enabled: stopped.enabled,
        kick,
        call,
        err,
        kept: stopped.resubmit.clone(),
    })
}

fn failed(error: io::Error) -> vhost::vhost_user::Error {
    vhost::vhost_user::Error::ReqHandlerError(error)
}
