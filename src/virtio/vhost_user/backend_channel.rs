//! The channel for messages from this back-end to the front-end (SET_BACKEND_REQ_FD). The `vhost` crate does not give out
//! the channel's descriptor and cannot send CONFIG_CHANGE_MSG (rust-vmm/vhost#99). So this file peeks at the message that
//! carries the descriptor before the crate reads it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};

use crate::base::sync::EventNotifier;
use crate::base::wait::wait_until;

/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;
/// VHOST_USER_GET_FEATURES.
pub(in crate::virtio) const GET_FEATURES: u32 = 1;
/// VHOST_USER_SET_FEATURES.
pub(in crate::virtio) const SET_FEATURES: u32 = 2;
/// VHOST_USER_SET_PROTOCOL_FEATURES.
pub(in crate::virtio) const SET_PROTOCOL_FEATURES: u32 = 16;

/// A front-end's message of version 1 that asks for no reply. Its body is `argument`, if there is one.
pub(in crate::virtio) fn message(request: u32, argument: Option<u64>) -> Vec<u8> {
    let size = if argument.is_some() { 8 } else { 0 };
    let mut message = [request, 1, size].map(u32::to_ne_bytes).concat();
    message.extend(argument.map(u64::to_ne_bytes).into_iter().flatten());
    message
}

/// What ended [`wait_for_message`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::virtio) enum Woken {
    /// There is a message, the end of the connection, or an error. Reading shows which.
    Message,
    /// Another thread notified.
    Notified,
    /// The timeout passed.
    Timeout,
}

/// Waits for a message, the notifier or the timeout. The notifier comes first if there is a message as well.
pub(in crate::virtio) fn wait_for_message(
    stream: &UnixStream,
    notifier: &EventNotifier,
    timeout: Option<Duration>,
) -> Woken {
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut sources = [PollFd::new(notifier, PollFlags::IN), PollFd::new(stream, PollFlags::IN)];
    match wait_until(&mut sources, deadline) {
        Ok(false) => Woken::Timeout,
        Ok(_) if !sources[0].revents().is_empty() => Woken::Notified,
        _ => Woken::Message,
    }
}

/// A duplicate of the channel's descriptor, if the next message on `stream` carries one. The message stays in the socket.
pub(in crate::virtio) fn peek(stream: &UnixStream) -> Option<OwnedFd> {
    let mut request = [0; 4];
    // An error, or the end of the connection, shows again when the message is read.
    match recv(stream, &mut request, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, 4)) if u32::from_ne_bytes(request) == SET_BACKEND_REQ_FD => {}
        _ => return None,
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    recvmsg(stream, &mut [IoSliceMut::new(&mut request)], &mut ancillary, flags).ok()?;
    ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    })
}
