//! One client of an export, in a thread of its own. Each wait has a bound, or ends with the export: its end closes the
//! receiving side of the socket.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::protocol::{Connection, End, Errno, Export, Extent, HOLE, MAX_CHUNK, Request, Span, Step};
use crate::backend::point_in_time::{InstantReader, ReadError};
use crate::base::rate_limit::{COPY_LOG, log_limited};

/// Bytes that are received at once.
const RECEIVE_SIZE: usize = 16 << 10;

/// The parts of one read that are read ahead, [`MAX_CHUNK`] bytes each.
const READ_AHEAD: usize = 4;

/// How long a client may take before it is disconnected.
#[derive(Clone, Copy, Debug)]
pub struct ClientTimeouts {
    /// For the whole negotiation.
    pub negotiation: Duration,
    /// For reading a part of a reply.
    pub write: Duration,
    /// Without a request, or a part of a reply that it has read, while others wait for its place.
    pub silence: Duration,
}

impl Default for ClientTimeouts {
    fn default() -> Self {
        ClientTimeouts {
            negotiation: Duration::from_secs(10),
            write: Duration::from_secs(60),
            silence: Duration::from_secs(60),
        }
    }
}

/// When a client last did something that the server waits for.
pub(super) struct Activity(Mutex<Instant>);

impl Activity {
    /// The client connects now.
    pub(super) fn new() -> Self {
        Activity(Mutex::new(Instant::now()))
    }

    /// The time of the client's last request, or of the last part of a reply that it has read.
    pub(super) fn last(&self) -> Instant {
        *self.0.lock().expect("no panic while held")
    }

    fn note(&self) {
        *self.0.lock().expect("no panic while held") = Instant::now();
    }
}

/// Serves the client until one of the two sides ends the connection. Sets `negotiated` when the client may send requests.
pub(super) fn serve(
    stream: &UnixStream,
    reader: &InstantReader,
    export: Arc<Export>,
    timeouts: ClientTimeouts,
    activity: &Activity,
    negotiated: &AtomicBool,
) {
    let mut session = Session { stream, reader, connection: Connection::new(export), timeouts, activity, negotiated };
    match session.run() {
        Ok(End::Client) => {}
        Ok(End::Violation(why)) => {
            log_limited!(
                COPY_LOG,
                Warn,
                "{}: a client breaks the NBD protocol and is disconnected: {why}",
                reader.name()
            );
        }
        Err(error) => log::debug!("{}: a client is gone: {error}", reader.name()),
    }
}

struct Session<'a> {
    stream: &'a UnixStream,
    reader: &'a InstantReader,
    connection: Connection,
    timeouts: ClientTimeouts,
    activity: &'a Activity,
    negotiated: &'a AtomicBool,
}

impl Session<'_> {
    fn run(&mut self) -> io::Result<End> {
        let negotiation_end = Instant::now() + self.timeouts.negotiation;
        let mut is_negotiated = false;
        let mut buffer = vec![0; RECEIVE_SIZE];
        loop {
            if !is_negotiated && self.connection.is_negotiated() {
                // From now on the client may pause.
                self.stream.set_read_timeout(None)?;
                self.stream.set_write_timeout(Some(self.timeouts.write))?;
                is_negotiated = true;
                self.activity.note();
                self.negotiated.store(true, Ordering::Release);
            }
            if !is_negotiated {
                self.limit_wait(negotiation_end)?;
            }
            match self.connection.step() {
                Step::Wait => match self.stream.read(&mut buffer) {
                    Ok(0) => return Ok(End::Client),
                    Ok(count) => self.connection.feed(&buffer[..count]),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                },
                Step::Send(bytes) => self.stream.write_all(&bytes)?,
                Step::Run(request) => {
                    self.activity.note();
                    match request {
                        Request::Read(span) => self.read(span)?,
                        Request::BlockStatus { span, one } => {
                            let reply = self.block_status(span, one);
                            self.stream.write_all(&reply)?;
                        }
                    }
                }
                Step::End(end) => return Ok(end),
            }
        }
    }

    /// Has the waits for the client end at this time. One that sends or reads a byte now and then does not renew it.
    fn limit_wait(&self, end: Instant) -> io::Result<()> {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "it does not finish the negotiation"));
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.set_write_timeout(Some(left))
    }

    /// Carries out a read and sends its reply, part by part.
    fn read(&mut self, span: Span) -> io::Result<()> {
        let mut begun = VecDeque::new();
        let (mut next, mut done) = (0, 0);
        while done < span.len {
            while next < span.len && begun.len() < READ_AHEAD {
                let len = (span.len - next).min(MAX_CHUNK);
                let start = span.offset + u64::from(next);
                begun.push_back((len, self.reader.begin(start..start + u64::from(len))));
                next += len;
            }
            let Some((len, read)) = begun.pop_front() else { break };
            match self.reader.finish(read) {
                Ok(data) => {
                    let mut message = self.connection.before_data(span, done, len);
                    message.extend_from_slice(&data);
                    self.stream.write_all(&message)?;
                    self.activity.note();
                }
                Err(error) => {
                    let (errno, text) = error_of(&error);
                    log_limited!(COPY_LOG, Warn, "{}: a client's read failed: {text}", self.reader.name());
                    let Some(reply) = self.connection.read_failed(span, done, errno, text) else {
                        return Err(io::Error::other("a simple reply that has begun cannot fail"));
                    };
                    return self.stream.write_all(&reply);
                }
            }
            done += len;
        }
        Ok(())
    }

    fn block_status(&self, span: Span, one: bool) -> Vec<u8> {
        match self.reader.status(span.offset..span.offset + u64::from(span.len)) {
            Ok(extents) => {
                let status = |hole| [if hole { HOLE } else { 0 }, 0];
                // No extent is longer than the request, whose length is a u32.
                let extents: Vec<Extent> = extents
                    .iter()
                    .map(|extent| Extent { len: extent.len as u32, status: status(extent.hole) })
                    .collect();
                self.connection.block_status(span, one, &extents)
            }
            Err(error) => {
                let (errno, text) = error_of(&error);
                self.connection.error(span.cookie, errno, text)
            }
        }
    }
}

fn error_of(error: &ReadError) -> (Errno, &str) {
    match error {
        ReadError::Over(why) => (Errno::Shutdown, why),
        ReadError::Failed(why) => (Errno::Io, why),
    }
}
