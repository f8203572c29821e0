//! A connection that moves to another process ([`crate::upgrade`]): all that the front-end said on it, in numbers and
//! descriptors. Taken while every ring is stopped, with nothing in flight; the next handler is brought into the same
//! state as the front-end would bring it there, by the same methods.
//!
//! What the guest's memory holds is not in here: the used rings, and what is marked as in flight.

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
use crate::upgrade::session_state::{Inflight, Region, Ring};
use crate::virtio::rings::StopMode;
use crate::virtio::virtqueue::split_ring::RingAddresses;
use crate::virtio::worker::stopped_ring::StoppedRing;

/// What the next process goes on with.
pub(crate) struct SavedSession {
    /// The front-end's connection, also for whoever watches for its end.
    pub(crate) stream: UnixStream,
    pub(crate) record: SessionState,
    /// What the record's numbers mean.
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
    /// Stops every ring, with nothing in flight, and gives the image free. `drained`: called when nothing is in flight any
    /// more. Errors: requests that do not finish within `timeout`, a sync that failed; then the rings go on.
    pub(in crate::virtio) fn pause_all(
        &mut self,
        timeout: Duration,
        drained: impl FnOnce(),
    ) -> std::result::Result<(), HandOverError> {
        if let Err(why) = self.come_to_rest(timeout) {
            wait_for(self.queues.iter().filter_map(Vring::ask_to_go_on).collect(), None);
            return Err(why);
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
        log::debug!("hand-over: the image is let go");
        Ok(())
    }

    /// All rings at once: the pause is as long as the slowest request, not as all of them together.
    fn come_to_rest(&mut self, timeout: Duration) -> std::result::Result<(), HandOverError> {
        let resting: Vec<_> = self.queues.iter().filter_map(Vring::ask_to_rest).collect();
        if wait_for(resting, Some(Instant::now() + timeout)) {
            return Ok(());
        }
        Err(HandOverError::RequestsInFlight(timeout))
    }

    /// The other process did not take over: the rings run again, once the image is ours again.
    pub(in crate::virtio) fn go_on(&mut self) {
        self.start_all();
    }

    /// What another process needs to go on. While every ring is stopped.
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
                Some(Inflight { memory: inflight.shared().record(descriptors)?, rings, entries })
            }
        };
        let log = self.log.as_ref().map(|log| log.shared().record(descriptors)).transpose()?;
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

    /// Brings a fresh handler into the state of the record, but for the features ([`SessionState::negotiated`]), which come
    /// first. No ring runs; with [`Handler::go_on`] they do. Errors are as those of the front-end's messages.
    pub(in crate::virtio) fn take_over(&mut self, record: SessionState, descriptors: &mut Descriptors) -> Result<()> {
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
        if let Some(Inflight { memory, rings, entries }) = record.inflight {
            let told = VhostUserInflight::new(memory.len, memory.offset, rings, entries);
            let file = file(descriptors, memory.file)?;
            self.set_inflight_fd(&told, file)?;
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
            self.take_over_ring(index as u32, ring, descriptors)?;
        }
        Ok(())
    }

    /// Until the image is claimed nothing may run, so a ring is enabled last, by hand.
    fn take_over_ring(&mut self, index: u32, ring: Ring, descriptors: &mut Descriptors) -> Result<()> {
        let mut file = |number: Option<usize>| {
            number.map(|number| descriptors.take(number).map(File::from)).transpose().map_err(failed)
        };
        let (kick, call, err) = (file(ring.kick)?, file(ring.call)?, file(ring.err)?);
        // An empty ring is made; one that could run would.
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
        // Signals it, too: one interrupt too many is harmless.
        stopped.set_call(index, call);
        Ok(())
    }

    /// Claims the image for rings that are to run. `false`: it is refused (the log and the status say why).
    pub(in crate::virtio) fn claim(&self) -> bool {
        !self.queues.iter().any(Vring::may_run) || self.activation.claim(&self.rings)
    }

    /// Returns when every ring that runs has looked at what is in it.
    pub(in crate::virtio) fn have_looked(&self) {
        wait_for(self.queues.iter().filter_map(Vring::ask_to_go_on).collect(), None);
    }
}

/// Whether all answered in time. A ring's worker answers all the same; nobody listens then.
fn wait_for(answers: Vec<Receiver<()>>, deadline: Option<Instant>) -> bool {
    answers.into_iter().all(|answer| match deadline {
        Some(deadline) => answer.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok(),
        None => answer.recv().is_ok(),
    })
}

fn record_ring(stopped: &StoppedRing, descriptors: &mut Descriptors) -> io::Result<Ring> {
    let mut copy = |file: &Option<File>| file.as_ref().map(|file| descriptors.add_copy(file.as_fd())).transpose();
    let (kick, call, err) = (copy(&stopped.kick)?, copy(&stopped.call)?, copy(&stopped.err)?);
    Ok(Ring {
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
