//! One connection of the control socket, with bounded input, bounded output and a bounded rate of requests. The control
//! thread owns it, and no method blocks.

use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;

use super::access::Access;
use super::protocol::json_stream::{Decoder, MalformedInput};
use super::service::ClientInfo;
use crate::base::rate_limit::{CONTROL_LOG, RateLimiter, log_limited};

/// The most bytes that are read from a connection in one turn of the control thread.
const READ_SIZE: usize = 16 * 1024;
/// While more bytes than this wait to be written, no further request of the connection is carried out.
const OUTPUT_HIGH_WATER: usize = 64 * 1024;
/// A client is disconnected when more bytes than this wait to be written. Only events can add up to it, if the client
/// does not read them.
pub(super) const MAX_OUTPUT: usize = 256 * 1024;

/// The most descriptors that are received with one read(2); the kernel closes the others.
const MAX_DESCRIPTORS: usize = 4;

/// The most requests of a connection that are carried out in each [`REQUEST_BURST_PERIOD`]: 200 a second.
const REQUEST_BURST: u32 = 50;
/// The period of [`REQUEST_BURST`].
const REQUEST_BURST_PERIOD: Duration = Duration::from_millis(250);

/// A connection.
pub(super) struct Peer {
    pub(super) client: ClientInfo,
    /// The client has sent `qmp_capabilities` and got the reply.
    pub(super) negotiated: bool,
    /// When the client connected.
    pub(super) since: Instant,
    /// When its last request came, or else when it connected.
    last_request: Instant,
    stream: UnixStream,
    decoder: Decoder,
    /// Bytes that were read. The decoder has taken the first `taken` of them.
    input: Vec<u8>,
    taken: usize,
    /// Descriptors that came with the input.
    descriptors: Vec<OwnedFd>,
    /// Lines to write. The first `sent` bytes are written.
    output: Vec<u8>,
    sent: usize,
    /// A request is being carried out. The next one waits, so that replies keep the order of the requests.
    busy: bool,
    /// The client has closed its sending side.
    input_ended: bool,
    /// Writing failed, so output is dropped. Requests that were received are still carried out.
    output_ended: bool,
    /// The connection must be closed, even if input or output is left.
    dead: bool,
    requests: RateLimiter,
}

