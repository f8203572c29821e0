//! The front-end's channel for our requests (SET_BACKEND_REQ_FD). The `vhost` crate keeps its descriptor to itself and
//! cannot send CONFIG_CHANGE_MSG (rust-vmm/vhost#99), so we look at that message before the crate takes it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recv, recvmsg};

/// VHOST_USER_SET_BACKEND_REQ_FD.
const SET_BACKEND_REQ_FD: u32 = 21;

/// Waits until there is a message (or the end of the connection, or an error: reading shows it), or the time is over:
/// then `false`.
pub(super) fn wait_for_message(stream: &UnixStream, timeout: Option<Duration>) -> bool {
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    poll(&mut [PollFd::new(stream, PollFlags::IN)], timeout.as_ref()) != Ok(0)
}

/// The channel, if the next message on `stream` hands one over: a descriptor of our own of it. The message stays.
pub(super) fn peek(stream: &UnixStream) -> Option<OwnedFd> {
    let mut request = [0; 4];
    // An error or an end shows again when the message is really read.
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
