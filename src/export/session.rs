//! One client of an export, in a thread of its own. Each wait has a bound, or ends with the export: its end closes the
//! receiving side of the socket.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::protocol::{Connection, End, Errno, Export, Extent, HOLE, MAX_CHUNK, Request, Span, Step};
use crate::backend::point_in_time::{InstantReader, ReadError};
use crate::base::rate_limit::{COPY_LOG, log_limited};

/// How long a client may take between two messages of the negotiation.
const NEGOTIATION_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a client may leave a reply unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes that are received at once.
const RECEIVE_SIZE: usize = 16 << 10;

/// The parts of one read that are read ahead, [`MAX_CHUNK`] bytes each.
const READ_AHEAD: usize = 4;

/// Serves the client until one of the two sides ends the connection. Sets `negotiated` when the client may send requests.
pub(super) fn serve(stream: &UnixStream, reader: &InstantReader, export: Arc<Export>, negotiated: &AtomicBool) {
    let mut session = Session { stream, reader, connection: Connection::new(export), negotiated };
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
    negotiated: &'a AtomicBool,
}

impl Session<'_> {
    fn run(&mut self) -> io::Result<End> {
        self.stream.set_read_timeout(Some(NEGOTIATION_TIMEOUT))?;
        self.stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let mut is_negotiated = false;
        let mut buffer = vec![0; RECEIVE_SIZE];
        loop {
            match self.connection.step() {
                Step::Wait => {
                    if self.connection.is_negotiated() && !is_negotiated {
                        // From now on the client may pause.
                        self.stream.set_read_timeout(None)?;
                        is_negotiated = true;
                        self.negotiated.store(true, Ordering::Release);
                    }
                    match self.stream.read(&mut buffer) {
                        Ok(0) => return Ok(End::Client),
                        Ok(count) => self.connection.feed(&buffer[..count]),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(error),
                    }
                }
                Step::Send(bytes) => self.stream.write_all(&bytes)?,
                Step::Run(Request::Read(span)) => self.read(span)?,
                Step::Run(Request::BlockStatus { span, one }) => {
                    let reply = self.block_status(span, one);
                    self.stream.write_all(&reply)?;
                }
                Step::End(end) => return Ok(end),
            }
        }
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