impl Peer {
    /// Serves `client` on `stream` from now on. Fails if the stream cannot be made non-blocking.
    pub(super) fn new(client: ClientInfo, stream: UnixStream, now: Instant) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Peer {
            client,
            negotiated: false,
            since: now,
            last_request: now,
            stream,
            decoder: Decoder::default(),
            input: Vec::new(),
            descriptors: Vec::new(),
            taken: 0,
            output: Vec::new(),
            sent: 0,
            busy: false,
            input_ended: false,
            output_ended: false,
            dead: false,
            requests: RateLimiter::new(REQUEST_BURST, REQUEST_BURST_PERIOD),
        })
    }

    /// Returns the events to poll for. `None`: the connection must not be polled, because it waits only for time to
    /// pass, and poll would report a hang-up again and again.
    pub(super) fn interest(&self) -> Option<PollFlags> {
        let mut flags = PollFlags::empty();
        if self.unsent() > 0 {
            flags |= PollFlags::OUT;
        }
        if self.input_left() == 0 && !self.input_ended && !self.busy {
            flags |= PollFlags::IN;
        }
        (!flags.is_empty() || self.busy).then_some(flags)
    }

    /// Reads or writes, as poll reported in `found`.
    pub(super) fn ready(&mut self, found: PollFlags) {
        if found.contains(PollFlags::IN) || (found.contains(PollFlags::HUP) && !self.busy && !self.input_ended) {
            self.read();
        } else if found.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
            self.dead = true;
        }
        if found.contains(PollFlags::OUT) {
            self.flush();
        }
    }

    fn read(&mut self) {
        if self.input_left() > 0 {
            return;
        }
        self.input.resize(READ_SIZE, 0);
        self.taken = 0;
        let result = self.receive();
        self.input.truncate(*result.as_ref().unwrap_or(&0));
        match result {
            Ok(0) => self.input_ended = true,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.input_ended = true,
        }
    }

    /// read(2) into the input, which takes the descriptors that came along. Only from a client that may use all commands:
    /// a received descriptor must be closed some day, and close(2) of a file waits for its filesystem, which may be the
    /// client's own (FUSE_FLUSH). Without room for them, the kernel drops the descriptors and does not flush.
    fn receive(&mut self) -> io::Result<usize> {
        if self.client.access < Access::All {
            return (&self.stream).read(&mut self.input);
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut self.input)];
        let got = recvmsg(&self.stream, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                self.descriptors.extend(received);
            }
        }
        Ok(got.bytes)
    }

    /// Takes the descriptors that came with the input.
    pub(super) fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }

    /// Returns the next request, if one is complete and the connection's rate allows it. [`Peer::reply`] must follow.
    pub(super) fn next(&mut self, now: Instant) -> Option<Result<Value, MalformedInput>> {
        while !self.is_throttled() && self.input_left() > 0 {
            if !self.requests.has_one(now) {
                return None;
            }
            let (taken, found) = self.decoder.feed(&self.input[self.taken..]);
            self.taken += taken;
            if found.is_some() {
                self.requests.take();
                self.last_request = now;
                self.busy = true;
                return found;
            }
        }
        None
    }

    /// Returns when [`Peer::next`] may return a request without new input. `None`: it needs new input or a reply first.
    pub(super) fn next_turn(&self, now: Instant) -> Option<Instant> {
        (!self.is_throttled() && self.input_left() > 0).then(|| self.requests.ready_at(now))
    }

    /// Whether the client has negotiated, all its requests have replies, and no request has come for `time`.
    pub(super) fn is_idle(&self, time: Duration, now: Instant) -> bool {
        let waits = self.negotiated && !self.busy && !self.dead && self.input_left() == 0;
        waits && now.saturating_duration_since(self.last_request) > time
    }

    fn is_throttled(&self) -> bool {
        self.busy || self.dead || self.unsent() > OUTPUT_HIGH_WATER
    }

    /// Queues the reply to the request that [`Peer::next`] returned.
    pub(super) fn reply(&mut self, line: &[u8]) {
        self.busy = false;
        self.queue(line);
    }

    /// Queues a line that is not a reply.
    pub(super) fn queue(&mut self, line: &[u8]) {
        if self.output_ended {
            return;
        }
        self.output.extend_from_slice(line);
        if self.unsent() > MAX_OUTPUT {
            self.flush();
        }
        if self.unsent() > MAX_OUTPUT {
            log_limited!(
                CONTROL_LOG,
                Warn,
                "control: {:?} reads too slowly and is disconnected",
                self.client.credentials
            );
            self.dead = true;
        }
    }

    /// Writes as much of the output as the socket accepts now.
    pub(super) fn flush(&mut self) {
        while self.unsent() > 0 {
            match self.stream.write(&self.output[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.output_ended = true;
                    self.sent = self.output.len();
                }
            }
        }
        if self.unsent() == 0 {
            (self.output, self.sent) = (Vec::new(), 0);
        } else if self.sent > OUTPUT_HIGH_WATER {
            self.output.drain(..self.sent);
            self.sent = 0;
        }
    }

    /// Returns the stream, for another use than the control protocol. Bytes that the client sent after its last request
    /// are lost.
    pub(super) fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Whether the connection must be closed: nothing more can be read from it or written to it.
    pub(super) fn is_finished(&self) -> bool {
        self.dead || (self.input_ended && !self.busy && self.input_left() == 0 && self.unsent() == 0)
    }

    /// Returns the number of bytes that wait to be written.
    pub(super) fn unsent(&self) -> usize {
        self.output.len() - self.sent
    }

    fn input_left(&self) -> usize {
        self.input.len() - self.taken
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
